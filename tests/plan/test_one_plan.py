"""A command makes its plan once: what it prints, checks, carries out and writes are numbers of one object."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseift_cli.plan import plan
from tests.helpers.own_member import mlp

MODEL = "tests.helpers.own_member:mlp"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """The member of every plan that is made; each is made by one allocation of non-zeros."""
    monkeypatch.chdir(root)
    members: list[str] = []
    allocate = plan.allocate_nonzeros

    def counted(layers, spec, *more):
        members.append(spec.member)
        return allocate(layers, spec, *more)

    monkeypatch.setattr(plan, "allocate_nonzeros", counted)
    return members


def test_commands_make_one_plan(made: list[str], sparseift, tmp_path: Path) -> None:
    out, recipe = str(tmp_path / "out"), tmp_path / "r.yaml"
    recipe.write_text(
        f'model: {{name: "{MODEL}", input: 3x8x8}}\ndata: synthetic-images\ntransform: wide\nsparsity: 0.5\n'
        "training: {steps: 2, batch_size: 4, device: cpu}\nevaluation: {every: 2, limit: 8}\n"
    )
    commands = {
        ("flops", MODEL): 0,
        ("flops", MODEL, "-s", "0.5"): 1,
        ("flops", MODEL, "-s", "0.5", "--max-flops-ratio", "2", "--json"): 1,
        ("flops", MODEL, "-s", "0.5,0.75,0.9"): 3,
        ("inspect", MODEL): 0,
        ("inspect", MODEL, "--why"): 4,
        ("transform", MODEL, "-s", "0.5", "-o", out): 1,
        ("flops", out): 1,
        ("flops", out, "--algorithm", "rigl"): 1,
        ("recipe", "validate", str(recipe), "--plan"): 1,
        ("train", str(recipe), "--dry-run"): 1,
        ("train", str(recipe), "--runs", str(tmp_path / "runs")): 1,
    }
    for command, plans in commands.items():
        made.clear()
        code, _, err = sparseift(*command)
        assert code == 0, (command, err)
        assert len(made) == plans, command


def test_functions_make_one_plan(made: list[str], tmp_path: Path) -> None:
    import sparseift_cli

    model, x = mlp()
    new, _ = sparseift_cli.transform(model, x, sparsity=0.5)
    assert len(made) == 1
    sparseift_cli.audit(new, x)
    sparseift_cli.flops(new)
    sparseift_cli.save(new, tmp_path / "out")
    assert len(made) == 1
    sparseift_cli.flops(model, x, sparsity=0.5)
    assert len(made) == 2
    sparseift_cli.load(tmp_path / "out", into=model)
    assert len(made) == 3
