"""A foreign checkpoint into a module: tensors by name, read one at a time, nothing executed and nothing passed over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.text import shape_text, some_of
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.reading import TensorReader, Unreadable
from ..checkpoint.recognise import Match, closest, load_catalogue, recognise
from ..errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import nn

_MAX_NAMES = 4  # of each kind, in one message


@dataclass(frozen=True)
class Fit:
    """A checkpoint, and the zoo model that it holds the weights of."""

    checkpoint: Checkpoint
    match: Match


def recognised(path: str | Path, key: str | None = None) -> Fit:
    """Open a checkpoint and find the zoo model it belongs to.

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: no zoo model has these tensors.
    """
    checkpoint = open_checkpoint(Path(path), key=key)
    shapes = {t.name: t.shape for t in checkpoint.tensors}
    catalogue = load_catalogue()
    for match in recognise(shapes, catalogue):
        if match.kind == "exact" or match.resized_head() or match.resized_vocabulary():
            return Fit(checkpoint, match)
    near = closest(shapes, catalogue)
    nearly = f" (nearest: {near.model}, {near.same} of {near.expected} tensors)" if near else ""
    raise UsageError(
        f"{path} fits no model of the zoo{nearly}",
        hint="say what it is the checkpoint of: --model package.module:callable, or a zoo name",
    )


def load_into(model: nn.Module, checkpoint: Checkpoint, match: Match | None = None) -> None:
    """Copy every tensor of `checkpoint` into `model`, whose names may differ by the prefixes that `match` found.

    Buffers that a checkpoint may lack (counters, rotary frequencies) keep their values.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape.
    """
    import torch

    removed, added = (match.removed, match.added) if match else ("", "")
    names = {added + t.name.removeprefix(removed): t for t in checkpoint.tensors}
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = [n for n in parameters if not any(other in names for other in tied[id(state[n])])]
    unexpected = [n for n, t in names.items() if n not in state and not t.buffer]
    shapes = [
        f"{n} is {shape_text(t.shape)}, the model's is {shape_text(state[n].shape)}"
        for n, t in names.items()
        if n in state and tuple(t.shape) != tuple(state[n].shape)
    ]
    problems = [
        *([f"missing: {some_of(sorted(missing), _MAX_NAMES)}"] if missing else []),
        *([f"not in the model: {some_of(unexpected, _MAX_NAMES)}"] if unexpected else []),
        *([f"of another shape: {some_of(shapes, _MAX_NAMES)}"] if shapes else []),
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)}",
            hint="`sparseift inspect` shows what it holds; --num-classes sets another head",
        )
    with TensorReader() as reader, torch.no_grad():
        for name, info in names.items():
            if name in state:
                try:
                    state[name].copy_(reader.read(info))
                except Unreadable as error:
                    raise CheckpointError(f"{checkpoint.path}: {name!r} cannot be read: {error}") from None
