"""What the families share: weight initialisation that costs nothing on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def init_weights(model: nn.Module, rule: Callable[[nn.Module], None]) -> None:
    """Run `rule` on every submodule of `model`, innermost first; does nothing where weights are meta tensors."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.apply(rule)
