"""Sparse training in any loop: one object beside the optimiser, one line between `backward` and the optimiser's step.

    sparsifier = Sparsifier(model, optimizer, algorithm="rigl", total_steps=N)
    for x, y in loader:
        loss(model(x), y).backward()  # with accumulation: all of it
        sparsifier.step()             # after all-reduce, unscaling and the non-finite check; before clipping
        optimizer.step()
        optimizer.zero_grad()

Zeros are stored in the weights, so the forward pass needs no masks. `step` multiplies gradients by their masks; then weights
and optimiser state of inactive places stay exactly zero under SGD, Adam and AdamW. At a mask update `step` keeps the dense
gradient, and a hook after the optimiser's step drops and grows weights: by their new values, and by that gradient.

    step t:  backward ─► Sparsifier.step(): keep dense gradients, prune for step t + 1, mask gradients
                      ─► clip ─► optimizer.step() ─► hook: observe, drop and grow, zero what changed

Masks are in no state dict of the model. The optimiser's brings them, with the schedule, so a program that saves model and
optimiser resumes to the bit; of weights that come alone the masks are read from their zeros (`agreement`).

A grown weight starts at zero with zero state, so Adam's first step on it is large: with betas .9, .999 and after many steps
it is (1 - .9) / sqrt(1 - .999) = 3.16 times the learning rate, whatever the gradient. `grown_state: mean` gives it the mean
state of its layer instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.randomness import generator_for
from ..base.text import some_of
from ..errors import UsageError, one_of
from ..kernels.copies import warn_of_averages
from ..mask.attached import capturing, copy_masks, unwatch, unwrapped
from ..mask.patterns import is_chosen, parse_pattern
from ..mask.saliency import MaskLayout
from .agreement import Adopted, clear_states, fit_masks, in_words, setting_changes
from .algorithms import MaskAlgorithm, WeightView, choose_algorithm
from .block_weight import BlockGradients, BlockWeight
from .drop_and_grow import extend, prune
from .find_weights import find_weights
from .guard import all_finite, multiply_, require_finite, require_masked_gradients, warn_of_masks_left, warn_of_order
from .mask_updates import MaskUpdates, Pending
from .optimizers import (
    STATE_KEY,
    clear_unwritten,
    convert_state,
    keeps_zeros,
    made_steps,
    optimizers_of,
    skipped_inside,
    take_state,
    warn_of_shape,
    warn_of_zeros,
)
from .schedule import never_moves
from .sparse_weight import Fill, SparseWeight
from .statistics import WeightStatistics, check_ranks, statistics_of

SCHEMA = "sparseift.sparsifier/1"
_CALLS = 32  # of `step`, after which the optimiser must have made more than half as many steps
FAST_ON = frozenset({"cuda"})
"""Devices on which masks are updated by `fast_drop_and_grow`. It saves waits for the device, and a CPU has none to save."""


class _Spec(Protocol):
    @property
    def pattern(self) -> str: ...


class Planned(Protocol):
    """What a `Plan` has that matters here: its spec's mask pattern."""

    @property
    def spec(self) -> _Spec: ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step computed with, for adding up the FLOPs of a run."""

    step: int
    nnz: Mapping[str, int]
    """Non-zeros of every sparse weight during this step's forward and backward pass."""
    dense_gradients: bool
    """Whether this step computed weight gradients at every place, masked or not."""


@dataclass(slots=True, eq=False)
class _Held:
    """One of the optimisers, and where it is in its step."""

    optimizer: Optimizer
    weights: list[SparseWeight]
    """The sparse weights that it trains; the first one has those that none trains too."""
    remask: bool
    """Whether it moves weights whose gradient is masked."""
    pending: Pending | None = None
    steps: int = 0
    first_step: bool = False
    stepped: bool = False
    """`Sparsifier.step` was called since its last step."""
    missed: bool = False
    """It was not called before its last step, which had gradients outside the masks."""
    evaluations: int | None = None
    """While the optimiser makes a step with a closure: how often `Sparsifier.step` was called in it."""

    def masked(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Its weights that have places outside their masks, each with its mask in floats, [*shape] both."""
        return ((w.parameter, w.mask_float) for w in self.weights if w.stores_zeros)


class Sparsifier(MaskUpdates):
    """Keeps the weights that a model's masks leave out at zero, and moves the masks as an algorithm says.

    Args:
        model: with masks beside its weights (`sparseift_cli.transform`, `sparsity.attached.attach`), on its final device and
            in its final dtype; DistributedDataParallel and torch.compile wrappers are looked through.
        plan: its pattern replaces the one that the masks came with. May be left out: `Sparsifier(model, optimizer)`.
        optimizer: holds every trained sparse weight; several in a list, as Muon beside AdamW. What Accelerate, Lightning and
            others wrap is looked for inside.
        algorithm: a name in `ALGORITHMS`, `package.module:Name`, a mapping with its name and options, or a `MaskAlgorithm`.
        total_steps: optimiser steps of the whole run; needed by every algorithm that moves masks.
        seed: of random growth and of ties. Random choices are functions of (seed, weight name, step).
        layouts: pattern, groups and transposition of single weights (`MaskLayout`), in place of those of plan and module.
        fill: first values of the weights that an algorithm with a start density (gmp, granet, dense) adds to the planned
            masks: `normal`, with the root mean square of the active ones, `zeros`, or a function of (name, weight [*shape]) to
            values [*shape]. Only zeros are filled.
        check_finite: let `step` check every gradient for NaN and infinity (one pass, one wait for the device).
        state: a `state_dict()` to go on from; nothing is filled then. Not needed where the optimiser's own state is loaded:
            it brings that of its Sparsifier.
        options: those of the algorithm, as delta_t, stop, drop_fraction, decay and regrow of rigl. These five may be given with
            every algorithm, so that one call serves a loop over algorithms.

    Raises:
        UsageError: no masks; an algorithm, option or value that does not exist; a pattern that cannot move (N:M); weights with
            more non-zeros than their masks.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Planned | Optimizer | Sequence[Optimizer] | None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        algorithm: str | Mapping[str, Any] | MaskAlgorithm = "rigl",
        total_steps: int | None = None,
        seed: int = 0,
        layouts: Mapping[str, MaskLayout] | None = None,
        fill: Fill = "normal",
        check_finite: bool = False,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if optimizer is None and plan is not None and not hasattr(plan, "spec"):
            plan, optimizer = None, plan  # pyright: ignore[reportAssignmentType]
        optimizers = optimizers_of(optimizer)
        if isinstance(fill, str):
            one_of("fill", fill, ("normal", "zeros"))
        super().__init__(*choose_algorithm(algorithm, options), total_steps, seed, optimizers)
        self.check_finite, self._model = check_finite, unwrapped(model)
        pattern = plan.spec.pattern if plan else None  # pyright: ignore[reportAttributeAccessIssue]
        if pattern is not None and (is_chosen(pattern) or parse_pattern(pattern).by_layer):
            pattern = None  # each mask has its own beside it
        moves, keeps = self.algorithm.moves, self.algorithm.keeps
        weights = find_weights(self._model, self.optimizers, pattern, layouts or {}, moves=moves, keeps=keeps)
        if not weights and self.algorithm.masked:
            raise UsageError("the model has no sparse weights", hint="transform it first, or use algorithm dense")
        self._start_with(weights)
        self._compact = self._compact_gradients()
        self.note_wrapper(model)
        self.steps = 0
        """Steps counted so far: the index of the next one."""
        self.last: StepRecord | None = None
        self._copies: list[nn.Module] = []
        self._unchecked, self._changes, self._calls, self._zeroed = True, 0, 0, 0
        self._adopted: Adopted | None = None
        self._restored, self._masked_all = False, True
        self._held: list[_Held] = []
        self._begin(state, fill)
        self._held = self._hold()
        self._hooks = [hook for held in self._held for hook in self._hooks_on(held)]
        self._expect_gradients()
        self._warn_of_start()

    # --- the loop ---

    @torch.no_grad()
    def step(self, found_inf: bool = False) -> bool:
        """Mask the gradients; call it once a step, on all gradients, before clipping and before the optimiser's step.

        Returns whether the optimiser may make its step: False where `found_inf` is true, or where `check_finite` is set and
        a gradient is NaN or infinite. Then gradients are left as they are (inf * 0 would be NaN) and a mask update of this
        step is lost; the step counts all the same. Under a GradScaler no check is needed: it skips such a step by itself,
        and the update is lost likewise. The pruning of gmp and granet needs no gradient and is never lost: it happens here,
        by the weights before the optimiser's step, so that the next step computes with the scheduled number of non-zeros.

        Raises:
            NonFiniteError: a weight that is to be pruned is NaN or infinite; no weight or mask has changed then. At a mask
                update by gradient the optimiser's step raises it, before it changes a weight.
        """
        if self._evaluated_again():
            self.mask_gradients()
            return True
        self._check()
        t, pending = self.steps, None
        self.steps += 1
        updates, dense = self.algorithm.updates_at(t, self.schedule), self._needs_dense_gradient(t)
        self.last = StepRecord(t, self._nnz, dense)
        finite = not found_inf and not (self.check_finite and not all_finite(self._gradients()))
        if finite and (updates or dense or self.algorithm.state):
            pending = Pending(t, updates, *(self._dense_gradients() if dense else ({}, {})))
        for held in self._held:
            held.pending, held.stepped = pending, True
        self._prune(t + 1, pending.gradients if pending else {})
        if finite:
            self.mask_gradients()
        self._expect_gradients()
        return finite

    # A loop whose step is a CUDA graph calls these two instead of `step`, where no mask moves: one inside the graph, the
    # other beside every replay.

    @property
    def still(self) -> bool:
        """Whether the next step leaves every mask as it is, needs no dense gradient, and gives the algorithm none to observe."""
        t, algorithm = self.steps, self.algorithm
        busy = algorithm.updates_at(t, self.schedule) or self._needs_dense_gradient(t) or algorithm.state
        return not busy and not self._down(t + 1)

    @torch.no_grad()
    def mask_gradients(self, but: Collection[SparseWeight] = ()) -> None:
        """Multiply every gradient by its mask, in place, except those of the weights in `but`."""
        self._masked_all = not but
        for held in self._held:
            held.stepped = True
        masked = [
            (w.parameter.grad, w.mask_float)
            for w in self.weights
            if w.stores_zeros and (w.nnz < w.numel or w.moves) and w not in but
        ]
        pairs = [(g, mask) for g, mask in masked if g is not None]
        multiply_([g for g, _ in pairs], [mask for _, mask in pairs])

    def count_still_step(self) -> None:
        """All that `step` does for a `still` step beside masking gradients, which a CUDA graph has done."""
        self.count_step(dense_gradients=False)

    def count_step(self, *, dense_gradients: bool) -> None:
        """Record a step in which every weight kept its number of non-zeros."""
        self.last = StepRecord(self.steps, self._nnz, dense_gradients)
        self.steps += 1
        self._expect_gradients()

    @property
    def collects_gradients(self) -> bool:
        """Whether the backward pass of the next step computes dense gradients of weights that are stored compactly.

        A captured CUDA graph of an ordinary backward pass does not: this one must be made operation by operation.
        """
        return self._compact is not None and self._needs_dense_gradient(self.steps)

    def note_wrapper(self, model: nn.Module) -> None:
        """Say what the loop calls in place of the model, where it was wrapped later than this object was made.

        DistributedDataParallel without `find_unused_parameters` computes every gradient in every process. Dense gradients of
        layers of stored blocks are then averaged a layer at a time; otherwise all of them at the end of the step.
        """
        model = getattr(model, "_orig_mod", model)
        if self._compact is not None and isinstance(model, nn.parallel.DistributedDataParallel):
            self._compact.alike = not model.find_unused_parameters

    def close(self) -> None:
        """Remove the hooks from the optimisers; masks stay as they are."""
        for hook in self._hooks:
            hook.remove()
        if self._compact is not None:
            self._compact.close()

    def keep_sparse(self, copy: nn.Module) -> None:
        """Give a copy of the model, as an average of its weights, the masks of the model now and after every mask update.

        Without it an average over moving masks has every weight that was active at one time or another: it is not sparse, and
        costs more than planned where it is what is evaluated. Weights that an update drops are zero in the copy from then on.
        Layers that store blocks alone (`use_kernels`) cannot be averaged without it, once their blocks move.

        Raises:
            UsageError: no copy of the model.
        """
        copy_masks(self._model, copy)
        self._copies.append(copy)

    @property
    def optimizer(self) -> Optimizer:
        """The first of `optimizers`."""
        return self.optimizers[0]

    # --- state ---

    @property
    def nnz(self) -> Mapping[str, int]:
        """Non-zeros of every sparse weight (of every part, where it has several), as the next step will compute with them."""
        return self._nnz

    def masks(self) -> dict[str, Tensor]:
        """Weight name -> the boolean buffer [*shape]."""
        return {w.name: w.mask for w in self.weights}

    def statistics(self) -> dict[str, WeightStatistics]:
        """Density, ITOP rate and churn of every sparse weight; waits for the device. `statistics.total` adds them up."""
        return {w.name: statistics_of(w) for w in self.weights}

    def check_ranks(self) -> None:
        """Raise CheckFailed where masks are not equal on every rank of torch.distributed; every rank must call it."""
        check_ranks({w.name: w.saved_mask for w in self.weights})

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs beside weights and optimiser, between two steps: JSON values and copies of tensors.

        The optimiser's `state_dict()` has it too, in its first group under `sparseift`, and loading that loads it here. An update
        is pending only between `step` and the optimiser's step, so none is saved.
        """
        return {
            "schema": SCHEMA,
            "settings": self._settings(),
            "step": self.steps,
            "final": dict(self._final),
            "start": dict(self._start),
            "churned": {w.name: w.read_num_grown() for w in self.weights},
            "masks": {w.name: w.saved_mask.clone() for w in self.weights},
            "ever": {w.name: w.ever_active.clone() for w in self.weights},
            "state": {f"{key}/{name}": t.clone() for name, held in self._states.items() for key, t in held.items()},
        }

    def _settings(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that was saved, as JSON values."""
        options = self.algorithm.options()
        if "stop" in options:
            options["stop"] = str(Fraction(options["stop"]))
        return {"algorithm": self.algorithm_name, "total_steps": self.total_steps, **options, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`, in the tensors that are in use; weights outside masks are zeroed.

        `total_steps` may be others than those of the saved run, which is said: from the next step on masks move by the schedule
        of the new length.

        Raises:
            UsageError: a state of another kind, other settings, or other weights.
        """
        if state.get("schema") != SCHEMA:
            raise UsageError(f"not the state of a Sparsifier: schema {state.get('schema')!r}, not {SCHEMA!r}")
        changes = setting_changes(self._settings(), state["settings"], self.algorithm.defaults())
        length = changes.pop("total_steps", None)
        if changes:
            raise UsageError(
                f"the saved run had other settings: {in_words(changes)}", hint="resume with the same settings"
            )
        if not self._same_weights(state):
            raise UsageError("the saved masks are of other weights", hint="build the model as for the saved run")
        self._restore(state)
        if length:
            self._warn_of_length(length)

    def _same_weights(self, state: Mapping[str, Any]) -> bool:
        masks, mine = state["masks"], {w.name: w for w in self.weights}
        return masks.keys() == mine.keys() and all(mine[name].fits(mask) for name, mask in masks.items())

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.steps, self.last, self._restored = int(state["step"]), None, True
        self._final, self._start = dict(state["final"]), dict(state["start"])
        states = state.get("state", {})
        for name, held in self._states.items():
            for key, tensor in held.items():
                tensor.copy_(states[f"{key}/{name}"])
        self._restore_masks(state)

    def _restore_masks(self, state: Mapping[str, Any]) -> None:
        self._zeroed = 0
        for w in self.weights:
            mask = state["masks"][w.name]
            self._zeroed += w.restore(mask, state["ever"][w.name], int(state["churned"][w.name]))
            w.note_version()
            for optimizer in self.optimizers:
                convert_state(optimizer, w.parameter, partial(w.state_of_other_form, mask=mask))
        for held in self._held:
            held.pending = None
        self._expect_gradients()
        self._unchecked, self._adopted = True, None
        self._mask_copies()
        self._count()

    def _load_with_optimizer(self, state: Mapping[str, Any]) -> None:
        """Continue from the state that came with the optimiser's: of this run, or of one whose masks this one begins with."""
        if state.get("schema") != SCHEMA or not self._same_weights(state):
            warnings.warn("the optimiser's state brings masks of other weights, which are not used", stacklevel=5)
            return
        changes = setting_changes(self._settings(), state["settings"], self.algorithm.defaults())
        if state["settings"]["algorithm"] != self.algorithm_name:
            self._begin_with_masks_of(state, changes["algorithm"])
            return
        self._restore(state)
        length = changes.pop("total_steps", None)
        if length:
            self._warn_of_length(length)
        if changes:
            warnings.warn(
                f"the saved run had other settings ({in_words(changes)}): it goes on at step {self.steps} with the new ones",
                stacklevel=5,
            )

    def _begin_with_masks_of(self, state: Mapping[str, Any], change: str) -> None:
        """Take the masks of a run with another algorithm, where they are what this one begins with."""
        if self.algorithm.start_density is not None:
            return  # it begins denser, with whatever weights there are
        if any(w.num_nonzeros(state["masks"][w.name]) != w.nnz for w in self.weights):
            return  # of a run that had not come down to the plan yet: its weights will not fit
        self._restore_masks(state)
        if self.algorithm.moves:
            warnings.warn(
                f"the saved run had another algorithm ({change}): this one begins with its masks, at step 0",
                stacklevel=6,
            )

    def _warn_of_length(self, change: str) -> None:
        if self.algorithm.moves and self.algorithm.masked:
            warnings.warn(
                f"total_steps {change}: from step {self.steps} on masks move by the schedule of the new length, until step "
                f"{self.schedule.end}; what was pruned stays pruned",
                stacklevel=5,
            )

    # --- updates ---

    def _before_step(self, held: _Held, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the optimiser touches a weight: a gradient that is not finite ends the run at a mask update."""
        held.evaluations = 0 if any(callable(given) for given in (*args, *kwargs.values())) else None
        unmasked = False
        if held.evaluations is None and not held.stepped:
            if any(w.changed for w in held.weights):  # loaded, and `step` has not looked at them yet
                self._follow_weights()
                self._unchecked = True
            unmasked = warn_of_order(held.masked())
            blocks = [w.parameter for w in held.weights if w.moves and not w.stores_zeros]
            if not unmasked and any(p.grad is not None for p in blocks):
                warn_of_masks_left()
        elif held.evaluations is None and held.missed:  # step() may have been called late, after the optimiser's step
            require_masked_gradients(held.masked())
        held.missed = unmasked
        held.first_step, held.stepped = not optimizer.state, False
        if held.pending is not None and held.pending.updates and not skipped_inside(optimizer):
            require_finite({**held.pending.gradients, **held.pending.scores}, "the gradient", held.pending.step)
            for key in self.algorithm.state:
                tensors = {name: tensors[key] for name, tensors in self._states.items()}
                require_finite(tensors, f"the {key}", held.pending.step)

    @torch.no_grad()
    def _after_step(self, held: _Held, optimizer: Optimizer, *_: Any) -> None:
        pending, held.pending = held.pending, None
        evaluations, held.evaluations = held.evaluations, None
        held.steps += 1
        if held.first_step and optimizer.state and skipped_inside(optimizer):
            clear_unwritten(optimizer)
        if evaluations is not None and not evaluations and held.steps <= 2:  # masked before gradients were made again?
            require_masked_gradients(held.masked(), in_closure=True)
        if held.remask or (held.missed and not evaluations):
            for w in held.weights:
                w.apply_mask(self.state_of(w))
        elif held.steps == 1 and self._masked_all:
            self._check_first_step(held)
        if pending is not None and not skipped_inside(optimizer):
            self._update([w for w in held.weights if w.moves], pending)
        for w in held.weights:
            w.note_version()

    def _update(self, moving: list[SparseWeight], pending: Pending) -> None:
        """Show the algorithm the gradients of the step, and drop and grow where it is due."""
        if self.algorithm.state:
            for w in moving:
                gradient = pending.gradients.get(w.name)
                if gradient is not None or self.algorithm.dense_gradient == "never":
                    self.algorithm.observe(self.view_of(w, pending.step, gradient))
        if pending.updates:
            require_finite({w.name: w.parameter for w in moving}, "the weight", pending.step)
            for w in moving:
                w.num_grown = 0  # of weights that this update does not reach
            self._drop_and_grow([w for w in moving if self._can_change(w, pending)], pending)
            self._mask_copies()

    def _mask_copies(self) -> None:
        for copy in self._copies:
            copy_masks(self._model, copy)
        warn_of_averages(self._model)

    def _can_change(self, w: SparseWeight, pending: Pending) -> bool:
        """Whether the update can change this mask: something is dropped, places are free, and the layer took part in the step."""
        without_gradient = self.algorithm.dense_gradient != "never" and not pending.has(w)
        return bool(self.drops(w, pending.step)) and w.num_active < w.num_blocks and not without_gradient

    def _drop_and_grow(self, weights: list[SparseWeight], pending: Pending) -> None:
        t, found, on_host = pending.step, dict[SparseWeight, Tensor](), dict[SparseWeight, tuple[Tensor, Tensor]]()
        for device in dict.fromkeys(w.parameter.device for w in weights):
            there = [w for w in weights if w.parameter.device == device and device.type in FAST_ON]
            if stored := [w for w in there if isinstance(w, BlockWeight)]:
                on_host |= self._exchanged_on_host(stored, pending)
            if fast := [w for w in there if w.stores_zeros and w.one_part and not self.balanced]:
                found |= self._fast_drop_and_grow(fast, pending)
        for w in weights:
            gradient = pending.gradients.pop(w.name, None)
            if isinstance(w, BlockWeight) and w in on_host:
                before, blocks = on_host[w]
                w.set_mask(blocks, self.state_of(w), w.nnz, before, grown_state=self.grown_state)
                continue
            blocks = found[w] if w in found else self.updated(w, t, gradient, pending.scores.get(w.name))
            w.set_mask(blocks, self.state_of(w), nnz=w.nnz, grown_state=self.grown_state)

    def _prune(self, t: int, dense: Mapping[str, Tensor]) -> None:
        """Prune every weight to the non-zeros that step `t` computes with; `dense` are gradients [*shape] to score by."""
        down = self._down(t)
        if not down:
            return
        require_finite({w.name: w.parameter for w in down}, "the weight", t)
        for w, wanted in down.items():
            scores, key = self._scores(w, "drop_scores", self.view_of(w, t, dense.get(w.name))), self.keys_of(w, t)[1]
            parts = zip(*map(w.in_parts, (w.active_blocks(), scores)), w.active_in_parts, wanted, strict=True)
            made = [prune(active, count, of, n, key) for active, of, count, n in parts]
            w.set_mask(w.whole(made), self.state_of(w))
            w.note_version()
        self._mask_copies()
        self._count()

    # --- dense gradients ---

    def _dense_gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By weight name: dense gradients [*shape], and scores [R, C] of those that are not kept."""
        gradients = {
            w.name: w.parameter.grad.clone()
            for w in self.weights
            if w.moves and w.stores_zeros and w.parameter.grad is not None
        }
        compact, scores = self._compact.take() if self._compact is not None else ({}, {})
        return gradients | compact, scores

    def _compact_gradients(self) -> BlockGradients | None:
        """What collects the dense gradients of weights that are stored compactly, where the algorithm needs them.

        Raises:
            UsageError: the algorithm begins with more weights than there is room for.
        """
        compact = [w for w in self.weights if isinstance(w, BlockWeight)]
        if compact and self.algorithm.start_density is not None:
            raise UsageError(
                f"{self.algorithm_name} begins denser than the planned masks, and layers of stored blocks have no room for that",
                hint="sparseift.to_masked(model) before the optimiser is made, or train without use_kernels",
            )
        moving = [w for w in compact if w.moves]
        if not moving or self.algorithm.dense_gradient == "never":
            return None
        return BlockGradients(moving, self._early_scores if self.algorithm.grows_by_gradient_alone else None)

    def _early_scores(self, w: SparseWeight, gradient: Tensor) -> Tensor:
        weight = torch.empty(w.weight_shape, device="meta")  # these scores read the gradient alone
        return self._scores(w, "grow_scores", WeightView(weight, gradient, layout=w.layout))

    def _expect_gradients(self) -> None:
        """Let the backward passes of the next step collect what that step needs."""
        if self._compact is not None:
            self._compact.expect(self._needs_dense_gradient(self.steps))

    def _gradients(self) -> list[Tensor]:
        held = (p.grad for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"])
        return [g for g in held if g is not None]

    # --- what others do to weights, and how the loop calls this ---

    def _evaluated_again(self) -> bool:
        """Whether this is a further call of `step` within one step of an optimiser that evaluates its closure several times."""
        inside = [held for held in self._held if held.evaluations is not None]
        for held in inside:
            held.evaluations = (held.evaluations or 0) + 1
        return any((held.evaluations or 0) > 1 for held in inside)

    def _check(self) -> None:
        """Let masks follow weights that were loaded, and say how the loop is wrong; waits for the device in rare steps alone."""
        self._calls += 1
        if self._calls == _CALLS and 2 * max(held.steps for held in self._held) <= _CALLS:
            made = max(held.steps for held in self._held)
            warnings.warn(
                f"sparsifier.step() was called {_CALLS} times and the optimiser made {made} steps: call it once a step, after "
                "the last micro-batch, and give Sparsifier the optimiser whose step() the loop calls",
                stacklevel=3,
            )
        changed = [w for w in self.weights if w.changed]
        if not (changed or self._unchecked) or any(capturing(w.parameter) for w in self.weights[:1]):
            return
        for w in changed:
            w.follow()
            for key, tensor in self._states.get(w.name, {}).items():
                self._states[w.name][key] = tensor.to(w.parameter.device)
        first, self._unchecked = self._unchecked, False
        if first:
            for w in self.weights:
                w.keep_fill()
        self._changes += bool(changed)
        if not first and self._changes & (self._changes - 1):
            return  # a loop that writes into weights in every step is looked at in steps 1, 2, 4, 8, ...
        if first and self._zeroed and not changed:
            warnings.warn(
                f"the loaded masks zeroed {self._zeroed:,} weights, and none were loaded since: load the model's state too",
                stacklevel=3,
            )
        self._zeroed = 0
        self._follow_weights()
        self._warn_of_loaded()
        for w in self.weights:
            w.note_version()
        self._count()

    def _follow_weights(self) -> None:
        """Let masks follow weights that were loaded."""
        if self.algorithm.masked:
            now = {n: k for w in self.weights for n, k in zip(w.part_names, w.active_in_parts, strict=True)}
            adopted = fit_masks(self.weights, now, self.seed, self.state_of)
            if adopted is not None:
                self._adopted = adopted
                self._mask_copies()
                self._count()

    def _warn_of_loaded(self) -> None:
        """Say what loaded weights and state of an optimiser do not bring."""
        cleared = clear_states(self.weights, self.state_of)
        if cleared:
            warnings.warn(
                f"the optimiser's state was not zero outside the masks of {some_of(cleared)}: it was set to zero there",
                stacklevel=4,
            )
        restarts = self.algorithm.masked and self.algorithm.moves and not self.steps
        loaded = restarts and any(map(made_steps, self.optimizers))
        if self._adopted is None and not loaded:
            return
        what = str(self._adopted) if self._adopted else "the optimiser brings a state, but none of a Sparsifier"
        again = (
            f"; the schedule of {self.algorithm_name} starts at step 0. To go on where a run was, load what "
            "optimizer.state_dict() or sparsifier.state_dict() gave beside its Sparsifier"
        )
        warnings.warn(what + (again if restarts else ""), stacklevel=4)
        self._adopted = None

    def _check_first_step(self, held: _Held) -> None:
        """After the first step: whether something moved weights outside their masks all the same."""
        if any(capturing(w.parameter) for w in held.weights[:1]):
            return
        moved = [w.name for w in held.weights if w.num_outside()]
        if moved:
            held.remask = True
            for w in held.weights:
                w.apply_mask(self.state_of(w))
            warnings.warn(
                f"the step of {type(held.optimizer).__name__} moved weights outside the masks of {some_of(moved)}: gradients "
                "were changed after sparsifier.step(), as by noise. Weights and state are masked again after every step",
                stacklevel=4,
            )

    def _load_hook(self, optimizer: Optimizer) -> None:
        """After the optimiser's `load_state_dict`."""
        state = take_state([optimizer])
        if state is not None:
            self._load_with_optimizer(state)
        else:
            for w in self.weights:
                w.note_loaded_state()
        self._unchecked = True

    def _save_hook(self, _: Optimizer, saved: dict[str, Any]) -> None:
        """After the first optimiser's `state_dict`: it takes that of the Sparsifier along."""
        saved["param_groups"][0][STATE_KEY] = self.state_dict()

    # --- the start ---

    def _begin(self, state: Mapping[str, Any] | None, fill: Fill) -> None:
        """Masks and weights as step 0 computes with them, or as they were saved."""
        came = take_state(self.optimizers)
        if state is not None:
            self.load_state_dict(state)
        elif came is not None:
            self._load_with_optimizer(came)
        if not self._restored:
            if self.algorithm.masked:
                self._adopted = fit_masks(self.weights, self._start, self.seed, self.state_of)
            if self.algorithm.start_density is not None:
                self._adopted = None
            self._densify(fill)
        for w in self.weights:
            w.note_version()

    def _hold(self) -> list[_Held]:
        """The optimisers with their weights; warns of those that move zeros, or whose steps depend on them."""
        held, left = list[_Held](), list(self.weights)
        for optimizer in self.optimizers:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            mine = [w for w in left if id(w.parameter) in own]
            left = [w for w in left if w not in mine]
            with_zeros = [w for w in mine if w.stores_zeros]
            for w in [w for w in mine if not w.stores_zeros][:1]:
                warn_of_shape(optimizer, w.parameter)
            remask = bool(with_zeros) and not keeps_zeros(optimizer)
            if remask:
                planned = [sum(self._final[n] for n in w.part_names) * w.block_size / w.numel for w in with_zeros]
                density, at = min((share, i) for i, share in enumerate(planned))
                warn_of_zeros(optimizer, with_zeros[at].parameter, density)
            held.append(_Held(optimizer, mine, remask))
        held[0].weights += left
        for w in self.weights:
            unwatch(w.parameter)
        return held

    def _hooks_on(self, held: _Held) -> list[Any]:
        optimizer = held.optimizer
        hooks = [
            optimizer.register_step_pre_hook(partial(self._before_step, held)),
            optimizer.register_step_post_hook(partial(self._after_step, held)),
        ]
        if self.weights:
            hooks.append(optimizer.register_load_state_dict_post_hook(self._load_hook))
            if held is self._held[0]:
                hooks.append(optimizer.register_state_dict_post_hook(self._save_hook))
        return hooks

    def _warn_of_start(self) -> None:
        """Say what keeps masks from moving."""
        algorithm, updates = self.algorithm, self.schedule.updates
        frozen = [w.name for w in self.weights if not w.parameter.requires_grad]
        if frozen and algorithm.moves and algorithm.masked:
            warnings.warn(f"frozen weights keep their masks: {some_of(frozen)}", stacklevel=3)
        if algorithm.drops_and_grows and updates == 0 and self.schedule.stop:
            warnings.warn(never_moves(self.algorithm_name, self.schedule), stacklevel=3)

    def _densify(self, fill: Fill) -> None:
        """Give every weight the non-zeros that step 0 computes with."""
        for w in self.weights:
            wanted = self._wanted(w, 0)
            if sum(wanted) > w.num_active:
                generator = generator_for(self.seed, w.name, "start")
                parts = zip(w.in_parts(w.active_blocks()), w.active_in_parts, wanted, strict=True)
                w.densify(w.whole([extend(a, count, n, generator) for a, count, n in parts]), fill, self.seed)
        self._count()

    def _count(self) -> None:
        self._nnz: Mapping[str, int] = {
            name: w.nnz if w.one_part else count * w.block_size
            for w in self.weights
            for name, count in zip(w.part_names, w.active_in_parts, strict=True)
        }
