"""Sparse training in anyone's loop: one object beside the optimiser, one line between `backward` and the optimiser's step.

    sparsifier = Sparsifier(model, optimizer, algorithm="rigl", total_steps=N)
    for x, y in loader:
        loss(model(x), y).backward()  # with accumulation: all of it
        sparsifier.step()             # after all-reduce, unscaling and the non-finite check; before clipping
        optimizer.step()
        optimizer.zero_grad()

Zeros are stored in the weights, so the forward pass knows nothing of masks. `step` multiplies gradients by their masks; then
weights and optimiser state of inactive places stay exactly zero under SGD, Adam and AdamW. At a mask update `step` keeps
the dense gradient, and a hook on the optimiser exchanges weights as soon as it has made its step.

A grown weight starts at zero with zero state, so Adam's first step on it is large: with betas .9, .999 and many steps behind
it (1 - .9) / sqrt(1 - .999) = 3.16 times the learning rate, whatever the gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base.randomness import key_of
from ..errors import UsageError, one_of
from ..mask.attached import unwrapped
from ..mask.mask import generator_for
from ..mask.saliency import MaskLayout
from .algorithms import ALGORITHMS, DropAndGrow, MaskAlgorithm, WeightView, make_algorithm, name_of, own_options
from .drop_and_grow import Regrow, exchange, extend, prune
from .gpu.fast_exchange import Exchange, exchange_numbers, in_groups, on_device, quick_exchange
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
QUICK_ON = frozenset({"cuda"})
"""Devices where masks are exchanged by `quick_exchange`; a CPU has nobody to wait for."""
Arguments = tuple[Tensor, int, Tensor, Tensor, int, int, Regrow]


class _Spec(Protocol):
    @property
    def pattern(self) -> str: ...


class Planned(Protocol):
    """What a `Plan` has that matters here: its spec's mask pattern."""

    @property
    def spec(self) -> _Spec: ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step computed with, for adding up the FLOPs that were spent."""

    step: int
    nnz: Mapping[str, int]
    """Non-zeros of every sparse weight during this step's forward and backward pass."""
    dense_gradients: bool
    """Whether this step computed weight gradients at every place, masked or not."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is to be done behind the optimiser's step, if it makes one: observe gradients, update masks."""

    step: int
    updates: bool
    """Whether weights are dropped and grown."""
    gradients: dict[str, Tensor]
    """Dense gradients [*shape] by weight name; empty where the algorithm wants none of this step."""


class Sparsifier:
    """Keeps the weights that a model's masks leave out at zero, and moves the masks as an algorithm says.

    Args:
        model: with masks beside its weights (`sparseift_cli.transform`, `sparsity.attached.attach`), on its final device and
            in its final dtype; DistributedDataParallel and torch.compile wrappers are looked through.
        plan: may stand before the optimiser or be left out; the pattern of the masks, in place of the one that they came with.
        optimizer: holds every trained sparse weight.
        algorithm: dense, static, set, rigl, gmp or granet.
        total_steps: optimiser steps of the whole run; needed by every algorithm that moves masks.
        delta_t, stop: masks change at steps t with 0 < t < stop * total_steps, delta_t | t (`isoflop.Schedule`).
        drop_fraction, schedule: share of a layer's weights exchanged at an update, and how it falls: cosine, linear,
            inverse_power, constant.
        regrow: may what was just dropped return at once (`allow`, as RigL; it then keeps value and state), or `forbid`.
        seed: of random growth and of ties. Random choices are functions of (seed, weight name, step).
        layouts: pattern, groups and transposition of single weights where plan and module do not tell (`MaskLayout`).
        fill: first values of the weights that gmp, granet and dense add to the attached masks: `normal`, with the root mean
            square of the active ones, `zeros`, or a function of (name, weight [*shape]). Only zeros are filled.
        check_finite: let `step` look for NaN and infinity in every gradient (one pass, one wait for the device).
        state: a `state_dict()` to go on from; nothing is filled then.

    Raises:
        UsageError: no masks; an algorithm, schedule or option that does not exist; an N:M pattern with masks that move.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Planned | Optimizer | None,
        optimizer: Optimizer | None = None,
        *,
        algorithm: str | MaskAlgorithm = "rigl",
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
        if "schedule" in options:  # the name that `decay` had
            options["decay"] = options.pop("schedule")
        if isinstance(algorithm, str):
            options = own_options(algorithm, options, whatever_value=True)
        self.algorithm = make_algorithm(algorithm, options)
        self.algorithm_name = ALGORITHMS.canonical(algorithm) if isinstance(algorithm, str) else name_of(algorithm)
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
        """Steps begun so far: the index of the next one."""
        self.last: StepRecord | None = None
        self._pending: _Pending | None = None
        self._first_step = self._heard = self._doubted = False
        self._states: dict[str, dict[str, Tensor]] = {
            w.name: {name: torch.zeros_like(w.parameter, dtype=torch.float32) for name in self.algorithm.state}
            for w in self.weights
            if w.moves
        }
        self._final = {w.name: w.active for w in self.weights}
        self._start = {w.name: self._first(w) for w in self.weights}
        if state is not None:
            self.load_state_dict(state)
        else:
            self._open(fill)
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
        t, self._pending, self._heard = self.steps, None, True
        self.steps += 1
        updates, dense = self.algorithm.updates_at(t, self.schedule), self._needs_dense_gradient(t)
        self.last = StepRecord(t, self._nnz, dense)
        finite = not found_inf and not (self.check_finite and not all_finite(self._gradients()))
        if finite and (updates or dense or self.algorithm.state):
            self._pending = _Pending(t, updates, self._dense_gradients() if dense else {})
        self._prune(t + 1)
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
        """Multiply every gradient by its mask, in place; `but` those of these weights."""
        self._heard = True
        live = [
            (w.parameter.grad, w.factor) for w in self.weights if (w.nnz < w.factor.numel() or w.moves) and w not in but
        ]
        pairs = [(g, factor) for g, factor in live if g is not None]
        multiply_([g for g, _ in pairs], [factor for _, factor in pairs])

    def count_still_step(self) -> None:
        """A step whose gradients were masked without this object: all that `step` does for a `still` one besides."""
        self.count_step(dense_gradients=False)

    def count_step(self, *, dense_gradients: bool) -> None:
        """The bookkeeping of a step that leaves every number of non-zeros as it is."""
        self.last = StepRecord(self.steps, self._nnz, dense_gradients)
        self.steps += 1

    def close(self) -> None:
        """Take the hooks off the optimiser; masks stay as they are."""
        for hook in self._hooks:
            hook.remove()

    # --- what it knows ---

    @property
    def nnz(self) -> Mapping[str, int]:
        """Non-zeros of every sparse weight, as the next step will compute with them."""
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

        An update waits only between `step` and the optimiser's step, so none is in here.
        """
        return {
            "schema": SCHEMA,
            "settings": self._settings(),
            "step": self.steps,
            "final": dict(self._final),
            "start": dict(self._start),
            "churned": {w.name: w.churned for w in self.weights},
            "masks": {w.name: w.mask.clone() for w in self.weights},
            "ever": {w.name: w.ever.clone() for w in self.weights},
            "state": {f"{key}/{name}": t.clone() for name, held in self._states.items() for key, t in held.items()},
        }

    def _settings(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that was saved, as JSON values."""
        options = self.algorithm.options()
        if "stop" in options:
            options["stop"] = str(Fraction(options["stop"]))
        return {"algorithm": self.algorithm_name, "total_steps": self.total_steps, **options, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`, in the tensors that model and hooks hold already; weights outside masks become zero.

        Load the model's and the optimiser's state after the Sparsifier was made, or give it `state` when it is made: the
        weights that gmp and granet add would else be filled over.

        Raises:
            UsageError: a state of another kind, other settings, or other weights.
        """
        if state.get("schema") != SCHEMA:
            raise UsageError(f"no state of a Sparsifier: schema {state.get('schema')!r}, not {SCHEMA!r}")
        mine, theirs = self._settings(), {"decay": state["settings"].get("schedule"), **state["settings"]}
        changed = [f"{key} {theirs.get(key)!r} -> {mine[key]!r}" for key in mine if mine[key] != theirs.get(key)]
        if changed:
            raise UsageError(
                f"the saved run was another one: {', '.join(changed)}", hint="resume with the same settings"
            )
        shapes = {w.name: tuple(w.mask.shape) for w in self.weights}
        if shapes != {name: tuple(mask.shape) for name, mask in state["masks"].items()}:
            raise UsageError("the saved masks are of other weights", hint="build the model as the saved run did")
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
        if not self._heard:
            warn_of_order([w.parameter for w in self.weights])
        elif self._doubted:  # the step before was not heard of: this may be its masking, a step late
            require_masked_gradients((w.parameter, w.factor) for w in self.weights)
        self._doubted = not self._heard
        self._first_step, self._heard = not optimizer.state, False
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
                w.clear(state_of(optimizer, w.parameter))
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
                w.churned_now = 0  # by this update, unless the exchange says otherwise
            self._exchange([w for w in moving if self._has_a_choice(w, pending)], pending)

    def _has_a_choice(self, w: SparseWeight, pending: _Pending) -> bool:
        """Does the update move this weight? Not where nothing is dropped or free, or the layer had no part in this step."""
        blind = self.algorithm.dense_gradient != "never" and w.name not in pending.gradients
        return bool(self.drops(w, pending.step)) and w.active < w.places and not blind

    def _exchange(self, weights: list[SparseWeight], pending: _Pending) -> None:
        t, sure = pending.step, dict[SparseWeight, Tensor]()
        for device in dict.fromkeys(w.parameter.device for w in weights):
            if device.type in QUICK_ON:
                sure |= self._exchange_quickly([w for w in weights if w.parameter.device == device], pending)
        for w in weights:
            gradient = pending.gradients.pop(w.name, None)
            cells = sure[w] if w in sure else exchange(*self.exchange_of(w, t, gradient))
            w.become(cells, state_of(self.optimizer, w.parameter), nnz=w.nnz)

    def _exchange_quickly(self, weights: list[SparseWeight], pending: _Pending) -> dict[SparseWeight, Tensor]:
        """The cells of those weights of which there is no doubt."""
        t, regrow = pending.step, self.regrow
        keys, drops = [self.keys_of(w, t) for w in weights], [self.drops(w, t) for w in weights]
        rows = [
            exchange_numbers(w.places, w.active, n, ties, regrow)
            for w, n, (_, ties) in zip(weights, drops, keys, strict=True)
        ]
        numbers = on_device(rows, weights[0].parameter.device)
        cells, doubts = list[Tensor](), list[Tensor]()
        for group in in_groups([w.places for w in weights]):
            found, doubted = quick_exchange(
                [
                    self.quick_exchange_of(
                        weights[i], pending.gradients.get(weights[i].name), keys[i][0], numbers[i], drops[i]
                    )
                    for i in group
                ]
            )
            cells += found
            doubts.append(doubted)
        told = torch.cat(doubts).tolist()  # the one wait for the device
        return {w: found for w, found, doubt in zip(weights, cells, told, strict=True) if not doubt}

    def exchange_of(self, w: SparseWeight, t: int, gradient: Tensor | None) -> Arguments:
        """The arguments of `exchange` for a weight at the update of step `t`."""
        view, (_, ties) = self.view_of(w, t, gradient), self.keys_of(w, t)
        drop, grow = (w.cells(scores.float()) for scores in self._scores(view))
        return w.cells_of_mask(), w.active, drop, grow, self.drops(w, t), ties, self.regrow

    def quick_exchange_of(
        self, w: SparseWeight, gradient: Tensor | None, key: int | Tensor, numbers: Tensor, most: int
    ) -> Exchange:
        """The same for `quick_exchange`; `key` is that of random growth."""
        algorithm, view = self.algorithm, self._view(w, gradient, key)
        by_magnitude = w.size == 1 and type(algorithm).drop_scores is MaskAlgorithm.drop_scores
        drop = view.weight if by_magnitude else w.cells(algorithm.drop_scores(view).float())
        return Exchange(
            w.cells_of_mask(),
            w.active,
            drop,
            w.cells(algorithm.grow_scores(view).float()),
            numbers,
            most,
            self.regrow,
            drop_by=magnitude if by_magnitude else None,
        )

    def view_of(self, w: SparseWeight, t: int, gradient: Tensor | None) -> WeightView:
        """What the algorithm sees of a weight behind the optimiser's step `t`."""
        return self._view(w, gradient, self.keys_of(w, t)[0])

    def _view(self, w: SparseWeight, gradient: Tensor | None, key: int | Tensor) -> WeightView:
        return WeightView(w.parameter.detach(), gradient, self._states.get(w.name, {}), key)

    def _scores(self, view: WeightView) -> tuple[Tensor, Tensor]:
        return self.algorithm.drop_scores(view), self.algorithm.grow_scores(view)

    def drops(self, w: SparseWeight, t: int) -> int:
        """How many blocks of a weight the update of step `t` drops and grows."""
        return self.algorithm.drops(w.active, t, self.schedule)

    def keys_of(self, w: SparseWeight, t: int) -> tuple[int, int]:
        """What random growth, and the choice between equal scores, are functions of."""
        return key_of(self.seed, w.name, "grow", t), key_of(self.seed, w.name, "ties", t)

    def _prune(self, t: int) -> None:
        """Bring every weight down to the non-zeros that step `t` computes with."""
        down = self._down(t)
        if not down:
            return
        require_finite({w.name: w.parameter for w in down}, "the weight", t)
        for w, n in down.items():
            scores = w.cells(self.algorithm.drop_scores(self.view_of(w, t, None)).float())
            cells = prune(w.cells_of_mask(), w.active, scores, n, self.keys_of(w, t)[1])
            w.become(cells, state_of(self.optimizer, w.parameter))
        self._count()

    def _down(self, t: int) -> dict[SparseWeight, int]:
        """The weights that step `t` computes with fewer non-zeros of, and how many."""
        if self.algorithm.start_density is None:  # only pruning algorithms have a density to come down from
            return {}
        wanted = {
            w: self.algorithm.nonzeros(t, self._start[w.name], self._final[w.name], self.schedule)
            for w in self.weights
            if w.moves
        }
        return {w: n for w, n in wanted.items() if n < w.active}

    def _dense_gradients(self) -> dict[str, Tensor]:
        return {w.name: w.parameter.grad.clone() for w in self.weights if w.moves and w.parameter.grad is not None}

    def _gradients(self) -> list[Tensor]:
        held = (p.grad for group in self.optimizer.param_groups for p in group["params"])
        return [g for g in held if g is not None]

    # --- the start ---

    def _first(self, w: SparseWeight) -> int:
        """The cells that are active at step 0: of the algorithm's start density rounded down, and all that are attached."""
        density = self.algorithm.start_density
        if density is None or not w.moves:
            return w.active
        return max(w.active, min(w.places, int(density * w.factor.numel() / w.size)))

    def _open(self, fill: Fill) -> None:
        for w in self.weights:
            n = self.algorithm.nonzeros(0, self._start[w.name], self._final[w.name], self.schedule)
            if n > w.active:
                cells = extend(w.cells_of_mask(), w.active, n, generator_for(self.seed, w.name, "start"))
                w.open(cells, fill, self.seed)
        self._count()

    def _count(self) -> None:
        self._nnz: Mapping[str, int] = {w.name: w.nnz for w in self.weights}


def magnitude(weight: Tensor) -> Tensor:
    """|w| of any shape, in float32."""
    return weight.float().abs()
