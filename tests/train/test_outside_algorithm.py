"""A mask algorithm from outside the package: counted by flops, trained from Python and from a recipe, its FLOPs audited."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sparseift_cli.cli.app import app
from sparseift_cli.errors import UsageError
from sparseift_cli.plan.spec import TrainingSpec
from sparseift_cli.recipe.load import load
from sparseift_cli.sparsity.algorithms import ALGORITHMS, DropAndGrow, WeightView, name_of
from sparseift_cli.sparsity.schedule import UpdateSchedule
from sparseift_cli.train.run import run_seeds
from tests.helpers.outside_algorithm import Sensitivity
from tests.helpers.sparse_net import STEPS, assert_zeros, loss_of, make, sparse_net, train

NAME = "tests.helpers.outside_algorithm:Sensitivity"
Write = Callable[..., Path]


def test_python_trains_it_and_every_update_follows_its_scores() -> None:
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = make(net, optimizer, NAME, power=2.0, regrow="forbid", delta_t=3)
    assert sparsifier.algorithm == Sensitivity(power=2.0, regrow="forbid", delta_t=3, drop_fraction=0.4)
    assert sparsifier.algorithm_name == name_of(sparsifier.algorithm) == NAME
    nnz, moved = dict(sparsifier.nnz), 0
    for t in range(STEPS):
        loss_of(net, t).backward()
        gradients = {name: net.get_parameter(name).grad.clone().abs() for name in nnz}
        before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros(sparsifier)
        assert dict(sparsifier.nnz) == nnz
        for name, mask in sparsifier.masks().items():
            grown, free = mask & ~before[name], ~mask & ~before[name]
            if grown.any():
                moved += 1
                assert gradients[name][grown].min() >= gradients[name][free].max()
    assert moved > 6


def test_flops_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])

    def counted(algorithm: str) -> dict:
        line = ["flops", "resnet18", "-s", "0.9", "--algorithm", algorithm, "--steps", "1000", "--json"]
        return json.loads(CliRunner().invoke(app, line, catch_exceptions=False).stdout)

    outside, rigl = counted(NAME), counted("rigl")
    assert outside["training"]["algorithm"] == NAME
    assert (
        outside["totals"] == rigl["totals"] and outside["matching"] == rigl["matching"]
    )  # dense gradients when RigL has
    assert outside["totals"] != counted("set")["totals"]


def test_a_recipe_trains_it(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe(NAME, steps=21)
    loaded = load(recipe, ["algorithm.power=0.5"])
    assert loaded.training["options"] == {"power": 0.5}
    (summary,) = run_seeds(loaded, [0], tmp_path / "runs", None, lambda *_: None, lambda *_: None)
    assert summary["flops"]["spent"] == summary["flops"]["audited"]
    saved = json.loads((Path(summary["path"]) / "audit.json").read_text())
    assert saved["training"]["algorithm"] == NAME and saved["training"]["options"] == {"power": 0.5}
    assert TrainingSpec.from_json(saved["training"]).method == Sensitivity(delta_t=2, power=0.5)


def test_what_is_wrong_with_it_is_said_with_its_place(write_recipe: Write) -> None:
    for options, message in (
        (["algorithm.name=tests.helpers.nothing:Sensitivity"], r"algorithm.*tests\.helpers\.nothing"),
        (["algorithm.name=tests.helpers.outside_algorithm:Option"], "not a mask algorithm"),
        ([f"algorithm.name={NAME}", "algorithm.power=-1"], "algorithm.*must be at least 0"),
        ([f"algorithm.name={NAME}", "algorithm.power=half"], "algorithm.*expected a number"),
        ([f"algorithm.name={NAME}", "algorithm.force=1"], "unknown key 'force'"),
    ):
        with pytest.raises(UsageError, match=message):
            load(write_recipe("rigl"), options)


def test_it_can_be_registered_under_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, write_recipe: Write) -> None:
    monkeypatch.setattr(ALGORITHMS, "_entries", dict(ALGORITHMS._entries))
    ALGORITHMS.register("sensitivity", Sensitivity)
    assert load(write_recipe("sensitivity")).training["algorithm"] == "sensitivity"
    assert TrainingSpec(algorithm="Sensitivity").method == Sensitivity()


@dataclass(frozen=True, kw_only=True)
class Failing(DropAndGrow):
    """Fails where `in_` says."""

    in_: str = "drop_scores"

    def drop_scores(self, at: WeightView) -> Tensor:
        if self.in_ == "shape":
            return at.weight.abs().sum(0)
        if self.in_ == "nan":
            return at.weight / 0
        return at.weight.no_such_method() if self.in_ == "drop_scores" else super().drop_scores(at)

    def drops(self, active: int, step: int, schedule: UpdateSchedule) -> int:
        return 1 // 0 if self.in_ == "drops" else super().drops(active, step, schedule)

    def schedule(self, steps: int | None) -> UpdateSchedule:
        return {}["none"] if self.in_ == "schedule" else super().schedule(steps)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("drop_scores", "failed in drop_scores: AttributeError: 'Tensor' object has no attribute 'no_such_method'"),
        ("drops", "failed in drops: ZeroDivisionError: integer division or modulo by zero"),
        ("schedule", "failed in schedule: KeyError: 'none'"),
        ("shape", r"drop_scores of .*:Failing gives scores of shape 3x3x3 for conv\.weight, a weight of 8x3x3x3"),
        ("nan", r"drop_scores of .*:Failing has NaN for conv\.weight"),
    ],
)
def test_what_goes_wrong_in_it_names_it(where: str, message: str) -> None:
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=message) as failed:
        train(net, optimizer, make(net, optimizer, Failing(in_=where, delta_t=3)), 0, STEPS)
    assert failed.value.exit_code == 2
    if "failed in" in message:
        assert f"{__name__}:Failing" in str(failed.value)
        assert failed.value.__cause__ is not None
