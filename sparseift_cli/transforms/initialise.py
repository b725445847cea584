"""The first weights of a transformed module: fresh ones (`initialise`), or those of the dense model (`preserve`).

Fresh weights are drawn as the dense model's own weights were. A module does not store how it was initialised, but its
weights show it: a rule such as Kaiming's (He et al. 2015, arXiv 1502.01852) sets the standard deviation from the fans,
and a few hundred weights are enough to estimate it. Every tensor of the dense model votes for the rules that fit its
deviation. Of the rules that fit a tensor, the one with the most votes is used, with the fans of the new shape. Constant
tensors (norms, zero biases, layer scales) stay constant; a deviation that no rule explains (0.02 in transformers) is
used as it is.

How a function is preserved is described in the folder `preserve`. `zero_residuals` is an option on top: residual
branches of a ResNet that start at zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..base.randomness import generator_for
from ..errors import UsageError
from ..mask.attached import is_transposed
from ..plan.plan import Plan
from ..trace.flow import is_layer_norm
from ..trace.structure import Structure
from .edits import Surgery
from .layers import weight_of
from .members import torch_half
from .members.base import MemberModule
from .preserve import DenseStart, Preserved

Init = Literal["dense", "density_scaled"]
Rule = tuple[str, str]  # distribution (normal or uniform), and a name in _DEVIATIONS or the deviation itself

# Standard deviation by fan in (i) and fan out (o).
_DEVIATIONS: dict[str, Callable[[int, int], float]] = {
    "kaiming fan_out": lambda i, o: math.sqrt(2 / o),
    "kaiming fan_in": lambda i, o: math.sqrt(2 / i),
    "lecun": lambda i, o: math.sqrt(1 / i),
    "xavier": lambda i, o: math.sqrt(2 / (i + o)),
    "torch default": lambda i, o: math.sqrt(1 / (3 * i)),
    "inverse fan_out": lambda i, o: math.sqrt(1 / (3 * o)),
}
_SAMPLE = 1 << 14  # number of elements that the deviation is estimated from
_MIN_ELEMENTS = 64  # of fewer elements the estimate is too uncertain to choose a rule
_LAST_NORMS = ("bn3", "bn2")  # of a bottleneck, of a basic block: the names in torchvision, timm and our zoo


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A new tensor to draw, the dense tensor whose distribution it has, and the weights that give the fans of both."""

    key: str
    new: Tensor
    new_weight: Tensor
    old_key: str
    old: Tensor
    old_weight: Tensor
    density: float


def initialise(model: nn.Module, dense: nn.Module, surgery: Surgery, *, seed: int = 0, init: Init = "dense") -> None:
    """Draw every weight of `model` that is sparse or has a new shape, in place; tensors on meta are left alone.

    Args:
        init: `dense`: the deviations of the dense model's rule. `density_scaled`: of a sparse weight multiplied by
            density ** -1/2, so that a sum over its non-zeros has the variance of a sum over dense weights. The parts of
            Parallel and Doped are added up and have that variance together, so theirs are not multiplied.
        seed: the draw of a tensor depends on the seed and its name, not on other tensors.

    Raises:
        UsageError: a weight of `dense` is NaN or infinite, so that its deviation cannot be estimated.
    """
    members = [_member(model, edit.path) for edit in surgery.members]
    summed = any(member.sums_parts for member in members)
    drawn = [s for s in _tensors_to_draw(model, dense, surgery) if not s.new.is_meta]
    fitting: dict[int, list[Rule]] = {}  # by dense tensor; the branches of Parallel share one
    for s in drawn:
        if id(s.old) not in fitting:
            _require_finite(s.old_key, s.old)
            fitting[id(s.old)] = _fitting_rules(s)
    votes = Counter(rule for rules in fitting.values() for rule in rules)
    with torch.no_grad():
        for s in drawn:
            rule = max(fitting[id(s.old)], key=lambda r: votes[r], default=None)
            scale = s.density**-0.5 if init == "density_scaled" and not summed else 1.0
            _draw(s, rule, scale, generator_for(seed, "init", s.key))
        nonzeros = {id(model.get_parameter(key)): nnz for key, nnz in surgery.nonzeros.items()}
        for member in members:
            if not member.weight.is_meta:
                weights = [weight_of(part) for part in member.parts()]
                member.balance([nonzeros.get(id(weight), weight.numel()) for weight in weights])


def trained_norm(model: nn.Module) -> str | None:
    """The name of a gain or bias of a norm whose values differ, which shows that `model` was trained; None if there is none.

    Every rule of initialisation sets all of them to one value. A model without norms does not show it.
    """
    for path, module in model.named_modules():
        if isinstance(module, (_NormBase, nn.GroupNorm)) or is_layer_norm(module):
            for name, values in module.named_parameters(recurse=False):
                if values.numel() and not values.is_meta and not torch.equal(values.min(), values.max()):
                    return f"{path}.{name}".removeprefix(".")
    return None


def _member(model: nn.Module, path: str) -> MemberModule:
    member = model.get_submodule(path)
    assert isinstance(member, MemberModule)
    return member


def _tensors_to_draw(model: nn.Module, dense: nn.Module, surgery: Surgery) -> Iterable[_Drawn]:
    density = {key: nnz / model.get_parameter(key).numel() for key, nnz in surgery.nonzeros.items()}
    old_parameters = dict(dense.named_parameters(remove_duplicate=False))
    to_draw = {r.key for r in surgery.resizes if not r.rotary} | (density.keys() & old_parameters.keys())
    for key, new in model.named_parameters():
        if key in to_draw:
            weight = _sibling_weight(model, key)
            old_weight = _sibling_weight(dense, key)
            yield _Drawn(key, new, weight, key, old_parameters[key], old_weight, density.get(key, 1.0))
    names = {id(p): key for key, p in model.named_parameters()}
    for edit in surgery.members:
        member = _member(model, edit.path)
        where = f"{edit.path}." if f"{edit.path}.weight" in old_parameters else f"{edit.path}_"  # in_proj_weight
        old_weight = _sibling_weight(dense, f"{where}weight")
        for part in member.parts():
            weight = part.get_parameter("weight")
            for name, new in part.named_parameters():
                key = names[id(new)]
                yield _Drawn(
                    key, new, weight, where + name, old_parameters[where + name], old_weight, density.get(key, 1.0)
                )


def _require_finite(key: str, weight: Tensor) -> None:
    """Raises UsageError where a weight that new ones are drawn after is NaN or infinite."""
    if not bool(weight.detach().isfinite().all()):
        raise UsageError(
            f"{key} is NaN or infinite in places, so new weights cannot be drawn like it",
            hint="take a checkpoint from before the training diverged",
        )


def _sibling_weight(model: nn.Module, key: str) -> Tensor:
    """The weight [out, in / groups, *kernel] whose fans apply to a parameter: for a bias that of its module, else its own."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    parameters = module._parameters
    weight = parameters.get(name.replace("bias", "weight")) if "bias" in name else None
    found = weight if weight is not None and weight.dim() > 1 else parameters[name]
    assert found is not None
    return found.t() if found.dim() == 2 and is_transposed(module) else found


def _fans(weight: Tensor) -> tuple[int, int]:
    """(fan in, fan out) of [out, in / groups, *kernel], as torch.nn.init counts them."""
    taps = math.prod(weight.shape[2:])
    return weight.shape[1] * taps, weight.shape[0] * taps


def _fitting_rules(s: _Drawn) -> list[Rule]:
    """The rules that may have drawn the dense tensor; the last is its own deviation. An empty list for constants."""
    values = s.old.detach().flatten()
    values = values[:: max(1, values.numel() // _SAMPLE)].double()
    deviation = float(values.std(correction=0)) if values.numel() > 1 else 0.0
    if s.old.is_meta or deviation <= 1e-9 * float(values.abs().max()):
        return []
    fourth_moment = float(((values - values.mean()) ** 4).mean())
    # Over deviation ** 4 (the kurtosis) it is 1.8 for a uniform distribution and 3 for a normal one.
    shape = "uniform" if fourth_moment < 2.3 * deviation**4 else "normal"
    own = (shape, f"{deviation:.1e}")
    if s.old_weight.dim() < 2 or values.numel() < _MIN_ELEMENTS:
        return [(shape, "torch default"), own] if s.old.dim() == 1 and s.old_weight.dim() > 1 else [own]
    # The estimated deviation of n normal values is off by a factor of 1 +- 1 / sqrt(2 n); four times that is allowed.
    tolerance = max(0.02, 4 / math.sqrt(2 * values.numel()))
    fans = _fans(s.old_weight)
    return [*((shape, name) for name, f in _DEVIATIONS.items() if abs(f(*fans) / deviation - 1) < tolerance), own]


def _draw(s: _Drawn, rule: Rule | None, scale: float, generator: torch.Generator) -> None:
    if rule is None:
        s.new.fill_(s.old.flatten()[0])
        return
    shape, name = rule
    old = s.old.detach().flatten()
    sample = old[:: max(1, old.numel() // _SAMPLE)].double()
    # far from zero they are no weights but lengths or gains, as those of weight_norm
    mean = float(sample.mean()) if abs(float(sample.mean())) > 2 * float(sample.std(correction=0)) else 0.0
    if name in _DEVIATIONS:
        deviation = scale * _DEVIATIONS[name](*_fans(s.new_weight))
    else:
        deviation = scale * float(old.float().std(correction=0))
    target = s.new if s.new.device.type == "cpu" else torch.empty(s.new.shape, dtype=torch.float32)
    if shape == "uniform":
        target.uniform_(mean - math.sqrt(3) * deviation, mean + math.sqrt(3) * deviation, generator=generator)
    else:
        target.normal_(mean, deviation, generator=generator)
    if target is not s.new:
        s.new.copy_(target)


# --- the dense model's weights ---


def preserve(
    new: nn.Module,
    dense: nn.Module,
    plan: Plan,
    surgery: Surgery,
    structure: Structure,
    *,
    seed: int = 0,
    slack: float = 0.1,
) -> Preserved:
    """Overwrite the weights of `new` so that it computes what `dense` computes, as nearly as its layers allow.

    The hidden layer of 2 x 2 weights becomes 4 x 4; the mask has the dense positions, and the outputs are the same:

    >>> from sparseift_cli import Options, masks, transform
    >>> dense = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 5))
    >>> x = torch.ones(1, 3)
    >>> wide, plan = transform(dense, x, sparsity=0.75, options=Options(start="preserve", preserve_slack=0))
    >>> masks(wide)["2.weight"].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    >>> torch.allclose(dense(x), wide(x))
    True

    Args:
        new: made from `dense` by the surgery, and initialised.
        seed: decides which random weights the slack adds.
        slack: Sparse Wide: the share of each layer's non-zeros, in [0, 1), that is taken from its smallest weights and
            given to added channels. Without it they have no gradient. Scope none ignores it.

    Returns:
        The masks and, as sentences in `notes`, where the function is not exact.

    Raises:
        UsageError: a slack outside [0, 1); a pattern, an order of channels or a member that dense weights do not fit.
    """
    if not 0 <= slack < 1:
        raise UsageError(f"preserve slack {slack:g} is not in [0, 1)", hint="0.1 replaces a tenth of the weights")
    with torch.no_grad():
        return torch_half(plan.member).preserve(DenseStart(new, dense, plan, surgery, structure, seed, slack))


# --- residual branches ---


@torch.no_grad()
def zero_residuals(model: nn.Module, name: str) -> None:
    """Set the gain of the last norm of every residual block of a ResNet to zero, so that each block passes its input on at first.

    Source: Goyal et al. 2017, arXiv 1706.02677, section 5.1.

    Args:
        name: what errors call the model.

    Raises:
        UsageError: no block of `model` ends with a norm of its own.
    """
    found = list(_last_norms(model))
    if not found:
        raise UsageError(
            f"init.zero_residual: {name} has no residual block that ends with a norm", hint="it is for ResNets"
        )
    for weight in found:
        weight.zero_()


def _last_norms(model: nn.Module) -> Iterator[nn.Parameter]:
    for block in model.modules():
        if not hasattr(block, "downsample"):
            continue
        last = next((getattr(block, key) for key in _LAST_NORMS if hasattr(block, key)), None)
        weight = getattr(last, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            yield weight
