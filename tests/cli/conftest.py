"""What the command tests share: a way to run a command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from sparseift_cli.cli.app import main

Sparseift = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sparseift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sparseift:
    """`sparseift("flops", "resnet18")`: (exit code, stdout, stderr)."""

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
