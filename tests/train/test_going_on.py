"""Going on as the tool itself says: the command after a signal, the one of `inspect`, names and edited code."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.errors import InterruptedRun
from sparseift_cli.models.source import source_hash
from sparseift_cli.recipe.load import load
from sparseift_cli.report.collect import collect
from sparseift_cli.report.frame import groups_frame, records, runs_frame
from sparseift_cli.train import run as running
from sparseift_cli.train.run import run_jobs

Write = Callable[..., Path]


def quiet(*_: Any) -> None:
    """Take a report and print nothing."""


def interrupt(row: Mapping[str, Any]) -> None:
    """A report that asks the run to stop after its first evaluation."""
    os.kill(os.getpid(), signal.SIGINT)


def stopped(recipe: Path, seed: int, root: Path) -> Path:
    """The directory of a run that was stopped at its first evaluation."""
    with pytest.raises(InterruptedRun):
        run_jobs([(load(recipe), seed)], root, None, interrupt, quiet)
    (path,) = (p for p in (root / recipe.stem).iterdir() if not (p / "summary.json").exists())
    return path


@pytest.mark.parametrize("older", [False, True])
def test_the_command_of_inspect_keeps_the_name(sparseift, write_recipe: Write, tmp_path: Path, older: bool) -> None:
    recipe, root = write_recipe("rigl"), tmp_path / "runs"
    run_jobs([(load(recipe), 0), (load(recipe), 1)], root, None, quiet, quiet)
    path = stopped(recipe, 2, root)
    if older:  # versions that wrote no name before the end
        content = json.loads((path / "provenance.json").read_text())
        del content["sessions"][0]["recipe"]
        (path / "provenance.json").write_text(json.dumps(content))
    command = json.loads(sparseift("inspect", str(path), "--json")[1])["next"][-1]
    code, out, _ = sparseift(*shlex.split(command)[1:], "--json")
    assert code == 0 and json.loads(out)["runs"][0]["recipe"] == "rigl_sgd"
    (group,) = records(groups_frame(runs_frame(collect([root]).runs)))
    assert (group["group"], group["n"]) == ("rigl_sgd", 3)


def test_a_moved_run_keeps_the_name(sparseift, write_recipe: Write, tmp_path: Path) -> None:
    path = stopped(write_recipe("rigl"), 0, tmp_path / "runs")
    moved = path.rename(tmp_path / "copied run")
    assert collect([moved]).runs[0].name == "rigl_sgd"
    code, out, _ = sparseift("train", str(moved / "recipe.yaml"), "--resume", str(moved), "--json")
    assert code == 0 and json.loads(out)["runs"][0]["recipe"] == "rigl_sgd"
    assert collect([moved]).runs[0].name == "rigl_sgd"


@pytest.mark.parametrize("parallel", [False, True])
def test_the_hint_after_a_signal_is_the_whole_command(
    sparseift, monkeypatch: pytest.MonkeyPatch, write_recipe: Write, tmp_path: Path, parallel: bool
) -> None:
    """Pasted as it is, it continues with the run that was stopped and begins the one that was not."""
    recipe, root = write_recipe("rigl", save=100), tmp_path / "my runs é"
    where = "sparseift_cli.train.parallel.run_parallel" if parallel else "sparseift_cli.train.run.run_jobs"

    def stop(jobs: Any, *rest: Any, **more: Any) -> Any:
        stopped(recipe, 0, root)
        raise InterruptedRun("2 of 2 runs stopped", signal.SIGINT)

    monkeypatch.setattr(where, stop)
    words = ["train", str(recipe), "--runs", str(root), "--seeds", "0..1", "--set", "data.limit=64", "--json"]
    words += ["--parallel", "2"] if parallel else []
    code, _, err = sparseift(*words)
    assert code == 130
    hint = err.strip().splitlines()[-1].removeprefix("  hint: continue with: ")
    given = shlex.split(hint)
    assert given[:3] == ["sparseift", "train", str(recipe)] and f"'{root}'" in hint
    options = {given[i] for i in range(len(given)) if given[i].startswith("--")}
    assert options == {"--runs", "--seeds", "--set", "--json", "--resume", *(["--parallel"] if parallel else [])}
    for option in ("--runs", "--seeds", "--set"):
        assert given[given.index(option) + 1] == words[words.index(option) + 1]
    assert given[given.index("--resume") + 1] == "latest"


def test_the_pasted_hint_goes_on(
    sparseift, monkeypatch: pytest.MonkeyPatch, write_recipe: Write, tmp_path: Path
) -> None:
    recipe, root = write_recipe("rigl"), tmp_path / "my runs"
    once, real = [True], running.train

    def stop_once(run: Any, folder: Any, ours: Any, report: Any, tick: Any = None) -> Any:
        if once:
            once.clear()
            return real(run, folder, ours, interrupt)
        return real(run, folder, ours, report, tick=tick)

    monkeypatch.setattr(running, "train", stop_once)
    code, _, err = sparseift("train", str(recipe), "--runs", str(root), "--seeds", "0..1")
    assert code == 130
    hint = shlex.split(err.strip().splitlines()[-1].removeprefix("  hint: continue with: "))
    code, _, err = sparseift(*hint[1:])
    assert code == 0 and "(seed 0, 12 steps, cpu): from step " in err and len(list((root / "rigl_sgd").iterdir())) == 2
    assert f"nothing of rigl_sgd seed 1 to continue with in {root}: from the start" in err
    assert "seed 0 to continue" not in err


def test_edited_code_is_told_when_a_run_goes_on(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edited_net.py").write_text("from tests.helpers.nets import cnn as net\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = write_recipe("rigl")
    recipe.write_text(recipe.read_text().replace("tests.helpers.nets:cnn", "edited_net:net"))
    path = stopped(recipe, 0, tmp_path / "runs")
    said: list[str] = []
    (tmp_path / "edited_net.py").write_text("from tests.helpers.nets import cnn as net  # edited\n")
    run_jobs([(load(recipe), 0)], tmp_path / "runs", str(path), quiet, lambda text, *_: said.append(text))
    assert "not as before, so bits may differ: the source of edited_net has changed" in said


def test_only_the_users_own_modules_have_a_source() -> None:
    assert list(source_hash("tests.helpers.nets:cnn")) in ([], ["tests.helpers.nets"])
    assert source_hash("resnet18") == source_hash("timm:resnet18") == source_hash("not.imported:net") == {}
