"""What a Sparsifier has to know of an optimiser: what is inside its wrappers, what it keeps for a weight, what it does to zeros.

No optimiser is known by name but the three of torch under which zeros stay zeros by their formulas. Of every other one a small
copy is tried on weights with and without zeros beside them (`factor_of_zeros`).
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..errors import UsageError

KEEPS_ZEROS = (SGD, Adam, AdamW)
"""Under these a weight whose value, gradient and state are zero stays exactly zero, with momentum, Nesterov and decay.

Others (Muon, Adamax, SAM, ...) may move it, and subclasses with a step of their own too: there masks are applied again."""

STATE_KEY = "sparseift"
"""The key in the first parameter group of a saved optimiser state under which the state of its Sparsifier is."""

_SIDE, _SAME = 128, 0.1  # of the matrix on which optimisers are tried, and how far factors are from 1 by chance

_INSIDE = ("optimizer", "original_optimizer", "_base_optimizer", "base_optimizer", "_optimizer", "optim")
"""Attributes by which wrappers (Accelerate, Lightning, Opacus, timm's Lookahead, learning rate schedules) hold what they wrap."""


def optimizers_of(given: Any) -> tuple[Optimizer, ...]:
    """The optimisers themselves, inside any wrappers: `given` is one, or a list, tuple or mapping of several.

    Raises:
        UsageError: none is given, or something that is no optimiser.
    """
    several = list(given.values()) if isinstance(given, Mapping) else given
    several = list(several) if isinstance(several, list | tuple) else [several]
    found = dict.fromkeys(innermost(one) for one in several if one is not None)
    if not found:
        raise UsageError("a Sparsifier needs the optimiser of the model", hint="Sparsifier(model, optimizer)")
    wrong = [one for one in found if not isinstance(one, Optimizer)]
    if wrong:
        raise UsageError(
            f"{type(wrong[0]).__name__} is no torch.optim.Optimizer and holds none",
            hint="Sparsifier(model, optimizer), with the optimiser whose step() the loop calls",
        )
    return tuple(found)


def innermost(optimizer: Any) -> Any:
    """The optimiser inside all wrappers: it alone calls hooks. Anything that wraps none is returned as it is."""
    while True:
        held = (getattr(optimizer, name, None) for name in _INSIDE)
        inner = next((one for one in held if isinstance(one, Optimizer) and one is not optimizer), None)
        if inner is None:
            return optimizer
        optimizer = inner


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether masked gradients suffice under this optimiser; warns if weights must be masked again after every step.

    Raises:
        UsageError: eps = 0, with which Adam divides zero by zero at every inactive weight.
    """
    if any(group.get("eps") == 0 for group in optimizer.param_groups):
        raise UsageError(
            "the optimiser has eps = 0, which divides 0 by 0 at every inactive weight", hint="eps=1e-8 is usual"
        )
    if any(isinstance(optimizer, known) and type(optimizer).step is known.step for known in KEEPS_ZEROS):
        return True
    warnings.warn(
        f"{type(optimizer).__name__} may move weights whose gradient is zero: weights and state are masked again after "
        "every step",
        stacklevel=4,
    )
    return False


def warn_of_zeros(optimizer: Optimizer, parameter: nn.Parameter, density: float) -> None:
    """Warn if the zeros of weights of this density change the step that the optimiser makes with the others."""
    factor = factor_of_zeros(optimizer, parameter, density)
    if factor is not None and abs(factor - 1) > _SAME:
        warnings.warn(
            f"the steps of {type(optimizer).__name__} depend on the zeros: at density {density:.3g} they are about {factor:.2g} "
            "times those of a dense layer. Give sparse weights a group with the learning rate divided by that, or take AdamW "
            "or SGD, which treat every weight by itself",
            stacklevel=4,
        )


def factor_of_zeros(optimizer: Optimizer, parameter: nn.Parameter, density: float) -> float | None:
    """How many times as far weights move where so many others in their matrix are zero, with zero gradients.

    A copy of the optimiser, with the options of the group of `parameter`, makes three steps on a matrix, and on the same
    matrix with zeros. 1 where every weight is treated by itself, as SGD, Adam and RMSprop do; above where a step is divided by a
    mean over the matrix (cautious optimisers, Adafactor). None where no such copy can make a step.
    """
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    if group is None:
        return None
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(_SIDE, _SIDE, generator=generator) for _ in range(4))
    mask = torch.rand(_SIDE, _SIDE, generator=generator) < density
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            dense = _moved(optimizer, group, start, gradients)
            sparse = _moved(optimizer, group, start * mask, [g * mask for g in gradients])
    except Exception:
        return None  # one that needs a closure, second derivatives or a device: nothing is known of it
    far = float(dense[mask].norm())
    return float(sparse[mask].norm()) / far if far > 0 else None


def warn_of_shape(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Warn if the optimiser's step with a weight depends on its shape: of stored blocks [n, B, B] it then makes another one.

    As `factor_of_zeros`, by three steps of a copy: on a matrix with zeros, and on its blocks alone.
    """
    if any(isinstance(optimizer, known) and type(optimizer).step is known.step for known in KEEPS_ZEROS):
        return
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)
    if group is None:
        return
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(_SIDE, _SIDE, generator=generator) for _ in range(4))
    cells = torch.rand(8, 8, generator=generator) < 0.5
    mask = cells.repeat_interleave(_SIDE // 8, 0).repeat_interleave(_SIDE // 8, 1)

    def stored(matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (8, -1)).unflatten(2, (8, -1)).transpose(1, 2)[cells]

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            zeros = stored(_moved(optimizer, group, start * mask, [g * mask for g in gradients]))
            blocks = _moved(optimizer, group, stored(start), [stored(g) for g in gradients])
        same = torch.allclose(zeros, blocks, rtol=_SAME, atol=1e-3 * float(zeros.abs().max()))
    except Exception:
        return  # as in `factor_of_zeros`
    if not same:
        warnings.warn(
            f"the steps of {type(optimizer).__name__} depend on the shape of a weight, and of layers that store blocks alone it "
            "gets these, not the matrix: training is not that of the masked layers. Take AdamW or SGD, or keep the layers masked",
            stacklevel=4,
        )


def _moved(optimizer: Optimizer, group: Mapping[str, Any], start: Tensor, gradients: Iterable[Tensor]) -> Tensor:
    """How far a copy of the optimiser moves a matrix [*] from `start` [*] by steps with these gradients [*]."""
    weight = nn.Parameter(start.clone())
    small = object.__new__(type(optimizer))
    small.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})  # schedules put theirs there
    small._optimizer_step_pre_hooks, small._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    small.param_groups, small.state = [{**group, "params": [weight]}], defaultdict(dict)
    for gradient in gradients:
        weight.grad = gradient.clone()
        with torch.enable_grad():
            small.step()
    return weight.detach() - start


def made_steps(optimizer: Optimizer) -> bool:
    """Whether its state is that of steps made: counted, or momentum that is not zero."""
    for values in optimizer.state.values():
        if not isinstance(values, Mapping):
            continue
        counted = values.get("step")
        tensors = (
            [v for v in values.values() if isinstance(v, Tensor)] if counted is None else [torch.as_tensor(counted)]
        )
        if any(bool(t.any()) for t in tensors):
            return True
    return False


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The optimiser's tensors [*shape] for a parameter [*shape]: momentum_buffer, exp_avg, exp_avg_sq and the like."""
    return [v for v in _tensors_of(optimizer, parameter) if v.shape == parameter.shape]


def state_by_block(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The optimiser's tensors [n, ...] for stored blocks [n, *unit]: those of their shape, and means over part of a block."""
    return [v for v in _tensors_of(optimizer, parameter) if v.dim() == parameter.dim() and len(v) == len(parameter)]


def _tensors_of(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    if parameter not in optimizer.state:  # a defaultdict: indexing would add an entry
        return []
    return [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor)]


def convert_state(optimizer: Optimizer, parameter: nn.Parameter, convert: Callable[[Tensor], Tensor]) -> None:
    """Replace the optimiser's tensors that have not the shape of a parameter [*shape] by what `convert` makes of them."""
    values = optimizer.state.get(parameter, {})
    for name, tensor in values.items():
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape != parameter.shape:
            made = convert(tensor)
            values[name] = torch.empty_like(parameter, dtype=made.dtype).copy_(made) if made is not tensor else tensor


def skipped_inside(optimizer: Optimizer) -> bool:
    """Whether a GradScaler made this step of a fused optimiser do nothing. Of other optimisers it does not call `step` at all."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def clear_unwritten(optimizer: Optimizer) -> None:
    """Zero momentum buffers that a skipped first step of fused SGD made but did not write.

    torch 2.13 leaves them uninitialised there and adds to them at the next step; zero gives what a first step should.
    """
    for values in optimizer.state.values():
        buffer = values.get("momentum_buffer")
        if buffer is not None:
            buffer.zero_()


def has_state(optimizer: Optimizer) -> bool:
    """Whether a loaded state of this optimiser brought that of a Sparsifier, which no Sparsifier has taken yet."""
    return any(STATE_KEY in group for group in optimizer.param_groups)


def take_state(optimizers: Iterable[Optimizer]) -> Mapping[str, Any] | None:
    """Remove the state of a Sparsifier that came with loaded states of these optimisers, and return it; None if there is none."""
    found = [group.pop(STATE_KEY, None) for optimizer in optimizers for group in optimizer.param_groups]
    return next((state for state in found if state is not None), None)
