"""Sparse Iso-FLOP Transformations for PyTorch: transform, audit to the MAC, train, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api import audit, copy_masks, export, flops, inspect, load, masks, save, transform
    from .errors import ArtifactError, CheckFailed, SparseiftError, UsageError
    from .kernels.convert import to_masked, use_kernels
    from .kernels.storage import to_dense_state
    from .plan.spec import TrainingSpec, TransformSpec
    from .sparsity.sparsifier import Sparsifier
    from .transforms.transformation import Options

__all__ = [
    "ArtifactError",
    "CheckFailed",
    "Options",
    "SparseiftError",
    "Sparsifier",
    "TrainingSpec",
    "TransformSpec",
    "UsageError",
    "__version__",
    "audit",
    "copy_masks",
    "export",
    "flops",
    "inspect",
    "load",
    "masks",
    "save",
    "to_dense_state",
    "to_masked",
    "transform",
    "use_kernels",
]

_HOMES = {
    "ArtifactError": "errors",
    "CheckFailed": "errors",
    "Options": "transforms.transformation",
    "Sparsifier": "sparsity.sparsifier",
    "SparseiftError": "errors",
    "TrainingSpec": "plan.spec",
    "TransformSpec": "plan.spec",
    "UsageError": "errors",
    "to_dense_state": "kernels.storage",
    "to_masked": "kernels.convert",
    "use_kernels": "kernels.convert",
}


def __getattr__(name: str) -> Any:
    """The public names, imported at their first use: `import sparseift_cli` itself costs nothing."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names: what a shell completes."""
    return sorted(__all__)
