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

A grown weight starts at zero with zero state, so Adam's first step on it is large: with betas .9, .999 and after many steps
it is (1 - .9) / sqrt(1 - .999) = 3.16 times the learning rate, whatever the gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.randomness import generator_for, key_of
from ..errors import UsageError, one_of
from ..mask.attached import unwrapped
from ..mask.saliency import MaskLayout
from .algorithms import ALGORITHMS, DropAndGrow, MaskAlgorithm, Regrow, WeightView, make_algorithm, name_of, own_options
from .drop_and_grow import drop_and_grow, extend, prune
from .gpu.fast_drop_and_grow import FastUpdate, fast_drop_and_grow, in_groups, on_device, update_numbers
from .guard import (
    all_finite,
    clear_unwritten,
    keeps_zeros,
    multiply_,
    require_finite,
    require_masked_gradients,
    skipped_inside,
    state_of,
    warn_of_order,
)
from .sparse_weight import Fill, SparseWeight, find_weights
from .statistics import WeightStatistics, check_ranks, statistics_of

SCHEMA = "sparseift.sparsifier/1"
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


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is to be done after the optimiser's step, if it makes one: observe gradients, update masks."""

    step: int
    updates: bool
    """Whether weights are dropped and grown."""
    gradients: dict[str, Tensor]
    """Dense gradients [*shape] by weight name; empty where the algorithm wants none of this step."""


def _chosen(
    algorithm: str | Mapping[str, Any] | MaskAlgorithm, options: Mapping[str, Any]
) -> tuple[MaskAlgorithm, str]:
    """The algorithm with its options, and what it is called."""
    given = dict(options)
    if "schedule" in given:  # the name that `decay` had
        given["decay"] = given.pop("schedule")
    if isinstance(algorithm, Mapping):  # as recipes have it
        given = {k: v for k, v in algorithm.items() if k != "name"} | given
        algorithm = str(algorithm.get("name", ""))
    if isinstance(algorithm, MaskAlgorithm):
        return make_algorithm(algorithm, given), name_of(algorithm)
    made = make_algorithm(algorithm, own_options(algorithm, given, whatever_value=True))
    return made, ALGORITHMS.canonical(algorithm)


class Sparsifier:
    """Keeps the weights that a model's masks leave out at zero, and moves the masks as an algorithm says.

    Args:
        model: with masks beside its weights (`sparseift_cli.transform`, `sparsity.attached.attach`), on its final device and
            in its final dtype; DistributedDataParallel and torch.compile wrappers are looked through.
        plan: its pattern replaces the one that the masks came with. May be left out: `Sparsifier(model, optimizer)`.
        optimizer: holds every trained sparse weight.
        algorithm: a name in `ALGORITHMS`, `package.module:Name`, a mapping with its name and options, or a `MaskAlgorithm`.
        total_steps: optimiser steps of the whole run; needed by every algorithm that moves masks.
        seed: of random growth and of ties. Random choices are functions of (seed, weight name, step).
        layouts: pattern, groups and transposition of single weights (`MaskLayout`), in place of those of plan and module.
        fill: first values of the weights that an algorithm with a start density (gmp, granet, dense) adds to the planned
            masks: `normal`, with the root mean square of the active ones, `zeros`, or a function of (name, weight [*shape]) to
            values [*shape]. Only zeros are filled.
        check_finite: let `step` check every gradient for NaN and infinity (one pass, one wait for the device).
        state: a `state_dict()` to go on from; nothing is filled then.
        options: those of the algorithm, as delta_t, stop, drop_fraction, decay and regrow of rigl. These five may be given with
            every algorithm, so that one call serves a loop over algorithms.

    Raises:
        UsageError: no masks; an algorithm, option or value that does not exist; a pattern that cannot move (N:M).
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Planned | Optimizer | None,
        optimizer: Optimizer | None = None,
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
        if isinstance(plan, Optimizer):
            plan, optimizer = None, plan
        if optimizer is None:
            raise UsageError("a Sparsifier needs the optimiser of the model", hint="Sparsifier(model, optimizer)")
        if isinstance(fill, str):
            one_of("fill", fill, ("normal", "zeros"))
        self.algorithm, self.algorithm_name = _chosen(algorithm, options)
        self.total_steps, self.seed = total_steps, seed
        if total_steps is None and self.algorithm.moves and self.algorithm.masked:
            raise UsageError(f"{self.algorithm_name} moves masks on a schedule, which needs total_steps")
        if total_steps is not None and total_steps < 1:
            raise UsageError(f"total_steps {total_steps} is not a positive number of steps")
        self.schedule = self.algorithm.schedule(total_steps)
        self.regrow: Regrow = self.algorithm.regrow if isinstance(self.algorithm, DropAndGrow) else "allow"
        self.optimizer, self.check_finite = optimizer, check_finite
        pattern = plan.spec.pattern if plan else None
        self.weights = find_weights(unwrapped(model), optimizer, pattern, layouts or {}, moves=self.algorithm.moves)
        if not self.weights and self.algorithm.masked:
            raise UsageError("the model has no sparse weights", hint="transform it first, or use algorithm dense")
        self._remask = bool(self.weights) and not keeps_zeros(optimizer)
        self.steps = 0
        """Steps counted so far: the index of the next one."""
        self.last: StepRecord | None = None
        self._pending: _Pending | None = None
        self._first_step = self._stepped = self._missed = False
        self._states: dict[str, dict[str, Tensor]] = {
            w.name: {name: torch.zeros_like(w.parameter, dtype=torch.float32) for name in self.algorithm.state}
            for w in self.weights
            if w.moves
        }
        self._final = {n: k for w in self.weights for n, k in zip(w.part_names, w.active_in_parts, strict=True)}
        self._start = {n: k for w in self.weights for n, k in zip(w.part_names, self._initial_blocks(w), strict=True)}
        if state is not None:
            self.load_state_dict(state)
        else:
            self._densify(fill)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

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
        t, self._pending, self._stepped = self.steps, None, True
        self.steps += 1
        updates, dense = self.algorithm.updates_at(t, self.schedule), self._needs_dense_gradient(t)
        self.last = StepRecord(t, self._nnz, dense)
        finite = not found_inf and not (self.check_finite and not all_finite(self._gradients()))
        if finite and (updates or dense or self.algorithm.state):
            self._pending = _Pending(t, updates, self._dense_gradients() if dense else {})
        self._prune(t + 1, self._pending.gradients if self._pending else {})
        if finite:
            self.mask_gradients()
        return finite

    # A loop whose step is a CUDA graph calls these two instead of `step`, where no mask moves: one inside the graph, the
    # other beside every replay.

    @property
    def still(self) -> bool:
        """Whether the next step leaves every mask as it is, needs no dense gradient, and gives the algorithm none to observe."""
        t, algorithm = self.steps, self.algorithm
        busy = algorithm.updates_at(t, self.schedule) or self._needs_dense_gradient(t) or algorithm.state
        return not busy and not self._down(t + 1)

    def _needs_dense_gradient(self, t: int) -> bool:
        """Whether step `t` computes weight gradients at every place."""
        wants = self.algorithm.dense_gradient
        return wants == "every step" or (wants == "at updates" and self.algorithm.updates_at(t, self.schedule))

    @torch.no_grad()
    def mask_gradients(self, but: Collection[SparseWeight] = ()) -> None:
        """Multiply every gradient by its mask, in place, except those of the weights in `but`."""
        self._stepped = True
        masked = [
            (w.parameter.grad, w.mask_float)
            for w in self.weights
            if (w.nnz < w.mask_float.numel() or w.moves) and w not in but
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

    def close(self) -> None:
        """Remove the hooks from the optimiser; masks stay as they are."""
        for hook in self._hooks:
            hook.remove()

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
        check_ranks(self.masks())

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs beside weights and optimiser, between two steps: JSON values and copies of tensors.

        An update is pending only between `step` and the optimiser's step, so none is saved.
        """
        return {
            "schema": SCHEMA,
            "settings": self._settings(),
            "step": self.steps,
            "final": dict(self._final),
            "start": dict(self._start),
            "churned": {w.name: w.read_num_grown() for w in self.weights},
            "masks": {w.name: w.mask.clone() for w in self.weights},
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

        Load the model's and the optimiser's state after the Sparsifier was made, or give it `state` when it is made. Else
        weights that gmp and granet add at the start would be filled again.

        Raises:
            UsageError: a state of another kind, other settings, or other weights.
        """
        if state.get("schema") != SCHEMA:
            raise UsageError(f"not the state of a Sparsifier: schema {state.get('schema')!r}, not {SCHEMA!r}")
        mine, theirs = self._settings(), {"decay": state["settings"].get("schedule"), **state["settings"]}
        changed = [f"{key} {theirs.get(key)!r} -> {mine[key]!r}" for key in mine if mine[key] != theirs.get(key)]
        if changed:
            raise UsageError(
                f"the saved run had other settings: {', '.join(changed)}", hint="resume with the same settings"
            )
        shapes = {w.name: tuple(w.mask.shape) for w in self.weights}
        if shapes != {name: tuple(mask.shape) for name, mask in state["masks"].items()}:
            raise UsageError("the saved masks are of other weights", hint="build the model as for the saved run")
        self.steps, self._pending, self.last = int(state["step"]), None, None
        self._final, self._start = dict(state["final"]), dict(state["start"])
        states = state.get("state", {})
        for name, held in self._states.items():
            for key, tensor in held.items():
                tensor.copy_(states[f"{key}/{name}"])
        for w in self.weights:
            w.restore(state["masks"][w.name], state["ever"][w.name], int(state["churned"][w.name]))
        self._count()

    # --- updates ---

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Before the optimiser touches a weight: a gradient that is not finite ends the run at a mask update."""
        if not self._stepped:
            warn_of_order([w.parameter for w in self.weights])
        elif self._missed:  # step() may have been called one iteration late, after the optimiser's step
            require_masked_gradients((w.parameter, w.mask_float) for w in self.weights)
        self._missed = not self._stepped
        self._first_step, self._stepped = not optimizer.state, False
        if self._pending is not None and self._pending.updates and not skipped_inside(optimizer):
            require_finite(self._pending.gradients, "the gradient", self._pending.step)
            for key in self.algorithm.state:
                held = {name: tensors[key] for name, tensors in self._states.items()}
                require_finite(held, f"the {key}", self._pending.step)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        pending, self._pending = self._pending, None
        if self._first_step and optimizer.state and skipped_inside(optimizer):
            clear_unwritten(optimizer)
        if self._remask:
            for w in self.weights:
                w.apply_mask(state_of(optimizer, w.parameter))
        if pending is None or skipped_inside(optimizer):
            return
        moving = [w for w in self.weights if w.moves]
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

    def _can_change(self, w: SparseWeight, pending: _Pending) -> bool:
        """Whether the update can change this mask: something is dropped, places are free, and the layer took part in the step."""
        without_gradient = self.algorithm.dense_gradient != "never" and w.name not in pending.gradients
        return bool(self.drops(w, pending.step)) and w.num_active < w.num_blocks and not without_gradient

    def _drop_and_grow(self, weights: list[SparseWeight], pending: _Pending) -> None:
        t, found = pending.step, dict[SparseWeight, Tensor]()
        for device in dict.fromkeys(w.parameter.device for w in weights):
            fast = [w for w in weights if w.parameter.device == device and w.one_part]
            if device.type in FAST_ON and fast:
                found |= self._fast_drop_and_grow(fast, pending)
        for w in weights:
            gradient = pending.gradients.pop(w.name, None)
            blocks = found[w] if w in found else self.updated(w, t, gradient)
            w.set_mask(blocks, state_of(self.optimizer, w.parameter), nnz=w.nnz)

    def _fast_drop_and_grow(self, weights: list[SparseWeight], pending: _Pending) -> dict[SparseWeight, Tensor]:
        """The new active blocks of weights on one device, without those that are uncertain."""
        t, regrow = pending.step, self.regrow
        keys, drops = [self.keys_of(w, t) for w in weights], [self.drops(w, t) for w in weights]
        rows = [
            update_numbers(w.num_blocks, w.num_active, n, ties, regrow)
            for w, n, (_, ties) in zip(weights, drops, keys, strict=True)
        ]
        numbers = on_device(rows, weights[0].parameter.device)
        blocks, uncertain = list[Tensor](), list[Tensor]()
        for group in in_groups([w.num_blocks for w in weights]):
            made, flags = fast_drop_and_grow(
                [
                    self.fast_update_of(
                        weights[i], pending.gradients.get(weights[i].name), keys[i][0], numbers[i], drops[i]
                    )
                    for i in group
                ]
            )
            blocks += made
            uncertain.append(flags)
        failed = torch.cat(uncertain).tolist()  # the one wait for the device
        return {w: made for w, made, fails in zip(weights, blocks, failed, strict=True) if not fails}

    def updated(self, w: SparseWeight, t: int, gradient: Tensor | None) -> Tensor:
        """The active blocks of a weight after the update of step `t`, part by part; `gradient` [*shape] is the dense one."""
        view, (_, ties) = self.view_of(w, t, gradient), self.keys_of(w, t)
        drop = w.block_scores(self.algorithm.drop_scores(view).float())
        grow = w.block_scores(self.algorithm.grow_scores(view).float())
        parts = zip(*map(w.in_parts, (w.active_blocks(), drop, grow)), w.active_in_parts, strict=True)
        made = [
            drop_and_grow(active, n, down, up, self.algorithm.drops(n, t, self.schedule), ties, self.regrow)
            for active, down, up, n in parts
        ]
        return w.whole(made)

    def fast_update_of(
        self, w: SparseWeight, gradient: Tensor | None, key: int | Tensor, numbers: Tensor, most: int
    ) -> FastUpdate:
        """The same for `fast_drop_and_grow`.

        Args:
            gradient: the dense one [*shape].
            key: of random growth; in a CUDA graph an int64 scalar on the device.
            numbers: int64 [NUMBERS], see `update_numbers`.
            most: an upper bound of the blocks that are dropped.
        """
        algorithm, view = self.algorithm, self._view(w, gradient, key)
        by_magnitude = w.single_weights and type(algorithm).drop_scores is MaskAlgorithm.drop_scores
        # magnitudes of active weights alone are far fewer than those of all
        drop = view.weight if by_magnitude else w.block_scores(algorithm.drop_scores(view).float())
        return FastUpdate(
            w.active_blocks(),
            w.num_active,
            drop,
            w.block_scores(algorithm.grow_scores(view).float()),
            numbers,
            most,
            self.regrow,
            drop_by=magnitude if by_magnitude else None,
        )

    def view_of(self, w: SparseWeight, t: int, gradient: Tensor | None) -> WeightView:
        """What the algorithm sees of a weight after the optimiser's step `t`; `gradient` is the dense one [*shape]."""
        return self._view(w, gradient, self.keys_of(w, t)[0])

    def _view(self, w: SparseWeight, gradient: Tensor | None, key: int | Tensor) -> WeightView:
        return WeightView(w.parameter.detach(), gradient, self._states.get(w.name, {}), key)

    def drops(self, w: SparseWeight, t: int) -> int:
        """How many blocks of a weight the update of step `t` drops and grows."""
        return self.algorithm.drops(w.num_active, t, self.schedule)

    def keys_of(self, w: SparseWeight, t: int) -> tuple[int, int]:
        """The keys of step `t`: of random growth, and of the choice between equal scores."""
        return key_of(self.seed, w.name, "grow", t), key_of(self.seed, w.name, "ties", t)

    def _prune(self, t: int, dense: Mapping[str, Tensor]) -> None:
        """Prune every weight to the non-zeros that step `t` computes with; `dense` are gradients [*shape] to score by."""
        down = self._down(t)
        if not down:
            return
        require_finite({w.name: w.parameter for w in down}, "the weight", t)
        for w, wanted in down.items():
            scores = w.block_scores(self.algorithm.drop_scores(self.view_of(w, t, dense.get(w.name))).float())
            key = self.keys_of(w, t)[1]
            parts = zip(*map(w.in_parts, (w.active_blocks(), scores)), w.active_in_parts, wanted, strict=True)
            made = [prune(active, count, of, n, key) for active, of, count, n in parts]
            w.set_mask(w.whole(made), state_of(self.optimizer, w.parameter))
        self._count()

    def _down(self, t: int) -> dict[SparseWeight, list[int]]:
        """The weights that step `t` computes with fewer non-zeros of, and how many in each part."""
        if self.algorithm.start_density is None:  # only pruning algorithms have a density to come down from
            return {}
        wanted = {w: self._wanted(w, t) for w in self.weights if w.moves}
        return {w: counts for w, counts in wanted.items() if sum(counts) < w.num_active}

    def _wanted(self, w: SparseWeight, t: int) -> list[int]:
        """The active blocks that step `t` computes with, in each part of a weight."""
        return [self.algorithm.nonzeros(t, self._start[n], self._final[n], self.schedule) for n in w.part_names]

    def _dense_gradients(self) -> dict[str, Tensor]:
        return {w.name: w.parameter.grad.clone() for w in self.weights if w.moves and w.parameter.grad is not None}

    def _gradients(self) -> list[Tensor]:
        held = (p.grad for group in self.optimizer.param_groups for p in group["params"])
        return [g for g in held if g is not None]

    # --- the start ---

    def _initial_blocks(self, w: SparseWeight) -> list[int]:
        """The blocks of each part that are active at step 0: of the start density, rounded down, but all planned ones."""
        density = self.algorithm.start_density
        if density is None or not w.moves:
            return w.active_in_parts
        places = [part.numel() for part in w.in_parts(w.active_blocks())]
        sizes = [w.mask_float.numel()] if w.one_part else [n * w.block_size for n in places]
        starts = (min(most, int(density * size / w.block_size)) for most, size in zip(places, sizes, strict=True))
        return [max(active, start) for active, start in zip(w.active_in_parts, starts, strict=True)]

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


def magnitude(weight: Tensor) -> Tensor:
    """|w| of any shape, in float32."""
    return weight.float().abs()
