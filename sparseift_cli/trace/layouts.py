"""How one dim is made of others: what views, concatenations and slices of a forward say about the order in memory.

A size equation knows that a fused projection has 3 * heads * head_dim rows; only the view that takes it apart knows
that the three come first. Whoever puts dense weights inside wider ones needs the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..table.poly import Poly
from .record import annotate, flags_of, producers_of
from .symint import Facts, poly_of

Dim = Any  # int or SymInt


def concrete(dim: Dim) -> int:
    """The size of this run, without asking for it as a plain number."""
    return dim.node.value if isinstance(dim, torch.SymInt) else int(dim)


def note_reshape(facts: Facts, before: Sequence[Dim], after: Sequence[Dim]) -> None:
    """Pair the dims of a reshape off from the left; a dim that became several, or came of several, is their product."""
    if not any(isinstance(d, torch.SymInt) for d in (*before, *after)):
        return
    left, right = ([d for d in dims if not (isinstance(d, int) and d == 1)] for dims in (before, after))
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        x, y = concrete(a[0]), concrete(b[0])
        while x != y:
            if x < y and left:
                a.append(left.pop(0))
                x *= concrete(a[-1])
            elif x > y and right:
                b.append(right.pop(0))
                y *= concrete(b[-1])
            else:
                return
        for whole, parts in ((a, b), (b, a)):
            if len(whole) == 1 and len(parts) > 1:
                _note_view(facts, "product", whole[0], [p for p in parts if concrete(p) != 1])
            elif len(whole) == 2 == len(parts) and isinstance(whole[0], int) and concrete(parts[0]) % whole[0] == 0:
                heads = poly_of(parts[0]).divided_by(Poly.const(whole[0]))  # [B, E] seen as [B * heads, head_dim]
                if heads is not None:
                    note_layout(facts, "product", whole[1], [facts.symint(heads), parts[1]])


def note_sum(facts: Facts, whole: Dim, parts: Sequence[Dim]) -> None:
    """`whole` is its parts, one after another."""
    _note_view(facts, "sum", whole, parts)


def note_layout(facts: Facts, kind: Any, whole: Dim, parts: Sequence[Dim]) -> None:
    """How `whole` lies in memory where no view says so: the groups of a convolution, the heads inside a fused function."""
    if isinstance(whole, torch.SymInt) and len(parts) > 1:
        facts.orders.setdefault(poly_of(whole), {}).setdefault((kind, tuple(poly_of(p) for p in parts)))


def _note_view(facts: Facts, kind: Any, whole: Dim, parts: Sequence[Dim]) -> None:
    if isinstance(whole, torch.SymInt) and len(parts) > 1:
        note_layout(facts, kind, whole, parts)
        key = poly_of(whole)
        known = facts.layouts.get(key)
        if known is None or known[0] == "sum":  # a view says more than a slice
            facts.layouts[key] = (kind, tuple(poly_of(p) for p in parts))


def _dim(tensor: Tensor, kwargs: dict[str, Any], rest: tuple[Any, ...], at: int) -> int:
    dim = kwargs.get("dim", rest[at] if len(rest) > at else 0)
    return dim % tensor.dim() if isinstance(dim, int) else 0


def _reshaped(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and out.dim() != args[0].dim():
        note_reshape(facts, args[0].shape, out.shape)
    return out


def _concatenated(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    tensors = kwargs.get("tensors", args[0] if args else ())
    if isinstance(tensors, (list, tuple)) and all(isinstance(t, Tensor) and t.dim() == out.dim() for t in tensors):
        dim = _dim(out, kwargs, args[1:], 0)
        note_sum(facts, out.shape[dim], [t.shape[dim] for t in tensors])
    return out


def _split(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = func(*args, **kwargs)
    dim = _dim(args[0], kwargs, args[1:], 1)
    note_sum(facts, args[0].shape[dim], [p.shape[dim] for p in parts])
    for i, part in enumerate(parts):
        note_part(part, i)
    return parts


def _unbound(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = func(*args, **kwargs)
    for i, part in enumerate(parts):
        note_part(part, i)
    return parts


def note_part(tensor: Tensor, part: int) -> Tensor:
    """Of its producers' output, `tensor` is the part with this number."""
    return annotate(tensor, flags_of(tensor), frozenset((producer, part) for producer, _ in producers_of(tensor)))


def note_index(facts: Facts, source: Tensor, index: Any, out: Tensor) -> None:
    """`x[..., :n]` and `x[..., n:]` take a dim apart; `x[i]` and `x[..., i, :]` take part i of one."""
    items: list[Any] = list(index) if isinstance(index, tuple) else [index]
    plain = [i for i in items if isinstance(i, int)]
    if len(plain) == 1 and out.dim() == source.dim() - 1:
        note_part(out, plain[0])
    if source.dim() != out.dim() or any(not (isinstance(i, slice) or i is Ellipsis) for i in items):
        return
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (source.dim() - len(items) + 1)
    for dim, item in enumerate(items):
        whole, part = source.shape[dim], out.shape[dim]
        if isinstance(item.stop, torch.SymInt) and concrete(item.stop) == concrete(whole):
            facts.equal(poly_of(item.stop), poly_of(whole))  # `x[:, :self.channels]` keeps all of them (GhostNet)
        if not isinstance(whole, torch.SymInt) or concrete(part) >= concrete(whole):
            continue
        if item.step is not None and concrete(item.step) != 1:  # every second one: pairs side by side
            if concrete(part) * concrete(item.step) == concrete(whole):
                _note_view(facts, "product", whole, [part, item.step])
            continue
        start = 0 if item.start is None else item.start
        before = start if concrete(start) >= 0 else whole + start
        note_sum(facts, whole, [p for p in (before, part, whole - part - before) if concrete(p) > 0])


def _shuffled(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    x, *rest = args if args else (kwargs["input"],)
    if func is F.pixel_shuffle:  # channel c * r * r + i * r + j goes to pixel (i, j) of channel c
        side = rest[0] if rest else kwargs["upscale_factor"]
        _note_view(facts, "product", x.shape[-3], [out.shape[-3], side, side])
    elif func in (F.channel_shuffle, torch.channel_shuffle):
        groups, channels = rest[0] if rest else kwargs["groups"], x.shape[1]
        for parts in ([groups, channels // groups], [channels // groups, groups]):
            note_layout(facts, "product", channels, parts)
    elif func is F.glu:
        dim = _dim(x, kwargs, tuple(rest), 0) if rest or "dim" in kwargs else x.dim() - 1
        note_sum(facts, x.shape[dim], [out.shape[dim]] * 2)
    return out


Watch = Callable[[Facts, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
WATCHED: dict[Any, Watch] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten), _reshaped),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _reshaped),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenated),
    **dict.fromkeys((Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.tensor_split), _split),
    **dict.fromkeys((Tensor.unbind, torch.unbind), _unbound),
    **dict.fromkeys((F.pixel_shuffle, F.channel_shuffle, torch.channel_shuffle, F.glu), _shuffled),
}


# Widths that something is chosen from by its place: a router's outputs are its experts, and must stay as many. No shape
# says so, since an index has no width. So what `topk` and its like return is remembered, and a width is fixed as soon
# as an operation reads such indices; where only the values are read (k largest, a maximum) it may grow.

# where the dim stands among the arguments, and what it is where it is not given (None: the indices are of all dims)
_CHOOSERS: dict[str, tuple[int, int | None]] = {
    "topk": (2, -1),
    "kthvalue": (2, -1),
    "sort": (1, -1),
    "argsort": (1, -1),
    "argmax": (1, None),
    "argmin": (1, None),
    "max": (1, None),
    "min": (1, None),
    "median": (1, None),
    "multinomial": (9, -1),
}
_FUNCTIONS = {getattr(home, name): where for name, where in _CHOOSERS.items() for home in (torch, Tensor)}
_MARK = "_sparseift_chosen_from"


class IndexTracker:
    """Indices that were made so far, and what follows from their use."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.any = False

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
        """`out`, the answer of `func`; attributes of a tensor (its shape) are no use of it."""
        if self.any and getattr(func, "__name__", "") != "__get__":
            for leaf in tree_leaves((args, dict(kwargs))):
                for poly in getattr(leaf, _MARK, ()) if isinstance(leaf, Tensor) else ():
                    self.facts.freeze(poly, "places in it are chosen by index")
        where = _FUNCTIONS.get(func)
        if where is not None:
            self._remember(where, args, kwargs, out)
        return out

    def _remember(
        self, where: tuple[int, int | None], args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        place, default = where
        source = args[0] if args else kwargs.get("input")
        if not isinstance(source, Tensor):
            return
        dim = kwargs.get("dim", args[place] if len(args) > place else default)
        dims = range(source.dim()) if not isinstance(dim, int) else [dim]
        widths: list[Poly] = [poly_of(size) for d in dims if isinstance(size := source.shape[d], torch.SymInt)]
        for leaf in tree_leaves(out) if widths else ():
            if isinstance(leaf, Tensor) and leaf.dtype is torch.int64 and leaf is not source:
                setattr(leaf, _MARK, widths)
                self.any = True
