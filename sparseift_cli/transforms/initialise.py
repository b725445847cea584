"""Fresh weights for what surgery made, drawn the way the dense model's own were.

No module says how it was initialised, but its weights do: a rule such as Kaiming's sets the standard deviation from the fans,
and hundreds of weights give it away. Each tensor of the dense model votes for the rules that its deviation fits; the rule
that most tensors share is taken for all of them, with the fans of the new shapes. Constant tensors (norms, zero biases,
layer scales) stay constant, and a deviation that no rule explains (0.02 in transformers) stays what it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..mask.attached import is_transposed
from ..mask.mask import generator_for
from .edits import Surgery
from .members.base import Member
from .members.doped import SparseDoped

Init = Literal["dense", "density_scaled"]
Rule = tuple[str, str]  # distribution (normal or uniform), and where the deviation comes from

_DEVIATIONS: dict[str, Callable[[int, int], float]] = {
    "kaiming fan_out": lambda i, o: math.sqrt(2 / o),
    "kaiming fan_in": lambda i, o: math.sqrt(2 / i),
    "lecun": lambda i, o: math.sqrt(1 / i),
    "xavier": lambda i, o: math.sqrt(2 / (i + o)),
    "torch default": lambda i, o: math.sqrt(1 / (3 * i)),
    "inverse fan_out": lambda i, o: math.sqrt(1 / (3 * o)),
}
_SAMPLE = 1 << 14  # elements that are looked at
_TELLING = 64  # a tensor of fewer elements says too little about its distribution


@dataclass(frozen=True, slots=True)
class _Source:
    """A new tensor, the dense one it descends from, and the weights whose fans the rule of each uses."""

    key: str
    new: Tensor
    new_weight: Tensor
    old_key: str
    old: Tensor
    old_weight: Tensor
    density: float


def initialise(model: nn.Module, dense: nn.Module, surgery: Surgery, *, seed: int = 0, init: Init = "dense") -> None:
    """Draw every weight of `model` that is sparse or not a clone of one of `dense`; nothing on meta.

    `density_scaled` multiplies the deviation of a sparse weight by density ** -1/2, so that a sum over its non-zeros has
    the variance that a dense one had; the parts of Parallel and Doped are summed, so theirs together have it as they are.
    The draw of a tensor depends on the seed and its name alone.

    Raises:
        UsageError: a weight of `dense` that says how to draw others is not finite.
    """
    summed = any(edit.member in ("sparse_parallel", "sparse_doped") for edit in surgery.members)
    sources = [s for s in _sources(model, dense, surgery) if not s.new.is_meta]
    fitting: dict[int, list[Rule]] = {}  # by dense tensor: the branches of Parallel all descend from one
    for s in sources:
        if id(s.old) not in fitting:
            _require_finite(s.old_key, s.old)
            fitting[id(s.old)] = _fitting(s)
    votes = Counter(rule for rules in fitting.values() for rule in rules)
    with torch.no_grad():
        for s in sources:
            rule = max(fitting[id(s.old)], key=lambda r: votes[r], default=None)
            scale = s.density**-0.5 if init == "density_scaled" and not summed else 1.0
            _draw(s, rule, scale, generator_for(seed, "init", s.key))
        for edit in surgery.members:
            member = model.get_submodule(edit.path)
            if isinstance(member, SparseDoped) and not member.weight.is_meta:
                (copy,) = (m for m in surgery.masked if m.layer == edit.path)
                _share_variance(member, copy.nnz)


def _share_variance(member: SparseDoped, nnz: int) -> None:
    """Scale U and V so that V U x and the masked copy together have the variance of the dense layer's output.

    With n inputs an output and deviation sigma the dense layer multiplies the variance of x by n sigma^2; the copy keeps
    the part `density` of that. U keeps the variance as it is (deviation n ** -1/2), V of rank r makes the rest of it.
    """
    u, v, sparse = (part.get_parameter("weight") for part in member.parts().values())
    inputs, rank = sparse[0].numel(), v[0].numel()
    left = inputs * float(sparse.std(correction=0)) ** 2 * (1 - nnz / sparse.numel())
    for weight, deviation in ((u, inputs**-0.5), (v, (left / rank) ** 0.5)):
        held = float(weight.std(correction=0))
        if held:
            weight.mul_(deviation / held)


def _sources(model: nn.Module, dense: nn.Module, surgery: Surgery) -> Iterable[_Source]:
    density = {m.key: m.nnz / model.get_parameter(m.key).numel() for m in surgery.masked}
    old_parameters = dict(dense.named_parameters(remove_duplicate=False))
    drawn = {r.key for r in surgery.resizes if not r.rotary} | (density.keys() & old_parameters.keys())
    for key, new in model.named_parameters():
        if key in drawn:
            weight = _sibling_weight(model, key)
            old_weight = _sibling_weight(dense, key)
            yield _Source(key, new, weight, key, old_parameters[key], old_weight, density.get(key, 1.0))
    names = {id(p): key for key, p in model.named_parameters()}
    for edit in surgery.members:
        member = model.get_submodule(edit.path)
        assert isinstance(member, Member)
        where = f"{edit.path}." if f"{edit.path}.weight" in old_parameters else f"{edit.path}_"  # in_proj_weight
        old_weight = _sibling_weight(dense, f"{where}weight")
        for part in member.parts().values():
            weight = part.get_parameter("weight")
            for name, new in part.named_parameters():
                key = names[id(new)]
                yield _Source(
                    key, new, weight, where + name, old_parameters[where + name], old_weight, density.get(key, 1.0)
                )


def _require_finite(key: str, weight: Tensor) -> None:
    """A weight that new ones are made from is a number at every place.

    Raises:
        UsageError: it is not; the message names it.
    """
    if not bool(weight.detach().isfinite().all()):
        raise UsageError(
            f"{key} is NaN or infinite in places, and new weights are made from it",
            hint="take a checkpoint from before the training diverged",
        )


def _sibling_weight(model: nn.Module, key: str) -> Tensor:
    """The weight whose fans a bias is drawn by: of the same module; any other parameter is its own."""
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


def _fitting(s: _Source) -> list[Rule]:
    """The rules that the dense tensor may have been drawn by; its own deviation is one. None for constants."""
    values = s.old.detach().flatten()
    values = values[:: max(1, values.numel() // _SAMPLE)].double()
    deviation = float(values.std(correction=0)) if values.numel() > 1 else 0.0
    if s.old.is_meta or deviation <= 1e-9 * float(values.abs().max()):
        return []
    shape = "uniform" if float(((values - values.mean()) ** 4).mean()) < 2.3 * deviation**4 else "normal"
    own = (shape, f"{deviation:.1e}")
    if s.old_weight.dim() < 2 or values.numel() < _TELLING:
        return [(shape, "torch default"), own] if s.old.dim() == 1 and s.old_weight.dim() > 1 else [own]
    tolerance = max(0.02, 4 / math.sqrt(2 * values.numel()))
    fans = _fans(s.old_weight)
    return [*((shape, name) for name, f in _DEVIATIONS.items() if abs(f(*fans) / deviation - 1) < tolerance), own]


def _draw(s: _Source, rule: Rule | None, scale: float, generator: torch.Generator) -> None:
    if rule is None:
        s.new.fill_(s.old.flatten()[0])
        return
    shape, name = rule
    if name in _DEVIATIONS:
        deviation = scale * _DEVIATIONS[name](*_fans(s.new_weight))
    else:
        deviation = scale * float(s.old.detach().flatten().float().std(correction=0))
    target = s.new if s.new.device.type == "cpu" else torch.empty(s.new.shape, dtype=torch.float32)
    if shape == "uniform":
        target.uniform_(-math.sqrt(3) * deviation, math.sqrt(3) * deviation, generator=generator)
    else:
        target.normal_(0.0, deviation, generator=generator)
    if target is not s.new:
        s.new.copy_(target)
