"""Replaces triton where it is not installed, so that modules of kernels can still be imported and read.

No backend takes a layer there (`registry.TritonBlocks.why_not`), so that nothing is ever computed with it.
"""

from __future__ import annotations

from typing import Any


class Absent:
    """Has every attribute; as a decorator, with or without arguments, it returns the function as it is."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


absent: Any = Absent()
