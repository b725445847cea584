"""Which layers --include, --exclude and the globs of a distribution select, and which outputs --free-outputs does. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..errors import UsageError, did_you_mean
from ..table.table import Layer, LayerTable

if TYPE_CHECKING:
    from .spec import TransformSpec


def selected(layer: Layer, spec: TransformSpec) -> bool:
    """Whether --include and --exclude leave a layer in."""
    inside = not spec.include or any(fnmatchcase(layer.name, g) for g in spec.include)
    return inside and not any(fnmatchcase(layer.name, g) for g in spec.exclude)


def may_grow(output: str, spec: TransformSpec) -> bool:
    """Whether --free-outputs lets the output of this name grow; the name of an output that is a tensor is empty."""
    return any(fnmatchcase(output, glob) for glob in spec.free_outputs)


def require_matches(table: LayerTable, spec: TransformSpec) -> None:
    """Raise UsageError for an --include or --exclude that names no layer, and for a --free-outputs that names no output.

    A slip would go unnoticed.
    """
    names = [layer.name for layer in table.layers]
    for option, globs in (("include", spec.include), ("exclude", spec.exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise UsageError(
                    f"--{option} {glob!r} matches no layer of {table.model}",
                    hint=did_you_mean(glob, names) or "`sparseift inspect` names the layers",
                )
    outputs = sorted({name for width in table.widths for name in width.outputs})
    for glob in spec.free_outputs:
        if not any(fnmatchcase(name, glob) for name in outputs):
            known = ", ".join(filter(None, outputs)) or ("it has one, '*'" if outputs else "none holds a width")
            raise UsageError(
                f"--free-outputs {glob!r} matches no output of {table.model} that holds a width",
                hint=did_you_mean(glob, outputs) or f"its outputs: {known}",
            )


def require_transformed(globs: Sequence[str], names: Sequence[str]) -> None:
    """Raise UsageError for a glob of a distribution that matches none of the transformed layers, `names`."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(
                f"distribution: {glob!r} matches no transformed layer",
                hint=did_you_mean(glob, names) or "`sparseift inspect --why` says which layers are transformed",
            )
