"""From a folder on disk back to a module: build the dense model, make the same edits, put the weights in."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ArtifactError, CheckFailed, UsageError
from ..mask.attached import attach, masks_of, unwrapped
from ..models.source import Request, build
from ..plan.plan import make_plan
from .artifact import BUFFERS, MASKS, WEIGHTS, Artifact
from .check import Measured
from .edits import Surgery
from .masking import require_masked
from .surgery import operate
from .transformation import REMEMBERED, Options, Transformation


def restore(stored: Artifact, into: nn.Module | None) -> nn.Module:
    """The transformed module of `stored`; see `api.load`."""
    dense = unwrapped(into) if into is not None else _dense(stored)
    surgery = Surgery.from_json(stored.surgery)
    new = operate(dense, surgery)
    if stored.weights.is_file():
        new = _filled(new, stored, surgery)
    buffers = _read(stored, BUFFERS) if (stored.path / BUFFERS).is_file() else {}
    _put_buffers(new, buffers, stored)
    plan = make_plan(stored.table, stored.spec, stored.training)
    facts = stored.provenance
    counts = {m.key: m.nnz for m in surgery.masked}
    params = sum(p.numel() for p in new.parameters())
    zeros = sum(new.get_parameter(k).numel() - n for k, n in counts.items())
    macs = sum(p.macs for p in plan.layers)
    new.__dict__[REMEMBERED] = Transformation(
        plan,
        surgery,
        Measured({}, macs, params, params - zeros, 0),
        Options.from_json(facts["options"]),
        tuple(facts["dead"]),
        facts["deviation"],
        tuple(facts["notes"]),
        buffers,
        facts["source"],
    )
    return new.eval()


def _dense(stored: Artifact) -> nn.Module:
    """The dense model, on meta where nothing but the state dict gives it its values."""
    source = stored.provenance.get("source")
    if not source:
        raise UsageError(
            f"{stored.path} does not say how its dense model is built",
            hint="give it: sparseift_cli.load(path, into=the_dense_model)",
        )
    request = Request.from_json(source)
    model = build(request).model
    outside = any(module._non_persistent_buffers_set for module in model.modules())
    return build(request, device="cpu").model if outside else model


def _filled(model: nn.Module, stored: Artifact, surgery: Surgery) -> nn.Module:
    weights, masks = _read(stored, WEIGHTS), _read(stored, MASKS)
    groups: dict[int, list[str]] = {}  # names that share one tensor; only the first is stored
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    odd = [names[0] for names in groups.values() if not any(n in weights for n in names)]
    odd += [n for n in weights if n not in model.state_dict()]
    try:
        model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        odd.append(str(error).strip().splitlines()[-1].strip())
    if odd:
        raise ArtifactError(
            f"{stored.path / WEIGHTS} does not fit the model: {', '.join(odd[:4])}",
            hint="it was changed, or belongs to another plan",
        )
    for names in groups.values():
        _tie(model, names, next(n for n in names if n in weights))
    for m in surgery.masked:
        mask = masks.get(m.key)
        weight = model.get_parameter(m.key)
        if mask is None or mask.shape != weight.shape or int(mask.count_nonzero()) != m.nnz:
            raise ArtifactError(
                f"{stored.path / MASKS}: the mask of {m.key} is not the planned one", hint="transform the model again"
            )
    _require_zeros(model, masks, surgery, stored)
    attach(model, {m.key: masks[m.key] for m in surgery.masked}, stored.spec.pattern)
    assert len(masks_of(model)) == len(surgery.masked)
    return model


def _require_zeros(model: nn.Module, masks: dict[str, torch.Tensor], surgery: Surgery, stored: Artifact) -> None:
    try:
        require_masked(model, masks, surgery.masked, stored.spec.pattern)
    except CheckFailed as error:
        raise ArtifactError(
            f"{stored.path}: {error.message}", hint="it was changed; transform the model again"
        ) from None


def _put_buffers(model: nn.Module, buffers: dict[str, torch.Tensor], stored: Artifact) -> None:
    """Buffers that no state dict holds, in every place that shares them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, held in module._buffers.items():
            places.setdefault(id(held), []).append((module, leaf))
    for name, tensor in buffers.items():
        path, _, leaf = name.rpartition(".")
        try:
            old = model.get_submodule(path)._buffers[leaf]
        except (AttributeError, KeyError):
            raise ArtifactError(
                f"{stored.path / BUFFERS} does not fit the model: {name}",
                hint="it was changed, or belongs to another plan",
            ) from None
        for module, leaf in places[id(old)]:
            module._buffers[leaf] = tensor


def _tie(model: nn.Module, names: list[str], stored_as: str) -> None:
    """Make all `names` the tensor that was read under one of them: `assign` put a new one in its place."""
    path, _, leaf = stored_as.rpartition(".")
    module = model.get_submodule(path)
    kind = "_parameters" if leaf in module._parameters else "_buffers"
    tensor = getattr(module, kind).get(leaf)
    for name in names if tensor is not None else ():
        path, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(path), kind)[leaf] = tensor


def _read(stored: Artifact, name: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(stored.path / name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{stored.path / name}: {error}", hint="the folder is damaged; transform the model again"
        ) from None
