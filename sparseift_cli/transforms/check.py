"""Checks after a transform: the cost is the planned one, and with start preserve the function is the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..base.text import shape_text, some_of
from ..errors import CheckFailed
from ..plan.plan import Plan
from ..table.table import Layer
from ..trace.build import TraceResult, trace
from ..trace.fake_mode import no_init
from ..trace.outputs import returned
from ..trace.symbolise import is_config
from .edits import Surgery

_MAX_PROBLEMS = 5  # in one message


# --- cost: measured == planned ---


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs counted in the transformed module. Exact numbers."""

    macs: dict[str, Fraction]
    """MACs of every planned row, by its name."""
    forward_macs: int
    params: int
    nonzero_params: int
    rows: int
    """Number of traced rows."""


def measure(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
    surgery: Surgery,
    masks: Mapping[str, Tensor] | None,
) -> tuple[Measured, TraceResult]:
    """Trace `model` with plain sizes and count it. A masked weight has the share of its MACs that its mask has of its weights.

    Args:
        masks: bool, same shape as the weight, by the weight's key. None (a module on meta): the planned numbers of
            non-zeros are used.
    """
    traced = trace(model, inputs, kwargs, name=plan.table.model, input_shape=plan.table.input, symbolic=False)
    masked = {(m.key, m.rows): m for m in surgery.masked}
    replaced = {edit.path for edit in surgery.members}
    macs: dict[str, Fraction] = {}
    zeros = 0
    for row in traced.table.layers:
        cost, name = Fraction(row.macs.evaluate(())), _planned_row(row, replaced)
        if m := masked.get((row.weight or "", _rows_of(row))):
            weights = m.of(model.get_parameter(m.key)).numel()
            nnz = m.nnz if masks is None else int(m.of(masks[m.key]).count_nonzero())
            cost, name = cost * nnz / weights, m.layer
            zeros += weights - nnz
        macs[name] = macs.get(name, Fraction(0)) + cost
    params = sum(p.numel() for p in model.parameters())
    total = sum(macs.values(), Fraction(0))
    return Measured(macs, round(total), params, params - zeros, len(traced.table.layers)), traced


def _rows_of(row: Layer) -> tuple[int, int] | None:
    """The rows of its weight that a row of plain sizes uses; None for all of them."""
    if row.start is None:
        return None
    start = row.start.evaluate(())
    return start, start + row.outputs.evaluate(())


def _planned_row(row: Layer, replaced: set[str]) -> str:
    """The name of the planned row that a row of the transformed module belongs to: U and V of `fc` belong to `fc`."""
    parts = row.name.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in replaced:
            return ".".join(parts[:n])
    return row.name


def require_as_planned(measured: Measured, plan: Plan, before: TraceResult, after: TraceResult) -> None:
    """Check that the module has exactly the planned MACs in every row, parameters, non-zeros and output shape.

    Args:
        before: the trace of the dense module; its output shape is compared with that of `after`, the transformed one's.

    Raises:
        CheckFailed: a row, a total or the output shape differs; the message names the first ones.
    """
    problems = []
    planned = {p.layer.name: p for p in plan.layers if p.macs}
    for name, row in planned.items():
        found = measured.macs.get(name, Fraction(0))
        if found != row.macs:
            problems.append(f"{name}: planned {row.macs:,} MACs, measured {float(found):,.0f}")
    for name, found in measured.macs.items():
        if found and name not in planned:
            problems.append(f"{name}: {float(found):,.0f} MACs that were not planned")
    params = sum(p.params for p in plan.layers)
    nonzero = params - sum(p.weights - p.nnz for p in plan.layers)
    for what, want, have in (("parameters", params, measured.params), ("non-zero", nonzero, measured.nonzero_params)):
        if want != have:
            problems.append(f"{what}: planned {want:,}, measured {have:,}")
    problems += _changed_outputs(before.structure.output_shapes, after.structure.output_shapes)
    if problems:
        more = f" (and {len(problems) - _MAX_PROBLEMS} more)" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckFailed(
            f"the transformed {plan.table.model} is not what was planned: {'; '.join(problems[:_MAX_PROBLEMS])}{more}"
        )


def _changed_outputs(before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """A sentence on each output of the model, by name, whose shape is not what it was, or that is gone or new."""
    for name in dict.fromkeys([*before, *after]):
        want, have = (shape_text(shapes[name]) if name in shapes else None for shapes in (before, after))
        if want != have:
            what = f"output {name}" if name else "the output"
            yield f"{what} has shape {have}, not {want}" if have and want else f"{what} is {'new' if have else 'gone'}"


# --- the configuration of a Hugging Face model ---

_FEW = 1 << 27  # parameters up to which models are run again, in float64 or built anew
_SAME = 1e-6  # of the largest output: no more than rounding


def lost_by_configuration(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """What `save_pretrained` would lose, as a note: the library builds a saved model from its configuration alone.

    A model is built from a copy of the configuration, gets the weights of `model`, and must give the same outputs; without
    values (on meta), or with many, its shapes and numbers are compared. None where nothing is lost, and of a model that has
    no such configuration.
    """
    config: Any = model.__dict__.get("config")
    if not (is_config(config) and hasattr(config, "from_dict")):
        return None
    runs = not any(p.is_meta for p in model.parameters()) and sum(p.numel() for p in model.parameters()) <= _FEW
    device = "cpu" if runs else "meta"
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), no_init(device):
            again = type(model)(type(config).from_dict(config.to_dict()))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"save_pretrained does not keep this model: {type(config).__name__} refuses its sizes ({reason})"
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
            if lost <= _SAME:
                return None
    elif not shapes and not others:
        return None
    what = (
        f"{type(model).__name__} builds {some_of([*shapes, *others], 3)} from its configuration"
        if shapes or others
        else ""
    )
    return f"save_pretrained does not keep this model{changes}{': ' if what else ''}{what}; sparseift.save does keep it"


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
            found = ours.__dict__.get(name)
            if (
                type(value) in (int, float)
                and type(found) is type(value)
                and not math.isclose(value, found, rel_tol=1e-6)
            ):
                yield f"{path}.{name} as {value:g}".removeprefix(".")


# --- function: deviation from the dense model ---


def deviation(new: nn.Module, dense: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Largest absolute difference between the outputs in eval mode, divided by the largest absolute output of `dense`.

    Both modules run on real tensors of the shapes and dtypes of `inputs` and `kwargs`; a tensor on meta or of zeros is
    replaced by normal numbers or random token ids. By-products (hidden states, caches), which may be wider, are not
    compared. Infinite where an output of `new` is NaN.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = a.weight.fill_(3.0), b.weight.fill_(2.0)
    >>> deviation(a, b, (torch.ones(1, 1),), {})
    0.5
    """
    args, named = _real_inputs(dense, inputs, kwargs)
    with torch.no_grad(), _eval_mode(new, dense):
        pairs = zip(_float_outputs(dense(*args, **named)), _float_outputs(new(*args, **named)), strict=True)
        both = [(a.double(), b.double()) for a, b in pairs if a.shape == b.shape and a.numel()]
    largest = max((float(a.abs().max()) for a, _ in both), default=0.0)
    difference = max((float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in both), default=0.0)
    return difference / largest if largest else difference


def _float_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output; no by-products."""
    return [t for t in returned(output).results.values() if t.is_floating_point()]


def _real_inputs(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
        with ExitStack() as stack, torch.no_grad(), _eval_mode(model):
            for module in embeddings:
                stack.callback(module.register_forward_pre_hook(record).remove)
            model(*inputs, **kwargs)
    return rows


@contextmanager
def _eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards the training flags are as before."""
    training = [m for model in models for m in model.modules() if m.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
