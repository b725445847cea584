"""Tells others when the weight gradient of a layer of stored blocks is computed, and offers them the dense one.

Mask algorithms grow weights where the gradient at places that are not stored is large. Operators look here when they run: a
watcher that comes or goes changes no graph and compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import ref

if TYPE_CHECKING:
    from torch import Tensor

    from .layer import BlockLayer


class Watcher(Protocol):
    """Who wants to know."""

    def add(self, layer: BlockLayer, dense_gradient: Callable[[], Tensor]) -> None:
        """A backward pass is at the weight gradient of `layer`; `dense_gradient` computes it at every place, [*weight_shape]."""
        ...


_WATCHED: dict[int, tuple[ref[BlockLayer], ref[Watcher]]] = {}
"""By the address of the layer's `columns`, which operators are given. Nothing is kept alive by being in here."""


def watch_gradient(layer: BlockLayer, watcher: Watcher) -> None:
    """Call `watcher.add` whenever the weight gradient of `layer` is computed, in place of any other watcher of the layer."""
    unwatch_gradient(layer)
    _WATCHED[layer.columns.data_ptr()] = ref(layer), ref(watcher)


def unwatch_gradient(layer: BlockLayer) -> None:
    """Call no watcher of `layer` any more; layers and watchers that are gone are forgotten too."""
    for address, (watched, watcher) in list(_WATCHED.items()):
        if watched() in (None, layer) or watcher() is None:
            del _WATCHED[address]


def notify(columns: Tensor, dense_gradient: Callable[[], Tensor]) -> None:
    """An operator is about to compute a weight gradient.

    Args:
        columns: of the BlockIndex, int32 [n].
        dense_gradient: computes it at every place, [out, in, *kernel], outputs first even where the layer is transposed.
    """
    if not _WATCHED or (found := _WATCHED.get(columns.data_ptr())) is None:
        return
    layer, watcher = found[0](), found[1]()
    if layer is not None and watcher is not None and layer.columns.data_ptr() == columns.data_ptr():
        watcher.add(
            layer, lambda: (dense_gradient().t() if layer.transposed else dense_gradient()).view(layer.weight_shape)
        )
