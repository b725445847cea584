"""Python's own standard library as text: about 12 MB of real source code that every machine has."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .source import DataSource

if TYPE_CHECKING:
    from .tokens import Stream, TokenSet

# Tests are left out because some systems do not install them; the others differ from one installation to the next.
_LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "idle_test"}
_LOCAL = ("_sysconfigdata", "sitecustomize", "usercustomize")
_VALID = 13  # of 256 hash values: 5 %


def open_stdlib(root: str | Path | None = None) -> TokenSet:
    """The library's .py files by bytes (vocabulary 256), in the order of their names; one in twenty is held out.

    Which ones is decided by a hash of the name, so a file stays in its split from one Python version to the next. The
    text is that of the running interpreter: compare `sha256` before comparing results.

    Raises:
        UsageError: this Python has no library sources.
    """
    from .text import byte_stream
    from .text_files import as_tensor
    from .tokens import TokenSet

    folder = Path(root).expanduser() if root is not None else Path(sysconfig.get_paths()["stdlib"])

    @cache
    def files() -> dict[str, list[Path]]:
        return split_files(folder)

    def read(split: str) -> Stream:
        return byte_stream(as_tensor(bytearray(b"".join(path.read_bytes() for path in files()[split]))))

    if not folder.is_dir() or not all(files().values()):
        raise UsageError(f"{folder}: holds no sources of Python's standard library", hint="name another data set")
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return TokenSet("stdlib", read, split_names=("train", "valid"), vocab=256, source=f"{folder} ({version})")


STDLIB = DataSource(
    name="stdlib",
    kind="tokens",
    open=open_stdlib,
    summary="Python's own sources, by bytes: real text on every machine",
    splits=("train", "valid"),
    data_defaults={"level": "bytes"},
)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The .py files of the library below `folder` by split, sorted by their path with '/' between its parts."""
    found: dict[str, Path] = {}
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        if not _LEFT_OUT.intersection(name.parts) and not name.name.startswith(_LOCAL):
            found[name.as_posix()] = path
    splits: dict[str, list[Path]] = {"train": [], "valid": []}
    for name in sorted(found):
        splits["valid" if hashlib.sha256(name.encode()).digest()[0] < _VALID else "train"].append(found[name])
    return splits
