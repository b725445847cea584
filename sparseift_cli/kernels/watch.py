"""Tells others when the weight gradient of a layer of stored blocks is computed, and offers them the dense one.

Mask algorithms grow weights where the gradient at places that are not stored is large. Operators look here when they run: a
watcher that comes or goes changes no graph and compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, ref

if TYPE_CHECKING:
    from torch import Tensor

    from .layer import BlockLayer


class Watcher(Protocol):
    """Who wants to know."""

    def add(self, layer: BlockLayer, dense_gradient: Callable[[], Tensor]) -> None:
        """A backward pass is at the weight gradient of `layer`; `dense_gradient` computes it at every place, [*weight_shape]."""
        ...


_WATCHED: WeakKeyDictionary[BlockLayer, ref[Watcher]] = WeakKeyDictionary()
"""Nothing is kept alive by being in here."""
_PLACES: dict[int, ref[BlockLayer]] = {}
"""Watched layers by the address of their `columns`, which operators are given; made anew where a layer has moved since."""


def watch_gradient(layer: BlockLayer, watcher: Watcher) -> None:
    """Call `watcher.add` whenever the weight gradient of `layer` is computed, in place of any other watcher of the layer."""
    _WATCHED[layer] = ref(watcher)


def unwatch_gradient(layer: BlockLayer, watcher: Watcher) -> None:
    """Call `watcher` for `layer` no more; another one, which came after it, stays."""
    found = _WATCHED.get(layer)
    if found is not None and found() in (None, watcher):
        del _WATCHED[layer]


def notify(columns: Tensor, dense_gradient: Callable[[], Tensor]) -> None:
    """An operator is about to compute a weight gradient.

    Args:
        columns: of the BlockIndex, int32 [n].
        dense_gradient: computes it at every place, [out, in, *kernel], outputs first even where the layer is transposed.
    """
    layer = _layer_with(columns) if _WATCHED else None
    watcher = None if layer is None else _WATCHED[layer]()
    if layer is not None and watcher is not None:
        watcher.add(
            layer, lambda: (dense_gradient().t() if layer.transposed else dense_gradient()).view(layer.weight_shape)
        )


def _layer_with(columns: Tensor) -> BlockLayer | None:
    """The watched layer that has the buffer `columns`, int32 [n]; `module.to` and others may have put it elsewhere."""
    address = columns.data_ptr()
    layer = _PLACES[address]() if address in _PLACES else None
    if layer is None or layer not in _WATCHED or layer.columns.data_ptr() != address:
        _PLACES.clear()
        _PLACES.update({layer.columns.data_ptr(): ref(layer) for layer in tuple(_WATCHED)})
        layer = _PLACES[address]() if address in _PLACES else None
    return layer
