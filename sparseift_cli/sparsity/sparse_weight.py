"""One weight with a mask: the tensors that belong to it, and the only place where they change together.

The boolean buffer beside the weight is the mask that users see. `mask_float` is the same mask in the weight's dtype: a gradient
times a boolean mask takes several times as long. Both change in place, so hooks and CUDA graphs may hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base.randomness import generator_for
from ..errors import UsageError
from ..kernels.layout import BlockLayout
from ..kernels.storage import CompactWeight
from ..mask.attached import mask_beside, parts_of
from ..mask.layout import Layout, part_name
from ..mask.patterns import UNSTRUCTURED, has_pattern, parse_pattern
from ..mask.saliency import MaskLayout
from .algorithms import GrownState
from .drop_and_grow import extend
from .gpu.primitives import as_words, count, invert_
from .guard import multiply_

Fill = str | Callable[[str, Tensor], Tensor]


class SparseWeight:
    """A parameter [*shape], its mask, and what is counted about it. `block_weight` has the same without the zeros.

    A block, a cell of the mask's pattern, moves as one; often it is a single weight.

    Raises:
        UsageError: a pattern that cannot move (N:M) although the mask `moves`, or a mask that is not made of whole blocks.
    """

    stores_zeros: ClassVar[bool] = True
    """Whether the parameter has places outside the mask, so that gradients must be masked."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        attribute: str,
        form: MaskLayout,
        *,
        moves: bool,
        keeps: tuple[bool, bool] = (False, False),
    ) -> None:
        self.name = name
        self._module, self._attribute = module, attribute
        self.parameter: nn.Parameter = module._parameters[attribute]  # pyright: ignore[reportAttributeAccessIssue]
        pattern = parse_pattern(form.get("pattern", "unstructured"))
        if moves and not pattern.moves_with(*keeps):
            balanced = pattern.moves_with(True, True)
            raise UsageError(
                f"the mask of {name} is {pattern.name}, which only "
                + ("static sparsity and balanced growth keep" if balanced else "static sparsity keeps"),
                hint="use algorithm static, "
                + ("growth balanced with regrow allow, " if balanced else "")
                + "or an unstructured or block pattern",
            )
        self.pattern, self._wanted = pattern if pattern.movable else UNSTRUCTURED, pattern
        self._layout = Layout(tuple(self.parameter.shape), form.get("groups", 1), form.get("transposed", False))
        self.block_size = self.pattern.unit
        """Weights in a block."""
        self._parts = parts_of(module, attribute)
        self.moves = moves and self.parameter.requires_grad
        self.ever_active = self.mask.clone()
        """Where a weight has ever been active, bool [*shape]; for the ITOP rate."""
        self.mask_float = torch.empty_like(self.parameter, requires_grad=False).copy_(self.mask)
        self._count()
        self._version = self.parameter._version
        self._filled: Tensor | None = None
        self.num_grown: int | Tensor = 0
        """Weights that the last update made active: an int, or an int64 scalar on the device that no one has read yet."""
        self.num_blocks = self.pattern.places(self._layout) // self.block_size
        if (
            not self.single_weights
            and moves
            and int(self.active_blocks().count_nonzero()) * self.block_size != self.nnz
        ):
            raise UsageError(f"the mask of {name} is not made of whole {pattern.name} blocks")

    @property
    def mask(self) -> Tensor:
        """The boolean buffer [*shape], looked up each time: `module.to` may have replaced it."""
        mask = mask_beside(self._module, self._attribute)
        assert mask is not None
        return mask

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight with its zeros."""
        return tuple(self.parameter.shape)

    @property
    def layout(self) -> Layout:
        """The weight as a matrix, of outputs and what each reads."""
        return self._layout

    @property
    def numel(self) -> int:
        """The places of the weight, zeros included."""
        return prod(self.weight_shape)

    @property
    def saved_mask(self) -> Tensor:
        """The mask as a state dict keeps it: bool [*shape], or [block rows, block columns] of a compact weight."""
        return self.mask

    @property
    def num_ever_active(self) -> int:
        """Weights that have ever been active; waits for the device."""
        return int(self.ever_active.count_nonzero())

    def dense_weight(self) -> Tensor:
        """The weight [*shape] with its zeros, without its gradient."""
        return self.parameter.detach()

    def new_state(self) -> Tensor:
        """A float32 tensor of zeros [*shape], for an algorithm's own numbers."""
        return torch.zeros_like(self.parameter, dtype=torch.float32, requires_grad=False)

    # --- what others do to the weight ---

    def note_loaded_state(self) -> None:
        """The optimiser's state was loaded, and nothing else with it: it is of the weights that are loaded too."""

    def note_version(self) -> None:
        """From here on `changed` is whether something else writes into the weight."""
        self._version = self.parameter._version

    def keep_fill(self) -> None:
        """The values that `densify` gave the weight are trained from here on: `restore` does not take them away."""
        self._filled = None

    @property
    def changed(self) -> bool:
        """Whether the weight was written to since `note_version`, or is another tensor, dtype or device than it was."""
        w = self.parameter
        same = self._module._parameters.get(self._attribute) is w and w.dtype == self.mask_float.dtype
        return not same or w._version != self._version or w.device != self.mask_float.device

    def follow(self) -> None:
        """Take dtype and device of the weight, which `model.to(...)` or `.type(...)` may have changed.

        Raises:
            UsageError: the module has another parameter now, which is not the one that this object and the optimiser have.
        """
        w = self.parameter
        self._require_same(self._module._parameters.get(self._attribute))
        if w.dtype != self.mask_float.dtype or w.device != self.mask_float.device:
            self.mask_float = torch.empty_like(w, requires_grad=False).copy_(self.mask)
            self.ever_active = self.ever_active.to(w.device)

    def _require_same(self, parameter: Tensor | None) -> None:
        if parameter is not self.parameter:
            raise UsageError(
                f"{self.name} is not the parameter any more that the Sparsifier was given",
                hint="make optimiser and Sparsifier after load_state_dict(assign=True), parametrize or a new nn.Parameter",
            )

    @torch.no_grad()
    def clear_outside(self, tensors: Iterable[Tensor]) -> bool:
        """Zero tensors [*shape] outside the mask; whether one was not zero there. Waits for the device."""
        inactive = ~self.mask
        spoiled = [t for t in tensors if bool(t[inactive].any())]
        for tensor in spoiled:
            tensor.masked_fill_(inactive, 0)
        return bool(spoiled)

    @torch.no_grad()
    def num_outside(self) -> int:
        """How many weights outside the mask are not zero; waits for the device."""
        return int(self.parameter.masked_fill(self.mask, 0).count_nonzero())

    @torch.no_grad()
    def mask_of_nonzeros(self, most: Sequence[int], generator: torch.Generator) -> Tensor | None:
        """Active blocks under which the weight, as it is, keeps every value: those with a non-zero, and random ones up to
        `active_in_parts`. None where a part has more than its number in `most`, or where no mask of the pattern has them.
        """
        weight = self.dense_weight()
        parts = self.in_parts(self.block_scores((weight != 0).float()) > 0)
        active = [int(part.count_nonzero()) for part in parts]
        if any(n > limit for n, limit in zip(active, most, strict=True)):
            return None
        counts = zip(parts, active, self.active_in_parts, strict=True)
        blocks = self.whole([extend(part, n, planned, generator) for part, n, planned in counts])
        mask, layout = self.mask_of_blocks(blocks), self._layout
        if self._wanted is not self.pattern and not has_pattern(
            mask, self._wanted.name, layout.groups, layout.transposed
        ):
            return None  # N:M
        return None if bool(weight.masked_fill(mask, 0).any()) else blocks

    @torch.no_grad()
    def adopt(self, blocks: Tensor, state: Iterable[Tensor] = ()) -> None:
        """Take the mask with these active blocks, as from `mask_of_nonzeros`; no weight changes.

        Args:
            blocks: as from `active_blocks`.
            state: of the optimiser, [*shape of the parameter]; what it has outside the mask is left to `clear_outside`.
        """
        self._store(self.mask_of_blocks(blocks))
        self.ever_active.copy_(self.mask)

    def state_of_other_form(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """A tensor [n, *unit] of the optimiser, saved when blocks alone were stored, as one of this weight [*shape].

        Any other tensor is returned as it is.

        Args:
            mask: as it was saved beside the tensor, bool [block rows, block columns].
        """
        side, taps = self.pattern.sides[0], prod(self.weight_shape[2:])
        count = int(mask.count_nonzero())
        unit = (taps, side, side) if self.parameter.dim() > 2 else (side, side)
        if tuple(mask.shape) == self.weight_shape or tuple(tensor.shape) != (count, *unit):
            return tensor
        layout = BlockLayout(self.weight_shape, self._layout.transposed, side, count)
        return CompactWeight.at(tensor, layout, mask).dense()

    # --- masks ---

    def read_num_grown(self) -> int:
        """`num_grown` as an int; waits for the device."""
        self.num_grown = int(self.num_grown)
        return self.num_grown

    # --- parts: rows that are used at different numbers of positions, each with its own number of non-zeros ---

    @property
    def one_part(self) -> bool:
        """Whether the non-zeros of the weight are counted together."""
        return not self._parts

    @property
    def part_names(self) -> tuple[str, ...]:
        """A name for each part; the weight's own where it is one."""
        return tuple(part_name(self.name, *rows) for rows in self._parts) or (self.name,)

    def in_parts(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """What `active_blocks` or `block_scores` gives, cut into the parts: views of the rows of each."""
        side = 1 if self.single_weights else self.pattern.sides[0]
        return tuple(blocks[start // side : stop // side] for start, stop in self._parts) or (blocks,)

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `in_parts`."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    @property
    def groups_of_parts(self) -> int:
        """Equal blocks of rows of `part_to_matrix` whose columns are other inputs."""
        return self._layout.groups if self.one_part else 1

    def part_to_matrix(self, part: Tensor) -> Tensor:
        """One of `in_parts` as a matrix, whose rows belong to outputs: [R, C]."""
        return self._layout_of(part).to_matrix(part) if self.single_weights else part

    def part_from_matrix(self, matrix: Tensor, part: Tensor) -> Tensor:
        """A matrix [R, C] as the part of which `part_to_matrix` has that form."""
        return self._layout_of(part).from_matrix(matrix) if self.single_weights else matrix

    def _layout_of(self, part: Tensor) -> Layout:
        return Layout(tuple(part.shape), self.groups_of_parts, self._layout.transposed)

    def _count(self) -> None:
        self.nnz = int(self.mask.count_nonzero())
        self.active_in_parts = [self.num_active]
        """Active blocks of each part."""
        if self._parts:
            self.active_in_parts = [int(part.count_nonzero()) for part in self.in_parts(self.active_blocks())]

    # --- blocks ---

    @property
    def single_weights(self) -> bool:
        """Whether a block is a single weight and every weight is one, so that masks of blocks are [*shape]."""
        return self.pattern.unrestricted

    @property
    def num_active(self) -> int:
        """Active blocks."""
        return self.nnz // self.block_size

    def block_scores(self, scores: Tensor) -> Tensor:
        """Scores [*shape] summed over each block: [*shape] for single weights, else [block rows, block columns]."""
        return scores if self.single_weights else self.pattern.to_cells(self._layout, self._layout.to_matrix(scores))

    def active_blocks(self) -> Tensor:
        """Which blocks are active: bool [*shape] for single weights, else [block rows, block columns]."""
        return self.mask if self.single_weights else self.block_scores(self.mask.float()) == self.block_size

    def mask_of_blocks(self, blocks: Tensor) -> Tensor:
        """The mask [*shape] with these active blocks, as `active_blocks` has them."""
        if self.single_weights:
            return blocks
        return self._layout.from_matrix(self.pattern.from_cells(self._layout, blocks))

    @torch.no_grad()
    def set_mask(
        self,
        blocks: Tensor,
        state: Sequence[Tensor] = (),
        nnz: int | None = None,
        *,
        grown_state: GrownState = "zero",
    ) -> None:
        """Give the weight the mask with these active blocks.

        A weight that is not active before and after becomes zero, in every tensor of the optimiser's `state` too. For one that
        grows this matters only where the optimiser was given a gradient without the mask: else it is zero already.

        Args:
            blocks: as from `active_blocks`.
            state: tensors [*shape] of the optimiser.
            nnz: the weights that are active then, where the caller knows that no part has another number of them.
            grown_state: what `state` has for weights that grow: `zero`, or the `mean` of those that are active before and after.
        """
        new, inactive = self.mask_of_blocks(blocks), torch.empty_like(self.mask)
        before, after, words = as_words(self.mask, new, inactive)
        self.num_grown = count(after & (after ^ before))
        invert_(torch.bitwise_and(before, after, out=words))
        for tensor in (self.parameter, *state):
            tensor.masked_fill_(inactive, 0)
        if grown_state == "mean":
            fill_with_mean(state, new & inactive, self.numel - inactive.count_nonzero())
        self._store(new, nnz)

    @torch.no_grad()
    def apply_mask(self, state: Iterable[Tensor] = ()) -> None:
        """Zero at every inactive place, in `state` [*shape] too: after an optimiser that does not leave it so."""
        tensors = [self.parameter, *state]
        multiply_(tensors, [self.mask_float] * len(tensors))

    @torch.no_grad()
    def restore(self, mask: Tensor, ever_active: Tensor, num_grown: int) -> int:
        """Copy saved masks into the tensors in use; weights outside the mask are zeroed, and counted.

        Args:
            mask, ever_active: bool, as `saved_mask` of this weight, or of the same one stored compactly.
            num_grown: what the last update before made active.
        """
        self._store(self._whole_mask(mask).to(self.mask.device))
        self.ever_active.copy_(self._whole_mask(ever_active))
        self.num_grown = num_grown
        if self._filled is not None and not self.changed:
            self.parameter.masked_fill_(self._filled, 0)  # what was loaded before has zeros there
        self._filled = None
        outside = self.num_outside()
        self.parameter.masked_fill_(~self.mask, 0)
        return outside

    def _whole_mask(self, mask: Tensor) -> Tensor:
        """A saved mask, [*shape] or [block rows, block columns], as [*shape]."""
        return mask if mask.shape == self.mask.shape else self.mask_of_blocks(mask)

    def num_nonzeros(self, mask: Tensor) -> int:
        """Weights that a saved mask, compact or not, has active."""
        count = int(mask.count_nonzero())
        return count if tuple(mask.shape) == self.weight_shape else count * self.block_size

    def fits(self, mask: Tensor) -> bool:
        """Whether a saved mask is one of this weight by its shape, compact or not."""
        return tuple(mask.shape) in (self.weight_shape, self.pattern.grid(self._layout))

    @torch.no_grad()
    def densify(self, blocks: Tensor, fill: Fill, seed: int) -> None:
        """Take a mask that has all active blocks and more; the weights that this adds get their first values.

        Args:
            blocks: as from `active_blocks`.
            fill: `normal`, of the root mean square of the weights that are active now; `zeros`; or a function of (name,
                weight [*shape]) to values [*shape], of which those are taken. A weight that is not zero keeps its value.
            seed: of `normal`.
        """
        new = self.mask_of_blocks(blocks)
        added = new & ~self.mask & (self.parameter == 0)
        if callable(fill):
            values = fill(self.name, self.parameter.detach()).to(self.parameter)
            self.parameter.copy_(torch.where(added, values, self.parameter))
        elif fill == "normal" and self.nnz:
            scale = float(self.parameter.double().square().sum() / self.nnz) ** 0.5
            draw = torch.randn(self.parameter.shape, generator=generator_for(seed, self.name, "fill"))
            self.parameter.copy_(torch.where(added, draw.mul_(scale).to(self.parameter), self.parameter))
        self._filled = added
        self._store(new)

    def _store(self, new: Tensor, nnz: int | None = None) -> None:
        self.mask.copy_(new)
        self.mask_float.copy_(new.view(torch.uint8))  # several times as fast as from booleans
        ever, active = as_words(self.ever_active, new)
        ever |= active
        if nnz is None:
            self._count()


def fill_with_mean(tensors: Iterable[Tensor], grown: Tensor, others: Tensor) -> None:
    """Set tensors [*] of an optimiser, where `grown`, to the mean over the `others`, which are all that is not zero.

    Summed in float64, so that weights with zeros between them and stored blocks get the same. Nothing waits for the device.

    Args:
        grown: bool, [*] or a shape that is broadcast to it.
        others: how many there are, an int64 scalar; 0 gives zero.
    """
    for tensor in tensors:
        if tensor.is_floating_point():
            mean = tensor.sum(dtype=torch.float64) / others.clamp(min=1)
            tensor.masked_fill_(grown, mean.to(tensor.dtype))
