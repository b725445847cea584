"""Between the two forms of a state dict: weights of stored blocks (`layout` says how they are written), and dense weights.

Both ways are exact, and what is no weight of stored blocks (biases, norms, other layers) passes through as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .layout import COLUMNS, LAYOUT, OFFSETS, PARTS, VALUES, BlockLayout, checked_layout, compact_paths, key


@dataclass(frozen=True, slots=True)
class CompactWeight:
    """A weight of stored blocks: its layout, `values` [n, B, B] or [n, taps, B, B], and int32 `row_offsets` and `columns`."""

    layout: BlockLayout
    values: Tensor
    row_offsets: Tensor
    columns: Tensor

    @classmethod
    def of(cls, state: Mapping[str, Tensor], path: str) -> CompactWeight:
        """The weight at `path` of a state dict, checked.

        Raises:
            UsageError: its tensors do not agree.
        """
        values, offsets, columns, layout = (state[key(path, part)] for part in PARTS)
        for part, tensor in zip(PARTS[1:], (offsets, columns, layout), strict=True):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise UsageError(
                    f"{key(path, part)} is {tensor.dtype} {list(tensor.shape)}, not a list of int32",
                    hint="the file is damaged or was changed; save the model again",
                )
        found = checked_layout(path, values.shape, offsets.tolist(), columns.tolist(), layout.tolist())
        return cls(found, values, offsets.int(), columns.int())

    @classmethod
    def take(cls, weight: Tensor, layout: BlockLayout, mask: Tensor) -> CompactWeight:
        """The blocks of a weight [*layout.shape] where `mask`, bool [R, C], is True; others are left out, whatever they hold."""
        rows, columns = mask.to(weight.device).nonzero().unbind(1)
        return cls.at(as_blocks(weight, layout)[rows, columns], layout, mask)

    @classmethod
    def at(cls, values: Tensor, layout: BlockLayout, mask: Tensor) -> CompactWeight:
        """A weight with the blocks `values` [n, B, B] or [n, taps, B, B] where `mask`, bool [R, C], is True."""
        rows, columns = mask.to(values.device).nonzero().unbind(1)
        offsets = torch.zeros(len(mask) + 1, dtype=torch.int32, device=values.device)
        offsets[1:] = torch.bincount(rows, minlength=len(mask)).cumsum(0)
        return cls(layout, values, offsets, columns.int())

    def mask(self) -> Tensor:
        """Bool [R, C], True where a block is stored."""
        mask = torch.zeros(self.layout.grid, dtype=torch.bool, device=self.columns.device)
        mask[self._rows(), self.columns.long()] = True
        return mask

    def weight_mask(self) -> Tensor:
        """Bool [*layout.shape], True where a block is stored."""
        return replace(self, values=torch.ones_like(self.values, dtype=torch.bool)).dense()

    def dense(self) -> Tensor:
        """The weight [*layout.shape], with zeros where no block is stored."""
        layout = self.layout
        weight = torch.zeros(layout.shape, dtype=self.values.dtype, device=self.values.device)
        blocks = as_blocks(weight, layout)
        where = (self._rows().to(weight.device), self.columns.long().to(weight.device))
        blocks[where] = self.values.detach().reshape(-1, *blocks.shape[2:])
        return weight

    def entries(self, path: str) -> dict[str, Tensor]:
        """The tensors of a state dict that stand for this weight, by their names."""
        parts = (self.values, self.row_offsets, self.columns, layout_tensor(self.layout).to(self.columns.device))
        return {key(path, name): part for name, part in zip(PARTS, parts, strict=True)}

    def _rows(self) -> Tensor:
        counts = self.row_offsets.long().diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def layout_tensor(layout: BlockLayout) -> Tensor:
    """`layout` as a state dict has it: int32 [1 + dims]."""
    return torch.tensor([int(layout.transposed), *layout.shape], dtype=torch.int32)


def to_dense_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict with every weight dense, zeros filled in: what the model without block layers loads.

    Weights that share their values (tied layers) share the dense tensor too. Weights that are dense already, and everything
    else, are the very tensors of `state`.

    >>> state = {"fc.values": torch.ones(1, 2, 2), "fc.bias": torch.zeros(2)}
    >>> state |= {"fc.row_offsets": torch.tensor([0, 1]), "fc.columns": torch.tensor([1]), "fc.layout": torch.tensor([0, 2, 4])}
    >>> to_dense_state(state)["fc.weight"].tolist()
    [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]

    Raises:
        UsageError: the tensors of a layer do not agree, or some are missing; the layer is named.
    """
    paths = compact_paths(state)
    made: dict[tuple[Any, ...], Tensor] = {}
    dense = {}
    for path in paths:
        at = tuple(_memory(state[key(path, part)]) for part in PARTS)
        if at not in made:
            made[at] = CompactWeight.of(state, path).dense()
        dense[key(path, VALUES)] = key(path, "weight"), made[at]
    hidden = {key(path, part) for path in paths for part in (OFFSETS, COLUMNS, LAYOUT)}
    return dict(dense.get(name, (name, tensor)) for name, tensor in state.items() if name not in hidden)


def to_compact_state(state: Mapping[str, Tensor], like: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_dense_state`: every weight [*shape] in the blocks that `like` has, a model or its state dict.

    Weights that `state` has in blocks already pass through as they are.

    Raises:
        UsageError: a weight has another shape than in `like`, or non-zeros outside its blocks; the weight is named.
    """
    model = like.state_dict() if isinstance(like, nn.Module) else like
    made: dict[tuple[Any, ...], CompactWeight] = {}
    blocks = {}
    for path in compact_paths(model):
        name = key(path, "weight")
        if name in state:
            pattern = CompactWeight.of(model, path)
            weight = state[name]
            at = (_memory(weight), _memory(model[key(path, COLUMNS)]))
            if at not in made:
                made[at] = _taken(name, weight, pattern.layout, pattern.mask())
            taken = made[at].entries(path)
            blocks[name] = taken | {key(path, VALUES): made[at].values.view_as(pattern.values)}
    compact = {}
    for name, tensor in state.items():
        compact.update(blocks.get(name, {name: tensor}))
    return compact


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors of any shape have in common exactly where they are tied."""
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr()


def _taken(name: str, weight: Tensor, layout: BlockLayout, mask: Tensor) -> CompactWeight:
    """The blocks of `weight` [*layout.shape] where `mask` [R, C] is True; nothing but zeros is left out."""
    require_shape(name, weight, layout)
    taken = CompactWeight.take(weight, layout, mask)
    lost = int(weight.count_nonzero()) - int(taken.values.count_nonzero())
    if lost:
        raise UsageError(
            f"{name} has {lost:,} non-zeros outside the {layout.num_blocks:,} blocks of {layout.block}x{layout.block} that the "
            "model stores",
            hint="its masks are others; load it into a model that has them, or into the masked model",
        )
    return taken


def require_shape(name: str, weight: Tensor, layout: BlockLayout) -> None:
    """Check the shape of a dense weight.

    Raises:
        UsageError: it is not [*layout.shape].
    """
    if tuple(weight.shape) != layout.shape:
        raise UsageError(f"{name} is {list(weight.shape)}, and the model's is {list(layout.shape)}")


def fitting_mask(name: str, weight: Tensor, layout: BlockLayout, now: Tensor | None) -> Tensor:
    """Bool [R, C], `num_blocks` True: the blocks of `weight` [*layout.shape] that are not all zero, then blocks of `now`.

    Args:
        name: of the weight, for errors.
        now: bool [R, C], where the layer has its blocks; None where it has none yet.

    Raises:
        UsageError: the weight has another shape, or more blocks that are not zero than are stored.
    """
    require_shape(name, weight, layout)
    blocks = as_blocks(weight, layout)
    mask = blocks.ne(0).flatten(2).any(2)
    spare = layout.num_blocks - int(mask.count_nonzero())
    if spare < 0 or (spare and now is None):
        raise UsageError(
            f"{name} has {layout.num_blocks - spare:,} blocks of {layout.block}x{layout.block} that are not zero, and the model "
            f"stores {layout.num_blocks:,}",
            hint="it was not trained with this number of blocks; load it into the masked model",
        )
    if spare and now is not None:
        more = (now.to(mask.device) & ~mask).flatten().nonzero()[:spare]
        mask.view(-1)[more] = True
    return mask


def as_blocks(weight: Tensor, layout: BlockLayout) -> Tensor:
    """A view [R, C, B, B], of a convolution [R, C, taps, B, B], of a weight [*layout.shape]: outputs x inputs."""
    if layout.transposed:
        weight = weight.t()
    blocks = weight.unflatten(0, (-1, layout.block)).unflatten(2, (-1, layout.block)).transpose(1, 2)
    return blocks.flatten(4).permute(0, 1, 4, 2, 3) if layout.taps > 1 else blocks.reshape(blocks.shape[:4])
