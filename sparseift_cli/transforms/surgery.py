"""From a plan to edits, and from edits to a new module. The dense module never changes.

`apply_surgery` allocates a tensor that changes its shape once, in the new shape; all others are cloned, and tied
tensors stay tied. The weights of resized and replaced layers are not set here: `initialise` or `preserve` does that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import _lru_cache_wrapper as CachedFunction
from functools import lru_cache
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from ..plan.members import MEMBERS
from ..plan.plan import Plan
from ..trace.constants import named_constants, resized
from ..trace.structure import Structure
from . import attention
from .edits import Replace, Resize, Surgery
from .layers import set_attribute, sync_sizes, take_over
from .members import torch_half
from .members.base import MemberModule
from .members.layerwise import Layerwise
from .rotary import set_frequencies

M = TypeVar("M", bound=nn.Module)


def surgery_for(plan: Plan, structure: Structure, model: nn.Module) -> Surgery:
    """The edits that turn `model` into the network that `plan` describes.

    Args:
        structure: of the trace of `model`.
    """
    surgery = torch_half(plan.member).surgery(plan, structure, model)
    patterns = {row.layer.name: row.pattern for row in plan.layers}
    return replace(surgery, masked=tuple(replace(m, pattern=patterns[m.layer]) for m in surgery.masked))


def apply_surgery(model: M, surgery: Surgery) -> M:
    """A copy of `model` with the edits made. Weights of changed layers are not set; everything else is a clone.

    Raises:
        UsageError: an edit does not fit the module (a plan of another model).
    """
    # Entries of deepcopy's memo are taken as copied: parameters and buffers stay shared until `_replace_tensors`.
    constants = dict(named_constants(model))
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *constants.values())}
    for module in model.modules():  # activations of the last forward: deepcopy refuses tensors with a gradient history
        for t in tree_leaves(module.__dict__):
            if isinstance(t, Tensor) and not t.is_leaf:
                memo.setdefault(id(t), t.detach().clone())
    new = copy.deepcopy(model, memo)
    _rebind_functions(new, {id(m): memo[id(m)] for m in model.modules()})
    fresh: dict[int, Tensor] = {}  # id of an old parameter or buffer -> the tensor that replaces it
    try:
        for resize in surgery.resizes:
            _resize(new, resize, fresh)
        for edit in surgery.attributes:
            set_attribute(new, edit)
        set_frequencies(new, surgery, fresh, constants)
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


def _rebind_functions(new: nn.Module, copies: dict[int, nn.Module]) -> None:
    """Let functions among the attributes of modules read the copy: `self.head = lambda x: x @ self.embed.weight.T`.

    deepcopy copies no functions, so they would go on with the modules that they hold, those of the dense model.

    Args:
        copies: id of a dense module -> its copy.
    """
    for module in new.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, FunctionType):
                module.__dict__[name] = _rebound(value, copies)
            elif isinstance(value, CachedFunction) and isinstance(value.__wrapped__, MethodType):
                holder = copies.get(id(value.__wrapped__.__self__))
                if holder is not None:  # without the results of the dense module
                    method = MethodType(value.__wrapped__.__func__, holder)
                    module.__dict__[name] = lru_cache(**value.cache_parameters())(method)


def _rebound(function: FunctionType, copies: dict[int, nn.Module]) -> FunctionType:
    """The function with copies in place of the dense modules that it closes over; itself where there are none."""
    cells = function.__closure__ or ()
    held = [_content(cell) for cell in cells]
    if not any(id(content) in copies for content in held):
        return function
    closure = tuple(
        CellType(copies[id(content)]) if id(content) in copies else cell
        for cell, content in zip(cells, held, strict=True)
    )
    rebound = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    rebound.__kwdefaults__ = function.__kwdefaults__
    rebound.__dict__.update(function.__dict__)
    return rebound


def _content(cell: CellType) -> Any:
    """What a function holds in a variable of the function around it; None where it was never set."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _resize(new: nn.Module, edit: Resize, fresh: dict[int, Tensor]) -> None:
    """Allocate the new tensor and note it in `fresh`; tied names share one."""
    path, _, name = edit.key.rpartition(".")
    module = new.get_submodule(path)
    stores = cast("list[dict[str, Tensor]]", [module._parameters, module._buffers, module.__dict__])
    old = next(store[name] for store in stores if name in store)
    if id(old) not in fresh:
        known = edit.runs and not old.is_meta
        tensor = resized(old.detach(), edit.runs)[0] if known else old.new_empty(edit.shape)
        if name in ("running_mean", "running_var"):
            tensor.fill_(float(name == "running_var"))
        is_parameter = isinstance(old, nn.Parameter)
        fresh[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor


def repeated_tables(model: nn.Module, surgery: Surgery) -> Iterator[str]:
    """A sentence for each table of `model`, the dense one, whose larger form follows from no formula."""
    constants, seen = dict(named_constants(model)), set[int]()
    for edit in surgery.resizes:
        old = constants.get(edit.key)
        if edit.runs and old is not None and not old.is_meta and id(old) not in seen:
            seen.add(id(old))
            if not resized(old.detach(), edit.runs)[1]:
                sizes = " -> ".join("x".join(map(str, shape)) for shape in (old.shape, edit.shape))
                yield f"{edit.key} ({sizes}) is no parameter and follows no known formula: its entries are repeated"


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
    shared = {id(t) for t in (*model.parameters(), *(t for _, t in named_constants(model)))}
    for module in new.modules():
        store: dict[str, Any]
        for store in (cast(Any, module._parameters), cast(Any, module._buffers), module.__dict__):
            for name, tensor in list(store.items()):
                if not isinstance(tensor, Tensor) or id(tensor) not in shared:
                    continue
                if id(tensor) not in fresh:
                    clone = tensor.detach().clone()
                    fresh[id(tensor)] = (
                        nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
                    )
                store[name] = fresh[id(tensor)]
