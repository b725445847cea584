"""From a folder that `save` wrote to the transformed module: build the dense model, repeat the edits, load weights and masks.

Apart from `artifact`, which reads and writes the folder itself and needs no torch to read its JSON.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, CheckFailed, UsageError
from ..kernels.convert import store_blocks
from ..kernels.layout import compact_paths
from ..kernels.layout import key as key_of
from ..kernels.registry import KERNELS, MASKED
from ..kernels.storage import CompactWeight, to_dense_state
from ..mask.attached import attach, mask_names, unwrapped
from ..models.source import Request, build
from ..plan.plan import make_plan
from ..trace.constants import plain_tensors
from .artifact import BUFFERS, MASKS, WEIGHTS, Artifact
from .check import Measured
from .edits import Surgery
from .masking import in_blocks, parts_of_masks, require_masked, shape_of
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
        _load_weights(new, stored, surgery, kernels)
    buffers = _read_tensors(stored, BUFFERS) if (stored.path / BUFFERS).is_file() else {}
    _set_buffers(new, buffers, stored)
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
    """The dense model, without memory for weights where the stored tensors give it all its values."""
    source = stored.provenance.get("source")
    if not source:
        raise UsageError(
            f"{stored.path} does not say how its dense model is built",
            hint="pass it: sparseift_cli.load(path, into=the_dense_model)",
        )
    request = Request.from_json(source)
    model = build(request).model
    has_unsaved_buffers = any(m._non_persistent_buffers_set or [*plain_tensors(m)] for m in model.modules())
    return build(request, device="cpu").model if has_unsaved_buffers else model


def _load_weights(model: nn.Module, stored: Artifact, surgery: Surgery, kernels: str) -> None:
    """Load the stored state dict and masks into `model`, in place; tied tensors stay tied."""
    weights, masks = _read_tensors(stored, WEIGHTS), _read_tensors(stored, MASKS)
    try:
        weights = _with_blocks(model, weights, masks, surgery, kernels)
    except UsageError as error:
        raise ArtifactError(f"{stored.path / WEIGHTS}: {error.message}", hint=error.hint) from None
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
            f"{stored.path / WEIGHTS} does not fit the model: {', '.join(problems[:4])}",
            hint="it was changed, or belongs to another plan",
        )
    for names in tied.values():
        _tie(model, names, next(n for n in names if n in weights))
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
    beside = {key: masks[key] for key in surgery.nonzeros if not in_blocks(model, key)}
    attach(model, beside, surgery.patterns, parts_of_masks(surgery))
    assert set(mask_names(model)) == surgery.nonzeros.keys()


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


def _set_buffers(model: nn.Module, buffers: dict[str, Tensor], stored: Artifact) -> None:
    """Set the buffers and plain tensors that no state dict holds, in every module that shares them."""
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
                f"{stored.path / BUFFERS} does not fit the model: {key}",
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


def _read_tensors(stored: Artifact, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(stored.path / name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{stored.path / name}: {error}", hint="the folder is damaged; transform the model again"
        ) from None
