"""A run between two steps, as tensors and JSON, and back: model, optimiser, masks, counters. No random state: all randomness is
a function of (seed, stream, step).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ArtifactError
from ..kernels.layout import PARTS, VALUES, compact_paths
from ..kernels.layout import key as tensor_name
from ..kernels.storage import to_compact_state, to_dense_state
from ..runs.checkpoint import Loaded
from ..sparsity.sparsifier import Sparsifier

MASK_TENSORS = ("masks", "ever", "state")
"""The tensors of a `Sparsifier.state_dict()`: masks, where weights have ever been active, the algorithm's own."""


def pack(
    model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors [*] by name, and numbers as JSON; `unpack` is its inverse."""
    tensors = {f"model/{name}": t.detach() for name, t in model.state_dict(keep_vars=True).items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, held in optimizer.state_dict()["state"].items():
        for name, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            elif value is not None:
                numbers.setdefault(str(index), {})[name] = value
    masks: dict[str, Any] | None = None
    if sparsifier is not None:
        masks = dict(sparsifier.state_dict())
        for kind in MASK_TENSORS:
            tensors |= {f"{kind}/{name}": t for name, t in masks.pop(kind).items()}
    return tensors, {"optimizer": numbers, "sparsifier": masks}


def unpack(loaded: Loaded, model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier | None) -> None:
    """Put a checkpoint back into the very tensors that are in use; of either form, with zeros or of stored blocks alone.

    Raises:
        ArtifactError: it is of another model.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, **{kind: {} for kind in MASK_TENSORS}}
    for name, tensor in loaded.tensors.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = tensor
    own = dict(model.state_dict(keep_vars=True))
    if sparsifier is not None and _dense_names(own) == _dense_names(parts["model"]):
        state: dict[str, Any] = dict(loaded.state["sparsifier"])
        sparsifier.load_state_dict(state | {kind: parts[kind] for kind in MASK_TENSORS})
        if own.keys() != parts["model"].keys():  # the run goes on with other kernels
            parts = _in_form_of(model, optimizer, parts)
    wrong = list(own.keys() ^ parts["model"].keys())
    wrong += [n for n in own.keys() & parts["model"].keys() if own[n].shape != parts["model"][n].shape]
    if wrong:
        raise ArtifactError(
            f"{loaded.path} is of another model: {', '.join(sorted(wrong)[:4])}",
            hint="resume with the code and the recipe that began the run",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(parts["model"][name])
    optimizer.load_state_dict(_optimizer_state(optimizer, parts["optimizer"], loaded.state["optimizer"]))


def _dense_names(names: Iterable[str]) -> set[str]:
    """The names of a state dict, those of stored blocks as if their weights were dense."""
    stored = {path: {tensor_name(path, part) for part in PARTS} for path in compact_paths(list(names))}
    return set(names) - set().union(*stored.values()) | {tensor_name(path, "weight") for path in stored}


def _in_form_of(
    model: nn.Module, optimizer: Optimizer, parts: Mapping[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, model and optimiser, in the form that the model has: with zeros, or blocks alone."""
    saved, own = parts["model"], model.state_dict()
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    converted = dict[str, Tensor]()
    for place, tensor in parts["optimizer"].items():
        p = parameters[int(place.partition("/")[0])]
        if tensor.dim() and tensor.shape != p.shape:
            path = names[id(p)].rpartition(".")[0]
            converted[place] = _converted(path, tensor, saved, own)
    state = to_compact_state(to_dense_state(saved), own)
    return {**parts, "model": state, "optimizer": parts["optimizer"] | converted}


def _converted(path: str, tensor: Tensor, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
    """The optimiser's tensor for the weight of the layer at `path`, from the form of the state `saved` in that of `own`."""
    weight, values = tensor_name(path, "weight"), tensor_name(path, VALUES)
    before, now = ({n: state[n] for part in PARTS if (n := tensor_name(path, part)) in state} for state in (saved, own))
    if before:
        tensor = to_dense_state({**before, values: tensor})[weight]
    return to_compact_state({weight: tensor}, now)[values] if now else tensor


def _optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    held: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in numbers.items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        p = parameters[int(index)]
        if (
            tensor.shape == p.shape
        ):  # laid out as the parameter is: fused optimisers refuse channels_last beside contiguous
            tensor = torch.empty_like(p, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        held.setdefault(int(index), {})[name] = tensor
    return {"state": held, "param_groups": optimizer.state_dict()["param_groups"]}
