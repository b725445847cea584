"""One process or several: what torchrun's environment variables say, and the communication between the processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import InterruptedRun, UsageError
from ..kernels.layer import BlockLayer
from ..mask.attached import SUFFIX, masks_of

# SIGTERM and SIGINT ask a run to stop after the step it is in; a second one means now.

_asked: list[int] = []


@contextmanager
def catching_signals() -> Iterator[None]:
    """Record SIGTERM and SIGINT instead of ending at once, while inside.

    Raises:
        InterruptedRun: a second signal, which ends at once whatever is being done.
    """
    _asked.clear()

    def note(number: int, frame: FrameType | None) -> None:
        if _asked:
            raise KeyboardInterrupt
        _asked.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        if not _asked:
            raise
        raise InterruptedRun("stopped at once by a second signal; what was saved before is there", _asked[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested(processes: Processes) -> int:
    """The signal that came, 0 without one; all processes stop together when one of them was asked."""
    mine = _asked[0] if _asked else 0
    if processes.world == 1:
        return mine
    return (mine or signal.SIGTERM) if processes.agree(bool(mine)) else 0


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the `of` places for runs that `train --parallel` keeps going at once. Slot i takes GPU i modulo their number."""

    index: int = 0
    of: int = 1

    def local(self, gpus: int) -> int:
        """The GPU of this slot, among `gpus`."""
        return self.index % gpus

    def neighbours(self, gpus: int) -> int:
        """How many runs share its GPU, itself among them."""
        return len(range(self.local(gpus), self.of, gpus))


ALONE = Slot()


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among `world` of them; rank 0 is the one that writes."""

    device: torch.device
    rank: int = 0
    world: int = 1
    at_once: int = 1
    """How many runs share the device."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` [*] added up in place over all processes, [*]."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; every process gets the same answer."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def from_first(self, text: str) -> str:
        """What rank 0 says."""
        if self.world == 1:
            return text
        held = [text]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over all processes.

        Batch statistics are rank 0's on all of them. Masks and the indices of blocks are left alone: to send them with every
        forward would cost as much as the weights, and would hide masks that differ.
        """
        if self.world == 1:
            return model
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, _masks(model))
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give every process rank 0's buffers but masks, as the next training forward would: what is saved is measured."""
        if self.world > 1:
            masks = set(_masks(model))
            for name, buffer in model.named_buffers():
                if name not in masks:
                    dist.broadcast(buffer, 0)

    def without_averaging(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """For every micro-batch of an accumulated step but the last one."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def _masks(model: nn.Module) -> list[str]:
    """Buffers with masks and the indices of blocks, which no process sends to another: each computes the same ones."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, BlockLayer)]
    index = [f"{path}.{name}".removeprefix(".") for path, layer in layers for name in layer._buffers]
    return [*(name + SUFFIX for name in masks_of(model)), *index]


@contextmanager
def processes(wanted: str, slot: Slot = ALONE) -> Iterator[Processes]:
    """Join the other processes, where torchrun started several; `wanted` is the recipe's device.

    `auto` and `cuda` are the GPU of the local rank or, where several runs go on at once, of the `slot`.

    Raises:
        UsageError: no such device.
    """
    world, rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    local = os.environ.get("LOCAL_RANK")
    gpus = torch.cuda.device_count() if wanted in ("auto", "cuda") and torch.cuda.is_available() else 1
    device = pick_device(wanted, slot.local(gpus) if local is None else int(local))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(device, at_once=slot.neighbours(gpus))
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, rank, world)
    finally:
        dist.destroy_process_group()


def pick_device(wanted: str, local: int = 0) -> torch.device:
    """`auto`: the GPU of this local rank, where there is one, else the CPU."""
    if wanted == "auto":
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"no device is called {wanted!r}", hint="auto, cpu, cuda, cuda:1 or mps") from None
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"this machine has no device {wanted}", hint="--set training.device=auto takes what there is")
    return torch.device("cuda", local) if device.type == "cuda" and "index" not in repr(device) else device
