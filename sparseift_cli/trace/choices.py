"""Widths that something is chosen from by its place: a router's outputs are its experts, and must stay as many.

No shape says so, since an index has no width. So what `topk` and its like return is remembered, and a width is fixed as soon
as an operation reads such indices; where only the values are read (k largest, a maximum) it may grow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .symint import Facts, Poly, poly_of

# where the dim stands among the arguments, and what it is where it is not given (None: the indices are of all dims)
_CHOOSERS: dict[str, tuple[int, int | None]] = {
    "topk": (2, -1), "kthvalue": (2, -1), "sort": (1, -1), "argsort": (1, -1), "argmax": (1, None), "argmin": (1, None),
    "max": (1, None), "min": (1, None), "median": (1, None), "multinomial": (9, -1),
}  # fmt: skip
_FUNCTIONS = {getattr(home, name): where for name, where in _CHOOSERS.items() for home in (torch, Tensor)}
_MARK = "_sparseift_chosen_from"


class Choices:
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
