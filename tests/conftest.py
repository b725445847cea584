"""What every test shares: one thread of arithmetic, deterministic hypothesis, and the way to the shared data."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports torch, and inherited by subprocesses: the same bits with and without xdist, and no
# worker that fights another for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

settings.register_profile("house", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("house")

Sparseift = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared reference data: $SPARSEIFT_SHARED, else `shared` beside the repository. Skips where there is none."""
    named = os.environ.get("SPARSEIFT_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared reference data: $SPARSEIFT_SHARED or a folder `shared` beside the repository")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as users get it, built offline."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def unpacked_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an installation of the wheel would put on the path."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def sparseift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sparseift:
    """Runs a command in this process: `sparseift("flops", "resnet18")` -> (exit code, stdout, stderr)."""
    from sparseift_cli.cli.app import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparseift", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
