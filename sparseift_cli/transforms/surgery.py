"""From a plan to edits, and from edits to a new module. The dense module never changes.

`apply_surgery` allocates a tensor that changes its shape once, in the new shape; all others are cloned, and tied
tensors stay tied. The weights of resized and replaced layers are not set here: `initialise` or `preserve` does that.
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
    """The edits that turn `model` into the network that `plan` describes.

    Args:
        structure: of the trace of `model`.
    """
    return torch_half(plan.member).surgery(plan, structure, model)


def apply_surgery(model: M, surgery: Surgery) -> M:
    """A copy of `model` with the edits made. Weights of changed layers are not set; everything else is a clone.

    Raises:
        UsageError: an edit does not fit the module (a plan of another model).
    """
    # Entries of deepcopy's memo are taken as copied: parameters and buffers stay shared until `_replace_tensors`.
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # activations of the last forward: deepcopy refuses tensors with a gradient history
        for t in tree_leaves(module.__dict__):
            if isinstance(t, Tensor) and not t.is_leaf:
                memo.setdefault(id(t), t.detach().clone())
    new = copy.deepcopy(model, memo)
    fresh: dict[int, Tensor] = {}  # id of an old parameter or buffer -> the tensor that replaces it
    try:
        for resize in surgery.resizes:
            _resize(new, resize, fresh)
        for edit in surgery.attributes:
            _set_attribute(new, edit)
        _set_frequencies(new, surgery, fresh, dict(model.named_buffers(remove_duplicate=False)))
        _replace_members(new, surgery)
    except (AttributeError, KeyError, IndexError) as error:
        raise UsageError(
            f"the surgery does not fit this {type(model).__name__}: {error}", hint="it was planned for another model"
        ) from error
    _replace_tensors(new, model, fresh)
    for module in new.modules():
        sync_sizes(module)
        if isinstance(module, nn.RNNBase):  # it has a second list of its weights
            module._init_flat_weights()
    return new


def _resize(new: nn.Module, edit: Resize, fresh: dict[int, Tensor]) -> None:
    """Allocate the new tensor and note it in `fresh`; tied names share one."""
    path, _, name = edit.key.rpartition(".")
    module = new.get_submodule(path)
    old = (module._parameters if name in module._parameters else module._buffers)[name]
    assert old is not None
    if id(old) not in fresh:
        tensor = old.new_empty(edit.shape)
        if name in ("running_mean", "running_var"):
            tensor.fill_(float(name == "running_var"))
        is_parameter = isinstance(old, nn.Parameter)
        fresh[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor


def _set_frequencies(new: nn.Module, surgery: Surgery, fresh: dict[int, Tensor], old: dict[str, Tensor]) -> None:
    """Frequencies of resized rotary embeddings: as their class computes them, or the same geometric series for more pairs.

    Called after the attributes are set: a Hugging Face module computes its frequencies from the configuration.

    Args:
        old: buffers of the dense model by name, the frequencies of n pairs [n].
    """
    for edit in surgery.resizes:
        if edit.rotary and not old[edit.key].is_meta:
            made = _from_class(new.get_submodule(edit.key.rpartition(".")[0]), edit)
            fresh[id(old[edit.key])].copy_(made if made is not None else _geometric(old[edit.key], edit))


def _from_class(module: nn.Module, edit: Resize) -> Tensor | None:
    """The frequencies [new number of pairs] of a new module from the changed configuration; None where it has none."""
    config = module.__dict__.get("config")
    if config is None or not is_config(config):
        return None
    with torch.device("cpu"):
        made = type(module)(config)._buffers.get(edit.key.rpartition(".")[2])
    return made if made is not None and tuple(made.shape) == edit.shape else None


def _geometric(old: Tensor, edit: Resize) -> Tensor:
    """The frequencies base ** (-i / n), i < n, for another n: [n] -> [edit.shape[0]], with the same base.

    Raises:
        CheckFailed: the old frequencies are not of this form.
    """
    n = old.shape[0]
    base = float(old[-1].double()) ** (-n / (n - 1)) if n > 1 else 1.0
    steps = torch.arange(n, dtype=torch.float64)
    if not torch.allclose(old.double().cpu(), base ** (-steps / n), rtol=1e-4):
        raise CheckFailed(
            f"{edit.key} holds scaled rotary frequencies, which cannot be computed for another head_dim",
            hint="--heads scale_count keeps the head_dim",
        )
    return base ** (-torch.arange(edit.shape[0], dtype=torch.float64) / edit.shape[0])


def _set_attribute(new: nn.Module, edit: SetAttribute) -> None:
    owner: Any = new
    for part in edit.owner.split(".") if edit.owner else ():
        owner = getattr(owner, part)
    values = owner.__dict__
    if isinstance(owner, nn.Module) and edit.name in owner._buffers:
        buffer = owner._buffers[edit.name]
        assert buffer is not None
        owner._buffers[edit.name] = torch.full_like(buffer, edit.value)
    elif edit.index is None:
        values[edit.name] = edit.value
    else:
        items = list(values[edit.name])
        items[edit.index] = edit.value
        values[edit.name] = items if isinstance(values[edit.name], list) else tuple(items)


def _replace_members(new: nn.Module, surgery: Surgery) -> None:
    """Replace every occurrence of a layer by the one member made for it (a shared layer occurs several times)."""
    made: dict[int, nn.Module] = {}  # id of the old layer -> its member
    inside_attention: dict[str, dict[str, Replace]] = {}
    for edit in surgery.members:
        path, _, name = edit.path.rpartition(".")
        parent = new.get_submodule(path)
        if isinstance(parent, nn.MultiheadAttention):
            inside_attention.setdefault(path, {})[name] = edit
        else:
            layer = new.get_submodule(edit.path)
            made[id(layer)] = take_over(build_member(new, layer, edit), layer)
    for path, edits in inside_attention.items():
        module = new.get_submodule(path)
        assert isinstance(module, nn.MultiheadAttention)
        made[id(module)] = take_over(attention.with_members(new, module, edits, build_member), module)
    for module in list(new.modules()):
        attention.leave_fast_path(module, made)
        for name, child in list(module._modules.items()):
            if id(child) in made:
                module._modules[name] = made[id(child)]


def build_member(root: nn.Module, layer: nn.Module, edit: Replace) -> MemberModule:
    """The module that `edit` puts in the place of `layer`, a layer of `root`."""
    half = torch_half(MEMBERS.get(edit.member))
    assert isinstance(half, Layerwise), f"{edit.member} replaces no single layers"
    return half.build(root, layer, edit)


def _replace_tensors(new: nn.Module, model: nn.Module, fresh: dict[int, Tensor]) -> None:
    """Set the tensors of `fresh`; every other tensor that `new` still shares with `model` is cloned."""
    shared = {id(t) for t in (*model.parameters(), *model.buffers())}
    for module in new.modules():
        store: dict[str, Any]
        for store in (cast(Any, module._parameters), cast(Any, module._buffers)):
            for name, tensor in store.items():
                if tensor is None or id(tensor) not in shared:
                    continue
                if id(tensor) not in fresh:
                    clone = tensor.detach().clone()
                    fresh[id(tensor)] = (
                        nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
                    )
                store[name] = fresh[id(tensor)]
