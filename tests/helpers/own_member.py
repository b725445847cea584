"""A member from outside the package, in one file of each half's few lines, and a net that it transforms."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from sparseift_cli.plan.layer_plan import LayerPlan, Part
from sparseift_cli.plan.members import DenseLayer, LayerwiseMember
from sparseift_cli.transforms.edits import Replace
from sparseift_cli.transforms.layers import bias_of, like, outputs_of
from sparseift_cli.transforms.members.base import MemberModule


class TwoInSequence(LayerwiseMember):
    """Two sparse layers, one behind the other, for square linear layers."""

    name = "two_in_sequence"
    title = "Two in Sequence"
    help = "two sparse layers, one behind the other"
    torch_half = "tests.helpers.own_member:SequenceModule"

    def replace(self, dense: DenseLayer) -> LayerPlan:
        if dense.convolution or dense.shape.inputs != dense.shape.outputs:
            return dense.untouched("only square linear layers")
        first, second = Part.full("first", dense.shape), Part.full("second", dense.shape, reads_part=True)
        return dense.replaced(parts=(first, second), detail="2 in sequence", activations=2 * dense.activations)


class SequenceModule(MemberModule):
    """B relu(A x) + b, both of the shape of the layer it replaces."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    @classmethod
    def build(cls, root: nn.Module, layer: nn.Module, edit: Replace) -> Self:
        outputs = outputs_of(layer)
        return cls(like(layer, outputs, bias=False), like(layer, outputs, bias=bias_of(layer) is not None))

    @classmethod
    def part_paths(cls, size: int) -> tuple[str, ...]:
        return "first", "second"

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


WIDTH = 16
MACS = 192 * WIDTH + 2 * WIDTH * WIDTH + WIDTH * 10  # of `mlp`, one image


def mlp() -> tuple[nn.Module, Tensor]:
    """Two square layers between an input and an output layer; images of 3x8x8, 10 classes."""
    body = [module for _ in range(2) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, WIDTH), nn.ReLU(), *body, nn.Linear(WIDTH, 10))
    return net, torch.zeros(1, 3, 8, 8)
