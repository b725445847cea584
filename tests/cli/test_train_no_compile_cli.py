"""`sparseift train --no-compile`: the recipe without the fast path, in every process that trains it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.cli import train as train_command
from sparseift_cli.cli.app import main

RECIPE = "resnet18_cifar100/wide75_rigl"  # compile: auto
MLP = "quickstart/digits_mlp_wide75_rigl"


def sparseift(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sparseift", "train", *words])
    main()


@pytest.mark.parametrize("given", [(), ("--set", "training.seed=3"), ("--set", "training.compile=true")])
def test_it_is_two_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit):
        sparseift(monkeypatch, RECIPE, "--print-recipe")
    assert "compile: auto " in (before := capsys.readouterr().out) and "cuda_graph: true " in before
    with pytest.raises(SystemExit):
        sparseift(monkeypatch, RECIPE, "--no-compile", *given, "--print-recipe")
    shown = capsys.readouterr().out
    assert "compile: false " in shown and "--set training.compile=false" in shown
    assert "cuda_graph: false " in shown and "--set training.cuda_graph=false" in shown


def test_parallel_runs_get_the_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(train_command, "_run_parallel", lambda *of: calls.append(of) or [])
    with pytest.raises(SystemExit):
        sparseift(monkeypatch, MLP, "--no-compile", "--seeds", "0..1", "--parallel", "2", "--runs", str(tmp_path))
    ((jobs, asked, _),) = calls
    assert asked.all_sets == ["training.compile=false", "training.cuda_graph=false"]
    assert all(recipe.spec.training.cuda_graph is False for recipe, _ in jobs)
