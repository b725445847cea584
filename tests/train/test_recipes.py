"""Every recipe that we ship trains: two steps on the CPU with its own transform, algorithm, optimiser and schedule.

What is shrunk: the model (`tests.helpers.recipe_nets`, but for the quickstarts, which run as they are), the data (made up, where
the real ones are not on every machine), batch, length and the time between mask updates.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.cli.train_view import audit_of, plan_facts
from sparseift_cli.recipe.load import Recipe, load, run_steps
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.train.run import run_seeds

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes"
RECIPES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))
BATCH = 8


def quiet(*_: Any) -> None:
    """Take a report and print nothing."""


def shrunk(recipe: Recipe) -> list[str]:
    """`--set` options for a run of seconds."""
    spec = recipe.spec
    assert spec.data is not None
    sets = [
        "training.epochs=null",
        "training.steps=2",
        f"training.batch_size={BATCH}",
        "training.device=cpu",
        f"training.accumulate={min(2, spec.training.accumulate)}",
        *(f"algorithm.{key}=1" for key in ("delta_t", "stop") if key in type(spec.algorithm).model_fields),
        "data.workers=0",
        "data.limit=16",
        "evaluation.limit=8",
        f"evaluation.batch_size={BATCH}",
    ]
    if recipe.transform.get("match") == "train":  # of two steps one is an update: no density matches that
        sets.append("transform.match=model")
    if recipe.path.parent.name == "quickstart":
        return sets
    if (multiple := recipe.transform.get("width_multiple", 1)) > 1:  # of channels that are an eighth
        sets.append(f"transform.width_multiple={max(1, multiple // 8)}")
    name = spec.model.name.rpartition(":")[2]
    tokens = spec.data.name in ("tokens", "wikitext-2", "wikitext-103", "text")
    if recipe.transform.get("pattern") == "128x128":  # of widths that are an eighth
        sets.append("transform.pattern=16x16")
    if recipe.transform.get("base_width"):  # hidden 768 -> 1536; here 96 -> 192
        sets.append(f"transform.base_width={recipe.transform['base_width'] // 8}")
    sets += [
        f"model.name=tests.helpers.recipe_nets:{name}",
        *(f"model.{k}=null" for k in ("num_classes", "input", "seq")),
    ]
    if spec.evaluation.test:  # made-up sets have none
        sets.append("evaluation.test=false")
    return [*sets, f"data.name={'synthetic-text' if tokens else 'synthetic-images'}"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)  # `tests.helpers.recipe_nets` is found from here
    path = FOLDER / f"{name}.yaml"
    recipe = load(path, shrunk(load(path)))
    (summary,) = run_seeds(recipe, [0], tmp_path, None, quiet, quiet)
    flops, metrics = summary["flops"], summary["metrics"]
    assert flops["spent"] == flops["audited"]
    assert metrics["step"] == 2 and math.isfinite(metrics["train_loss"])
    newest = RunDirectory.open(Path(summary["path"])).checkpoints.newest()
    assert newest is not None and newest.step == 2
    assert (summary["nonzero_params"] == summary["params"]) == (recipe.spec.algorithm.name == "dense")
    if recipe.spec.transform is not None and recipe.spec.algorithm.name != "dense":
        assert 0 < metrics["density"] < 1
        assert (metrics["churn"] > 0) == (recipe.spec.algorithm.name in ("rigl", "set"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_planned_at_its_full_size(name: str) -> None:
    recipe = load(FOLDER / f"{name}.yaml")
    facts = {fact: value for fact, value, _ in plan_facts(recipe, audit_of(recipe), run_steps(recipe.spec), None)}
    assert 0 < facts["nonzero_params"] <= facts["params"]
    assert (facts["nonzero_params"] == facts["params"]) == (recipe.spec.algorithm.name == "dense")
