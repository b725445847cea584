"""Sparse training inside the Hugging Face Trainer and Lightning: thin callbacks around a Sparsifier.

    trainer = transformers.Trainer(model, ..., callbacks=[hugging_face_callback(algorithm="rigl")])
    trainer = lightning.Trainer(..., callbacks=[lightning_callback(algorithm="rigl")])

Neither library is needed until one of these is called. `total_steps` is the trainer's own where it is not given; all other
options are those of `Sparsifier`. What the Trainer's loops cannot give:

* The Hugging Face Trainer clips before `on_pre_optimizer_step`, so it clips by the norm of the *dense* gradient.
  Lightning clips afterwards, as it should be.
* Both count optimiser steps; a Lightning module with several optimisers gets a Sparsifier on the first that has a sparse
  weight.
* DistributedDataParallel broadcasts buffers at every forward, boolean masks too. They are equal anyway:
  `broadcast_buffers=False` (`ddp_broadcast_buffers=False`) saves it where no BatchNorm needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import UsageError
from ..mask.attached import masks_of, unwrapped
from .optimizers import has_state, innermost
from .sparsifier import Sparsifier

STATE_FILE = "sparsifier.pt"


def hugging_face_callback(**options: Any) -> Any:
    """A `transformers.TrainerCallback` that masks gradients at `on_pre_optimizer_step`.

    Its state is part of the optimiser's in every checkpoint folder, and a file `sparsifier.pt` beside it; on
    `resume_from_checkpoint` it is read from where it is. The Sparsifier is its attribute `sparsifier` once training has begun.

    Raises:
        UsageError: transformers is not installed.
    """
    base = _attribute("transformers", "TrainerCallback")

    class HuggingFaceSparseTraining(base):
        sparsifier: Sparsifier | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer, saved = innermost(kwargs["optimizer"]), None
            if state.global_step and not has_state(optimizer):  # resumed: model and optimiser are loaded by now
                saved = _read(_folder(args, state))
            self.sparsifier = _make(kwargs["model"], optimizer, state.max_steps, saved, options)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _begun(self.sparsifier).step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = _folder(args, state)
            if state.is_world_process_zero and folder.is_dir():
                torch.save(_begun(self.sparsifier).state_dict(), folder / STATE_FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _begun(self.sparsifier).close()

    return HuggingFaceSparseTraining()


def lightning_callback(**options: Any) -> Any:
    """A `lightning.Callback` that masks gradients at `on_before_optimizer_step`; its state is part of the checkpoints.

    The Sparsifier is its attribute `sparsifier` once training has begun.

    Raises:
        UsageError: neither lightning nor pytorch_lightning is installed.
    """
    base = _attribute("lightning", "Callback", "pytorch_lightning")

    class LightningSparseTraining(base):
        state_key = "lightning_callback.<locals>.SparseTraining"
        """What Lightning saves the state under: the name that the class had when it had to be a name."""
        sparsifier: Sparsifier | None = None
        saved: Mapping[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            optimizer = _first_sparse([innermost(o) for o in trainer.optimizers], pl_module)
            self.sparsifier = _make(pl_module, optimizer, trainer.estimated_stepping_batches, self.saved, options)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            sparsifier = _begun(self.sparsifier)
            if innermost(optimizer) is sparsifier.optimizer:
                sparsifier.step()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            _begun(self.sparsifier).close()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.sparsifier is None else self.sparsifier.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.saved = state_dict or None

    return LightningSparseTraining()


def _make(
    model: nn.Module, optimizer: Optimizer, steps: Any, saved: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Sparsifier:
    given: dict[str, Any] = {"total_steps": int(steps), "state": saved} | dict(options)
    return Sparsifier(model, optimizer, **given)


def _begun(sparsifier: Sparsifier | None) -> Sparsifier:
    if sparsifier is None:
        raise UsageError("training has not begun, so there is no Sparsifier yet")
    return sparsifier


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(folder: Path) -> Mapping[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise UsageError(
            f"{path} is missing: the checkpoint was saved without a Sparsifier", hint="resume without the callback"
        )
    return torch.load(path, weights_only=True)


def _first_sparse(optimizers: list[Optimizer], model: nn.Module) -> Optimizer:
    model = unwrapped(model)
    sparse = {id(model.get_parameter(name)) for name in masks_of(model)}
    for optimizer in optimizers:
        if any(id(p) in sparse for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    return optimizers[0]


def _attribute(package: str, name: str, other: str | None = None) -> Any:
    """An optional dependency's class, imported by name so that nothing of it is needed before."""
    for candidate in (package, other):
        if candidate is not None:
            try:
                return getattr(import_module(candidate), name)
            except ImportError:
                continue
    raise UsageError(f"this callback needs {package}, which is not installed", hint=f"pip install {package}")
