"""Norms over channels, of whatever library: what kind they are, and what keeps their values when zeros join in.

A norm over D channels that becomes one over D' of which a = D / D' hold what they held and the rest hold the mean (zero, for a
root mean square) sees a times the dense variance. With eps * a and gain * sqrt(a) it gives the dense values again:
sqrt(a) g (x - m) / sqrt(a v + a eps) = g (x - m) / sqrt(v + eps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...table.poly import Poly
from ...trace.flow import is_layer_norm
from ...trace.structure import Structure
from ..edits import SetAttribute
from .live import Live

_EPS = ("eps", "variance_epsilon", "epsilon")
_GAINS = ("weight", "gamma", "scale")


@dataclass(frozen=True)
class Norm:
    """A norm whose channels grow. `centres`: it subtracts the mean. `offset`: its gain is `offset + weight` (Gemma's is 1)."""

    path: str
    module: nn.Module
    width: Poly
    share: float
    """a = D / D'."""
    centres: bool
    gain: str | None
    offset: float
    groups: int = 1
    """Above 1 the statistics are those of a GroupNorm's groups, and the width that of one group."""

    @property
    def gain_key(self) -> str | None:
        """The state_dict key of its gain."""
        return None if self.gain is None else f"{self.path}.{self.gain}"

    @property
    def bias_key(self) -> str | None:
        """The state_dict key of its bias."""
        return f"{self.path}.bias" if self.module._parameters.get("bias") is not None else None

    def gains(self, weight: Tensor, factor: float) -> Tensor:
        """The weight whose gain is `factor` times that of `weight`."""
        return (weight + self.offset) * factor - self.offset

    def eps(self) -> SetAttribute | None:
        """The edit that multiplies its eps by a; None where the module does not hold its eps as a number."""
        for name in _EPS:
            if name in self.module.__dict__:
                held = self.module.__dict__[name]
                if held is None:  # RMSNorm's default, the eps of its dtype
                    dtype = next((p.dtype for p in self.module.parameters()), torch.get_default_dtype())
                    held = torch.finfo(dtype).eps
                return SetAttribute(self.path, name, self.share * held) if type(held) is float else None
        return None


def grown_norms(dense: nn.Module, structure: Structure, live: Live) -> list[Norm]:
    """Every norm over channels, or over groups of them, whose statistics see more channels than in `dense`."""
    found = []
    for path, module in dense.named_modules():
        width = _width(path, module, structure)
        if width is None or live.new(width) == live.dense(width):
            continue
        if isinstance(module, nn.GroupNorm):
            groups = structure.attributes.get((path, "num_groups", None))
            if groups is not None and live.dense(width) * live.new(groups) == live.new(width) * live.dense(groups):
                continue  # whole groups join in, each with statistics of its own
        share = live.dense(width) / live.new(width)
        gain = next((g for g in _GAINS if module._parameters.get(g) is not None), None)
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        centres, offset = _kind(module, live.dense(width), gain)
        found.append(Norm(path, module, width, share, centres, gain, offset, groups))
    return found


def _width(path: str, module: nn.Module, structure: Structure) -> Poly | None:
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


def _kind(module: nn.Module, size: int, gain: str | None) -> tuple[bool, float]:
    """Does it subtract the mean, and what does it add to its weight? Asked of the module itself: T5's LayerNorm does not."""
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return True, 0.0
    if isinstance(module, nn.RMSNorm):
        return False, 0.0
    parameter = next(module.parameters(recurse=False), None)
    x = torch.linspace(-1, 1, size).sin()[None, None]
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
        except (RuntimeError, TypeError, ValueError):  # it wants another input: its name has to do
            return "rms" not in type(module).__name__.lower(), 0.0
