"""Compiles kernels.cpp for this CPU, once, and loads it.

The library is in the cache folder, under a name that follows from its source, the compiler and the instructions of this CPU.
It contains no code of torch and is called by addresses: it compiles in seconds instead of a minute, and stays right when torch
changes. Its threads are those of the OpenMP runtime that torch loaded before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from ...base.locations import cache_dir
from ...errors import UsageError

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
CELLS = ((1, 1), (4, 1), (4, 4), (8, 8), (16, 16))
"""Rows x columns of the cells for which there are kernels."""
_SECONDS = 300


class CompilerError(Exception):
    """Why there is no library, in one line."""


def why_not() -> str | None:
    """Why the kernels cannot run on this machine, and what would help; None where they can. Compiles on first use."""
    return None if isinstance(found := _found(), ctypes.CDLL) else found


def library() -> ctypes.CDLL:
    """The loaded kernels, whose functions are those at the end of kernels.cpp.

    Raises:
        UsageError: `why_not`.
    """
    found = _found()
    if isinstance(found, str):
        raise UsageError(f"the kernels for sparse layers on a CPU cannot run here: {found}")
    return found


def address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> ctypes.c_void_p:
    """Where the elements of a contiguous CPU tensor, of any shape, begin; null for None.

    Raises:
        UsageError: it is on another device, of another dtype than `dtype`, or not contiguous.
    """
    if tensor is None:
        return ctypes.c_void_p()
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        raise UsageError(
            f"CPU kernels take contiguous tensors of {dtype} on the CPU, not {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}"
        )
    return ctypes.c_void_p(tensor.data_ptr())


@lru_cache(maxsize=1)
def _found() -> ctypes.CDLL | str:
    if sys.byteorder != "little" or os.name != "posix":
        return "they are written for Linux and macOS"
    try:
        with _folder() as folder:
            return _load(folder)
    except CompilerError as error:
        return str(error)


@contextmanager
def _folder() -> Iterator[Path]:
    """Where the library is kept; where that cannot be written, a folder that is deleted once it is loaded."""
    kept = cache_dir() / "kernels"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        writable = os.access(kept, os.W_OK)
    except OSError:
        writable = False
    if writable:
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _load(folder: Path) -> ctypes.CDLL:
    """The library in `folder`, compiled first where it is missing or cannot be loaded. One process compiles, others wait."""
    compiler = _compiler()
    native, macros = _instructions(compiler)
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *map(str.encode, (*compiler, *FLAGS)), macros]))
    path = folder / f"cpu-{key.hexdigest()[:16]}.so"
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            with suppress(OSError, AttributeError):  # a file that was damaged
                return _typed(ctypes.CDLL(str(path)))
        _compile(compiler, native, path)
        try:
            return _typed(ctypes.CDLL(str(path)))
        except OSError as error:
            raise CompilerError(f"what {compiler[0]} compiled cannot be loaded: {error}") from error


def _compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first of c++, g++ and clang++."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"$CXX, {named[0]}, was not found" if named else "no C++ compiler was found (c++, g++, clang++)"
    raise CompilerError(f"{missing}; with one, sparse layers skip their zeros instead of multiplying by them")


def _instructions(compiler: list[str]) -> tuple[list[str], bytes]:
    """The option that means this CPU, and what the compiler defines with it: its version and the instructions that it may use."""
    said = b""
    for option in (["-march=native"], ["-mcpu=native"], list[str]()):  # the second for older compilers on ARM
        done = _run([*compiler, *option, "-dM", "-E", "-x", "c++", os.devnull])
        if done.returncode == 0:
            return option, done.stdout
        said = done.stderr
    raise CompilerError(f"{compiler[0]} fails: {_first_line(said)}")


def _compile(compiler: list[str], native: list[str], path: Path) -> None:
    """Compile to a temporary file, then rename it to `path`; without threads where the compiler knows no OpenMP."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".so")
    os.close(handle)
    try:
        command = [*compiler, *FLAGS, *native, "-o", temporary, str(SOURCE)]
        done = _run([*command, "-fopenmp"])
        if done.returncode:
            done = _run(command)
        if done.returncode:
            raise CompilerError(f"{compiler[0]} cannot compile them: {_first_line(done.stderr)}")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} cannot be run: {error}") from error


def _first_line(text: bytes) -> str:
    """The first line that says "error", or the first one."""
    lines = text.decode(errors="replace").strip().splitlines() or ["it says nothing"]
    return next((line for line in lines if "error" in line), lines[0])


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its arguments, which ctypes does not know."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    cell, ends = [number, number, size, size], [size, number]
    found.sparseift_forward.argtypes = [*cell, *[pointer] * 6, *ends]
    found.sparseift_backward.argtypes = [*cell, *[pointer] * 9, *ends]
    return found
