"""Sweeps: points and their names, what they would cost, runs that fail or are stopped, and going on."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.cli.sweep_view import SUMMED, refused_points
from sparseift_cli.errors import UsageError
from sparseift_cli.recipe.load import load
from sparseift_cli.recipe.sweep import Sweep, make_sweep
from sparseift_cli.recipe.write import resolved_yaml

Write = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]
TWO_BY_TWO = ("sparsity=0.5,0.75", "algorithm=static,set")


def sweep_of(path: Path, *options: str, dense: bool = False, sets: tuple[str, ...] = ()) -> Sweep:
    found = make_sweep(path, options, sets, with_dense=dense)
    assert found is not None
    return found


def names(path: Path, *options: str, dense: bool = False) -> list[str]:
    return [recipe.name for recipe in sweep_of(path, *options, dense=dense).recipes()]


def words_of(*options: str) -> list[str]:
    return [word for option in options for word in ("--sweep", option)]


def stamps(root: Path) -> set[str]:
    return {path.parent.parent.relative_to(root).as_posix() for path in root.rglob("recipe.yaml")}


# --- points ---


def test_every_combination_is_a_point_that_set_would_make(write_recipe: Write) -> None:
    path = write_recipe("static")
    recipes = sweep_of(path, *TWO_BY_TWO).recipes()
    assert [r.name for r in recipes] == [
        f"sparsity={s},algorithm={a}" for s in ("0.5", "0.75") for a in ("static", "set")
    ]
    for recipe in recipes:
        assert recipe.point is not None
        by_hand = load(path, recipe.point.sets)
        assert resolved_yaml(recipe.spec) == resolved_yaml(by_hand.spec) and by_hand.name == "static_sgd"
    assert [r.spec.transform and r.spec.transform.sparsity for r in recipes] == [0.5, 0.5, 0.75, 0.75]
    assert [r.spec.algorithm.name for r in recipes] == ["static", "set"] * 2


def test_names_say_the_axes(write_recipe: Write) -> None:
    path = write_recipe("static")
    assert names(path, "sparsity=.50,75e-2") == ["sparsity=0.5", "sparsity=0.75"]
    assert names(path, "optimizer.lr=1e-3,.1") == ["lr=0.001", "lr=0.1"]
    assert names(path, "training.batch_size=16,32", "evaluation.batch_size=8") == [
        f"training.batch_size={n},evaluation.batch_size=8" for n in (16, 32)
    ]
    patterns = ("sparsity=0.5", "transform.pattern=unstructured,2:4")
    assert names(path, *patterns) == ["sparsity=0.5,pattern=unstructured", "sparsity=0.5,pattern=2:4"]
    assert names(path, "data.root=a/b,a b,a_b") == ["root=a_b", "root=a_b.2", "root=a_b.3"]
    assert sweep_of(path, "sparsity=0.5").folder == "static_sgd_sweep"


def test_dense_baselines_are_one_for_each_setting_that_a_dense_model_has(write_recipe: Write) -> None:
    path = write_recipe("rigl")
    assert names(path, "sparsity=0.5,0.75", "algorithm.delta_t=1,2", dense=True)[:1] == ["dense"]
    found = names(path, "sparsity=0.5,0.75", "optimizer.lr=0.1,0.2", dense=True)
    assert found[:2] == ["dense,lr=0.1", "dense,lr=0.2"] and len(found) == 6
    dense, sparse, _ = sweep_of(path, "sparsity=0.5,0.75", dense=True).recipes()
    assert dense.spec.transform is None and dense.spec.algorithm.name == "dense"
    for section in ("model", "data", "optimizer", "schedule", "training", "evaluation", "checkpoint"):
        assert getattr(dense.spec, section) == getattr(sparse.spec, section)


def test_a_section_of_the_recipe_is_the_same_sweep(write_recipe: Write, tmp_path: Path) -> None:
    section = "sweep:\n  sparsity: [0.5, 0.75]\n  algorithm: [static, set]\n"
    path = write_recipe("static", more=section)
    assert sweep_of(path).points == sweep_of(write_recipe("static"), *TWO_BY_TWO).points
    path = write_recipe("static", more=section)
    assert names(path, "transform.sparsity=0.9") == ["sparsity=0.9,algorithm=static", "sparsity=0.9,algorithm=set"]
    assert load(path).spec.transform == load(write_recipe("static")).spec.transform
    write_recipe("static", more=section)
    child = tmp_path / "child.yaml"
    child.write_text("extends: static_sgd\nsweep: {algorithm: null, optimizer.lr: [0.1]}\n")
    assert names(child) == ["sparsity=0.5,lr=0.1", "sparsity=0.75,lr=0.1"]
    child.write_text("extends: static_sgd\nsweep: null\n")
    assert make_sweep(child, ()) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["sparsity"], "--sweep sparsity: expected KEY=VALUE,VALUE"),
        (["sparsity="], "expected values with a comma"),
        (["sparsity=0.5,"], "expected values with a comma"),
        (["sparsity=0.5,,0.75"], "expected values with a comma"),
        (["sparsity=0.5],[0.75"], "expected values with a comma"),
        (["sparsity=[0.5]"], "single values, not lists"),
        (["sparsity=0.5,.50"], "sparsity: 0.5 is there twice"),
        (["sparsty=0.5"], "unknown key 'sparsty', did you mean 'sparsity'?"),
        (["transform.memb=wide"], "unknown key 'memb', did you mean 'member'?"),
        (["transform.member=wide,doppd"], "--sweep transform.member=doppd: transform.member: unknown member"),
        (["sparsity=0.5,1.5"], "--sweep sparsity=1.5: transform.sparsity: must be below 1, not 1.5"),
        (["training.seed=0,1"], "--seeds 0..2 trains every point"),
        (["sparsity=0.5", "transform.sparsity=0.75"], "transform.sparsity is an axis already"),
        (["transform.member=wide,sparse_wide"], "are the same run"),
        (["transform.pattern=unstructured,2:4"], "not 1/4 (use sparsity 0.5) (at pattern=2:4)"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(write_recipe: Write, options: list[str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        sweep_of(write_recipe("static"), *options).recipes()
    assert said in error.value.message


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{sparsity: 0.5}", "14:9: sweep: sparsity needs a list of values: [0.5]"),
        ("{sparsty: [0.5]}", "unknown key 'sparsty', did you mean 'sparsity'?"),
        ("{sparsity: []}", "sparsity: an axis needs a value"),
        ("{sparsity: [0.5, 0.50]}", "sparsity: 0.5 is there twice"),
        ("{sparsity: [0.5], transform.sparsity: [0.5]}", "transform.sparsity and sparsity are one key"),
        ("sparsity", "sweep: expected a mapping"),
    ],
)
def test_a_wrong_section_is_reported_by_its_line(write_recipe: Write, section: str, said: str) -> None:
    path = write_recipe("static", more=f"sweep: {section}\n")
    with pytest.raises(UsageError) as error:
        load(path)
    assert said.removeprefix("14:9: ") in error.value.message and f"{path}:" in error.value.message


def test_a_sweep_is_of_one_recipe_and_dense_baselines_of_a_sweep(sparseift: Command, write_recipe: Write) -> None:
    one, other = write_recipe("static"), write_recipe("set")
    code, _, err = sparseift("train", str(one), str(other), "--sweep", "sparsity=0.5")
    assert code == 2 and "a sweep is of one recipe" in err
    code, _, err = sparseift("train", str(one), "--with-dense")
    assert code == 2 and "--with-dense is for a sweep" in err


def test_validate_looks_at_every_point(sparseift: Command, write_recipe: Write) -> None:
    path = write_recipe("static", more="sweep: {sparsity: [0.5, 0.75]}\n")
    code, out, err = sparseift("recipe", "validate", str(path))
    assert code == 0 and out.endswith("fine, a sweep of 2 points\n"), err
    path.write_text(path.read_text().replace("[0.5, 0.75]", "[0.5, 0.9999]"))
    code, _, err = sparseift("recipe", "validate", str(path))
    assert code == 1 and "sparsity=0.9999: no density matches" in err


# --- the budget ---


def test_the_sum_of_a_dry_run_is_that_of_single_ones(sparseift: Command, write_recipe: Write) -> None:
    path = write_recipe("rigl", steps=7)
    words = ["train", str(path), "--dry-run", "--tflops", "0.00001", "--json"]
    code, out, err = sparseift(*words, *words_of(*TWO_BY_TWO), "--with-dense", "--seeds", "0..2")
    assert code == 0, err
    whole = json.loads(out)
    assert [r["recipe"] for r in whole["recipes"]] == ["dense", *names(path, *TWO_BY_TWO)]
    assert whole["recipes"][1]["axes"] == {"sparsity": 0.5, "algorithm": "static"}
    total: dict[str, int] = dict.fromkeys(SUMMED, 0)
    for recipe in sweep_of(path, *TWO_BY_TWO, dense=True).recipes():
        assert recipe.point is not None
        code, out, err = sparseift(*words, *(w for pair in recipe.point.sets for w in ("--set", pair)))
        assert code == 0, err
        single = json.loads(out)
        single.setdefault("executed_flops", single["training_flops"])
        total = {name: total[name] + 3 * single[name] for name in SUMMED}
    assert whole["total"] == {"points": 5, "runs": 15, **total}
    assert total["steps"] == 5 * 3 * 7 and total["seconds"] > 0


def test_a_point_without_a_plan_is_refused_before_anything_is_trained(
    sparseift: Command, write_recipe: Write, tmp_path: Path
) -> None:
    path, root = write_recipe("static", steps=4), tmp_path / "runs"
    words = ["train", str(path), "--runs", str(root), "--sweep", "sparsity=0.5,0.9999,0.75"]
    code, out, err = sparseift(*words, "--dry-run", "--json")
    shown = json.loads(out)
    assert code == 1 and "1 of 3 points are refused" in err and not root.exists()
    assert [r["recipe"] for r in shown["recipes"]] == ["sparsity=0.5", "sparsity=0.75"]
    (refused,) = shown["refused"]
    assert refused["recipe"] == "sparsity=0.9999" and "no density matches" in refused["message"]
    code, out, err = sparseift(*words, "--json")
    assert code == 1 and err.index("sparsity=0.9999 is refused") < err.index("step 4/4")
    assert [r["recipe"] for r in json.loads(out)["runs"]] == ["sparsity=0.5", "sparsity=0.75"]
    assert stamps(root) == {"static_sgd_sweep/sparsity=0.5", "static_sgd_sweep/sparsity=0.75"}


def test_only_runs_know_where_data_says_how_large_a_model_is(write_recipe: Write) -> None:
    path = write_recipe("static")
    text = path.read_text().replace("data: synthetic-images", "data: {name: image-folder, root: nowhere}")
    path.write_text(text.replace('"tests.helpers.nets:cnn", input: 3x8x8', "digits_mlp"))
    swept = sweep_of(path, "sparsity=0.9999")
    assert refused_points(swept.recipes()) == {}
    assert list(refused_points(swept.recipes(["model.num_classes=10"]))) == ["sparsity=0.9999"]


# --- training ---


@pytest.mark.parametrize("parallel", [(), ("--parallel", "2")])
def test_a_run_that_fails_does_not_stop_the_others(
    sparseift: Command, write_recipe: Write, tmp_path: Path, parallel: tuple[str, ...]
) -> None:
    path, root = write_recipe("static", steps=4), tmp_path / "runs"
    path.write_text(path.read_text().replace(", clip: 1.0", ""))
    words = ["train", str(path), "--runs", str(root), "--sweep", "optimizer.lr=0.01,1e30", "--with-dense"]
    words += ["--set", "training.threads=1"]
    code, out, err = sparseift(*words, *parallel)
    assert code == 3, err
    assert "2 of 4 runs failed; the table says why" in err and "Traceback" not in err
    assert "static_sgd_sweep: 2 of 4 points" in out
    failed = [line.split() for line in out[out.index("Failed") :].splitlines() if "lr=" in line]
    assert [line[:3] for line in failed] == [["dense,lr=1.0e30", "0", "3"], ["lr=1.0e30", "0", "3"]]
    before = {p: p.stat().st_mtime_ns for p in root.rglob("summary.json")}
    code, out, err = sparseift(*words, "--json")
    shown = json.loads(out)
    assert code == 3 and len(before) == 2 and before == {p: p.stat().st_mtime_ns for p in root.rglob("summary.json")}
    assert [(r["recipe"], r["axes"]) for r in shown["runs"]] == [
        ("dense,lr=0.01", {"lr": 0.01}),
        ("lr=0.01", {"lr": 0.01}),
    ]
    assert [(f["recipe"], f["seed"], f["exit_code"]) for f in shown["failures"]] == [
        ("dense,lr=1.0e30", 0, 3),
        ("lr=1.0e30", 0, 3),
    ]


def test_a_sweep_that_was_stopped_twice_is_finished_by_the_same_command(write_recipe: Write, tmp_path: Path) -> None:
    """2 x 2 points with 2 seeds: stopped in the first run and in a later one, then finished; no run is made twice."""
    path, root = write_recipe("static", steps=300, save=100), tmp_path / "runs"
    words = [sys.executable, "-m", "sparseift_cli", "train", str(path), "--runs", str(root), "--seeds", "0..1"]
    words += [*words_of(*TWO_BY_TWO), "--set", "training.threads=1", "--set", "evaluation.every=50", "--json"]
    hint = ""
    for label in ("sparsity=0.5,algorithm=static", "sparsity=0.75,algorithm=static"):
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if label in line and "from the start" in line:
                    break
            for line in process.stderr:
                if "step 50/" in line:
                    process.send_signal(signal.SIGTERM)
                    break
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (143, ""), err
        hint = err.strip().splitlines()[-1]
    again = shlex.split(hint.removeprefix("  hint: continue with: "))
    assert [w for w in again if w in TWO_BY_TWO] == list(TWO_BY_TWO) and again[:2] == ["sparseift", "train"]
    done = {p: p.stat().st_mtime_ns for p in root.rglob("summary.json")}
    assert len(done) == 4  # the points at 0.5
    last = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert last.returncode == 0, last.stderr
    assert {p: p.stat().st_mtime_ns for p in done} == done
    shown: dict[str, Any] = json.loads(last.stdout)
    runs = [(r["axes"]["sparsity"], r["axes"]["algorithm"], r["seed"]) for r in shown["runs"]]
    assert runs == [(s, a, n) for s in (0.5, 0.75) for a in ("static", "set") for n in (0, 1)]
    assert all(r["steps"] == 300 for r in shown["runs"]) and shown["failures"] == []
    assert len(list(root.rglob("recipe.yaml"))) == 8
    sessions = [json.loads(p.read_text())["sessions"] for p in root.rglob("provenance.json")]
    assert sorted(map(len, sessions)) == [1] * 6 + [2] * 2
    assert {json.dumps(s[-1]["sweep"]) for s in sessions} == {
        json.dumps({"recipe": "static_sgd", "axes": {"sparsity": s, "algorithm": a}})
        for s in (0.5, 0.75)
        for a in ("static", "set")
    }


def test_another_recipe_needs_another_folder(sparseift: Command, write_recipe: Write, tmp_path: Path) -> None:
    path = write_recipe("static", steps=3)
    words = ["train", str(path), "--runs", str(tmp_path / "runs"), "--sweep", "sparsity=0.5"]
    assert sparseift(*words)[0] == 0
    code, _, err = sparseift(*words, "--set", "optimizer.lr=0.5")
    assert code == 4 and "hint: a sweep of another recipe needs a folder of its own: --runs FOLDER" in err
