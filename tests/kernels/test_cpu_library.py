"""The C++ kernels are compiled once, whatever goes on around them, and a machine that cannot says so in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.cpu import library

LOAD = "from sparseift_cli.kernels.cpu.library import library; print(library().sparseift_threads())"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home of its own for every test, in which nothing is compiled yet; returns the folder of the libraries."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library._found.cache_clear()
    yield tmp_path / ".cache" / "sparseift" / "kernels"
    library._found.cache_clear()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes $CXX a script of these shell lines, which ends in the compiler without optimisation; returns its log."""

    def make(lines: str = "") -> Path:
        log, script = tmp_path / "log", tmp_path / "own-c++"
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = -O3 ]; then echo compiled >> {log}; fi\n{lines}\nexec {COMPILER} "$@" -O0\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


def compiled(log: Path) -> int:
    """How often the compiler was asked for a library."""
    return len(log.read_text().splitlines()) if log.exists() else 0


@needs_compiler
def test_processes_that_start_together_compile_once(compiler: Callable[..., Path], root: Path, home: Path) -> None:
    log = compiler("sleep 0.2")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", LOAD]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate()[0].strip() for process in running} <= {"0", "1"}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert compiled(log) == 1
    assert len(list(home.glob("*.so"))) == 1
    assert library.why_not() is None
    assert compiled(log) == 1


@needs_compiler
def test_a_damaged_library_is_compiled_again(
    compiler: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    log = compiler()
    assert library.why_not() is None
    (path,) = home.glob("cpu-*.so")
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    other = tmp_path / "other" / home.relative_to(tmp_path) / path.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"no library")
    library._found.cache_clear()
    assert library.why_not() is None
    assert compiled(log) == 2
    assert other.stat().st_size > 10_000


@needs_compiler
def test_without_openmp_there_is_one_thread(compiler: Callable[..., Path]) -> None:
    log = compiler('for word in "$@"; do if [ "$word" = -fopenmp ]; then exit 1; fi; done')
    assert library.library().sparseift_threads() == 0
    assert compiled(log) == 2


@needs_compiler
def test_a_home_that_cannot_be_written_costs_a_compilation(
    compiler: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = compiler()
    monkeypatch.setenv("HOME", os.devnull)
    assert library.why_not() is None
    assert compiled(log) == 1


def test_no_compiler_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("PATH", "")
    assert library.why_not() == (
        "no C++ compiler was found (c++, g++, clang++); with one, sparse layers skip their zeros instead of multiplying by them"
    )
    with pytest.raises(UsageError, match="cannot run here: no C"):
        library.library()
    monkeypatch.setenv("CXX", "icpc -fast")
    library._found.cache_clear()
    assert (library.why_not() or "").startswith("$CXX, icpc, was not found; with one")
    assert not list(home.glob("*.so"))


@needs_compiler
def test_an_error_of_the_compiler_is_shown(compiler: Callable[..., Path], home: Path) -> None:
    compiler('if [ "$1" = -O3 ]; then echo "In file x" >&2; echo "x.cpp:1: error: no such thing" >&2; exit 1; fi')
    assert (library.why_not() or "").endswith("cannot compile them: x.cpp:1: error: no such thing")
    assert not list(home.glob("*.so"))
    compiler('echo "license expired" >&2; exit 1')
    library._found.cache_clear()
    assert (library.why_not() or "").endswith("own-c++ fails: license expired")
