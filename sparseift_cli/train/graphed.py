"""The step as CUDA graphs: no kernel of a small network waits for Python, and Python for the device at mask updates alone.

The first steps of a run are made operation by operation: they compile the model and give every tensor its place. Then
the step is recorded once, without being executed, and replayed from there on:

    first graph     batch out of the resident data, augmentation, forward, backward, look for NaN
    second graph    mask the gradients, clip, optimiser
    third graph     the same with a mask update, for the steps that have one (RigL, SET)

What changes from step to step lies in tensors that the graphs read: the picks of the batch, the learning rate. Where
an algorithm thins masks out (GMP, GraNet), the rest of such a step happens operation by operation.

A loss or gradient that is no number sets a flag on the device, and the fused optimisers leave every weight alone from that
step on. The host looks at the flag later, so weights and checkpoints are those before that step all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..sparsity.gpu.graphed_update import GraphedUpdate
from .evaluate import logits_of, loss_of
from .prepare import Prepared
from .processes import Processes
from .step import clip, compiled, diverged, set_rate

WARM_UP = 3  # steps before recording: the first compiles and makes the optimiser's state, and cuDNN settles on kernels
LOOK = 100  # steps after which the host asks the device for the flag, and reads the answer to the last question


def can_be_graphed(run: Prepared, processes: Processes) -> bool:
    """One process on a GPU, a fused optimiser, no fp16, whose loss scale is decided on the host, and no recomputation.

    A block that is computed again puts the random state back first, which no graph can record.
    """
    spec = run.spec
    return (
        spec.training.cuda_graph
        and not spec.training.recompute
        and processes.device.type == "cuda"
        and processes.world == 1
        and getattr(spec.optimizer, "fused", False)
        and spec.training.precision != "fp16"
    )


class GraphedStep:
    """`Step` for one process and one GPU; the numbers are those of `EagerStep`, but for what torch.compile fuses."""

    def __init__(self, run: Prepared) -> None:
        self._run, self._device = run, run.device
        self._rate = torch.zeros((), device=self._device)
        self._bad = torch.zeros((), device=self._device)  # the fused optimisers' `found_inf`: 1 stops every update
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self._device)
        self._number = torch.zeros((), dtype=torch.int64, device=self._device)  # of the step being made
        self._answer = torch.full((), -1, dtype=torch.int64).pin_memory()
        self._asked: Any = None
        torch.backends.cudnn.benchmark = not run.spec.training.deterministic  # shapes never change: the search pays
        run.optimizer.found_inf = self._bad  # pyright: ignore[reportAttributeAccessIssue]
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._loss = torch.zeros((), device=self._device)
        self._graphs: tuple[Any, Any, Any] | None = None
        fits = run.sparsifier is not None and GraphedUpdate.fits(run.sparsifier)
        self._moving = GraphedUpdate(run.sparsifier) if fits and run.sparsifier is not None else None
        self._made = 0
        whole = compiled(run)
        self._assembly = run.train.assembly
        if self._assembly is not None:
            self._assemble = torch.compile(self._assembly.assemble) if whole else self._assembly.assemble
        self._lose = torch.compile(self._loss_of) if whole else self._loss_of

    def __call__(self, step: int) -> Tensor:
        self._feed(step)
        if self._graphs is None:
            self._aside(step)
        else:
            first, second, third = self._graphs
            first.replay()
            sparsifier = self._run.sparsifier
            if sparsifier is None or sparsifier.still:
                second.replay()
                if sparsifier is not None:
                    sparsifier.count_still_step()
            elif self._moving is not None:
                self._moving.load_numbers()
                third.replay()
                if not self._moving.finish():
                    self.check()
            else:
                self._update()
        self._look(step)
        return self._loss.clone()

    def check(self) -> None:
        bad = int(self._first_bad)
        if bad >= 0:
            raise diverged(bad)

    # --- what a step reads ---

    def _feed(self, step: int) -> None:
        """Put what is particular to `step` where the graphs read it."""
        run = self._run
        place = divmod(step, run.train.steps_per_epoch)
        made = run.train.batch(*place) if self._assembly is None else self._assembly.picks(*place)
        if self._inputs is None:
            self._inputs = made[0].clone(memory_format=torch.preserve_format), made[1].clone()
        else:
            for place, value in zip(self._inputs, made, strict=True):
                place.copy_(value, non_blocking=True)
        self._rate.fill_(run.rate(step))
        self._number.fill_(step)
        set_rate(run, self._rate)

    # --- the two halves ---

    def _loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        run = self._run
        with run.autocast():
            return loss_of(logits_of(run.model(x)), y, smoothing=run.spec.training.label_smoothing)

    def _backward(self) -> None:
        run = self._run
        assert self._inputs is not None
        x, y = self._inputs if self._assembly is None else self._assemble(*self._inputs)
        micro = run.spec.training.accumulate
        self._loss.zero_()
        for part, target in zip(x.chunk(micro), y.chunk(micro), strict=True):
            loss = self._lose(part, target) / micro
            loss.backward()
            self._loss += loss.detach()
        self._flag()

    @torch.no_grad()
    def _flag(self) -> None:
        gradients = [p.grad for p in self._run.model.parameters() if p.grad is not None]
        largest = torch._foreach_norm(gradients, torch.inf)  # pyright: ignore[reportPrivateImportUsage]
        finite = torch.stack([n.float() for n in largest]).isfinite().all() & self._loss.isfinite()
        self._first_bad.copy_(torch.where(finite | (self._first_bad >= 0), self._first_bad, self._number))
        self._bad.copy_(self._first_bad >= 0)

    def _update(self) -> None:
        if self._run.sparsifier is not None:
            self._run.sparsifier.step()
        clip(self._run)
        self._run.optimizer.step()

    # --- recording ---

    def _aside(self, step: int) -> None:
        """A step on another stream, as graphs are recorded on one; after the last of them the graphs are."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._backward()
            self._update()
            self._run.optimizer.zero_grad(
                set_to_none=True
            )  # recording gives gradients their places in the graph's memory
        torch.cuda.current_stream().wait_stream(stream)
        self._made += 1
        if self._made >= WARM_UP:
            try:
                self._record()
            except RuntimeError as error:  # the model asks the device for a value, or allocates what a graph cannot
                reason = str(error).strip().splitlines()[0]
                raise UsageError(
                    f"the step of this model cannot be recorded as a CUDA graph: {reason}",
                    hint="--set training.cuda_graph=false makes it operation by operation",
                ) from error

    def _record(self) -> None:
        run = self._run
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            self._backward()
        with torch.cuda.graph(second, pool=first.pool()):
            if run.sparsifier is not None:
                run.sparsifier.mask_gradients()
            clip(run)
            run.optimizer.step()
        third = self._record_update(first.pool()) if self._moving is not None else None
        self._graphs = first, second, third

    def _record_update(self, pool: Any) -> Any:
        run, moving, graph = self._run, self._moving, torch.cuda.CUDAGraph()
        assert run.sparsifier is not None
        assert moving is not None
        with torch.cuda.graph(graph, pool=pool):
            moving.mask_gradients(whole=run.spec.training.clip is None)
            clip(run)
            run.optimizer.step()
            moving.drop_and_grow(self._bad)
        return graph

    # --- the flag ---

    def _look(self, step: int) -> None:
        """Ask the device for the flag now and then; the answer is read at the next question, when it is long there."""
        if step % LOOK:
            return
        if self._asked is not None:
            self._asked.synchronize()
            if (bad := int(self._answer)) >= 0:
                raise diverged(bad)
        self._answer.copy_(self._first_bad, non_blocking=True)
        self._asked = torch.cuda.Event()
        self._asked.record()
