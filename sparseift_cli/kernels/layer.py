"""What all layers of stored blocks share: the parameters, the index buffers, and the way from and to a dense weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..mask.attached import keep_form
from .copies import note_copy, note_loaded
from .index import BlockIndex
from .layout import COLUMNS, LAYOUT, OFFSETS, PARTS, VALUES, BlockLayout
from .storage import CompactWeight, as_blocks, fitting_mask, layout_tensor


class BlockLayer(nn.Module):
    """A layer whose parameter `values` is the stored blocks of its weight, ordered by row of blocks, then by column.

    The weight is [out, in, *kernel]; `values` is [n, B, B], or [n, taps, B, B] where there is a kernel of kh * kw taps: every
    tap of a block is then a matrix [B outputs, B inputs] in one piece, which is what kernels load.

    Its state dict says by itself where the blocks are (`layout`), and `load_state_dict` takes the dense `weight` too.

    Args:
        mask: bool [out / B, in / B], True where a block is stored.
        block: B, the side of a block.
        kernel: () for a linear layer, (kh, kw) for a convolution.
        bias: whether to add a bias [out].
        backend: a name in `KERNELS`, or auto.
        transposed: the dense weight is [in, out], as Hugging Face's Conv1D has it; not with a kernel.
    """

    values: Tensor
    bias: Tensor | None
    layout: Tensor
    row_offsets: Tensor
    columns: Tensor
    rows: Tensor
    column_offsets: Tensor
    column_rows: Tensor
    column_order: Tensor
    groups: Tensor
    dense_form: tuple[nn.Module, ...] = ()
    """The layer that this one replaced, without its tensors; in a tuple, so that it is no submodule."""

    def __init__(
        self,
        mask: Tensor,
        block: int,
        kernel: tuple[int, ...] = (),
        *,
        bias: bool = True,
        backend: str = "auto",
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.block, self.backend, self.transposed = block, backend, transposed
        keep_form(self, "weight", f"{block}x{block * math.prod(kernel)}")
        on_meta = device is not None and torch.device(device).type == "meta"
        index = BlockIndex.from_mask(mask if on_meta else mask.to(device), block)
        for name, tensor in index._asdict().items():
            self.register_buffer(name, tensor.to(device), persistent=name in PARTS)
        rows, columns = index.grid
        shape = (rows * block, columns * block)
        self.weight_shape = (*(shape[::-1] if transposed else shape), *kernel)
        taps = (math.prod(kernel),) if kernel else ()
        self.values = nn.Parameter(torch.empty(index.num_blocks, *taps, block, block, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows * block, device=device, dtype=dtype)) if bias else None
        self.register_buffer(LAYOUT, layout_tensor(self._layout).to(self.columns.device))
        self.reset_parameters()

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """A layer with the values of a dense `weight` [out, in, *kernel] at the blocks of `mask` [R, C].

        Args:
            weight: [in, out] where `transposed`.
            mask: bool [R, C].
            bias: [out] or None.
            options: those of the class.

        Raises:
            UsageError: the weight does not consist of R x C square blocks, or has non-zeros outside the mask.
        """
        out, inputs = weight.shape[1::-1] if options.get("transposed") else weight.shape[:2]
        block = out // mask.shape[0]
        if (out, inputs) != (mask.shape[0] * block, mask.shape[1] * block):
            raise UsageError(f"a weight {list(weight.shape)} does not consist of {list(mask.shape)} square blocks")
        options = {"device": weight.device, "dtype": weight.dtype, **options}
        layer = cls(mask, block, bias=bias is not None, **options)
        with torch.no_grad():
            layer.values.copy_(layer.blocks_of(weight))
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        if not weight.is_meta and layer.values.count_nonzero() != weight.count_nonzero():
            raise UsageError("the dense weight has non-zeros outside the blocks of the mask")
        return layer

    def reset_parameters(self) -> None:
        """Draw the values uniformly, with the variance that torch would give a dense layer of the mean number of inputs."""
        bound = math.sqrt(self.index.grid[0] * self.block / self.values.numel())
        with torch.no_grad():
            self.values.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @property
    def index(self) -> BlockIndex:
        """Where the blocks are: the buffers of this module, so that `index.move_(mask)` moves its blocks."""
        return BlockIndex(
            self.row_offsets,
            self.columns,
            self.rows,
            self.column_offsets,
            self.column_rows,
            self.column_order,
            self.groups,
        )

    @property
    def block_mask(self) -> Tensor:
        """Bool [R, C], True where a block is stored."""
        return self.index.mask()

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in, *kernel], computed from `values` at every access, so that code which reads it stays right.

        Gradients flow back to `values`; what is written into it does not.
        """
        return self.scattered(self.values)

    def dense(self) -> Tensor:
        """The weight [out, in, *kernel] with its zeros, without a gradient."""
        return self.scattered(self.values.detach())

    @property
    def weight_mask(self) -> Tensor:
        """Bool [out, in, *kernel], True where a block is stored; computed at every access."""
        return self.scattered(torch.ones_like(self.values, dtype=torch.uint8)).bool()

    def scattered(self, values: Tensor) -> Tensor:
        """[out, in, *kernel] of any dtype: `values`, of the shape of the parameter, at the stored blocks, and zero elsewhere."""
        grid = values.new_zeros(*self.index.grid, *values.shape[1:])
        grid = grid.index_put((self.rows.long(), self.columns.long()), values)
        if grid.dim() == 4:
            matrix = grid.transpose(1, 2).flatten(0, 1).flatten(1)
            return matrix.t() if self.transposed else matrix
        return grid.permute(0, 3, 1, 4, 2).reshape(self.weight_shape)

    def blocks_of(self, weight: Tensor) -> Tensor:
        """The stored blocks of a dense tensor [out, in, *kernel], in the shape of `values`: the inverse of `scattered`."""
        stored = as_blocks(weight, self._layout)[self.rows.long(), self.columns.long()]
        return stored.view(-1, *self.values.shape[1:])

    @torch.no_grad()
    def move_(self, mask: Tensor, state: Iterable[Tensor] = (), before: Tensor | None = None) -> None:
        """Move the blocks in place to the True cells of `mask` [R, C], as many as before; a block that was not stored is zero.

        Args:
            mask: bool [R, C].
            state: tensors of an optimiser, of the shape of `values`, whose blocks move along.
            before: `block_mask`, where the caller has it. With both on the CPU, nothing waits for a GPU.

        Raises:
            UsageError: the mask has another grid or another number of blocks.
        """
        before = self.index.mask() if before is None else before
        self.index.move_(mask)
        self._take_from(before, mask.to(before.device), (self.values, *state))

    @torch.no_grad()
    def follow_(self, before: Tensor, tensors: Iterable[Tensor]) -> None:
        """Bring tensors, of the shape of `values`, from the blocks in `before`, bool [R, C], to those of now, in place.

        A block that was not in `before` is zero.
        """
        self._take_from(before, self.index.mask(), tensors)

    def _take_from(self, before: Tensor, now: Tensor, tensors: Iterable[Tensor]) -> None:
        """`follow_` from the blocks in `before` to those in `now`, bool [R, C] on one device; `tensors` [n, *unit] on any."""
        cells = before.flatten()
        place = (cells.cumsum(0) - 1).masked_fill_(~cells, -1)
        source = place[now.flatten()].to(self.values.device, non_blocking=True)
        new, source = (source < 0).view(-1, *(1 for _ in self.values.shape[1:])), source.clamp_(min=0)
        for tensor in tensors:
            tensor.copy_(tensor[source].masked_fill_(new, 0))

    def _mask_if_set(self) -> Tensor | None:
        """Bool [R, C]; None on meta, or where `to_empty` left anything in the index."""
        if self.columns.is_meta:
            return None
        rows, columns = self.index.grid
        cells = self.rows.long() * columns + self.columns.long()
        inside = (self.rows >= 0) & (self.rows < rows) & (self.columns >= 0) & (self.columns < columns)
        return self.block_mask if inside.all() and len(cells.unique()) == len(cells) else None

    @property
    def _layout(self) -> BlockLayout:
        return BlockLayout(self.weight_shape, self.transposed, self.block, len(self.values))

    def empty_dense_form(self) -> nn.Module:
        """The ordinary layer of the same sizes, on meta; the caller sets its tensors. Subclasses say which.

        Raises:
            UsageError: there is none.
        """
        raise UsageError(f"{type(self).__name__} says of no ordinary layer that it has the same weight")

    def _describe_blocks(self) -> str:
        rows, columns = self.index.grid
        return f"blocks={len(self.values)} of {rows * columns}, {self.block} x {self.block}"

    # --- loading and moving to other types, as nn.Module calls them ---

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As nn.Module loads, after the weight was brought into blocks; then the buffers that follow from two are derived."""
        loads_index = self._in_blocks(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        note_loaded(self)
        if not loads_index or self.columns.is_meta:
            return
        rows = torch.repeat_interleave(torch.arange(len(self.row_offsets) - 1), self.row_offsets.diff().long().cpu())
        loaded = BlockIndex.from_pairs(rows.to(self.columns.device), self.columns, self.index.grid, self.block)
        for name, new in loaded._asdict().items():
            old = self._buffers[name]
            if old is not None and old.device == new.device:
                old.copy_(new)
            else:  # load_state_dict(assign=True), as from meta
                self._buffers[name] = new

    def _in_blocks(self, state: dict[str, Any], prefix: str) -> bool:
        """Bring the weight of a state dict into the blocks of this layer, checked; False where it has none.

        Raises:
            UsageError: it is another weight, has more blocks, or its tensors do not agree.
        """
        own, layout = self._layout, layout_tensor(self._layout)
        path = prefix.removesuffix(".")
        if prefix + "weight" in state and prefix + VALUES not in state:
            weight = state.pop(prefix + "weight")
            loaded = CompactWeight.take(weight, own, fitting_mask(prefix + "weight", weight, own, self._mask_if_set()))
        elif {prefix + OFFSETS, prefix + COLUMNS} & state.keys() and prefix + VALUES in state:
            loaded = CompactWeight.of({prefix + LAYOUT: layout, **state}, path)
            if (loaded.layout.grid, loaded.layout.taps) != (own.grid, own.taps) or len(loaded.values) != len(
                self.values
            ):
                raise UsageError(f"{path} of the state dict is {loaded.layout}, and the layer {own}")
        else:
            return False
        state.update(loaded.entries(path))
        state[prefix + VALUES] = loaded.values.reshape(self.values.shape).contiguous()
        state[prefix + LAYOUT] = layout.to(loaded.columns.device)
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As copy.deepcopy copies any module; an average is such a copy, see `copies`."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(deepcopy(self.__dict__, memo))
        note_copy(self, made)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module; but `module.type(...)` leaves an index of integers, and channels_last the order of the values."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        if not self.values.is_contiguous():
            self.values.data = self.values.data.contiguous()
        return self
