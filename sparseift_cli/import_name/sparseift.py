"""`import sparseift`: another name for the package `sparseift_cli`, and for every module in it.

The wheel puts this file beside the package; an editable install puts its folder on the path (pyproject.toml, `[tool.hatch]`).
Each module exists once, whichever name imported it first, so a class is the same class under both names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

import sparseift_cli


class _OtherName(MetaPathFinder, Loader):
    """Finds `sparseift.x.y` as the module `sparseift_cli.x.y`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname.startswith("sparseift.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"sparseift_cli.{spec.name.removeprefix('sparseift.')}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just replaced the spec by that of the other name, which relative imports would then follow.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _OtherName())
sys.modules[__name__] = sparseift_cli
