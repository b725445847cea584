"""A weight of which only the blocks in its mask are stored: the same interface as `SparseWeight`, without zeros anywhere.

The parameter is `values` [n, *unit] of a `kernels.layer.BlockLayer`. Its gradient and the optimiser's state have that shape, so
nothing has to be masked. Masks here are masks of blocks, bool [R, C]. Scores are still those of the dense weight [*shape],
which exists during a mask update, one layer at a time: algorithms see no difference, and masks are those of masked training.

`BlockGradients` has the dense gradients that such layers do not compute by themselves, at the steps that need them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.text import some_of
from ..kernels.copies import note_trained
from ..kernels.layer import BlockLayer
from ..kernels.watch import unwatch_gradient, watch_gradient
from ..mask.attached import capturing, parts_of
from ..mask.layout import Layout
from ..mask.patterns import Block
from .algorithms import GrownState
from .sparse_weight import SparseWeight, fill_with_mean


class BlockWeight(SparseWeight):
    """The weight of a `BlockLayer`. `name` is that of the dense weight: random choices and plans go by it."""

    stores_zeros = False

    def __init__(self, name: str, layer: BlockLayer, *, moves: bool) -> None:
        self.name, self._layer = name, layer
        note_trained(layer)
        self.parameter = layer.values  # pyright: ignore[reportAttributeAccessIssue]
        self._layout = Layout(layer.weight_shape, transposed=layer.transposed)
        self.pattern = self._wanted = Block(layer.block, layer.block * self._layout.taps)
        self.block_size = self.pattern.unit
        self._parts = parts_of(layer, "weight")
        self.moves = moves and self.parameter.requires_grad
        self.ever_active = layer.block_mask
        """Where a block has ever been active, bool [R, C]."""
        self._mask = layer.block_mask
        """Where blocks were last known to be, bool [R, C]: weights that are loaded bring others."""
        self._state_follows = True
        """Whether the optimiser's state is of those blocks. Where it was loaded, it is of the blocks that are loaded with it."""
        self._count()
        self._version = self.parameter._version
        self.num_grown = 0
        self.num_blocks = self.ever_active.numel()

    @property
    def layer(self) -> BlockLayer:
        """The layer whose weight it is."""
        return self._layer

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self._layer.weight_shape

    @property
    def mask(self) -> Tensor:
        """Bool [*shape], made anew each time."""
        return self._layer.weight_mask

    @property
    def saved_mask(self) -> Tensor:
        """Bool [R, C]."""
        return self._layer.block_mask

    @property
    def num_ever_active(self) -> int:
        return int(self.ever_active.count_nonzero()) * self.block_size

    def dense_weight(self) -> Tensor:
        """The weight [*shape], made anew each time."""
        return self._layer.dense()

    def new_state(self) -> Tensor:
        """Zeros [*shape]: an algorithm's own numbers are of every place."""
        return torch.zeros(self.weight_shape, dtype=torch.float32, device=self.parameter.device)

    # --- what others do to the weight ---

    def keep_fill(self) -> None:
        """Nothing was filled."""

    @property
    def changed(self) -> bool:
        w = self.parameter
        return self._layer.values is not w or w._version != self._version or w.device != self.ever_active.device

    def follow(self) -> None:
        self._require_same(self._layer.values)
        self.ever_active = self.ever_active.to(self.parameter.device)
        self._mask = self._mask.to(self.parameter.device)

    def note_loaded_state(self) -> None:
        self._state_follows = False

    def note_version(self) -> None:
        super().note_version()
        self._state_follows = True

    @torch.no_grad()
    def num_outside(self) -> int:
        """Non-zeros that were loaded into blocks where none was stored; blocks that brought zeros alone go back."""
        layer = self._layer
        if torch.equal(layer.block_mask, self._mask):
            return 0
        outside = ~self._mask[layer.rows.long(), layer.columns.long()]
        found = int(self.parameter[outside].count_nonzero())
        if not found:
            layer.move_(self._mask)
        return found

    @torch.no_grad()
    def adopt(self, blocks: Tensor, state: Iterable[Tensor] = ()) -> None:
        """As `SparseWeight.adopt`, of blocks, bool [R, C]; `state` [n, *unit] goes with its blocks."""
        self._layer.move_(blocks)
        if self._state_follows:
            self._layer.follow_(self._mask, state)
        self._note_mask(blocks)
        self.ever_active.copy_(blocks)

    def state_of_other_form(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """A tensor [*shape] of the optimiser, saved when the weight had zeros, as [n, *unit]; any other one as it is.

        Args:
            mask: as it was saved; this weight has it already.
        """
        return self._layer.blocks_of(tensor) if tuple(tensor.shape) == self.weight_shape else tensor

    def _note_mask(self, blocks: Tensor) -> None:
        self._mask, self._state_follows = blocks.clone(), True

    def clear_outside(self, tensors: Iterable[Tensor]) -> bool:
        """False for any tensors [n, *unit]: there is no place outside the mask."""
        return False

    def apply_mask(self, state: Iterable[Tensor] = ()) -> None:
        """Nothing, for any state [n, *unit]: there is no place outside the mask."""

    # --- masks of blocks ---

    def _count(self) -> None:
        self.nnz = self.parameter.numel()
        self.active_in_parts = [self.num_active]
        if self._parts:
            self.active_in_parts = [int(part.count_nonzero()) for part in self.in_parts(self.active_blocks())]

    def active_blocks(self) -> Tensor:
        """Bool [R, C]."""
        return self._layer.block_mask

    @torch.no_grad()
    def set_mask(
        self,
        blocks: Tensor,
        state: Sequence[Tensor] = (),
        nnz: int | None = None,
        before: Tensor | None = None,
        *,
        grown_state: GrownState = "zero",
    ) -> None:
        """Move the blocks to those of `blocks`, bool [R, C]; a block that grows is zero, in the optimiser's `state` as
        `grown_state` says.

        `before` is `active_blocks()`, where the caller has it. With both on the CPU, nothing waits for a GPU.
        """
        before = self.active_blocks() if before is None else before
        grown = blocks & ~before
        self.num_grown = grown.count_nonzero() * self.block_size
        self._layer.move_(blocks, state, before)
        if grown_state == "mean":
            stored = grown.flatten()[blocks.flatten()].to(self.parameter.device, non_blocking=True)
            for tensor in state:  # [n, *unit], or means over part of a block
                others = (~stored).count_nonzero() * tensor[0].numel()
                fill_with_mean([tensor], stored.view(-1, *(1 for _ in tensor.shape[1:])), others)
        blocks = blocks.to(self.parameter.device, non_blocking=True)
        self._note_mask(blocks)
        self.ever_active |= blocks
        if nnz is None:
            self._count()

    def drop_scores_by_magnitude(self) -> Tensor:
        """Sums of magnitudes over each stored block: float32 [n], in the order of `active_blocks`."""
        return self.parameter.detach().float().abs().flatten(1).sum(1)

    @torch.no_grad()
    def restore(self, mask: Tensor, ever_active: Tensor, num_grown: int) -> int:
        """As `SparseWeight.restore`, of masks [*shape] or [R, C]; 0, as no weight is outside the mask."""
        blocks = self._blocks_of(mask).to(self.parameter.device)
        self._layer.move_(
            blocks
        )  # with its values: of a dense checkpoint, blocks that are all zero were elsewhere until now
        self._note_mask(blocks)
        self.ever_active.copy_(self._blocks_of(ever_active))
        self.num_grown = num_grown
        self._count()
        return 0

    def _blocks_of(self, mask: Tensor) -> Tensor:
        """A saved mask, [*shape] of a masked-dense run or [R, C], as [R, C]."""
        if tuple(mask.shape) == self.weight_shape:
            return self.block_scores(mask.float()) > 0
        return mask


@dataclass(slots=True)
class _Collected:
    """The dense gradient of one weight, as far as it was computed in this step.

    A pass is one backward pass. It counts when the next one begins or the step ends: if its gradient was added to that of the
    parameter, as `backward` does and `torch.autograd.grad` does not.
    """

    expected: int = 0
    """How often a step computes it: passes x uses of the layer; 0 is not known yet."""
    surprises: int = 0
    """Steps that computed it more or less often. After `_SURPRISES` of them it is complete at the end of a step alone."""
    calls: int = 0
    dense: Tensor | None = None
    backward: int = -1
    """The pass that was seen last, and what belongs to it alone:"""
    calls_in_pass: int = 0
    dense_of_pass: Tensor | None = None
    before: Tensor | None = None
    """The gradient of the parameter when the pass began, and its version."""
    version: int = 0
    scores: Tensor | None = None
    scored: int = -1
    """The pass in which scores were made."""
    stored: Tensor | None = None
    """Of the gradient that scores were made of: what it is at the stored blocks [n, *unit]."""
    late: bool = False
    """A gradient came when `scores` had been made already."""
    half: bool = False
    """It was computed in float16, where a scaled loss overflows now and then."""

    def usable(self, tensor: Tensor) -> bool:
        """False where a float16 gradient overflowed: the update is lost, as it is for a step that a GradScaler skips."""
        return not self.half or bool(tensor.isfinite().all())

    @property
    def may_be_complete(self) -> bool:
        """Whether this was the last gradient of the step, as far as earlier steps tell."""
        return self.surprises < _SURPRISES and self.calls + self.calls_in_pass == self.expected

    def thrown_away(self, gradient: Tensor) -> bool:
        """Whether the gradient [n, *unit] of the parameter was set to zero since the last pass. Rarely waits for the device."""
        before, version = self.before, gradient._version
        if not self.calls + self.calls_in_pass or (gradient is before and version - self.version in (0, 1)):
            return False
        return not (before is None and version == 0) and not bool(gradient.any())

    def end_pass(self, gradient: Tensor | None) -> None:
        """Count the last pass, if it has added to the gradient [n, *unit] of the parameter."""
        untouched = gradient is None or (gradient is self.before and gradient._version == self.version)
        if untouched and self.calls_in_pass:
            self.surprises = _SURPRISES  # no number of passes says that a gradient is complete in such a loop
            if self.scored == self.backward:
                self.scores, self.late = None, self.late or self.calls > 0  # the sum of those before is gone
        elif not untouched:
            self.late = self.late or (
                self.scores is not None and self.scored != self.backward and self.calls_in_pass > 0
            )
            self.calls += self.calls_in_pass
            self.dense = _sum(self.dense, self.dense_of_pass, None if gradient is None else gradient.dtype)
        self.calls_in_pass, self.dense_of_pass = 0, None


def _sum(one: Tensor | None, other: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The sum of two tensors of one shape in `dtype`; where one of them is None, the other as it is."""
    if one is None or other is None:
        return other if one is None else one
    return one.to(dtype) + other


_SURPRISES = 2
_SAME_DIRECTION = 0.7
"""Cosine above which two gradients are the same but for rounding, or clipping of single values."""
Reduce = Callable[[BlockWeight, Tensor], Tensor]


class BlockGradients:
    """Collects dL/dw [*shape] at every place of weights that are stored compactly, at the steps for which it is asked.

    The first step of a program counts how often the gradient of each weight is computed in a step (micro-batches, uses of the
    layer). From then on, where scores need the gradient alone, they are made as soon as it is complete, and it is freed: one
    dense gradient exists at a time. With several micro-batches a step, the sums of all layers exist until the last of them;
    those of layers that take part now more and now less often, as experts do, until the end of the step.

    Where training is distributed, a gradient is averaged as soon as it is complete only if every process computes every one
    (`alike`); otherwise at the end of the step, where processes without one add zeros.

    Args:
        weights: those whose gradients are wanted.
        reduce: (weight, gradient [*shape]) to the scores [R, C] by which blocks grow; None where these need more than it.
    """

    def __init__(self, weights: Sequence[BlockWeight], reduce: Reduce | None) -> None:
        self._reduce = reduce
        self._weights = {w.layer: w for w in weights}
        self._found = {w: _Collected() for w in weights}
        self._collecting = False
        self.alike = False

    def expect(self, wanted: bool) -> None:
        """Say, after a step, whether the backward passes of the next one need dense gradients."""
        seen = any(not c.expected or c.calls or c.calls_in_pass for c in self._found.values())
        if not wanted and not self._collecting and not seen:
            return  # nothing is watched, and nothing was
        self._collecting = wanted
        for w, found in self._found.items():
            found.end_pass(w.parameter.grad)
            surprise = found.late or (found.calls and found.expected not in (0, found.calls))
            self._found[w] = _Collected(found.calls or found.expected, found.surprises + bool(surprise))
            if wanted or not self._found[w].expected:
                watch_gradient(w.layer, self)
            else:
                unwatch_gradient(w.layer, self)

    def close(self) -> None:
        """Watch no layer any more."""
        for w in self._found:
            unwatch_gradient(w.layer, self)

    @torch.no_grad()
    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By weight name, what was collected in this step: dense gradients [*shape], and scores [R, C] where these were made."""
        gradients, scores, late = dict[str, Tensor](), dict[str, Tensor](), list[str]()
        stored = dict[BlockWeight, Tensor]()
        for w, found in self._found.items():
            found.end_pass(w.parameter.grad)
            if w.parameter.grad is None:
                found.dense = found.scores = None  # thrown away, or never a gradient of the parameter
        for w in self._found if self._early else self._of_any_process():
            found = self._found[w]
            if found.late:
                late.append(w.name)
            elif found.scores is not None and found.usable(found.scores):
                scores[w.name] = found.scores
                stored |= {} if found.stored is None else {w: found.stored}
            elif found.dense is not None and found.usable(dense := self._finished(w, found.dense)):
                stored[w] = w.layer.blocks_of(dense)
                gradients[w.name] = _unscaled(w, dense, stored[w])
        if late:
            warnings.warn(
                f"the loop made more backward passes in this step than before: the masks of {some_of(late)} are not updated "
                "in it",
                stacklevel=4,
            )
        for name in (others := _names_of_others(stored)):
            gradients.pop(name, None)
            scores.pop(name, None)
        if others:
            warnings.warn(
                f"the gradients of {some_of(others)} are not those of the backward passes times a factor, and layers that "
                "store blocks alone have no others at every place: their masks are not updated in this step. Change gradients "
                "after sparsifier.step()",
                stacklevel=4,
            )
        return gradients, scores

    @torch.no_grad()
    def add(self, layer: BlockLayer, dense_gradient: Callable[[], Tensor]) -> None:
        """A backward pass is at a weight gradient; the dense one [*shape] is in the dtype of the product."""
        w = self._weights[layer]
        if capturing(w.parameter):
            return
        found, backward, gradient = self._found[w], torch._C._current_graph_task_id(), w.parameter.grad
        if backward != found.backward:
            if gradient is None or found.thrown_away(gradient):  # by zero_grad
                found = self._found[w] = _Collected(found.expected, found.surprises)
            found.end_pass(gradient)
            found.backward, found.before = backward, gradient
            found.version = 0 if gradient is None else gradient._version
        found.calls_in_pass += 1
        if not self._collecting or found.scores is not None:
            return
        more = dense_gradient()
        found.half = more.dtype == torch.float16
        found.dense_of_pass = _sum(found.dense_of_pass, more, w.parameter.dtype)
        if self._reduce is not None and self._early and found.may_be_complete:
            whole = _sum(found.dense, found.dense_of_pass, w.parameter.dtype)
            assert whole is not None
            whole = self._finished(w, whole)
            found.scores, found.scored, found.stored = self._reduce(w, whole), backward, w.layer.blocks_of(whole)
            found.dense = found.dense_of_pass = None

    @property
    def _early(self) -> bool:
        """Whether a gradient may be averaged as soon as it is complete here."""
        return self.alike or _processes() == 1

    def _of_any_process(self) -> list[BlockWeight]:
        """The weights of which any process has a gradient; here it is zero where this one has none."""
        weights = list(self._found)
        has = torch.tensor([self._found[w].dense is not None for w in weights], dtype=torch.int32)
        has = has.to(weights[0].parameter.device)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        chosen = [w for w, any_has in zip(weights, has.tolist(), strict=True) if any_has]
        for w in chosen:
            if self._found[w].dense is None:
                self._found[w].dense = torch.zeros(w.weight_shape, dtype=w.parameter.dtype, device=w.parameter.device)
        return chosen

    def _finished(self, w: BlockWeight, dense: Tensor) -> Tensor:
        """The gradient in the weight's dtype, averaged over all processes."""
        dense = dense.to(w.parameter.dtype)
        if (world := _processes()) > 1:
            dense = dense.contiguous()  # it may be transposed here, and zeros in other processes are not
            dist.all_reduce(dense)
            dense /= world
        return dense


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _names_of_others(stored: Mapping[BlockWeight, Tensor]) -> list[str]:
    """The weights whose gradient [n, *unit] has another direction than what was collected at the stored blocks."""
    weights = [w for w in stored if w.parameter.grad is not None]
    if not weights:
        return []
    cosines = list[Tensor]()
    for w in weights:
        one, other = w.parameter.grad.float().flatten(), stored[w].float().flatten()  # pyright: ignore[reportOptionalMemberAccess]
        cosines.append((one @ other) / (one.norm() * other.norm()))  # NaN, which is not less, where one of them is zero
    found = torch.stack([c.to(cosines[0].device) for c in cosines]).tolist()
    return [w.name for w, cosine in zip(weights, found, strict=True) if cosine < _SAME_DIRECTION]


def _unscaled(w: BlockWeight, dense: Tensor, stored: Tensor) -> Tensor:
    """A dense gradient [*shape], multiplied by what the compact one was multiplied by since the backward pass.

    `stored` is what the dense one is at the stored blocks [n, *unit].
    Loops unscale gradients (fp16), or divide them by a number of micro-batches, before `Sparsifier.step`.
    """
    gradient = w.parameter.grad
    if gradient is None:
        return dense
    largest = torch.stack([gradient.abs().max(), stored.abs().max()]).double().tolist()
    ratio = largest[0] / largest[1] if largest[1] else 1.0
    return dense if abs(ratio - 1) < 0.01 else dense * ratio
