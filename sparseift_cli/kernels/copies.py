"""Finds averages of a model whose blocks stay where they were while the model's move: they mix blocks of different places.

An average of dense weights with moving zeros is only less sparse than wanted. Of stored blocks it has no meaning, and nothing
fails, so it is looked for: a `deepcopy` of a layer whose values others write, and whose blocks are elsewhere.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

_COPIES: WeakKeyDictionary[nn.Module, list[ref[nn.Module]]] = WeakKeyDictionary()
_VERSION = "values_version"
"""Attribute of a copy: the version of its values when they were last known to be those of its blocks; None when it is trained."""


def note_copy(layer: nn.Module, made: nn.Module) -> None:
    """`made` is a copy of `layer`, a `BlockLayer`."""
    _COPIES.setdefault(layer, []).append(ref(made))
    setattr(made, _VERSION, made.get_parameter("values")._version)


def forget_copies(layer: nn.Module) -> None:
    """`layer` stores no blocks any more."""
    _COPIES.pop(layer, None)


def note_loaded(layer: nn.Module) -> None:
    """Values and blocks of a `BlockLayer` were loaded together."""
    if getattr(layer, _VERSION, None) is not None:
        setattr(layer, _VERSION, layer.get_parameter("values")._version)


def note_trained(layer: nn.Module) -> None:
    """A `BlockLayer` is trained by itself: it is no average."""
    setattr(layer, _VERSION, None)


def warn_of_averages(model: nn.Module) -> None:
    """Warn, once for each copy of a layer, where the blocks of `model` have moved and an average of it was left behind."""
    if not _COPIES:
        return
    for layer in model.modules():
        for made in tuple(_COPIES.get(layer, ())):
            copy = made()
            if copy is None or _is_left_behind(layer, copy):
                _COPIES[layer].remove(made)
                if copy is not None:
                    warnings.warn(
                        "a copy of the model changes as an average does, and its blocks do not move with those of the model: "
                        "call sparsifier.keep_sparse(copy) once, before the first update of the masks",
                        stacklevel=4,
                    )


def _is_left_behind(layer: nn.Module, copy: Any) -> bool:
    """Whether somebody wrote into the values of a copy, other than its own training, and its blocks are elsewhere."""
    version = getattr(copy, _VERSION, None)
    if version in (None, copy.values._version) or copy.values.grad is not None or copy.columns.is_meta:
        return False
    pairs = ((layer.get_buffer(name), copy.get_buffer(name)) for name in ("row_offsets", "columns"))
    return not all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
