"""Between a module and its tensors on disk: build the dense model, repeat the edits, set weights, masks and buffers.

Apart from `artifact`, which reads and writes the folder itself and needs no torch to read its JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, CheckFailed, UsageError
from ..kernels.convert import store_blocks
from ..kernels.layout import compact_paths
from ..kernels.layout import key as key_of
from ..kernels.registry import KERNELS, MASKED
from ..kernels.storage import CompactWeight, to_dense_state
from ..mask.attached import attach, mask_names, stores_blocks, unwrapped
from ..models.source import Request, build
from ..plan.plan import make_plan
from ..trace.constants import plain_tensors
from .artifact import BUFFERS, MASKS, Artifact
from .check import Measured
from .edits import Surgery
from .masking import MasksOf, in_blocks, parts_of_masks, require_masked, shape_of
from .surgery import apply_surgery
from .transformation import Options, Transformation, record


def restore(stored: Artifact, into: nn.Module | None, kernels: str = "auto") -> nn.Module:
    """The transformed module of `stored`, in eval mode on the CPU.

    Args:
        kernels: what computes layers that are stored in blocks; "masked" makes them dense.
        into: the dense model that it was made from (any weights, or on meta). None: built from the source in the
            folder.

    Raises:
        ArtifactError: weights, masks or buffers are damaged or do not fit the plan.
        UsageError: no source is stored and `into` is None, `into` is another model, or no kernels have this name.
    """
    if kernels not in ("auto", MASKED):
        KERNELS.get(kernels)
    dense = unwrapped(into) if into is not None else _build_dense(stored)
    surgery = Surgery.from_json(stored.surgery, stored.spec.pattern)
    new = apply_surgery(dense, surgery)
    params = sum(p.numel() for p in new.parameters())
    zeros = sum(m.of(new.get_parameter(m.key)).numel() - m.nnz for m in surgery.masked)
    if stored.weights.is_file():
        weights, masks = read_tensors(stored.weights), read_tensors(stored.path / MASKS)
        set_weights(new, weights, masks, surgery, kernels, stored.weights)
        _require_planned_masks(new, masks, surgery, stored)
        attach_masks(new, masks, surgery)
        assert set(mask_names(new)) == surgery.nonzeros.keys()
    buffers = read_tensors(stored.path / BUFFERS) if (stored.path / BUFFERS).is_file() else {}
    set_buffers(new, buffers, stored.path / BUFFERS)
    plan = make_plan(stored.table, stored.spec, stored.training, sizes=stored.sizes)
    facts = stored.provenance
    done = Transformation(
        plan,
        surgery,
        Measured({}, sum(p.macs for p in plan.layers), params, params - zeros, 0),
        Options.from_json(facts["options"]),
        unconnected=tuple(facts["dead"]),
        deviation=facts["deviation"],
        notes=tuple(facts["notes"]),
        buffers=buffers,
        source=facts["source"],
    )
    record(new, done)
    return new.eval()


def _build_dense(stored: Artifact) -> nn.Module:
    source = stored.provenance.get("source")
    if not source:
        raise UsageError(
            f"{stored.path} does not say how its dense model is built",
            hint="pass it: sparseift_cli.load(path, into=the_dense_model)",
        )
    return build_dense(Request.from_json(source))


def build_dense(request: Request) -> nn.Module:
    """The dense model, without memory for weights where the stored tensors give it all its values.

    Raises:
        UsageError: the source cannot be found or built.
    """
    model = build(request).model
    has_unsaved_buffers = any(m._non_persistent_buffers_set or [*plain_tensors(m)] for m in model.modules())
    return build(request, device="cpu").model if has_unsaved_buffers else model


def set_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    masks: dict[str, Tensor],
    surgery: Surgery,
    kernels: str,
    where: Path,
) -> None:
    """Put a state dict into `model`, in place; tied tensors stay tied, each is needed under one of its names.

    Args:
        weights: [*shape], or the stored blocks of a weight (`kernels.layout`).
        masks: bool [*shape], or [R, C] of a weight in blocks, by the weight's name. Changed: afterwards all are [*shape].
        kernels: what computes layers that are stored in blocks; "masked" makes them dense.
        where: the file, for errors.

    Raises:
        ArtifactError: they do not fit the model, or each other.
    """
    try:
        weights = _with_blocks(model, dict(weights), masks, surgery, kernels)
    except UsageError as error:
        raise ArtifactError(f"{where}: {error.message}", hint=error.hint) from None
    tied: dict[int, list[str]] = {}  # names that share one tensor; only the first of them is stored
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    problems = [names[0] for names in tied.values() if not any(n in weights for n in names)]
    problems += [n for n in weights if n not in model.state_dict()]
    try:
        model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        problems.append(str(error).strip().splitlines()[-1].strip())
    if problems:
        raise ArtifactError(
            f"{where} does not fit the model: {', '.join(problems[:4])}",
            hint="it was changed, or belongs to another plan",
        )
    for names in tied.values():
        _tie(model, names, next(n for n in names if n in weights))


def attach_masks(model: nn.Module, masks: Mapping[str, Tensor], surgery: Surgery) -> None:
    """Put the masks, bool [*shape], beside their weights, which are zeroed where a mask is False; those in blocks have theirs."""
    beside = {key: masks[key] for key in surgery.nonzeros if key in masks and not in_blocks(model, key)}
    attach(model, beside, surgery.patterns, parts_of_masks(surgery))


def _require_planned_masks(model: nn.Module, masks: Mapping[str, Tensor], surgery: Surgery, stored: Artifact) -> None:
    for m in surgery.masked:
        mask = masks.get(m.key)
        if mask is None or mask.shape != shape_of(model, m.key) or int(m.of(mask).count_nonzero()) != m.nnz:
            raise ArtifactError(
                f"{stored.path / MASKS}: the mask of {m.name} is not the planned one (missing, or other shape or number of "
                "non-zeros)",
                hint="transform the model again",
            )
    try:
        require_masked(model, masks, surgery.masked)
    except CheckFailed as error:
        raise ArtifactError(
            f"{stored.path}: {error.message}", hint="it was changed; transform the model again"
        ) from None


def _with_blocks(
    model: nn.Module, weights: dict[str, Tensor], masks: dict[str, Tensor], surgery: Surgery, kernels: str
) -> dict[str, Tensor]:
    """Make the layers of `model` whose weights are stored in blocks such layers, and their `masks` [*shape], both in place.

    Returns `weights`, dense where `kernels` is "masked".

    Raises:
        UsageError: weight, mask and model do not fit together.
    """
    paths = compact_paths(weights)
    for path in paths:
        name, found = key_of(path, "weight"), CompactWeight.of(weights, path)
        if name not in surgery.nonzeros:
            raise UsageError(f"{name} is stored in blocks, and the plan has no mask for it")
        if found.layout.shape != shape_of(model, name):
            raise UsageError(f"{name} is {list(found.layout.shape)}, and the model's is {list(shape_of(model, name))}")
        if name not in masks or not torch.equal(masks[name], found.mask()):
            raise UsageError(f"the mask of {name} is missing, or not where its blocks are")
        masks[name] = found.weight_mask()
        if kernels != MASKED:
            parts = parts_of_masks(surgery).get(name, ())
            store_blocks(model, name, found.mask(), surgery.patterns[name], parts, kernels)
    return to_dense_state(weights) if paths and kernels == MASKED else weights


def set_buffers(model: nn.Module, buffers: Mapping[str, Tensor], where: Path) -> None:
    """Set the buffers [*] and plain tensors that no state dict holds, by name, in every module that shares them.

    Raises:
        ArtifactError: the model has none of that name; `where` is the file, for the error.
    """
    owners: dict[int, list[tuple[dict[str, Any], str]]] = {}
    held: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        stores: tuple[dict[str, Any], ...] = (module._buffers, module.__dict__)
        for store, named in zip(stores, (module._buffers.items(), plain_tensors(module)), strict=True):
            for name, tensor in named:
                if tensor is not None:
                    held[f"{path}.{name}".removeprefix(".")] = tensor
                    owners.setdefault(id(tensor), []).append((store, name))
    for key, tensor in buffers.items():
        if key not in held:
            raise ArtifactError(
                f"{where} does not fit the model: {key}",
                hint="it was changed, or belongs to another plan",
            )
        for store, name in owners[id(held[key])]:
            store[name] = tensor


def _tie(model: nn.Module, names: list[str], stored_as: str) -> None:
    """Make all `names` the tensor that was loaded under one of them; `assign=True` put a new tensor there alone."""
    path, _, leaf = stored_as.rpartition(".")
    module = model.get_submodule(path)
    kind = "_parameters" if leaf in module._parameters else "_buffers"
    tensor = getattr(module, kind).get(leaf)
    for name in names if tensor is not None else ():
        path, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(path), kind)[leaf] = tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors [*] of a safetensors file of ours, by name, on the CPU.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {error}", hint="the folder is damaged; transform the model again") from None


# --- from a module to what is stored ---


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every tensor [*] once, under its first name: what safetensors can hold.

    Raises:
        UsageError: an entry is no tensor.
    """
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"{name} is {type(tensor).__name__}, and a folder holds tensors",
                hint="a module's get_extra_state must give a tensor",
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def unsaved_buffers(model: nn.Module, done: Transformation | None) -> dict[str, Tensor]:
    """The buffers [*] that no state dict holds (position tables, causal masks), masks of weights apart, by name.

    With them plain tensors that `done` resized. Every tensor once.
    """
    skipped = {id(t) for t in MasksOf(model).values()}
    resized = {edit.key for edit in done.surgery.resizes} if done else set()
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        unsaved = set[str]() if stores_blocks(module) else module._non_persistent_buffers_set  # an index is derived
        buffers = {prefix + name: module._buffers.get(name) for name in sorted(unsaved)}
        plain = {key: t for name, t in plain_tensors(module) if (key := prefix + name) in resized}
        for key, tensor in (buffers | plain).items():
            if tensor is not None and id(tensor) not in skipped:
                skipped.add(id(tensor))
                found[key] = tensor
    return found
