"""What the local members have in common: a module that stands in for one layer, and the non-linearity inside it."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..edits import Replace
from ..layers import bias_of, norm_like, weight_of

MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "leaky_relu": nn.LeakyReLU,
    "hardtanh": nn.Hardtanh,
}


_FROM_FIRST = ("in_features", "in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_FROM_LAST = ("out_features", "out_channels")


class Member(nn.Module, ABC):
    """A module in the place of a linear or convolution: same input, same output shape, the same FLOPs once masked."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The layers whose weights the plan counts, by the plan's names for them."""

    def __getattr__(self, name: str) -> Any:
        """Sizes that the replaced layer reports are reported still: some models read them (DaViT its kernel size)."""
        if name in _FROM_FIRST or name in _FROM_LAST:
            parts = list(self.parts().values())
            return getattr(parts[0] if name in _FROM_FIRST else parts[-1], name)
        return super().__getattr__(name)

    @property
    def weight(self) -> Tensor:
        """The weight of the first part: for models that ask a layer for its dtype or device before they call it."""
        return weight_of(next(iter(self.parts().values())))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last part, or None."""
        return bias_of(list(self.parts().values())[-1])


def non_linearity(root: nn.Module, layer: nn.Module, edit: Replace) -> list[nn.Module]:
    """What stands behind `layer` inside a member: its norm, then its activation (copied from `root`, or made by name)."""
    inside: list[nn.Module] = []
    if edit.norm:
        inside.append(norm_like(edit.norm, layer, edit.eps, edit.momentum))
    if edit.activation:
        inside.append(_activation(root, edit.activation))
    return inside


def _activation(root: nn.Module, name: str) -> nn.Module:
    if name.startswith("module:"):
        return copy.deepcopy(root.get_submodule(name.removeprefix("module:")))
    word, _, options = name.partition(":")
    return MODULES[word](**{k: _value(v) for k, v in re.findall(r"(\w+)=([^,]*)", options)})


def _value(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
