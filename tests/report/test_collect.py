"""Which directories are runs, which are damaged, foreign, running or stopped; and which belong together."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from sparseift_cli.base.metrics import MetricFacts
from sparseift_cli.errors import UsageError
from sparseift_cli.report.collect import Collected, collect
from sparseift_cli.report.frame import groups_frame, records, regroup, runs_frame
from tests.helpers.report_runs import make_run, seeds, write


def reasons(found: Collected) -> dict[str, str]:
    return {path.name: reason for path, reason in found.skipped}


def test_any_depth_and_any_mix(tmp_path: Path) -> None:
    single = make_run(tmp_path / "runs", "net_dense", 0)
    make_run(tmp_path / "runs", "net_dense", 1)
    make_run(tmp_path / "deep" / "results", "net_wide75_rigl", 0, member="wide", packed=True)
    assert len(collect([tmp_path]).runs) == 3
    assert [run.path for run in collect([single]).runs] == [single]
    assert len(collect([single, tmp_path / "runs", tmp_path / "deep"]).runs) == 3  # each once


def test_packed_metrics_are_the_same(tmp_path: Path) -> None:
    plain = collect([make_run(tmp_path / "a", seed=1)]).runs[0]
    packed = collect([make_run(tmp_path / "b", seed=1, packed=True)]).runs[0]
    assert packed.metrics == plain.metrics
    assert [row["step"] for row in packed.metrics] == [390, 780]


def test_states(tmp_path: Path) -> None:
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, finished=False)
    running = make_run(tmp_path, seed=2, finished=False)
    begun = make_run(tmp_path, seed=3, finished=False)
    (begun / "metrics.jsonl").unlink()
    with FileLock(running / "lock"):
        states = [run.state for run in collect([tmp_path]).runs]
    assert states == ["finished", "stopped", "running", "stopped"]
    assert [run.state for run in collect([running]).runs] == ["stopped"]  # the lock's file stays, the lock is gone
    with FileLock(running / "lock", timeout=0):
        pass  # and looking did not take it


def test_looking_at_a_lock_leaves_it_to_the_writer(tmp_path: Path) -> None:
    run = make_run(tmp_path, finished=False)
    (run / "lock").touch()
    assert collect([run]).runs[0].state == "stopped"
    with FileLock(run / "lock", timeout=0) as held:
        assert held.is_locked


DAMAGE = {
    "summary.json": (b"{", "summary.json is not JSON"),
    "metrics.jsonl": (b'{"step": 1}\n{"step": \n{"step": 3}\n', "metrics.jsonl:2: this line is no JSON object"),
    "recipe.yaml": (b"model: {name: x\n", "recipe.yaml"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_skipped(tmp_path: Path, name: str) -> None:
    content, message = DAMAGE[name]
    bad = make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1)
    (bad / name).write_bytes(content)
    found = collect([tmp_path])
    assert len(found.runs) == 1
    assert message in reasons(found)[bad.name]
    assert found.damaged


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"schema": "sparseift.summary/1"},
        {"schema": "other/1", "steps": 1},
        [],
        {"schema": "sparseift.summary/1", "steps": 1, "metrics": [], "flops": {}},
    ],
)
def test_a_summary_of_something_else_is_damage(tmp_path: Path, summary: object) -> None:
    write(make_run(tmp_path) / "summary.json", summary)
    assert "summary.json" in next(iter(reasons(collect([tmp_path])).values()))


def test_deep_yaml_and_cut_archives_do_not_stop_it(tmp_path: Path) -> None:
    deep, cut = make_run(tmp_path, seed=0), make_run(tmp_path, seed=1, packed=True)
    (deep / "recipe.yaml").write_text("a: " + "[" * 10_000)
    packed = (cut / "metrics.jsonl.gz").read_bytes()
    (cut / "metrics.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    make_run(tmp_path, seed=2)
    found = collect([tmp_path])
    assert len(found.runs) == 1
    assert "nested too deeply" in reasons(found)[deep.name]
    assert "cut short" in reasons(found)[cut.name]


def test_what_a_report_can_do_without_is_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "audit.json").write_text("{")
    (run / "provenance.json").unlink()
    (found,) = collect([tmp_path]).runs
    assert found.audit is None
    assert found.provenance is None
    assert found.warnings == ("audit.json is not JSON",)


@pytest.mark.parametrize(
    "line",
    [
        "transform: wide",
        "algorithm: rigl",
        "evaluation:\n  metrics: top1",
        "checkpoint: [1]",
        "model: resnet18",
        "data: 3",
    ],
)
def test_recipes_that_are_not_resolved_are_damage(tmp_path: Path, line: str) -> None:
    run = make_run(tmp_path)
    key = line.split(":")[0]
    kept, skipping = [], False
    for text in (run / "recipe.yaml").read_text().splitlines():
        skipping = text.startswith(f"{key}:") or (skipping and text.startswith(" "))
        kept += [] if skipping else [text]
    (run / "recipe.yaml").write_text("\n".join([*kept, line, ""]))
    assert "not a resolved recipe" in reasons(collect([tmp_path]))[run.name]


@pytest.mark.parametrize("sessions", [[], {}, ["x"], [{"git": "abc"}], [{"versions": []}], None])
def test_odd_provenance_is_a_warning(tmp_path: Path, sessions: object) -> None:
    write(make_run(tmp_path) / "provenance.json", {"sessions": sessions})
    found = collect([tmp_path])
    assert found.runs[0].warnings == ("provenance.json is not what a run writes",)
    assert len(runs_frame(found.runs)) == 1


def test_half_a_line_at_the_end_is_no_line_yet(tmp_path: Path) -> None:
    run = make_run(tmp_path, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "to')
    assert [row["step"] for row in collect([run]).runs[0].metrics] == [1, 2]


def test_foreign_folders_are_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "deep" / "recipe.txt").touch()
    (tmp_path / ".git" / "x").mkdir(parents=True)
    unbegun = tmp_path / "net_dense" / "20260101T000000Z-00000000"
    unbegun.mkdir()
    write(unbegun / "audit.json", {})
    model = tmp_path / "model"
    model.mkdir()
    for name in ("table.json", "plan.json", "audit.json", "provenance.json"):
        write(model / name, {})
    found = collect([tmp_path])
    assert len(found.runs) == 1
    assert {name: reason.split(":")[0].split(",")[0] for name, reason in reasons(found).items()} == {
        "notes": "foreign",
        unbegun.name: "no recipe.yaml",
        "model": "a transformed model",
    }


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    assert "holds no run" in collect([tmp_path]).skipped[0][1]
    with pytest.raises(UsageError, match="is not there"):
        collect([tmp_path / "no"])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        collect([tmp_path / "file"])


def test_links_in_circles_end(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "net_dense" / "loop").symlink_to(tmp_path)
    assert len(collect([tmp_path]).runs) == 1


def test_a_recipe_shared_by_seeds_keeps_every_seed(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70, 71, 72])
    runs = collect([tmp_path]).runs
    assert [run.seed for run in runs] == [0, 1, 2]
    assert [run.recipe["training"]["seed"] for run in runs] == [0, 1, 2]


def test_seeds_are_one_group_and_settings_are_not(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70, 71, 72])
    make_run(tmp_path, "net_dense", 3, epochs=200, stamp=1)
    make_run(tmp_path, "net_dense", 4, lr=0.2, stamp=1)
    frame = runs_frame(collect([tmp_path]).runs)
    groups = {row["group"]: row for row in records(groups_frame(frame))}
    assert {label: row["n"] for label, row in groups.items()} == {
        "net_dense [training.epochs=2, optimizer.lr=0.1]": 3,
        "net_dense [training.epochs=200, optimizer.lr=0.1]": 1,
        "net_dense [training.epochs=2, optimizer.lr=0.2]": 1,
    }


def test_where_it_ran_and_old_recipes_make_no_group(tmp_path: Path) -> None:
    run = make_run(tmp_path, seed=0)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("device: auto", "device: cuda\n  deterministic: false"))
    make_run(tmp_path, seed=1)
    (row,) = records(groups_frame(runs_frame(collect([tmp_path]).runs)))
    assert (row["group"], row["n"]) == ("net_dense", 2)


def test_a_seed_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path, seed=0, values=(60.0,))
    make_run(tmp_path, seed=0, values=(80.0,), stamp=1)
    make_run(tmp_path, seed=1, values=(70.0,))
    make_run(tmp_path, seed=1, values=(10.0,), stamp=1, finished=False)
    (row,) = records(groups_frame(runs_frame(collect([tmp_path]).runs)))
    assert (row["n"], row["runs"], row["mean"]) == (2, 4, 75.0)


def test_last_and_best_of_higher_and_lower(tmp_path: Path) -> None:
    make_run(tmp_path, "a", values=(60.0, 80.0, 70.0))
    make_run(tmp_path, "b", values=(3.0, 1.0, 2.0), metric="perplexity_per_word")
    rows = records(groups_frame(runs_frame(collect([tmp_path]).runs)))
    assert [(row["metric"], row["mean"], row["best"]) for row in rows] == [
        ("top1", 70.0, 80.0),
        ("perplexity_per_word", 2.0, 1.0),
    ]


def test_flops_beyond_64_bits_stay_exact(tmp_path: Path) -> None:
    huge = 2**70 + 1
    seeds(tmp_path, "net_dense", [70, 71], flops=huge)
    (row,) = records(groups_frame(runs_frame(collect([tmp_path]).runs)))
    assert row["flops"] == huge


def test_regrouping_never_mixes_data_or_lengths(tmp_path: Path) -> None:
    make_run(tmp_path, "a", 0)
    make_run(tmp_path, "b", 0, member="wide")
    make_run(tmp_path, "c", 0, data="cifar10")
    make_run(tmp_path, "d", 0, epochs=9)
    frame = regroup(runs_frame(collect([tmp_path]).runs), ["seed"])
    assert sorted(row["n"] for row in records(groups_frame(frame))) == [1, 1, 2]
    with pytest.raises(UsageError, match="there is no column 'algo'"):
        regroup(frame, ["algo"])


def test_name_without_a_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path, "net_wide75_rigl", finished=False)
    kept = tmp_path / "results" / "my_recipe"
    shutil.copytree(run, kept)
    assert collect([run]).runs[0].name == "net_wide75_rigl"
    assert collect([kept]).runs[0].name == "my_recipe"


def test_numbers_of_json_that_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, seed=0, values=(70.0,))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 780, "top1": None, "loss": "x"}) + "\n")
    (row,) = records(runs_frame(collect([tmp_path]).runs))
    assert (row["value"], row["counted"]) == (None, False)


@pytest.mark.parametrize(("words_per_token", "unit"), [(1.0, "token"), (0.25, "word")])
def test_runs_that_recorded_a_perplexity_without_its_unit(tmp_path: Path, words_per_token: float, unit: str) -> None:
    """An older version wrote exp(loss a word) where it knew the words, else exp(loss): it is one group with today's runs."""
    values = [math.exp(loss / words_per_token) for loss in (2.0, 1.0)]
    old = MetricFacts("perplexity", "perplexity", "perplexity", lower_is_better=True)
    make_run(tmp_path, seed=0, values=values, metric="perplexity", recorded={"perplexity": old})
    name = f"perplexity_per_{unit}"
    facts = MetricFacts(name, name.replace("_", " "), name.replace("_", " "), lower_is_better=True)
    make_run(tmp_path, seed=1, values=values, metric=name, recorded={name: facts})
    runs = collect([tmp_path]).runs
    assert all("perplexity" not in row and row[name] for run in runs for row in run.metrics)
    assert [run.summary["metrics"][name] for run in runs] == [values[-1]] * 2
    (row,) = records(groups_frame(runs_frame(runs)))
    assert (row["metric"], row["n"], row["mean"]) == (name, 2, pytest.approx(values[-1]))
