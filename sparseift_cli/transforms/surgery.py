"""From a plan to edits, and from edits to a new module; the module one starts from is never changed.

`operate` copies the module without its memory: parameters that change are made once in their new shape, the others are
cloned, ties stay ties. Weights are left unset here: `initialise` or `preserve` fill them.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CheckFailed, UsageError
from ..plan.members import MEMBERS
from ..plan.plan import Plan
from ..trace.structure import Structure
from ..trace.symbolise import is_config
from . import attention
from .edits import Replace, Resize, SetAttribute, Surgery
from .layers import sync_sizes, take_over
from .members import torch_half
from .members.base import MemberModule
from .members.layerwise import Layerwise

M = TypeVar("M", bound=nn.Module)


def surgery_for(plan: Plan, structure: Structure, model: nn.Module) -> Surgery:
    """Every edit that makes `model`, which `structure` was traced from, the network that `plan` describes."""
    return torch_half(plan.member).surgery(plan, structure, model)


def operate(model: M, surgery: Surgery) -> M:
    """A new module with the edits made. Weights of changed layers are not set; everything else is a clone.

    Raises:
        UsageError: an edit does not fit the module (a plan of another model).
    """
    memory: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # activations of the last forward: deepcopy takes no tensor that has a history
        for t in tree_leaves(module.__dict__):
            if isinstance(t, Tensor) and not t.is_leaf:
                memory.setdefault(id(t), t.detach().clone())
    twin = copy.deepcopy(model, memory)
    fresh: dict[int, Tensor] = {}  # id of an old parameter or buffer -> what takes its place
    try:
        for resize in surgery.resizes:
            _resize(twin, resize, fresh)
        for edit in surgery.attributes:
            _set(twin, edit)
        _fill_rotary(twin, surgery, fresh, dict(model.named_buffers(remove_duplicate=False)))
        _replace_members(twin, surgery)
    except (AttributeError, KeyError, IndexError) as error:
        raise UsageError(
            f"the surgery does not fit this {type(model).__name__}: {error}", hint="it was planned for another model"
        ) from error
    _put_in_place(twin, model, fresh)
    for module in twin.modules():
        sync_sizes(module)
        if isinstance(module, nn.RNNBase):  # it keeps a second list of its weights
            module._init_flat_weights()
    return twin


def _resize(twin: nn.Module, edit: Resize, fresh: dict[int, Tensor]) -> None:
    path, _, name = edit.key.rpartition(".")
    module = twin.get_submodule(path)
    old = (module._parameters if name in module._parameters else module._buffers)[name]
    assert old is not None
    if id(old) not in fresh:
        new = old.new_empty(edit.shape)
        if name in ("running_mean", "running_var"):
            new.fill_(float(name == "running_var"))
        fresh[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _fill_rotary(twin: nn.Module, surgery: Surgery, fresh: dict[int, Tensor], old: dict[str, Tensor]) -> None:
    """Frequencies of resized rotary embeddings: as their own class makes them, or as the old ones say.

    Run once the numbers are set: a Hugging Face module computes its frequencies from the configuration.
    """
    for edit in surgery.resizes:
        if edit.rotary and not old[edit.key].is_meta:
            new = fresh[id(old[edit.key])]
            made = _made_by_its_class(twin.get_submodule(edit.key.rpartition(".")[0]), edit)
            new.copy_(made if made is not None else _geometric(old[edit.key], edit))


def _made_by_its_class(module: nn.Module, edit: Resize) -> Tensor | None:
    config = module.__dict__.get("config")
    if config is None or not is_config(config):
        return None
    with torch.device("cpu"):
        made = type(module)(config)._buffers.get(edit.key.rpartition(".")[2])
    return made if made is not None and tuple(made.shape) == edit.shape else None


def _geometric(old: Tensor, edit: Resize) -> Tensor:
    """The frequencies base ** (-i / n), i < n, of a rotary embedding with n pairs, for another n and the same base."""
    n = old.shape[0]
    base = float(old[-1].double()) ** (-n / (n - 1)) if n > 1 else 1.0
    steps = torch.arange(n, dtype=torch.float64)
    if not torch.allclose(old.double().cpu(), base ** (-steps / n), rtol=1e-4):
        raise CheckFailed(
            f"{edit.key} holds scaled rotary frequencies, which cannot be made anew for another head_dim",
            hint="--heads scale_count keeps the head_dim",
        )
    return base ** (-torch.arange(edit.shape[0], dtype=torch.float64) / edit.shape[0])


def _set(twin: nn.Module, edit: SetAttribute) -> None:
    owner: Any = twin
    for part in edit.owner.split(".") if edit.owner else ():
        owner = getattr(owner, part)
    held = owner.__dict__
    if isinstance(owner, nn.Module) and edit.name in owner._buffers:
        buffer = owner._buffers[edit.name]
        assert buffer is not None
        owner._buffers[edit.name] = torch.full_like(buffer, edit.value)
    elif edit.index is None:
        held[edit.name] = edit.value
    else:
        items = list(held[edit.name])
        items[edit.index] = edit.value
        held[edit.name] = items if isinstance(held[edit.name], list) else tuple(items)


def _replace_members(twin: nn.Module, surgery: Surgery) -> None:
    """Every place where a replaced layer stands gets the one member made for it (a shared layer stands in several)."""
    made: dict[int, nn.Module] = {}
    inside_attention: dict[str, dict[str, Replace]] = {}
    for edit in surgery.members:
        path, _, name = edit.path.rpartition(".")
        parent = twin.get_submodule(path)
        if isinstance(parent, nn.MultiheadAttention):
            inside_attention.setdefault(path, {})[name] = edit
        else:
            layer = twin.get_submodule(edit.path)
            made[id(layer)] = take_over(build_member(twin, layer, edit), layer)
    for path, edits in inside_attention.items():
        module = twin.get_submodule(path)
        assert isinstance(module, nn.MultiheadAttention)
        made[id(module)] = take_over(attention.with_members(twin, module, edits, build_member), module)
    for module in list(twin.modules()):
        attention.leave_fast_path(module, made)
        for name, child in list(module._modules.items()):
            if id(child) in made:
                module._modules[name] = made[id(child)]


def build_member(root: nn.Module, layer: nn.Module, edit: Replace) -> MemberModule:
    """The module that `edit` puts in the place of `layer`, a layer of `root`."""
    half = torch_half(MEMBERS.get(edit.member))
    assert isinstance(half, Layerwise), f"{edit.member} replaces no single layers"
    return half.build(root, layer, edit)


def _put_in_place(twin: nn.Module, model: nn.Module, fresh: dict[int, Tensor]) -> None:
    """Resized tensors into their places; whatever `twin` still shares with `model` becomes a clone of its own."""
    theirs = {id(t) for t in (*model.parameters(), *model.buffers())}
    for module in twin.modules():
        store: dict[str, Any]
        for store in (cast(Any, module._parameters), cast(Any, module._buffers)):
            for name, tensor in store.items():
                if tensor is None or id(tensor) not in theirs:
                    continue
                if id(tensor) not in fresh:
                    clone = tensor.detach().clone()
                    fresh[id(tensor)] = (
                        nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
                    )
                store[name] = fresh[id(tensor)]
