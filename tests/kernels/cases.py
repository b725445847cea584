"""What the tests of kernels share: masks with corner cases, and the dense layer that every kernel must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseift_cli.kernels.index import BlockIndex
from sparseift_cli.kernels.reference import ACTIVATIONS

MASKS = {
    "an empty row and an empty column": [[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]],
    "one block": [[0, 0], [0, 1], [0, 0]],
    "all blocks": [[1, 1, 1], [1, 1, 1]],
    "one row": [[1, 0, 1, 1, 1]],
    "one column": [[1], [0], [1]],
}


def mask_of(name: str) -> Tensor:
    """Bool [R, C]."""
    return torch.tensor(MASKS[name], dtype=torch.bool)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`, in float64; NaN and infinity where `found` has any."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@dataclass
class Case:
    """Random operands of one layer and, in float64, what comes out of the dense layer with the same weight."""

    index: BlockIndex
    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor
    z: Tensor
    dx: Tensor
    dvalues: Tensor

    @classmethod
    def draw(
        cls, mask: Tensor, block: int, tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> Case:
        """Operands of `dtype` for the blocks of `mask` [R, C]."""
        rows, columns = mask.shape
        generator = torch.Generator().manual_seed(seed)
        index = BlockIndex.from_mask(mask.to(device), block)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        x, grad = normal(tokens, columns * block), normal(tokens, rows * block)
        values = normal(index.num_blocks, block, block) * block**-0.5
        bias = normal(rows * block)
        at = index.rows.long(), index.columns.long()
        weight = torch.zeros(rows, columns, block, block, dtype=torch.float64, device=device)
        weight[at] = values.double()
        weight = weight.transpose(1, 2).reshape(rows * block, columns * block)
        full = (grad.double().T @ x.double()).view(rows, block, columns, block).transpose(1, 2)
        z = F.linear(x.double(), weight, bias.double())
        return cls(index, x, values, bias, grad, z, grad.double() @ weight, full[at])

    def y(self, activation: str) -> Tensor:
        """activation(x W^T + bias) in float64."""
        return ACTIVATIONS[activation](self.z)
