"""Sparse Wide: every dim of every parameter, and every number that a module holds, follows the new widths.

The paper (Sparse-IFT, section 3.1) multiplies all widths by sqrt(1/density). Which numbers those are, the trace found;
here they are written down as edits. Some numbers follow from a width without being one: an attention scale head_dim ** -0.5
kept as a float, the frequencies of a rotary embedding, the sizes in a Hugging Face configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..plan import Plan
from ..poly import Poly
from ..trace.structure import Structure
from ..trace.symbolise import NOT_WIDTHS, is_config
from .edits import Resize, SetAttribute

_SCALES = ("scal", "norm_factor", "temperature", "inv_")
_COUNTS = (
    "num",
    "layer",
    "position",
    "vocab",
    "token",
    "head",
    "group",
    "bucket",
    "expert",
    "image",
    "patch",
    "channels",
)


def resizes(plan: Plan, structure: Structure) -> Iterator[Resize]:
    """Every parameter and buffer whose shape changes."""
    for key, dims in structure.shapes.items():
        new = tuple(d.evaluate(plan.sizes) for d in dims)
        if new != tuple(d.evaluate(plan.table.sizes) for d in dims):
            yield Resize(key, new, rotary=key.endswith("inv_freq"))


def attributes(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[SetAttribute]:
    """Every number held by a module or configuration that changes with the widths."""
    for (owner, name, index), width in structure.attributes.items():
        new = width.evaluate(plan.sizes)
        if new != width.evaluate(plan.table.sizes):
            yield SetAttribute(owner, name, new, index)
    yield from _scales(plan, structure, model)
    yield from _configurations(plan, structure, model)


def _scales(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[SetAttribute]:
    """Floats that are a width to the power of 1/2 or -1/2, as attention scales are: no shape shows them."""
    for path, module in model.named_modules():
        floats = {
            k: v for k, v in module.__dict__.items() if type(v) is float and any(part in k.lower() for part in _SCALES)
        }
        if not floats:
            continue
        for old, new in _sizes_around(path, plan, structure):
            for name, value in list(floats.items()):
                for power in (-0.5, 0.5):
                    if old != new and math.isclose(value, old**power, rel_tol=1e-6):
                        yield SetAttribute(path, name, new**power)
                        floats.pop(name)
                        break


def _sizes_around(path: str, plan: Plan, structure: Structure) -> Iterator[tuple[int, int]]:
    """(dense, new) of the widths a module may scale by: what its attention sums over, its own numbers, its parameters."""
    below = f"{path}." if path else ""
    contracted = [
        d
        for p, dims in structure.contracted.items()
        if p == path or p.startswith(below) or path.startswith(f"{p}.")
        for d in dims
    ]
    numbers = [d for (owner, _, _), d in structure.attributes.items() if owner == path]
    own = [d for key, dims in structure.shapes.items() if key.startswith(below) for d in dims]
    for d in dict.fromkeys([*contracted, *numbers, *own]):
        yield d.evaluate(plan.table.sizes), d.evaluate(plan.sizes)


def _configurations(plan: Plan, structure: Structure, model: nn.Module) -> Iterator[SetAttribute]:
    """Sizes in a Hugging Face configuration: those that the forward did not read are known by their value alone.

    A size is written only where every width of that dense size has the same new one.
    """
    becomes: dict[int, set[int]] = {}
    for dims in structure.shapes.values():
        for d in dims:
            becomes.setdefault(d.evaluate(plan.table.sizes), set()).add(d.evaluate(plan.sizes))
    heads = {
        d.evaluate(plan.table.sizes): d.evaluate(plan.sizes) for dims in structure.contracted.values() for d in dims
    }
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, config in module.__dict__.items():
            if is_config(config) and id(config) not in seen:
                seen.add(id(config))
                owner = f"{path}.{key}" if path else key
                known = {n for (o, n, _) in structure.attributes if o == owner}
                yield from _one_configuration(owner, config.__dict__, known, becomes, heads)


def _one_configuration(owner: str, numbers: Mapping[str, Any], known: set[str], becomes: Mapping[int, set[int]],
                       heads: Mapping[int, int]) -> Iterator[SetAttribute]:  # fmt: skip
    for name, value in numbers.items():
        if type(value) is not int or name in known or name in NOT_WIDTHS:
            continue
        if name in ("head_dim", "d_kv", "kv_channels"):
            if heads.get(value, value) != value:
                yield SetAttribute(owner, name, heads[value])
        elif not any(word in name for word in _COUNTS):
            new = becomes.get(value, set()) - {value}
            if len(new) == 1:
                yield SetAttribute(owner, name, new.pop())


def head_blocks(width: Poly, plan: Plan, structure: Structure) -> int:
    """How many heads (times the parts of a fused projection) lie side by side along a dim of an attention projection.

    1 where no view took the dim apart, and where the order in memory is another.
    """
    layout = structure.layouts.get(width)
    if layout is None:
        return 1
    if layout.kind == "sum":
        parts = [head_blocks(p, plan, structure) for p in layout.parts]
        equal = len({p.evaluate(plan.sizes) for p in layout.parts}) == 1
        return sum(parts) if equal and len(set(parts)) == 1 else 1
    blocks = 1
    for part in layout.parts[:-1]:
        blocks *= part.evaluate(plan.sizes)
    return blocks
