"""One weight with a mask: the tensors that belong to it, and the only place where they change together.

The boolean buffer beside the weight is the mask that users see. `mask_float` is the same mask in the weight's dtype: a gradient
times a boolean mask takes several times as long. Both change in place, so hooks and CUDA graphs may hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.randomness import generator_for
from ..base.text import some_of
from ..errors import UsageError
from ..mask.attached import is_transposed, mask_beside, masks_of, masks_without_weights, parts_of, pattern_of
from ..mask.layout import Layout, part_name
from ..mask.patterns import UNSTRUCTURED, has_pattern, parse_pattern
from ..mask.saliency import MaskLayout
from .drop_and_grow import extend
from .gpu.primitives import as_words, count, invert_
from .guard import multiply_

Fill = str | Callable[[str, Tensor], Tensor]


class SparseWeight:
    """A parameter [*shape], its mask, and what is counted about it.

    A block, a cell of the mask's pattern, moves as one; often it is a single weight.

    Raises:
        UsageError: a pattern that cannot move (N:M) although the mask `moves`, or a mask that is not made of whole blocks.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str, form: MaskLayout, *, moves: bool) -> None:
        self.name = name
        self._module, self._attribute = module, attribute
        self.parameter: nn.Parameter = module._parameters[attribute]  # pyright: ignore[reportAttributeAccessIssue]
        pattern = parse_pattern(form.get("pattern", "unstructured"))
        if moves and not pattern.movable:
            raise UsageError(
                f"the mask of {name} is {pattern.name}, which only static sparsity keeps",
                hint="use algorithm static, or an unstructured or block pattern",
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

    # --- what others do to the weight ---

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
        if self._module._parameters.get(self._attribute) is not w:
            raise UsageError(
                f"{self.name} is not the parameter any more that the Sparsifier was given",
                hint="make optimiser and Sparsifier after load_state_dict(assign=True), parametrize or a new nn.Parameter",
            )
        if w.dtype != self.mask_float.dtype or w.device != self.mask_float.device:
            self.mask_float = torch.empty_like(w, requires_grad=False).copy_(self.mask)
            self.ever_active = self.ever_active.to(w.device)

    @torch.no_grad()
    def num_outside(self) -> int:
        """How many weights outside the mask are not zero; waits for the device."""
        return int(self.parameter.masked_fill(self.mask, 0).count_nonzero())

    @torch.no_grad()
    def mask_of_nonzeros(self, most: Sequence[int], generator: torch.Generator) -> Tensor | None:
        """Active blocks under which the weight, as it is, keeps every value: those with a non-zero, and random ones up to
        `active_in_parts`. None where a part has more than its number in `most`, or where no mask of the pattern has them.
        """
        parts = self.in_parts(self.block_scores((self.parameter != 0).float()) > 0)
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
        return None if bool(self.parameter.masked_fill(mask, 0).any()) else blocks

    @torch.no_grad()
    def adopt(self, blocks: Tensor) -> None:
        """Take the mask with these active blocks, as from `mask_of_nonzeros`; no weight changes."""
        self._store(self.mask_of_blocks(blocks))
        self.ever_active.copy_(self.mask)

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
    def set_mask(self, blocks: Tensor, state: Iterable[Tensor] = (), nnz: int | None = None) -> None:
        """Give the weight the mask with these active blocks.

        A weight that is not active before and after becomes zero, in every tensor of the optimiser's `state` too. For one that
        grows this matters only where the optimiser was given a gradient without the mask: else it is zero already.

        Args:
            blocks: as from `active_blocks`.
            state: tensors [*shape] of the optimiser.
            nnz: the weights that are active then, where the caller knows that no part has another number of them.
        """
        new, inactive = self.mask_of_blocks(blocks), torch.empty_like(self.mask)
        before, after, words = as_words(self.mask, new, inactive)
        self.num_grown = count(after & (after ^ before))
        invert_(torch.bitwise_and(before, after, out=words))
        for tensor in (self.parameter, *state):
            tensor.masked_fill_(inactive, 0)
        self._store(new, nnz)

    @torch.no_grad()
    def apply_mask(self, state: Iterable[Tensor] = ()) -> None:
        """Zero at every inactive place, in `state` [*shape] too: after an optimiser that does not leave it so."""
        tensors = [self.parameter, *state]
        multiply_(tensors, [self.mask_float] * len(tensors))

    @torch.no_grad()
    def restore(self, mask: Tensor, ever_active: Tensor, num_grown: int) -> int:
        """Copy saved masks, bool [*shape], into the tensors in use; weights outside the mask are zeroed, and counted."""
        self._store(mask.to(self.mask.device))
        self.ever_active.copy_(ever_active)
        self.num_grown = num_grown
        if self._filled is not None and not self.changed:
            self.parameter.masked_fill_(self._filled, 0)  # what was loaded before has zeros there
        self._filled = None
        outside = self.num_outside()
        self.parameter.masked_fill_(~self.mask, 0)
        return outside

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


def find_weights(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    pattern: str | None,
    layouts: Mapping[str, MaskLayout],
    *,
    moves: bool,
) -> list[SparseWeight]:
    """Every weight with a mask, in the order of the modules.

    Args:
        pattern: of all masks; None for the one kept beside each mask.
        layouts: pattern, groups and transposition of single weights, in place of what their modules have.
        moves: whether any mask will change.

    Raises:
        UsageError: a weight that is trained but by none of the optimisers; a mask whose weight is no parameter any more; a
            layout of a name that is no sparse weight; a mask that does not have the pattern, or a pattern that cannot move.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    lost = masks_without_weights(model)
    if lost:
        raise UsageError(
            f"{some_of(lost)} {'has' if len(lost) == 1 else 'have'} a mask and is no parameter any more",
            hint="parametrize or prune the dense model, and transform that",
        )
    found = list[SparseWeight]()
    for name in masks_of(model):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        form: MaskLayout = {
            "pattern": pattern or pattern_of(module, attribute),
            "groups": getattr(module, "groups", 1),
            "transposed": is_transposed(module),
        }
        form |= layouts.get(name, MaskLayout())
        weight = SparseWeight(name, module, attribute, form, moves=moves)
        if weight.parameter.requires_grad and id(weight.parameter) not in held:
            raise UsageError(
                f"{name} is trained but not in the optimiser",
                hint="give all optimisers, Sparsifier(model, [muon, adamw]), or freeze it",
            )
        found.append(weight)
    unknown = set(layouts) - {w.name for w in found}
    if unknown:
        raise UsageError(f"layouts of {', '.join(sorted(unknown))}: no sparse weights of these names")
    return found
