"""The mask of one wide weight: the dense positions, and places for what the plan has left or the slack sets free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 22  # random numbers drawn at a time


@dataclass(frozen=True, slots=True)
class Places:
    """Positions of a flattened weight where random values leave the function alone: every line with every offset."""

    lines: Tensor
    offsets: Tensor

    @staticmethod
    def of(shape: Sequence[int], axis: int, chosen: Tensor, other_axis: int, others: Tensor) -> Places:
        """`chosen` indices along `axis`, each a line, with `others` along `other_axis`, and everything along further dims."""
        strides = torch.empty(tuple(shape), device="meta").stride()
        offsets = others * strides[other_axis]
        for dim, size in enumerate(shape):
            if dim not in (axis, other_axis):
                offsets = (offsets[:, None] + torch.arange(size) * strides[dim]).flatten()
        return Places(chosen * strides[axis], offsets)

    def __len__(self) -> int:
        return len(self.lines) * len(self.offsets)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` of them at random (all, where there are fewer), spread evenly over the lines."""
        n, width = len(self.lines), len(self.offsets)
        count = min(count, n * width)
        if not count:
            return torch.zeros(0, dtype=torch.long)
        each, more = divmod(count, n)
        lines = self.lines[torch.randperm(n, generator=generator)]  # the first `more` get one more
        drawn = []
        block = max(1, _BLOCK // width)
        for start in range(0, n, block):
            some = lines[start : start + block]
            order = torch.rand(len(some), width, generator=generator).argsort(1)
            drawn.append((some[:, None] + self.offsets[order[:, :each]]).flatten())
            extra = max(0, min(len(some), more - start))
            if extra:
                drawn.append(some[:extra] + self.offsets[order[:extra, each]])
        return torch.cat(drawn)


@dataclass(frozen=True, slots=True)
class Spent:
    """A mask with the planned count, and what it cost: dense weights kept and left out, places given random values.

    `blank` are flat positions in the mask that have to hold zeros.
    """

    mask: Tensor
    blank: Tensor
    dense: int
    kept: int
    random: int
    lost: float
    """Norm of the dense weights left out, over the norm of all of them."""


def spend(
    weight: Tensor,
    live: tuple[Tensor, ...],
    nnz: int,
    slack: float,
    places: Sequence[Places],
    generator: torch.Generator,
) -> Spent:
    """Choose `nnz` positions of `weight`, which holds the dense values at the index `live`.

    slack * nnz of them, and whatever the plan has beyond the dense weights, go to `places`, to each set alike. If there are
    too few, the rest of the mask holds zeros. The smallest dense weights give way.
    """
    values = weight[live].abs().float().flatten()
    chosen = _share(places, max(int(slack * nnz), nnz - len(values)), generator)
    keep = min(len(values), nnz - len(chosen))
    dropped = values.topk(len(values) - keep, largest=False).indices
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[dropped] = False
    mask[live] = kept.view(weight[live].shape)
    mask.view(-1)[chosen] = True
    short = nnz - keep - len(chosen)
    blank = torch.zeros(0, dtype=torch.long)
    if short:
        empty = (~mask).flatten().nonzero().flatten()
        blank = empty[torch.randperm(len(empty), generator=generator)[:short]]
        mask.view(-1)[blank] = True
    norm = float(values.norm())
    return Spent(mask, blank, len(values), keep, len(chosen), float(values[dropped].norm()) / norm if norm else 0.0)


def _share(places: Sequence[Places], wanted: int, generator: torch.Generator) -> Tensor:
    """`wanted` flat positions, as equally from each set as they can give."""
    chosen = [torch.zeros(0, dtype=torch.long)]
    for i, place in enumerate(sorted(places, key=len)):  # what a small set cannot give, the next ones do
        chosen.append(place.draw((wanted - sum(map(len, chosen))) // (len(places) - i), generator))
    return torch.cat(chosen)
