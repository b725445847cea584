"""What two modules compute, compared: a transformed one with the dense one, and with what its library would build again."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from ..base.text import shape_text, some_of
from ..trace.fake_mode import no_init
from ..trace.outputs import returned
from ..trace.symbolise import is_config

_FEW = 1 << 27  # parameters up to which a model runs in float64, and is built again by its library
SAME = 1e-6  # of the largest output: no more than rounding


# --- the dense model and the transformed one ---


def measure_deviation(
    new: nn.Module, dense: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float | None, str | None]:
    """`deviation`, or None and a sentence why it cannot be measured: `dense` does not repeat its own outputs."""
    found = deviation(new, dense, inputs, kwargs)
    if found <= SAME:
        return found, None
    own = deviation(dense, dense, inputs, kwargs, seeds=(0, 1))
    if own <= SAME:
        return found, None
    return None, (
        "the deviation cannot be measured: the forward pass draws random numbers in eval mode too, and two runs of the dense "
        f"model differ by {own:.2g} of their largest value (F.dropout without training=self.training, noise)"
    )


def deviation(
    new: nn.Module,
    dense: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    seeds: tuple[int, int] = (0, 0),
) -> float:
    """Largest absolute difference between the outputs in eval mode, divided by the largest absolute output of `dense`.

    Both modules run on real tensors of the shapes and dtypes of `inputs` and `kwargs`; a tensor on meta or of zeros is
    replaced by normal numbers or random token ids. They run in float64 where they can, so that rounding is not counted, and
    with the same seed. By-products (hidden states, caches), which may be wider, are not compared. Infinite where an output
    of `new` is NaN.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = a.weight.fill_(3.0), b.weight.fill_(2.0)
    >>> deviation(a, b, (torch.ones(1, 1),), {})
    0.5

    Args:
        seeds: of the random numbers that the forward passes of `new` and `dense` draw.
    """
    args, named = real_inputs(dense, inputs, kwargs)
    with torch.no_grad(), eval_mode(new, dense):
        try:
            found, want = (
                _outputs(m, args, named, seed, exact=True) for m, seed in zip((new, dense), seeds, strict=True)
            )
        except Exception:  # a dtype is written in the forward pass, or it reads tensors from elsewhere
            found, want = (
                _outputs(m, args, named, seed, exact=False) for m, seed in zip((new, dense), seeds, strict=True)
            )
    both = [(a.double(), b.double()) for a, b in zip(want, found, strict=True) if a.shape == b.shape and a.numel()]
    largest = max((float(a.abs().max()) for a, _ in both), default=0.0)
    difference = max((float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in both), default=0.0)
    return difference / largest if largest else difference


def largest_difference(new: nn.Module, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """As `deviation`, computed in the dtype of the models: 0 where all outputs are equal to the bit."""
    args, named = real_inputs(model, inputs, kwargs)
    with torch.no_grad(), eval_mode(new, model):
        found, want = (_outputs(m, args, named, 0, exact=False) for m in (new, model))
    largest = max((float(t.abs().max()) for t in want if t.numel()), default=0.0)
    both = [(a.double(), b.double()) for a, b in zip(found, want, strict=True) if a.numel()]
    worst = max((float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in both), default=0.0)
    return worst / largest if largest else worst


def _outputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int, *, exact: bool
) -> list[Tensor]:
    """The floating-point tensors that `model` returns, no by-products; `exact`: computed in float64, if it is not too large."""
    state = random.getstate()
    random.seed(seed)
    try:
        with torch.random.fork_rng({p.device.index for p in model.parameters() if p.is_cuda}):
            torch.manual_seed(seed)
            if not (exact and _has_one_function_in_float64(model)):
                output = model(*args, **kwargs)
            else:
                tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
                args, kwargs = tree_map_only(Tensor, _in_float64, (args, dict(kwargs)))
                output = functional_call(model, {k: _in_float64(t) for k, t in tensors.items()}, args, dict(kwargs))
    finally:
        random.setstate(state)
    return [t for t in returned(output).results.values() if t.is_floating_point()]


def _has_one_function_in_float64(model: nn.Module) -> bool:
    """Not so where it has too many parameters, or a norm (eps None) whose eps is that of the dtype."""
    few = sum(p.numel() for p in model.parameters()) <= _FEW
    return few and all(getattr(module, "eps", 0.0) is not None for module in model.modules())


def first_difference(
    new: nn.Module,
    dense: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    positions: Mapping[str, Tensor],
) -> tuple[str, float] | None:
    """The first module, in the order of the forward pass, whose output is not the dense one, and the difference as `deviation`.

    Args:
        positions: the modules to compare, by path: index of each dense channel along the channels of `new`, int64 [channels].
    """
    args, named = real_inputs(dense, inputs, kwargs)
    seen: list[dict[str, Tensor]] = []
    for model in (dense, new):
        outputs: dict[str, Tensor] = {}

        def keep(path: str, output: object, into: dict[str, Tensor] = outputs) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                into.setdefault(path, output.double())

        with torch.no_grad(), eval_mode(model), ExitStack() as stack:
            for path in positions:
                hook = model.get_submodule(path).register_forward_hook(lambda _m, _a, out, path=path: keep(path, out))
                stack.callback(hook.remove)
            _outputs(model, args, named, 0, exact=False)
        seen.append(outputs)
    for path, want in seen[0].items():
        found = _at_dense_channels(seen[1].get(path, want), want, positions[path])
        if (
            found is not None
            and want.numel()
            and float((found - want).abs().max()) > 100 * SAME * float(want.abs().max())
        ):
            return path, float((found - want).abs().max() / want.abs().max())
    return None


def _at_dense_channels(found: Tensor, want: Tensor, positions: Tensor) -> Tensor | None:
    """`found`, an output [.., channels, ..] of the new model, at its dense channels; None where other dims differ."""
    axes = [i for i, (n, size) in enumerate(zip(found.shape, want.shape, strict=False)) if n != size]
    if axes and found.dim() == want.dim() and len(axes) == 1 and want.shape[axes[0]] == len(positions):
        found = found.index_select(axes[0], positions.to(found.device))
    return found if found.shape == want.shape else None


def _in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def real_inputs(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors of the same shapes and dtypes, on the device of `model`; one on meta or of zeros becomes random numbers or ids."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    given: tuple[Any, dict[str, Any]] = (inputs, dict(kwargs))
    on_device = tree_map_only(
        Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device) if t.is_meta else t, given
    )
    vocabulary = _embedding_rows(model, *on_device)
    smallest = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)

    def sample(t: Tensor) -> Tensor:
        if t.any():
            return t.to(device)
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator).to(device, t.dtype)
        if t.dtype == torch.bool:
            return t.to(device)
        high = vocabulary.get(t.untyped_storage().data_ptr(), smallest)
        return torch.randint(high, t.shape, generator=generator).to(device, t.dtype)

    return tree_map_only(Tensor, sample, on_device)


def _embedding_rows(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, int]:
    """Storage of an input -> the smallest number of rows among the embeddings that look it up, found by one forward."""
    storages = {t.untyped_storage().data_ptr() for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)}
    rows: dict[int, int] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor):
            storage = args[0].untyped_storage().data_ptr()
            if storage in storages:
                rows[storage] = min(rows.get(storage, module.num_embeddings), module.num_embeddings)

    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if embeddings:
        with ExitStack() as stack, torch.no_grad(), eval_mode(model):
            for module in embeddings:
                stack.callback(module.register_forward_pre_hook(record).remove)
            model(*inputs, **kwargs)
    return rows


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards the training flags are as before."""
    training = [m for model in models for m in model.modules() if m.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- the configuration of a Hugging Face model ---


def lost_by_configuration(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """What `save_pretrained` would lose, as notes: the library builds a saved model from its configuration alone.

    A model is built from a copy of the configuration, gets the weights of `model`, and must give the same outputs; without
    values (on meta), or with many, its shapes and numbers are compared. Empty where nothing is lost, and of a model that has
    no such configuration.
    """
    config: Any = model.__dict__.get("config")
    if not (is_config(config) and hasattr(config, "from_dict")):
        return []
    runs = not any(p.is_meta for p in model.parameters()) and sum(p.numel() for p in model.parameters()) <= _FEW
    device = "cpu" if runs else "meta"
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), no_init(device):
            again = type(model)(type(config).from_dict(config.to_dict()))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return [f"save_pretrained does not keep this model: {type(config).__name__} refuses its sizes ({reason})"]
    shapes, others = list(_other_shapes(again, model)), list(_other_numbers(again, model))
    changes = ""
    if runs and not shapes:
        again.load_state_dict(model.state_dict(), strict=False)
        try:
            lost = deviation(again.to(next(model.parameters()).device), model, inputs, kwargs)
        except RuntimeError as error:
            changes = f" (the saved one does not run: {error})"
        else:
            changes = f" (outputs change by up to {lost:.2g} of the largest)"
            if lost <= SAME:
                return []
    elif not shapes and not others:
        return []
    what = (
        f"{type(model).__name__} builds {some_of([*shapes, *others], 3)} from its configuration"
        if shapes or others
        else ""
    )
    return [
        f"save_pretrained does not keep this model{changes}{': ' if what else ''}{what}; sparseift.save does keep it"
    ]


def _other_shapes(built: nn.Module, model: nn.Module) -> Iterator[str]:
    """Tensors of the state dict that `built`, made from the configuration of `model`, has in another shape."""
    have = model.state_dict()
    for key, tensor in built.state_dict().items():
        if key not in have or have[key].shape != tensor.shape:
            yield f"{key} as {shape_text(tensor.shape)}"


def _other_numbers(built: nn.Module, model: nn.Module) -> Iterator[str]:
    """Numbers of modules, and buffers that no state dict holds, that `built` has otherwise."""
    modules = dict(model.named_modules())
    for path, module in built.named_modules():
        ours = modules.get(path)
        if ours is None:
            continue
        for name in module._non_persistent_buffers_set:
            one, other = ours._buffers.get(name), module._buffers.get(name)
            if one is None or other is None or other.is_meta or one.is_meta:
                continue
            if one.shape != other.shape or not torch.allclose(one.double().cpu(), other.double().cpu(), rtol=1e-5):
                yield f"{path}.{name} with other values".removeprefix(".")
        for name, value in module.__dict__.items():
            found: Any = ours.__dict__.get(name)
            if (
                type(value) in (int, float)
                and type(found) is type(value)
                and not math.isclose(value, found, rel_tol=1e-6)
            ):
                yield f"{path}.{name} as {value:g}".removeprefix(".")
