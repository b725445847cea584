"""Residual branches that begin at zero, so that a block passes its input on at first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..errors import UsageError

_LAST = ("bn3", "bn2")  # of a bottleneck, of a basic block: torchvision's names, which timm and our zoo have too


@torch.no_grad()
def zero_residuals(model: nn.Module, name: str) -> None:
    """Zero the scale of the last norm of every residual block of a ResNet (Goyal et al., arXiv 1706.02677, section 5.1).

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
        last = next((getattr(block, key) for key in _LAST if hasattr(block, key)), None)
        weight = getattr(last, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            yield weight
