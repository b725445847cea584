"""Which weights are zero: masks with exact counts, at random or by saliency at initialisation."""

from .layout import Block, Layout, NofM, parse_pattern, room
from .mask import disjoint_masks, empty_rows_and_columns, make_mask
from .n_of_m import has_pattern
from .saliency import MaskLayout, force_masks, scores

__all__ = [
    "Block",
    "Layout",
    "MaskLayout",
    "NofM",
    "disjoint_masks",
    "empty_rows_and_columns",
    "force_masks",
    "has_pattern",
    "make_mask",
    "parse_pattern",
    "room",
    "scores",
]
