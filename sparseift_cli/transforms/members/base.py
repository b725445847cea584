"""The torch half of a member: the base classes of this folder, and of members from outside the package.

A `TorchHalf` carries out the plan of its member on a module. Members that replace single layers need none of their own:
they provide the `MemberModule` that replaces a layer, and `layerwise.py` does the rest.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...mask.mask import make_mask
from ...plan.plan import Plan
from ...trace.structure import Structure
from ..edits import Masked, Replace, Surgery
from ..layers import bias_of, norm_like, weight_of
from ..preserve import DenseStart, Preserved

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


class TorchHalf(ABC):
    """How the plan of one member is carried out on a module."""

    @abstractmethod
    def surgery(self, plan: Plan, structure: Structure, model: nn.Module) -> Surgery:
        """Every edit that makes `model`, which `structure` was traced from, the network that `plan` describes."""

    def notes(self, plan: Plan, structure: Structure, model: nn.Module, surgery: Surgery) -> Iterator[str]:
        """What a user should know of a network with new weights: a sentence each."""
        yield from ()

    @abstractmethod
    def preserve(self, start: DenseStart) -> Preserved:
        """Overwrite the weights of `start.new` so that it computes what `start.dense` does, as nearly as its layers allow.

        Raises:
            UsageError: no weights of the dense module fit it.
        """


@dataclass(frozen=True)
class DenseWeight:
    """A dense layer's weight, and the parts that are to start with its values.

    Args:
        weight: [out, in / groups, *kernel].
        groups: of the convolution; 1 for a linear layer.
        size: branches, or the rank per group.
        masked: one entry a part, in the order of `part_paths`; None for a part without a mask.
        generator: for random choices.
    """

    weight: Tensor
    groups: int
    size: int
    masked: Sequence[Masked | None]
    generator: torch.Generator

    @property
    def pattern(self) -> str:
        """Where the non-zeros of its masked parts may be."""
        return next((m.pattern for m in self.masked if m is not None), "unstructured")

    def largest(self, part: int, scores: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask of a part, in `shape`, with its planned count at the highest `scores` (as many elements, any shape)."""
        masked = self.masked[part]
        assert masked is not None
        return make_mask(
            shape,
            masked.nnz,
            generator=self.generator,
            pattern=masked.pattern,
            scores=scores.reshape(tuple(shape)),
            connect=False,
            groups=masked.groups,
        )

    def share_of(self, residual: Tensor) -> float:
        """Norm of `residual` over that of the weight."""
        norm = float(self.weight.double().norm())
        return float(residual.double().norm()) / norm if norm else 0.0


@dataclass(frozen=True)
class Decomposition:
    """Values and masks of the parts of a layer that together compute what the dense weight does, or nearly.

    Args:
        values: one tensor a part, in the order of `part_paths`, reshaped to the part's weight.
        masks: one boolean mask a part; None for a part without.
        bias_part: the part that gets the bias of the dense layer.
        lost: the norm of what the parts do not add up to, over the weight's norm.
        method: how it was done, a clause for a note.
    """

    values: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    bias_part: int
    lost: float
    method: str


class MemberModule(nn.Module, ABC):
    """A module in the place of a linear or convolution: same input, same output shape, the same FLOPs once masked.

    Input [..., in] and output [..., out] of a linear layer; [batch, in, *space] and [batch, out, *space] of a
    convolution.
    """

    sums_parts: ClassVar[bool] = False
    """Are the parts' outputs added? Then it is their sum that has the variance of the dense layer's output."""

    @classmethod
    @abstractmethod
    def build(cls, root: nn.Module, layer: nn.Module, edit: Replace) -> Self:
        """The module for `layer` of the model `root`, weights not yet set; `layers.like` and `pointwise` make its parts."""

    @classmethod
    @abstractmethod
    def part_paths(cls, size: int) -> tuple[str, ...]:
        """Where its weights are, in the order of the plan's parts: paths of submodules.

        Args:
            size: the size that the edit gives: branches, or the rank per group.
        """

    @property
    def size(self) -> int:
        """What `part_paths` takes; any number will do for a module of a fixed number of parts."""
        return 0

    def parts(self) -> list[nn.Module]:
        """The layers whose weights the plan counts, in its order."""
        return [self.get_submodule(path) for path in self.part_paths(self.size)]

    @classmethod
    def decompose(cls, dense: DenseWeight) -> Decomposition:
        """Values of its parts that compute what the dense layer does (`--init preserve`), its non-linearities apart.

        Raises:
            UsageError: there are none.
        """
        raise UsageError(f"{cls.__name__} cannot start as the dense layer", hint="use --init fresh")

    @classmethod
    def linear_option(cls) -> str:
        """The option that leaves out the norm and activation inside, for a message."""
        return "--norm none --activation none"

    def balance(self, nonzeros: Sequence[int]) -> None:
        """Adjust freshly drawn weights, where a rule for single layers does not give the output its variance.

        Args:
            nonzeros: of each part, in the order of `part_paths`.
        """

    def __getattr__(self, name: str) -> Any:
        """The sizes of the layer it replaces: some models read them (DaViT reads the kernel size)."""
        if name in _FROM_FIRST or name in _FROM_LAST:
            parts = self.parts()
            return getattr(parts[0] if name in _FROM_FIRST else parts[-1], name)
        return super().__getattr__(name)

    @property
    def weight(self) -> Tensor:
        """The weight of the first part, in its shape: for models that ask a layer for its dtype or device."""
        return weight_of(self.parts()[0])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last part [out], or None."""
        return bias_of(self.parts()[-1])


def non_linearity(root: nn.Module, layer: nn.Module, edit: Replace) -> list[nn.Module]:
    """What follows `layer` inside a member: its norm, then its activation (copied from `root`, or made by name)."""
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
