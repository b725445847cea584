"""How one dim is made of others, in which order, as views, concatenations, splits and slices of a forward pass show it.

Equations between sizes know that a fused QKV projection has 3 * heads * head_dim rows. They do not know whether the
rows are ordered as [3, heads, head_dim] or [heads, 3, head_dim]; only the view that takes them apart does.
`transforms/preserve` needs the order to put the rows of a dense weight at their places in a wider one.

The functions here are called by `shape_rules` for the functions in WATCHED: they call PyTorch's function and record
what it shows in `Facts.layouts` (the most telling layout of a dim) and `Facts.all_layouts` (all that were seen). At the end
of the file is `IndexTracker`, for widths that must not change because an entry is chosen by its index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..table.poly import Poly
from .record import annotate, flags_of, producers_of
from .symint import Facts, concrete, poly_of
from .union_find import LazyRenaming, UnionFind

Dim = Any  # int or SymInt


def note_reshape(facts: Facts, before: Sequence[Dim], after: Sequence[Dim]) -> None:
    """Record which dims a reshape splits or joins, from the shapes before and after it.

    Dims are matched from the left, by their values in this run; sizes of 1 are skipped.

    >>> facts = Facts()
    >>> heads, head_dim = (facts.symint(facts.new_variable(size)) for size in (4, 16))
    >>> note_reshape(facts, (32, heads * head_dim), (32, 1, heads, head_dim))
    >>> facts.layouts
    {w0*w1: ('product', (w0, w1))}
    """
    if not any(isinstance(d, torch.SymInt) for d in (*before, *after)):
        return
    left, right = ([d for d in dims if not (isinstance(d, int) and d == 1)] for dims in (before, after))
    while left and right:  # take dims from both sides until the products of the taken ones are equal
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
                return  # e.g. [6, 4] -> [4, 6]: no dim is a product of others
        for whole, parts in ((a, b), (b, a)):
            if len(whole) == 1 and len(parts) > 1:
                _note_view(facts, "product", whole[0], [p for p in parts if concrete(p) != 1])
            elif len(whole) == 2 == len(parts) and isinstance(whole[0], int) and concrete(parts[0]) % whole[0] == 0:
                heads = poly_of(parts[0]).divided_by(Poly.const(whole[0]))  # [B, E] -> [B * heads, head_dim]
                if heads is not None:
                    note_layout(facts, "product", whole[1], [facts.symint(heads), parts[1]])


def note_sum(facts: Facts, whole: Dim, parts: Sequence[Dim]) -> None:
    """Record that the dim `whole` is its parts, one after another."""
    _note_view(facts, "sum", whole, parts)


def note_cut(facts: Facts, whole: Dim, parts: Sequence[Dim]) -> None:
    """Record that the dim `whole` is cut into its parts, one after another, of which none may shrink.

    >>> facts = Facts()
    >>> whole, part = (facts.symint(facts.new_variable(size)) for size in (16, 4))
    >>> note_cut(facts, whole, [whole - part, part])
    >>> list(facts.equations)
    [-1*w0 + w1 + w2]
    """
    for part in parts:
        facts.not_negative(poly_of(part))
    note_sum(facts, whole, parts)


def note_layout(facts: Facts, kind: Any, whole: Dim, parts: Sequence[Dim]) -> None:
    """Record how `whole` is made of `parts` where no view shows it: groups of a convolution, heads in a fused function.

    `kind` is "product" or "sum", as in `DimLayout`.
    """
    if isinstance(whole, torch.SymInt) and len(parts) > 1:
        facts.all_layouts.setdefault(poly_of(whole), {}).setdefault((kind, tuple(poly_of(p) for p in parts)))


def _note_view(facts: Facts, kind: Any, whole: Dim, parts: Sequence[Dim]) -> None:
    """The same where a view or slice shows it: then it is a candidate for the one layout of `whole`, too."""
    if isinstance(whole, torch.SymInt) and len(parts) > 1:
        note_layout(facts, kind, whole, parts)
        key = poly_of(whole)
        known = facts.layouts.get(key)
        if known is None or known[0] == "sum":  # a view tells more than a slice: the order of all parts
            facts.layouts[key] = (kind, tuple(poly_of(p) for p in parts))


def equal_parts(facts: Facts, variables: UnionFind) -> list[Poly]:
    """Equations (each is 0) between the parts of a concatenation that a view or a split takes apart again.

    A bias `cat((q, k, v))` of a projection viewed as [3, heads, head_dim]: their sum alone would let q grow instead of k.

    >>> facts = Facts()
    >>> q, k, whole = (facts.symint(facts.new_variable(size)) for size in (8, 8, 16))
    >>> note_sum(facts, q + k, [q, k])
    >>> note_reshape(facts, (5, whole), (5, 2, 8))
    >>> facts.equal(poly_of(whole), poly_of(q + k))
    >>> equal_parts(facts, UnionFind(3, facts.equations))
    [w0 + -1*w1]
    """
    views: dict[Poly, set[int]] = {}  # a dim of equal parts, minus any of its sums -> how many parts
    for whole, seen in facts.all_layouts.items():
        for kind, parts in seen:
            if kind == "product" and parts[0].is_constant:
                views.setdefault(whole, set()).add(parts[0].constant)
    same = _same_in(variables)
    found: dict[Poly, None] = {}
    for whole, seen in facts.all_layouts.items():
        for kind, parts in seen:
            alike = kind == "sum" and len({part.evaluate(facts.sizes) for part in parts}) == 1
            if (
                alike
                and len(set(parts)) > 1
                and any(len(parts) in counts and same(view, whole) for view, counts in views.items())
            ):
                found |= dict.fromkeys(parts[0] - part for part in parts[1:] if part != parts[0])
    return [*found, *_parts_taken_apart_again(facts, same)]


def _parts_taken_apart_again(facts: Facts, same: Callable[[Poly, Poly], bool]) -> Iterator[Poly]:
    """Equations between two sums of one dim that have a border at the same place: the parts in front of it are alike.

    A bias `cat((q, k, v))` of a projection that is split by [q_dim, k_dim, v_dim].
    """
    sums: dict[int, list[tuple[Poly, tuple[Poly, ...]]]] = {}  # size of a dim -> (the dim, its parts)
    for whole, seen in facts.all_layouts.items():
        parts_of_whole = [(whole, parts) for kind, parts in seen if kind == "sum"]
        sums.setdefault(whole.evaluate(facts.sizes), []).extend(parts_of_whole)
    for alike in sums.values():
        for (whole, parts), (other, others) in combinations(alike, 2):
            if parts != others and same(whole, other):
                borders, other_borders = _borders(facts, parts), _borders(facts, others)
                common = [at for at in borders if at in other_borders]
                yield from (borders[at] - other_borders[at] for at in common if borders[at] != other_borders[at])


def _borders(facts: Facts, parts: Sequence[Poly]) -> dict[int, Poly]:
    """Where each part but the last one ends: its place in this run -> the sum of the parts in front."""
    ends = list(accumulate(parts))[:-1]
    return {end.evaluate(facts.sizes): end for end in ends}


def _same_in(variables: UnionFind) -> Callable[[Poly, Poly], bool]:
    """Whether two sizes are equal by the equations between `variables`."""
    known = {equation.primitive() for equation in variables.equations}

    def same(a: Poly, b: Poly) -> bool:
        difference = (a - b).rename(LazyRenaming(variables.find)).primitive()
        return not difference.terms or difference in known

    return same


def _dim(tensor: Tensor, kwargs: dict[str, Any], rest: tuple[Any, ...], at: int) -> int:
    """The argument `dim` of a function, by name or at position `at` of `rest`, as a non-negative number."""
    dim = kwargs.get("dim", rest[at] if len(rest) > at else 0)
    return dim % tensor.dim() if isinstance(dim, int) else 0


# --- the watched functions: each calls `func` and records what the result shows ---


def _reshaped(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and list(map(concrete, out.shape)) != list(map(concrete, args[0].shape)):
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
    dim = _dim(args[0], kwargs, args[1:], 1)
    uneven = _uneven_chunks(func, args, kwargs, dim)
    parts = uneven or func(*args, **kwargs)
    note = note_sum if uneven else note_cut  # what is left of uneven chunks follows them
    note(facts, args[0].shape[dim], [p.shape[dim] for p in parts])
    for i, part in enumerate(parts):
        note_part(part, i)
    return parts


def _uneven_chunks(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], dim: int
) -> tuple[Tensor, ...] | None:
    """Chunks of which the last one is smaller, so that it stays the rest; PyTorch's own division fixes how many are left over.

    x [..., 88] in 3 chunks is 30, 30 and x.shape[-1] - 2 * 30.
    """
    if func not in (Tensor.chunk, torch.chunk) or len(args) + len(kwargs) < 2:
        return None
    size, chunks = args[0].shape[dim], kwargs["chunks"] if "chunks" in kwargs else args[1]
    if (
        not isinstance(size, torch.SymInt)
        or concrete(size) % concrete(chunks) == 0
        or concrete(size) < concrete(chunks)
    ):
        return None
    length = (size + chunks - 1) // chunks
    whole = (concrete(size) - 1) // concrete(length)
    return torch.split_with_sizes(args[0], [*[length] * whole, size - length * whole], dim)


def _unbound(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = func(*args, **kwargs)
    for i, part in enumerate(parts):
        note_part(part, i)
    return parts


def note_part(tensor: Tensor, part: int) -> Tensor:
    """Note that a tensor (any shape) is part number `part` of the output of its producers, as q is part 0 of a split QKV."""
    return annotate(tensor, flags_of(tensor), frozenset((producer, part) for producer, _ in producers_of(tensor)))


def note_index(facts: Facts, source: Tensor, index: Any, out: Tensor) -> None:
    """Record what `out = source[index]` (any shapes) shows.

    `x[..., :n]` and `x[..., n:]` split a dim into n and the rest; `x[i]` and `x[..., i, :]` take part i of a dim.
    """
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
            facts.equal(poly_of(item.stop), poly_of(whole))  # x[:, :self.channels] keeps all of them (GhostNet)
        if not isinstance(whole, torch.SymInt) or concrete(part) >= concrete(whole):
            continue
        if item.step is not None and concrete(item.step) != 1:  # x[::2], as rotary embeddings: pairs of neighbours
            if concrete(part) * concrete(item.step) == concrete(whole):
                _note_view(facts, "product", whole, [part, item.step])
            continue
        start = 0 if item.start is None else item.start
        before = start if concrete(start) >= 0 else whole + start
        note_cut(facts, whole, [p for p in (before, part, whole - part - before) if concrete(p) > 0])


def _shuffled(facts: Facts, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    x, *rest = args if args else (kwargs["input"],)
    if func is F.pixel_shuffle:  # channel (c * r + i) * r + j -> pixel (i, j) of channel c
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


# --- widths that an entry is chosen from by its index ---

# Where integers name the entries of a width (classes, experts, rows of a table), their number must stay. No shape shows
# that, because an index has no width. So a width is fixed that an op indexes: `gather` along it, a loss with targets.

_ALONG_DIM = """
    gather index_select index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_
    scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_
"""  # (input, dim, index, ...)
_ALL_DIMS = "take put put_"  # (input, index, ...)
_CLASS_LOSSES = "cross_entropy nll_loss multi_margin_loss multilabel_margin_loss"  # (input [N, C, ...] or [C], target)


def _indexed_along_dim(input: Tensor, *args: Any, **kwargs: Any) -> list[Dim]:
    dim = kwargs.get("dim", args[0] if args else None)
    return [input.shape[dim]] if isinstance(dim, int) and input.dim() else []


def _taken_along_dim(input: Tensor, indices: Any, dim: Any = None) -> list[Dim]:
    return [input.shape[dim]] if isinstance(dim, int) else list(input.shape)


def _indexed_anywhere(input: Tensor, *_: Any, **__: Any) -> list[Dim]:
    return list(input.shape)


def _classes(input: Tensor, target: Any, *_: Any, **__: Any) -> list[Dim]:
    by_class = isinstance(target, Tensor) and not target.is_floating_point() and input.dim()
    return [input.shape[min(1, input.dim() - 1)]] if by_class else []


def _symbols(log_probs: Tensor, *_: Any, **__: Any) -> list[Dim]:
    return [log_probs.shape[-1]]


def _one_hot(tensor: Tensor, num_classes: Any = -1) -> list[Dim]:
    return [num_classes]


def _rows(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Dim]:
    return [weight.shape[0]]


def _indexed_by_tensors(source: Tensor, index: Any = (), *_: Any, indices: Any = None, **__: Any) -> list[Dim]:
    """The dims that tensors of integers index in `source[index]`; numbers in the code name entries that stay."""
    index = index if indices is None else indices
    items: list[Any] = list(index) if isinstance(index, tuple) else [index]
    taken = [_dims_taken(item) for item in items]
    missing = source.dim() - sum(taken)
    dims, at = [], 0
    for item, dims_of_item in zip(items, taken, strict=True):
        if isinstance(item, Tensor) and item.dtype not in (torch.bool, torch.uint8):
            dims.append(source.shape[at])
        at += missing if item is Ellipsis else dims_of_item
    return dims


def _dims_taken(item: Any) -> int:
    """How many dims an item of an index reads: a mask one for each of its own, None and an ellipsis none."""
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 0 if item is None or item is Ellipsis or isinstance(item, bool) else 1


def _by_name(names: str, find: Callable[..., list[Dim]]) -> dict[Any, Callable[..., list[Dim]]]:
    homes = (torch, Tensor, F)
    return {getattr(home, name): find for name in names.split() for home in homes if hasattr(home, name)}


_INDEXED: dict[Any, Callable[..., list[Dim]]] = {
    **_by_name(_ALONG_DIM, _indexed_along_dim),
    **_by_name("take_along_dim", _taken_along_dim),
    **_by_name(_ALL_DIMS, _indexed_anywhere),
    **_by_name(_CLASS_LOSSES, _classes),
    **_by_name("ctc_loss", _symbols),
    **_by_name("one_hot", _one_hot),
    **_by_name("embedding_bag", _rows),
    **_by_name("__getitem__ __setitem__ index_put index_put_", _indexed_by_tensors),
}

# A router's outputs are its experts: topk chooses among them. The indices that topk and the like return are marked, and
# a width is fixed as soon as an op reads such indices. Where only the values are read (the k largest), it may grow.

# function -> position of `dim` in its arguments, and its default (None: the indices are over all dims)
_INDEX_FUNCTIONS: dict[str, tuple[int, int | None]] = {
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
_DIM_ARGUMENT = {getattr(home, name): where for name, where in _INDEX_FUNCTIONS.items() for home in (torch, Tensor)}
_MARK = "_sparseift_chosen_from"


class IndexTracker:
    """Freezes the widths that a function indexes, and those whose indices, as topk returns them, are used."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.any_marked = False

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
        """Check one call `out = func(*args, **kwargs)`; returns `out`. Reading an attribute (x.shape) is no use of x."""
        if self.any_marked and getattr(func, "__name__", "") != "__get__":
            for leaf in tree_leaves((args, dict(kwargs))):
                for poly in getattr(leaf, _MARK, ()) if isinstance(leaf, Tensor) else ():
                    self.facts.freeze(poly, "places in it are chosen by index")
        if func in _INDEXED:
            for size in _INDEXED[func](*args, **kwargs):
                self.facts.freeze(poly_of(size), "places in it are chosen by index")
        where = _DIM_ARGUMENT.get(func)
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
                self.any_marked = True
