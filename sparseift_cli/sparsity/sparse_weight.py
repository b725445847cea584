"""One weight with a mask: the tensors that belong to it, and the only place where they change together.

The boolean buffer beside the weight is the mask that everybody sees; `factor` is the same in the weight's dtype, because a
gradient times a boolean mask is several times as slow. Both are changed in place, so whoever holds them stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError
from ..mask.attached import SUFFIX, is_transposed, masks_of, pattern_of
from ..mask.layout import Block, Layout, NofM, parse_pattern
from ..mask.mask import generator_for
from ..mask.saliency import MaskLayout
from .gpu.words import as_words, count, invert_
from .guard import multiply_

Fill = str | Callable[[str, Tensor], Tensor]


class SparseWeight:
    """A parameter, its mask, and what is counted about it. Cells are what moves as one: single weights, or whole blocks.

    Raises:
        UsageError: an N:M pattern although `moves`, or a mask that is not made of whole blocks.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str, form: MaskLayout, *, moves: bool) -> None:
        self.name = name
        self._module, self._buffer = module, attribute + SUFFIX
        self.parameter: nn.Parameter = module._parameters[attribute]  # pyright: ignore[reportAttributeAccessIssue]
        kind = parse_pattern(form.get("pattern", "unstructured"))
        if isinstance(kind, NofM):
            if moves:
                raise UsageError(
                    f"the mask of {name} is {kind.n}:{kind.m}, which only static sparsity keeps",
                    hint="use algorithm static, or an unstructured or block pattern",
                )
            kind = Block(1, 1)
        self.block = kind
        self._layout = Layout(tuple(self.parameter.shape), form.get("groups", 1), form.get("transposed", False))
        self.size = kind.size
        self.moves = moves and self.parameter.requires_grad
        self.ever = self.mask.clone()
        """Which places have ever been active, for the ITOP rate."""
        self.factor = torch.empty_like(self.parameter, requires_grad=False).copy_(self.mask)
        self.nnz = int(self.mask.count_nonzero())
        self.churned_now: int | Tensor = 0
        """Weights that the last update made active; a scalar on the device until somebody asks for `churned`."""
        down, across = self._layout.grid(kind)
        self.places = down * across
        if self.size > 1 and moves and int(self.cells_of_mask().count_nonzero()) * self.size != self.nnz:
            raise UsageError(f"the mask of {name} is not made of whole {kind.rows}x{kind.columns} blocks")

    @property
    def mask(self) -> Tensor:
        """The boolean buffer, as it is now: `module.to` may have replaced it."""
        mask = self._module._buffers[self._buffer]
        assert mask is not None
        return mask

    @property
    def churned(self) -> int:
        """Weights that the last update made active; waits for the device."""
        self.churned_now = int(self.churned_now)
        return self.churned_now

    @property
    def active(self) -> int:
        """Active cells."""
        return self.nnz // self.size

    def cells(self, scores: Tensor) -> Tensor:
        """Scores [*shape] summed over each cell: [*shape] for single weights, else [block rows, block columns]."""
        return scores if self.size == 1 else self._layout.to_blocks(self._layout.to_matrix(scores), self.block)

    def cells_of_mask(self) -> Tensor:
        """Which cells are active."""
        return self.mask if self.size == 1 else self.cells(self.mask.float()) == self.size

    def mask_of_cells(self, cells: Tensor) -> Tensor:
        """The mask [*shape] with these active cells."""
        return cells if self.size == 1 else self._layout.from_matrix(self._layout.from_blocks(cells, self.block))

    @torch.no_grad()
    def become(self, cells: Tensor, state: Iterable[Tensor] = (), nnz: int | None = None) -> None:
        """Give the weight the mask with these active cells, `nnz` weights in all where the caller knows it.

        What it loses becomes zero, in the optimiser's `state` too. So does what it gains, which is zero already unless
        the optimiser has just seen a gradient that was not masked.
        """
        new, lost = self.mask_of_cells(cells), torch.empty_like(self.mask)
        before, after, inactive = as_words(self.mask, new, lost)
        self.churned_now = count(after & (after ^ before))
        invert_(torch.bitwise_and(before, after, out=inactive))
        for tensor in (self.parameter, *state):
            tensor.masked_fill_(lost, 0)
        self._take(new, nnz)

    @torch.no_grad()
    def clear(self, state: Iterable[Tensor] = ()) -> None:
        """Zero at every inactive place: after an optimiser that does not leave it so."""
        tensors = [self.parameter, *state]
        multiply_(tensors, [self.factor] * len(tensors))

    @torch.no_grad()
    def restore(self, mask: Tensor, ever: Tensor, churned: int) -> None:
        """The masks of a saved state, into the tensors that everybody holds; weights outside the mask become zero."""
        self._take(mask.to(self.mask.device))
        self.ever.copy_(ever)
        self.churned_now = churned
        self.parameter.masked_fill_(~self.mask, 0)

    @torch.no_grad()
    def open(self, cells: Tensor, fill: Fill, seed: int) -> None:
        """Take a mask that has all active cells and more; the weights that this adds, all zero, get their first values.

        `fill`: `normal`, of the root mean square of the weights that are active; `zeros`; or a function of (name, weight)
        that gives values [*shape], of which those are taken. A weight that is not zero keeps its value.
        """
        new = self.mask_of_cells(cells)
        added = new & ~self.mask & (self.parameter == 0)
        if callable(fill):
            values = fill(self.name, self.parameter.detach()).to(self.parameter)
            self.parameter.copy_(torch.where(added, values, self.parameter))
        elif fill == "normal" and self.nnz:
            scale = float(self.parameter.double().square().sum() / self.nnz) ** 0.5
            draw = torch.randn(self.parameter.shape, generator=generator_for(seed, self.name, "fill"))
            self.parameter.copy_(torch.where(added, draw.mul_(scale).to(self.parameter), self.parameter))
        self._take(new)

    def _take(self, new: Tensor, nnz: int | None = None) -> None:
        self.mask.copy_(new)
        self.factor.copy_(new.view(torch.uint8))  # several times as fast as from booleans
        ever, active = as_words(self.ever, new)
        ever |= active
        self.nnz = int(new.count_nonzero()) if nnz is None else nnz


# The sparse weights of a model, as a Sparsifier handles them.


def find_weights(
    model: nn.Module, optimizer: Optimizer, pattern: str | None, layouts: Mapping[str, MaskLayout], *, moves: bool
) -> list[SparseWeight]:
    """Every weight with a mask, in the order of the modules; `layouts` over what the module itself tells.

    `pattern`: of all masks; None for the one that lies beside each.

    Raises:
        UsageError: a weight that is trained but not by this optimiser; a layout of a name that is no sparse weight; a
            mask that does not have the pattern, or a pattern that cannot move.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
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
                f"{name} is trained but not in the optimiser", hint="give it to the optimiser, or freeze it"
            )
        found.append(weight)
    unknown = set(layouts) - {w.name for w in found}
    if unknown:
        raise UsageError(f"layouts of {', '.join(sorted(unknown))}: no sparse weights of these names")
    return found
