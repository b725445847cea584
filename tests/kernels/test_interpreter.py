"""The real Triton kernels on a CPU: `test_triton` in Triton's interpreter, which must be on before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def release(package: str) -> tuple[int, int] | None:
    """(major, minor) of an installed package, or None."""
    try:
        major, minor = version(package).split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def test_kernels_in_the_interpreter(root: Path) -> None:
    triton, numpy = release("triton"), release("numpy")
    if triton is None:
        pytest.skip("triton is not installed; `pip install triton` works on a CPU too")
    if triton < (3, 8) and numpy is not None and numpy >= (2, 3):
        pytest.skip("the interpreter of triton before 3.8 needs numpy before 2.3")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels/test_triton.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout and "failed" not in run.stdout
