"""Does a mask have the pattern that it was planned with?"""

from __future__ import annotations

from torch import Tensor

from .layout import Block, Layout, NofM, parse_pattern
from .n_of_m import groups_of


def has_pattern(mask: Tensor, pattern: str, groups: int = 1, transposed: bool = False) -> bool:
    """Is every block of `mask` [*shape] full or empty, and nothing outside of them; or has every group of M inputs its N?

    Raises:
        UsageError: a pattern that does not exist, or not the shape of a weight.
    """
    kind, layout = parse_pattern(pattern), Layout(tuple(mask.shape), groups, transposed)
    if kind == Block(1, 1):
        return True
    matrix = layout.to_matrix(mask)
    if isinstance(kind, NofM):
        live = layout.by_tap(matrix)
        for first, m in groups_of(layout.columns, kind.m):
            whole = (layout.columns - first) // m * m
            held = live[:, first : first + whole].reshape(-1, m).sum(1)
            if bool((held != m * kind.n // kind.m).any()):
                return False
        return True
    full = layout.from_blocks(layout.to_blocks(matrix.float(), kind) == kind.size, kind)
    return bool((full == matrix).all())
