"""The mask of one wide weight: the positions of its dense weights, and random positions for the slack.

With the dense weights alone the added channels have exactly zero gradients: they read nothing, and nothing that the
output depends on reads them. The slack breaks this. It removes the smallest dense weights of the layer and adds as many
random weights on the inputs of added channels. The outputs of these channels still have no weights, so the function
changes by no more than the removed weights, but gradients reach the added channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 22  # random numbers in memory at a time


@dataclass(frozen=True, slots=True)
class FreePositions:
    """Flat positions of a weight where any value leaves the function alone: every line combined with every offset.

    `lines`: int64 [number of lines], the flat position of each; `offsets`: int64 [positions in a line], relative to it.
    """

    lines: Tensor
    offsets: Tensor

    @staticmethod
    def along(shape: Sequence[int], axis: int, chosen: Tensor, other_axis: int, others: Tensor) -> FreePositions:
        """The positions with an index of `chosen` [n] along `axis` and one of `others` [m] along `other_axis`.

        Each index along `axis` is a line. Along further dims (the taps of a convolution's kernel) all positions are
        free.
        """
        strides = torch.empty(tuple(shape), device="meta").stride()
        offsets = others * strides[other_axis]
        for dim, size in enumerate(shape):
            if dim not in (axis, other_axis):
                offsets = (offsets[:, None] + torch.arange(size) * strides[dim]).flatten()
        return FreePositions(chosen * strides[axis], offsets)

    def __len__(self) -> int:
        return len(self.lines) * len(self.offsets)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """int64 [min(count, len(self))] random positions without repetition, spread evenly over the lines."""
        n, width = len(self.lines), len(self.offsets)
        count = min(count, n * width)
        if not count:
            return torch.zeros(0, dtype=torch.long)
        each, remainder = divmod(count, n)
        lines = self.lines[torch.randperm(n, generator=generator)]  # the first `remainder` lines get one position more
        sampled = []
        block = max(1, _BLOCK // width)
        for start in range(0, n, block):
            some = lines[start : start + block]
            order = torch.rand(len(some), width, generator=generator).argsort(1)
            sampled.append((some[:, None] + self.offsets[order[:, :each]]).flatten())
            extra = max(0, min(len(some), remainder - start))
            if extra:
                sampled.append(some[:extra] + self.offsets[order[:extra, each]])
        return torch.cat(sampled)


@dataclass(frozen=True, slots=True)
class SlackMask:
    """A mask with the planned number of non-zeros, and what became of the dense weights.

    `mask`: bool, the shape of the weight. `zero_positions`: int64 [k], flat positions inside the mask that must hold
    zeros.
    """

    mask: Tensor
    zero_positions: Tensor
    num_dense: int
    """Weights of the dense layer."""
    num_kept: int
    """Dense weights that the mask keeps."""
    num_random: int
    """Positions that hold random values: the slack, and what the plan has beyond the dense weights."""
    lost_norm: float
    """Norm of the removed dense weights, over the norm of all of them."""


def distribute_slack(
    weight: Tensor,
    dense_index: tuple[Tensor, ...],
    nnz: int,
    slack: float,
    free: Sequence[FreePositions],
    generator: torch.Generator,
) -> SlackMask:
    """Choose `nnz` positions of `weight` [out, in, *kernel]: its largest dense weights, and random free positions.

    slack * nnz positions, or what the plan has beyond the dense weights if that is more, are sampled from `free`,
    equally from each set. Where `free` has fewer, the remaining positions of the mask are random ones that hold zeros.

    A dense 2 x 2 weight inside a wide 3 x 3 one, four non-zeros, a quarter of them slack. The smallest dense weight, 1,
    is removed, and the added output gets a random weight on a dense input:

    >>> weight = torch.tensor([[3.0, 2.0, 0.1], [1.0, 4.0, 0.2], [0.3, 0.4, 0.5]])
    >>> dense_index = torch.tensor([[0], [1]]), torch.tensor([[0, 1]])
    >>> free = FreePositions.along((3, 3), 0, torch.tensor([2]), 1, torch.tensor([0, 1]))
    >>> choice = distribute_slack(weight, dense_index, 4, 0.25, [free], torch.Generator().manual_seed(0))
    >>> choice.mask.int().tolist()
    [[1, 1, 0], [0, 1, 0], [1, 0, 0]]

    Args:
        weight: holds the dense values at `dense_index` (see `Coordinates.index`); on the CPU.
        slack: share of the non-zeros, in [0, 1).
    """
    values = weight[dense_index].abs().float().flatten()
    chosen = _sample_equally(free, max(int(slack * nnz), nnz - len(values)), generator)
    num_kept = min(len(values), nnz - len(chosen))
    removed = values.topk(len(values) - num_kept, largest=False).indices
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[removed] = False
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    mask[dense_index] = kept.view(weight[dense_index].shape)
    mask.view(-1)[chosen] = True
    missing = nnz - num_kept - len(chosen)
    zero_positions = torch.zeros(0, dtype=torch.long)
    if missing:
        outside = (~mask).flatten().nonzero().flatten()
        zero_positions = outside[torch.randperm(len(outside), generator=generator)[:missing]]
        mask.view(-1)[zero_positions] = True
    norm = float(values.norm())
    lost_norm = float(values[removed].norm()) / norm if norm else 0.0
    return SlackMask(mask, zero_positions, len(values), num_kept, len(chosen), lost_norm)


def _sample_equally(free: Sequence[FreePositions], count: int, generator: torch.Generator) -> Tensor:
    """int64 [at most count] positions, as equally from each set as their sizes allow."""
    sampled = [torch.zeros(0, dtype=torch.long)]
    for i, positions in enumerate(sorted(free, key=len)):  # smallest first: larger sets make up for what it lacks
        sampled.append(positions.sample((count - sum(map(len, sampled))) // (len(free) - i), generator))
    return torch.cat(sampled)
