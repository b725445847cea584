"""Norms over channels that widen: how their outputs stay the dense ones, and which weights change for it.

Let a norm over D channels turn into one over D', a = D / D'. Let D of the new channels hold the dense values x, with
mean m and variance v, and let every added channel hold m (for a root mean square: 0, and v is the mean square). The
wider norm then sees the same mean and the variance a v. With eps' = a eps and gain' = sqrt(a) g it returns the same:

    sqrt(a) g (x - m) / sqrt(a v + a eps) = g (x - m) / sqrt(v + eps)

>>> x, a = torch.tensor([3.0, 4.0]), 2 / 4
>>> torch.rms_norm(x, (2,), torch.ones(2), 1e-3)
tensor([0.8485, 1.1313])
>>> torch.rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), (4,), torch.full((4,), a**0.5), 1e-3 * a)
tensor([0.8485, 1.1313, 0.0000, 0.0000])

What must hold of the inputs, by the kind of norm:

- BatchNorm: nothing; it works channel by channel, and is not in this file.
- RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): every added channel holds 0, so no layer that writes to the input
  may have weights on added outputs.
- LayerNorm: every added channel holds the mean of the dense ones, which holds of a sum if it holds of each summand.
  - Dense layer, bias, embedding, position table: the mean over the dense outputs is written into the added outputs,
    which are then *filled*.
  - Sparse layer: it has no non-zeros left for that. Its dense outputs are *centred*, W <- (I - 11^T / D) W, and its
    added outputs stay zero. This subtracts a mean from its output, which no LayerNorm sees; so only LayerNorms may read
    it (pre-LN transformers).
- GroupNorm: whole groups of the old size must be added.

Everything else is reported as not exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...base.text import some_of
from ...table.poly import Poly
from ...trace.flow import NORM_PREFIX, PARAMETER_PREFIX, UNKNOWN, is_layer_norm
from ...trace.structure import Structure
from ...trace.symbolise import is_config
from ..edits import SetAttribute
from .coordinates import Coordinates, LayerWeight

_EPS = ("eps", "variance_epsilon", "epsilon")
_GAINS = ("weight", "gamma", "scale")


# --- which norms there are ---


@dataclass(frozen=True)
class WidenedNorm:
    """A norm over channels that has more channels in the new model."""

    path: str
    module: nn.Module
    width: Poly
    """The channels that its statistics are taken over."""
    ratio: float
    """a = D / D'."""
    centres: bool
    """It subtracts the mean (a LayerNorm), or does not (a root mean square)."""
    gain: str | None
    """The name of its gain parameter."""
    offset: float
    """The gain is `offset + weight`: 0, or 1 in Gemma."""
    groups: int = 1
    """Above 1 it is a GroupNorm with that many groups, which grow."""

    @property
    def gain_key(self) -> str | None:
        """The state_dict key of its gain."""
        return None if self.gain is None else f"{self.path}.{self.gain}"

    @property
    def bias_key(self) -> str | None:
        """The state_dict key of its bias."""
        return f"{self.path}.bias" if self.module._parameters.get("bias") is not None else None

    def scale_gain(self, weight: Tensor, factor: float) -> Tensor:
        """The weight [any shape] whose gain, `offset + weight`, is `factor` times that of `weight`."""
        return (weight + self.offset) * factor - self.offset

    def scale_for_width(self, weight: Tensor) -> Tensor:
        """The weight [any shape] whose gain is sqrt(a) times that of `weight`."""
        return self.scale_gain(weight, math.sqrt(self.ratio))

    def eps_edit(self) -> SetAttribute | None:
        """The edit that multiplies eps by a; None where the module has no attribute that holds its eps as a float."""
        for name in _EPS:
            if name in self.module.__dict__:
                eps = self.module.__dict__[name]
                if eps is None:  # RMSNorm's default: the machine epsilon of its dtype
                    dtype = next((p.dtype for p in self.module.parameters()), torch.get_default_dtype())
                    eps = torch.finfo(dtype).eps
                return SetAttribute(self.path, name, self.ratio * eps) if type(eps) is float else None
        return None


def widened_norms(dense: nn.Module, structure: Structure, coordinates: Coordinates) -> list[WidenedNorm]:
    """Every norm of `dense` over channels, or over groups of them, whose statistics will include more channels."""
    found = []
    for path, module in dense.named_modules():
        width = _channels(path, module, structure)
        if width is None:
            continue
        dense_size, new_size = coordinates.dense_size(width), coordinates.new_size(width)
        if new_size == dense_size:
            continue
        if isinstance(module, nn.GroupNorm):
            groups = structure.attributes.get((path, "num_groups", None))
            if groups is not None and dense_size * coordinates.new_size(groups) == new_size * coordinates.dense_size(
                groups
            ):
                continue  # whole groups are added, each with statistics of its own
        gain = next((g for g in _GAINS if module._parameters.get(g) is not None), None)
        num_groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        centres, offset = _probe_kind(module, dense_size, gain)
        found.append(WidenedNorm(path, module, width, dense_size / new_size, centres, gain, offset, num_groups))
    return found


def _channels(path: str, module: nn.Module, structure: Structure) -> Poly | None:
    if not (is_layer_norm(module) or isinstance(module, nn.GroupNorm)):
        return None
    for name in (*_GAINS, "bias"):
        dims = structure.shapes.get(f"{path}.{name}")
        if dims:
            total = Poly.const(1)
            for dim in dims:
                total = total * dim
            return total
    return structure.attributes.get((path, "normalized_shape", 0))


def _probe_kind(module: nn.Module, size: int, gain: str | None) -> tuple[bool, float]:
    """(does it subtract the mean, what does it add to its gain parameter), found by running the module.

    Class names do not say it: T5's LayerNorm subtracts no mean, Gemma's RMSNorm adds 1 to its weight.
    """
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return True, 0.0
    if isinstance(module, nn.RMSNorm):
        return False, 0.0
    parameter = next(module.parameters(recurse=False), None)
    x = torch.linspace(-1, 1, size).sin()[None, None]  # [1, 1, size], like a batch of one token
    if parameter is not None:
        x = x.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        try:
            centres = bool(torch.allclose(module(x), module(x + 3), rtol=1e-3, atol=1e-4))
            if gain is None:
                return centres, 0.0
            zeros: dict[str, Any] = {gain: torch.zeros_like(module.get_parameter(gain))}
            if "bias" in module._parameters:
                zeros["bias"] = zeros[gain]
            return centres, float(bool(functional_call(module, zeros, (x,)).any()))
        except (RuntimeError, TypeError, ValueError):  # it takes another kind of input, so only its name is left
            return "rms" not in type(module).__name__.lower(), 0.0


def configured_eps(new: nn.Module, edits: Sequence[SetAttribute]) -> list[SetAttribute]:
    """The edits of the configurations in `new` that make norms which are built from them have the eps that `edits` set.

    A configuration has one eps for all its norms, so only where every norm below it that has this eps gets the same new one.
    """
    changed = {(e.owner, e.name): float(e.value) for e in edits if e.name in _EPS}
    found: list[SetAttribute] = []
    for path, holder in new.named_modules():
        config = holder.__dict__.get("config")
        if not is_config(config) or any(value is config for m in _parents(new, path) for value in m.__dict__.values()):
            continue
        below = {f"{path}.{p}".strip("."): m for p, m in holder.named_modules()}
        norms = [(p, n, m.__dict__[n]) for p, m in below.items() for n in _EPS if type(m.__dict__.get(n)) is float]
        for name, old in vars(config).items():
            if "eps" in name and type(old) is float:
                values = {changed.get((p, n), old) for p, n, value in norms if value == old}
                if len(values) == 1 and old not in values:
                    found.append(SetAttribute(f"{path}.config".removeprefix("."), name, values.pop()))
    return found


def _parents(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules that the one at `path` is in, from the root on."""
    parts = path.split(".") if path else []
    return [root.get_submodule(".".join(parts[:n])) for n in range(len(parts))]


# --- which weights must change ---


@dataclass
class NormPlan:
    """What to do with the weights around the widened norms. Tensors go by their first name (see `canonical_names`)."""

    norms: list[WidenedNorm]
    centred: dict[str, int] = field(default_factory=dict)
    """Name of a tensor -> the dim along which its mean is subtracted."""
    filled: dict[str, int] = field(default_factory=dict)
    """Name of a tensor -> the dim along which the added coordinates hold the mean of the dense ones."""
    zero_outputs: set[str] = field(default_factory=set)
    """Keys of weights whose added outputs a norm reads: no random value may be there."""
    zero_inputs: set[str] = field(default_factory=set)
    """Keys of weights whose added inputs are exactly zero: any value may be there."""
    notes: list[str] = field(default_factory=list)


def plan_norms(
    dense: nn.Module,
    structure: Structure,
    coordinates: Coordinates,
    norms: list[WidenedNorm],
    weights: Mapping[str, LayerWeight],
    names: Mapping[str, str],
) -> NormPlan:
    """Decide for everything that a norm of `norms` reads whether it is centred or filled; `notes` say what is not exact.

    Args:
        weights: see `layer_weights`.
        names: see `canonical_names`.
    """
    plan = NormPlan(norms)
    values = dict(dense.named_parameters())
    by_path = {n.path: n for n in norms}
    read_elsewhere = set(structure.read_by_others)
    for norm in norms:
        if not norm.centres or norm.groups > 1:
            read_elsewhere |= structure.norm_inputs.get(norm.path, frozenset())
    inexact: dict[str, list[str]] = {}
    for norm in norms:
        sources = structure.norm_inputs.get(norm.path, frozenset([UNKNOWN]))
        plan.zero_outputs |= {s for s in sources if s in weights}
        if UNKNOWN in sources:  # unknown operations write there, so any layer of this width may
            width = coordinates.size_key(norm.width)
            plan.zero_outputs |= {k for k, w in weights.items() if coordinates.size_key(w.outputs) == width}
        inputs = _NormInputs(norm, coordinates, structure.shapes, weights, names, values, by_path, read_elsewhere)
        for problem in dict.fromkeys(inputs.classify(sources, plan)):
            inexact.setdefault(problem, []).append(norm.path)
    for problem, paths in inexact.items():
        plan.notes.append(f"not exact at {some_of((p or 'the model itself' for p in paths), 3)}: {problem}")
    exact = {n.path: n for n in norms if not any(n.path in paths for paths in inexact.values())}
    plan.zero_inputs = set(_with_zero_inputs(structure, coordinates, weights, names, exact, plan.filled, values))
    return plan


@dataclass(frozen=True)
class _NormInputs:
    """What one norm reads, and how each part of it can be made to hold its own mean in the added channels."""

    norm: WidenedNorm
    coordinates: Coordinates
    dims: Mapping[str, tuple[Poly, ...]]
    weights: Mapping[str, LayerWeight]
    names: Mapping[str, str]
    values: Mapping[str, Tensor]
    norms: Mapping[str, WidenedNorm]
    read_elsewhere: set[str]

    def classify(self, sources: Iterable[str], plan: NormPlan) -> Iterable[str]:
        """Add every source to the centred or the filled tensors of `plan`; yield a sentence for each that fits neither."""
        norm = self.norm
        if norm.groups > 1:
            yield "a GroupNorm whose groups grow is exact only where the means of its groups are zero"
            return
        if norm.eps_edit() is None:
            yield "its eps is written in its code, so it cannot be scaled"
        for source in sorted(sources) if norm.centres else ():
            if source == UNKNOWN:
                yield "its input is not a sum of known layers, so the mean of the added channels is not controlled"
            elif source.startswith(PARAMETER_PREFIX):
                yield from self._parameter(source.removeprefix(PARAMETER_PREFIX), plan)
            elif source.startswith(NORM_PREFIX):
                yield from self._norm(source.removeprefix(NORM_PREFIX), plan)
            elif source in self.weights:
                yield from self._layer(self.weights[source], plan)
            else:
                yield "it reads a product of weights that is not a linear or convolution"

    def _parameter(self, key: str, plan: NormPlan) -> Iterable[str]:
        """An embedding table, a position table, a parameter that is added."""
        if self.coordinates.size_key(self.dims[key][-1]) != self.coordinates.size_key(self.norm.width):
            yield "it reads a parameter of another width, concatenated with others whose means differ"
        else:
            plan.filled[self.names[key]] = -1

    def _norm(self, path: str, plan: NormPlan) -> Iterable[str]:
        """The output of another norm, as in post-LN."""
        source = self.norms.get(path)
        if source is None or not source.centres or source.groups > 1:
            yield "it reads the output of a norm that does not subtract the mean, so the mean changes with the data"
            return
        gain = None if source.gain_key is None else self.values[source.gain_key]
        if gain is not None and float(gain.max() - gain.min()) > 0:
            yield "it reads the output of another LayerNorm with unequal gains, whose mean changes with the data"
        if source.bias_key:
            plan.filled[self.names[source.bias_key]] = -1

    def _layer(self, weight: LayerWeight, plan: NormPlan) -> Iterable[str]:
        whole = self.coordinates.size_key(weight.outputs) == self.coordinates.size_key(self.norm.width)
        concatenated = self.coordinates.dense_size(weight.outputs) < self.coordinates.dense_size(self.norm.width)
        bias = self.names.get(weight.bias_key)
        if weight.computed:
            yield "it reads a layer whose weight is computed in forward, so that the outputs cannot be centred"
        elif weight.kind not in ("linear", "conv"):
            yield f"it reads a {weight.kind} layer, whose outputs share no inputs and so have no common mean to subtract"
        elif not (whole or (concatenated and weight.masked)):
            yield "it reads a layer's outputs in another grouping than the layer writes them"
        elif not weight.masked:
            plan.filled[self.names[weight.key]] = weight.axis
            if bias:
                plan.filled[bias] = -1
        elif weight.key in self.read_elsewhere:
            yield "it reads a sparse layer that other operations read too, so the outputs cannot be centred"
        else:
            plan.centred[self.names[weight.key]] = weight.axis
            if bias:
                plan.centred[bias] = -1


def _with_zero_inputs(
    structure: Structure,
    coordinates: Coordinates,
    weights: Mapping[str, LayerWeight],
    names: Mapping[str, str],
    exact: Mapping[str, WidenedNorm],
    filled: Mapping[str, int],
    values: Mapping[str, Tensor],
) -> Iterable[str]:
    """Keys of weights that read only norms whose added channels are exactly zero.

    Such a norm's added inputs hold the mean, so they are zero behind it, unless its bias was filled with a mean other
    than 0.
    """
    for key, weight in weights.items():
        sources = structure.weight_inputs.get(key, frozenset())
        read = [exact.get(s.removeprefix(NORM_PREFIX)) for s in sources if s.startswith(NORM_PREFIX)]
        if not read or len(read) != len(sources):
            continue
        if all(
            n is not None
            and coordinates.size_key(n.width) == coordinates.size_key(weight.inputs)
            and (n.bias_key is None or names[n.bias_key] not in filled or float(values[n.bias_key].mean()) == 0)
            for n in read
        ):
            yield key
