"""The step as CUDA graphs. Of a small network Python launches kernels more slowly than a GPU runs them; a graph replays all of
them with one launch. Python waits for the device at mask updates alone.

The first steps of a run are made operation by operation: they compile the model and allocate every tensor, because a graph
reads and writes fixed addresses. Then the step is recorded once, without being executed, and replayed from there on:

    first graph     batch out of the resident data, augmentation, forward, backward, flag for NaN
    second graph    mask the gradients, clip, optimiser
    third graph     the same with a mask update, for the steps that have one (RigL, SET)

What changes from step to step is copied into tensors that the graphs read: the samples of the batch, the learning rate. Where
an algorithm thins masks out (GMP, GraNet), or moves stored blocks, the rest of such a step happens operation by operation; so
does all of a step that collects dense gradients for stored blocks (RigL, SNFS).

A loss or gradient that is not finite sets a flag on the device (`found_inf` of the fused optimisers), and from that step on
they change no weight. So the host may read the flag some steps later: weights and checkpoints are those before that step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..kernels.fuse import sparseift
from ..sparsity.gpu.graphed_update import GraphedUpdate
from .evaluate import logits_of, loss_of
from .prepare import Prepared
from .processes import Processes
from .step import clip, compiled, diverged, set_rate

WARM_UP = 3  # steps before recording: the first compiles and makes the optimiser's state, and cuDNN settles on kernels
FLAG_INTERVAL = 100  # steps after which the host starts a copy of the flag, and reads the copy that it started before


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
        self._bad = torch.zeros((), device=self._device)  # `found_inf` of the fused optimisers: 1 stops every update
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self._device)
        self.skipped = 0
        self._number = torch.zeros((), dtype=torch.int64, device=self._device)  # of the step being made
        self._flag_copy = torch.full((), -1, dtype=torch.int64).pin_memory()
        self._copied: Any = None
        torch.backends.cudnn.benchmark = (
            not run.spec.training.deterministic
        )  # shapes never change, so the search for the fastest kernel pays
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
        self._lose = torch.compile(self._loss_of, backend=sparseift) if whole else self._loss_of

    def __call__(self, step: int) -> Tensor:
        self._feed(step)
        if self._graphs is None:
            self._on_side_stream(step)
        elif self._run.sparsifier is not None and self._run.sparsifier.collects_gradients:
            self._by_operations()
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
        self._read_flag(step)
        return self._loss.clone()

    def check(self) -> None:
        bad = int(self._first_bad)
        if bad >= 0:
            raise diverged(bad)

    # --- what a step reads ---

    def _feed(self, step: int) -> None:
        """Copy what is particular to `step` into the tensors that the graphs read."""
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

    def _by_operations(self) -> None:
        """A step whose backward pass collects dense gradients of stored blocks, which the graphs do not."""
        parameters = list(self._run.model.parameters())
        written_by_graphs = [p.grad for p in parameters]
        self._run.optimizer.zero_grad(set_to_none=True)
        self._backward()
        self._update()
        for p, gradient in zip(parameters, written_by_graphs, strict=True):
            p.grad = gradient

    # --- recording ---

    def _on_side_stream(self, step: int) -> None:
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
            except RuntimeError as error:  # the model reads a value on the host, or allocates what a graph cannot
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

    def _read_flag(self, step: int) -> None:
        """Start a copy of the flag to the host now and then; read the one started before, so that no step waits for it."""
        if step % FLAG_INTERVAL:
            return
        if self._copied is not None:
            self._copied.synchronize()
            if (bad := int(self._flag_copy)) >= 0:
                raise diverged(bad)
        self._flag_copy.copy_(self._first_bad, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
