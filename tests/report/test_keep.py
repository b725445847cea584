"""Kept runs: the same bytes every time, no name of a machine in them, only finished ones; and their pages are current."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.cli.app import main
from sparseift_cli.errors import ArtifactError, UsageError
from sparseift_cli.recipe import catalog
from sparseift_cli.report import kept_file
from sparseift_cli.report.collect import collect
from sparseift_cli.report.html.page import command
from sparseift_cli.report.keep import keep, local
from tests.helpers.report_runs import make_run, seeds, write
from tests.tools import results


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def private(run: Path) -> None:
    """Give a run everything that a machine may leave in it."""
    facts = json.loads((run / "provenance.json").read_text())
    facts["sessions"][0]["command"] = [
        "/opt/me/env/bin/sparseift",
        "train",
        "/opt/me/src/recipes/net/dense.yaml",
        "--set",
        "data.root=/opt/me/data/c100",
        "--runs=../../me/runs",
        "--seeds",
        "0..2",
    ]
    write(run / "provenance.json", facts)
    facts = json.loads((run / "summary.json").read_text())
    write(run / "summary.json", facts | {"path": str(run)})
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("  root: null", '  root: "/opt/me/data/c100"'))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "tensors").write_text("large")
    (run / "lock").write_text("")


def test_keeping_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    runs = seeds(tmp_path / "runs", "net_dense", [70.0, 72.0])
    first = keep([tmp_path / "runs"], tmp_path / "kept")
    before = files(tmp_path / "kept")
    assert [k.state for k in first] == ["new", "new"]
    assert [k.path for k in first] == [tmp_path / "kept" / "net_dense" / f"{run.name}.json" for run in runs]
    assert list(before) == [f"net_dense/{run.name}.json" for run in runs]
    assert [k.state for k in keep(runs, tmp_path / "kept")] == ["unchanged"] * 2
    keep([tmp_path / "kept"], tmp_path / "again")  # what is kept can be kept elsewhere
    assert files(tmp_path / "kept") == files(tmp_path / "again") == before
    kept = collect([tmp_path / "kept"])
    assert [run.metrics for run in kept.runs] == [run.metrics for run in collect([tmp_path / "runs"]).runs]
    first[0].path.write_text(json.dumps(json.loads(first[0].path.read_text())))  # the same content, laid out otherwise
    assert [k.state for k in keep(runs, tmp_path / "kept")] == ["replaced", "unchanged"]
    assert files(tmp_path / "kept") == before


def test_nothing_names_a_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "net_dense")
    private(run)
    keep([run], tmp_path / "kept")
    (kept,) = collect([tmp_path / "kept"]).runs
    text = b"".join(files(tmp_path / "kept").values()).decode("utf-8", "replace")
    assert "/opt" not in text and str(tmp_path) not in text
    assert kept.recipe["data"]["root"] == "c100"
    assert kept.summary["path"] == f"net_dense/{run.name}"
    assert command(kept) == "sparseift train net/dense.yaml --set data.root=c100 --runs=runs --seeds 0..2"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("/data/me/runs", "runs"),
        ("~/runs", "runs"),
        ("..", ".."),
        ("../me/runs", "runs"),
        ("a/../../me", "me"),
        ("C:\\Users\\me\\runs", "runs"),
        ("--runs=/data/me/my runs", "--runs=my runs"),
        ("hf:/data/me/llama", "hf:llama"),
        ("/src/recipes/net/wide.yaml", "net/wide.yaml"),
        ("runs/a", "runs/a"),
        ("net/wide75", "net/wide75"),
        ("2026-01-01T12:00:00+00:00", "2026-01-01T12:00:00+00:00"),
        ("https://host/a/b", "https://host/a/b"),
    ],
)
def test_paths_lose_what_is_private(text: str, want: str) -> None:
    assert local(text) == want == local(want)


def test_what_cannot_be_kept_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "net_dense", 0)
    stopped = make_run(tmp_path / "runs", "net_wide", 1, finished=False)
    with pytest.raises(UsageError, match=f"not finished:\n  {stopped}: stopped"):
        keep([tmp_path / "runs"], tmp_path / "kept")
    broken = make_run(tmp_path / "runs", "net_wide", 2)
    (broken / "summary.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"summary\.json is not JSON"):
        keep([tmp_path / "runs"], tmp_path / "kept")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no run in"):
        keep([tmp_path / "empty"], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def old_kept_folder(run: Path, place: Path) -> Path:
    """A kept run as older versions wrote it: five files in a folder."""
    shutil.copytree(run, place / run.parent.name / run.name)
    folder = place / run.parent.name / run.name
    (folder / "metrics.jsonl.gz").write_bytes(gzip.compress((folder / "metrics.jsonl").read_bytes(), mtime=0))
    (folder / "metrics.jsonl").unlink()
    facts = json.loads((run / "summary.json").read_text())
    write(folder / "summary.json", facts | {"path": f"{run.parent.name}/{run.name}"})
    return folder


def test_folders_of_older_versions_are_read_and_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "net_wide", 0, more={"masks": {"fc": {"density": 0.5}}, "churn": math.nan})
    folder = old_kept_folder(run, tmp_path / "kept")
    (old,) = collect([tmp_path / "kept"]).runs
    keep([run], tmp_path / "new")
    (kept,) = keep([tmp_path / "kept"], tmp_path / "kept")
    assert kept.state == "replaced" and not folder.exists()
    assert files(tmp_path / "kept") == files(tmp_path / "new")
    (new,) = collect([tmp_path / "kept"]).runs
    text = partial(json.dumps, sort_keys=True)  # a NaN is not equal to itself, its text is
    for part in ("name", "seed", "state", "stamp", "recipe", "metrics", "summary", "audit", "provenance"):
        assert text(getattr(new, part)) == text(getattr(old, part)), part


def test_a_folder_with_more_than_a_kept_run_is_not_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", "net_dense", 0)
    (old_kept_folder(run, tmp_path / "kept") / "plot.svg").touch()
    before = files(tmp_path / "kept")
    with pytest.raises(ArtifactError, match="holds something else"):
        keep([run], tmp_path / "kept")
    with pytest.raises(ArtifactError, match="holds something else"):
        keep([tmp_path / "runs"], tmp_path / "runs")  # a run is not replaced by what is kept of it
    assert files(tmp_path / "kept") == before


def test_a_file_that_was_edited_is_damaged(tmp_path: Path) -> None:
    (kept,) = keep([make_run(tmp_path / "runs", "net_dense", 0, (50.0, 71.25))], tmp_path / "kept")
    text = kept.path.read_text()
    for changed, facts in (
        (text.replace("71.25", "72.25"), "its SHA-256 differs"),
        (text.replace('"seed": 0', '"seed": 1'), "its SHA-256 differs"),
        (text[: len(text) // 2], "is not JSON"),
        (text.replace("kept_run/1", "kept_run/2"), "is not a kept run: its schema is not 'sparseift.kept_run/1'"),
    ):
        assert changed != text
        kept.path.write_text(changed)
        ((path, reason),) = collect([tmp_path / "kept"]).skipped
        assert path == kept.path and facts in reason
        assert collect([kept.path]).skipped == [(path, reason)]
    kept.path.write_text(text)
    assert len(collect([kept.path]).runs) == 1


@pytest.mark.parametrize("broken", ["short row", "long row", "no metrics", "audit is a list", "step is text"])
def test_a_file_of_another_form_is_damaged_and_no_error(tmp_path: Path, broken: str) -> None:
    """Also where its SHA-256 is right, as in a file that somebody wrote by hand."""
    (kept,) = keep([make_run(tmp_path / "runs", "net_dense", 0)], tmp_path / "kept")
    document = json.loads(kept.path.read_text())
    rows = document["metrics"][0]["rows"]
    if broken == "short row":
        rows[0].pop()
    elif broken == "long row":
        rows[0].append(1)
    elif broken == "no metrics":
        del document["metrics"]
    elif broken == "audit is a list":
        document["audit"] = []
    else:
        rows[0][0] = "x"
    document["sha256"] = kept_file.digest(document)
    kept.path.write_text(json.dumps(document))
    assert len(collect([tmp_path]).skipped) == 1


def test_tables_give_back_every_row() -> None:
    rows = [
        {"step": 1, "lr": 0.1, "masks": {"a.b": {"density": 1 / 3}, "c": {}}, "none": None},
        {"step": 2, "lr": 1e-300, "masks": {"a.b": {"density": 2**70}, "c": {}}, "none": [1, {"x": 2}]},
        {"lr": 0.1, "step": 3},
        {"step": 4, "masks": {"a.b": {"density": 0.5}}},
    ]
    tables = kept_file.to_tables(rows)
    assert [len(table["rows"]) for table in tables] == [2, 1, 1]
    assert json.dumps(kept_file.from_tables(json.loads(json.dumps(tables)))) == json.dumps(rows)


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "net_dense", 0, (50.0, 70.0))
    other = make_run(tmp_path / "b", "net_dense", 0, (50.0, 71.0))
    keep([run], tmp_path / "kept")
    before = files(tmp_path / "kept")
    with pytest.raises(ArtifactError, match="holds something else"):
        keep([other], tmp_path / "kept")
    assert files(tmp_path / "kept") == before


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs", "net_dense", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sparseift", "report", "keep", "runs", "-o", "kept", "--json"])
    with pytest.raises(SystemExit):
        main()
    facts = json.loads(capsys.readouterr().out)
    assert facts["schema"] == "sparseift.report-keep/1"
    assert [(row["kept"], row["state"]) for row in facts["runs"]] == [
        ("kept/net_dense/20260101T120000Z-00000000.json", "new")
    ]


# --- the pages of kept results ---


def test_every_page_is_current() -> None:
    difference = "".join(map(results.stale, results.folders()))
    assert not difference, f"run `make results`:\n{difference}"


def test_the_picture_of_the_readme_is_drawn_from_kept_runs(root: Path, tmp_path: Path) -> None:
    pictures = re.findall(r"!\[.+\]\((recipes/.+/results/.+\.svg)\)", (root / "README.md").read_text("utf-8"))
    assert pictures and all(0 < (root / picture).stat().st_size < 60_000 for picture in pictures)
    folder = tmp_path / Path(pictures[0]).parent
    for run in sorted((root / pictures[0]).parent.glob("*/*.json"))[::3]:  # a seed of each recipe
        (folder / run.parent.name).mkdir(parents=True)
        shutil.copy(run, folder / run.parent.name)
    assert results.main(True, tmp_path) == 0
    drawn = tmp_path / pictures[0]
    if not drawn.exists():
        pytest.skip("another matplotlib than the pinned one draws it otherwise")
    drawn.write_text(drawn.read_text("utf-8").replace("dense", "sparse"), "utf-8")
    assert f"{pictures[0]}\n+++" in results.stale(folder, tmp_path)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with results of ResNet-18 on CIFAR-100: dense, wide at 90 %, and one of a recipe that is not shipped."""
    seeds(tmp_path / "runs", "resnet18_cifar100_dense", [76.5, 77.0, 77.5], epochs=200)
    wide = {"member": "wide", "sparsity": 0.9, "epochs": 200, "flops": 11 * 10**14}
    seeds(tmp_path / "runs", "resnet18_cifar100_wide90_rigl", [79.5, 80.0, 80.5], **wide)
    seeds(tmp_path / "runs", "own", [70.0], **{**wide, "sparsity": 0.5})
    keep([tmp_path / "runs"], tmp_path / "recipes" / "resnet18_cifar100" / "results")
    return tmp_path


def test_page_says_what_the_runs_say(repository: Path) -> None:
    (folder,) = results.folders(repository)
    text = results.page(folder, "recipes/resnet18_cifar100/results")
    assert "## resnet18_cifar on cifar100, 200 epochs, 78,000 steps" in text
    assert (
        "| resnet18_cifar100_dense | 3 | 77.00 ± 0.50 | 77.00 | 1.000e+15 | 1.0000 | 1,000 | 250 | 20.0 s | 77 [n] |"
        in text
    )
    assert (
        "| resnet18_cifar100_wide90_rigl | 3 | 80.00 ± 0.50 | 80.00 | 1.100e+15 | 1.1000 | 1,000 | 250 | 20.0 s | 80.1 [n] |"
        in text
    )
    assert "+3.00 points" in text and "1.1000x training FLOPs (unequal)" in text and "arXiv:2303.11525" in text
    (line,) = (line for line in text.splitlines() if line.startswith("sparseift train resnet18_cifar100/wide90_rigl"))
    assert line.endswith("--seeds 0..2") and "--set" in line  # these runs have few of the recipe's own values
    assert text.splitlines().count("sparseift") >= 1  # the recorded command of the other one


def test_page_names_the_seeds_of_a_difference(repository: Path) -> None:
    """The difference is that of the pairs; the means of the table are over other seeds too, and may have the other order."""
    runs = repository / "more" / "runs"
    seeds(runs, "net_dense", [70.0, 72.0, 77.0])
    seeds(runs, "net_wide75_rigl", [70.2, 72.1], member="wide")
    folder = repository / "recipes" / "net" / "results"
    keep([runs], folder)
    line, at_equal_time = (
        s for s in results.page(folder, "recipes/net/results").splitlines() if s.startswith("- net_wide75")
    )
    assert "wall time" in at_equal_time
    assert line.startswith("- net_wide75_rigl: +0.1") and line.endswith("(paired by seed, over seeds 0 and 1)")


def test_page_has_the_verdicts_at_equal_time(repository: Path) -> None:
    folder = repository / "recipes" / "net" / "results"
    for at, (name, seconds) in enumerate(
        (("net_dense", 100.0), ("net_wide75_time", 101.0), ("net_wide75_flops", 150.0))
    ):
        for seed in range(3):
            member = None if name == "net_dense" else "wide"
            flops = 15 * 10**14 if name == "net_wide75_time" else 10**15
            values = (60.0, 70.0 + 2 * seed + at * (1.1 if seed == 2 else 1))
            how: dict[str, Any] = {"seconds": seconds, "begins": 10_000.0 * at + 200 * seed, "flops": flops}
            audit = {"training": {"steps": 780}, "transform": {"sparsity": 0.75}, "layers": []} if member else None
            make_run(repository / name, name, seed, values, member=member, audit=audit, **how)
        keep([repository / name], folder)
    text = results.page(folder, "recipes/net/results")
    assert "## Against dense at equal time\n\nOf runs whose wall time is dense's within 2 %" in text
    section = text.partition("## Against dense at equal time")[2].partition("## How to repeat")[0]
    assert "- net_wide75_time: +1.03 points [0.89, 1.18], n=3, at 1.0100x wall time: better (paired by seed)" in section
    assert "net_wide75_flops" not in section
    assert "-seconds.svg)" in text
    for path in folder.glob("net_wide75_time/*"):
        path.unlink()
    assert "equal time" not in results.page(folder, "recipes/net/results")


def test_page_names_runs_that_shared_a_device(repository: Path) -> None:
    (folder,) = results.folders(repository)
    assert "shared the device" not in results.page(folder, "recipes/x/results")
    seeds(repository / "beside", "resnet18_cifar100_wide75_set", [79.0], member="wide", epochs=200, at_once=3)
    keep([repository / "beside"], folder)
    seeds(repository / "mixed", "resnet18_cifar100_wide75_rigl", [79.0], member="wide", epochs=200)
    seeds(repository / "mixed", "resnet18_cifar100_wide75_rigl", [79.5], member="wide", epochs=200, at_once=3, stamp=1)
    seeds(
        repository / "mixed",
        "resnet18_cifar100_wide75_static",
        [78.0],
        member="wide",
        algorithm="static",
        epochs=200,
        at_once=3,
    )
    keep([repository / "beside", repository / "mixed"], folder)
    page = results.page(folder, "recipes/x/results")
    assert "longer where several runs (their number in brackets) shared the device" in page
    rows = {
        name.strip(): line
        for line in page.splitlines()
        if line.startswith("| resnet18") and (name := line.split("|")[1])
    }
    assert [
        count in rows[f"resnet18_cifar100_{name}"]
        for name, count in (("wide75_rigl", " (1 or 3) |"), ("wide75_set", " (3) |"), ("wide75_static", " (3) |"))
    ] == [True] * 3
    assert "(3)" not in rows["resnet18_cifar100_dense"]


def test_published_number_is_shown_for_training_of_its_length_only(repository: Path) -> None:
    (folder,) = results.folders(repository)
    seeds(repository / "long", "resnet18_cifar100_dense_long", [78.0], epochs=400)
    keep([repository / "long"], folder)
    lines = results.page(folder, "recipes/x/results").splitlines()
    dense, long = (
        [line for line in lines if line.startswith(f"| resnet18_cifar100_dense{more} |")] for more in ("", "_long")
    )
    assert len(dense) == len(long) == 1 and dense[0].endswith("| 77 [n] |") and long[0].endswith("|  |")


def test_page_that_is_not_current_is_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = results.folders(repository)
    assert results.main(False, repository) == 1 and "as made from its runs" in capsys.readouterr().out
    assert results.main(True, repository) == 0
    assert results.stale(folder, repository) == "" and results.main(False, repository) == 0
    page = folder / "README.md"
    page.write_text(page.read_text("utf-8").replace("80.1", "82.1"), "utf-8")
    assert "-| resnet18_cifar100_wide90_rigl" in results.stale(folder, repository)


def test_recipes_of_kept_runs_are_not_shipped_ones(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "recipes_dir", lambda: repository / "recipes")
    assert list(catalog.shipped()) == []
    (repository / "recipes" / "net").mkdir()
    (repository / "recipes" / "net" / "dense.yaml").write_text("# A net.\nmodel: x\n")
    assert [entry.name for entry in catalog.shipped()] == ["net/dense"]


def test_a_page_includes_the_notes(repository: Path) -> None:
    (folder,) = results.folders(repository)
    assert "Discussion" not in results.page(folder, "recipes/x/results")
    (folder / "notes.md").write_text("It was the learning rate.\n", "utf-8")
    assert "## Discussion\n\nIt was the learning rate.\n\n## How to repeat the runs" in results.page(
        folder, "recipes/x/results"
    )
