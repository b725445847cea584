"""Run directories: made whole, locked, found again, refused to another recipe; sessions and what changed between them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_cli.errors import ArtifactError
from sparseift_cli.kernels import LayerChoice
from sparseift_cli.runs import provenance
from sparseift_cli.runs.directory import RunDirectory, recipe_hash

RECIPE = "model:\n  name: resnet18\noptimizer:\n  lr: 0.1\n"
NOON = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


def created(root: Path, recipe: str = RECIPE, now: datetime = NOON) -> RunDirectory:
    return RunDirectory.create(root, "mine", recipe, plan={"p": 1}, audit={"a": 1.5}, now=now)


def test_a_new_run_has_its_recipe_plan_and_audit(tmp_path: Path) -> None:
    run = created(tmp_path)
    assert run.path == tmp_path / "mine" / f"20260102T120000Z-{recipe_hash(RECIPE)}"
    assert {p.name for p in run.path.iterdir()} == {"recipe.yaml", "plan.json", "audit.json"}
    assert (run.recipe, run.summary) == (RECIPE, None)
    assert created(tmp_path).path.name == f"{run.path.name}.1"
    run.finish({"top1": 0.5})
    assert run.summary == {"top1": 0.5}


def test_latest_prefers_the_same_recipe(tmp_path: Path) -> None:
    assert RunDirectory.latest(tmp_path, "mine") is None
    first = created(tmp_path)
    other = created(tmp_path, RECIPE + "x: 1\n", NOON + timedelta(seconds=1))
    (tmp_path / "mine" / "notes").mkdir()
    (tmp_path / "mine" / f"20270102T120000Z-{recipe_hash(RECIPE)}").mkdir()  # died before its recipe was written
    assert RunDirectory.latest(tmp_path, "mine") == other
    assert RunDirectory.latest(tmp_path, "mine", recipe=RECIPE) == first
    assert RunDirectory.latest(tmp_path, "mine", recipe="new") == other
    again = [created(tmp_path) for _ in range(11)][-1]
    assert RunDirectory.latest(tmp_path, "mine", recipe=RECIPE) == again  # .11 is newer than .2


def test_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = created(tmp_path)
    run.require_recipe(RECIPE)
    with pytest.raises(ArtifactError) as caught:
        run.require_recipe(RECIPE.replace("0.1", "0.2"))
    assert caught.value.exit_code == 4
    assert "was begun with another recipe:" in caught.value.message
    assert "\n  -  lr: 0.1\n  +  lr: 0.2" in caught.value.message
    with pytest.raises(ArtifactError, match="lines more"):
        run.require_recipe("\n".join(map(str, range(100))))


def test_how_a_run_is_computed_may_change(tmp_path: Path) -> None:
    text = (
        "data:\n  device: x\ntraining:\n  steps: 5\n  device: cpu\n  threads: 1\n  kernels: auto\ninit:\n  kernels: 1\n"
    )
    other = text.replace("device: cpu", "device: cuda").replace("threads: 1", "threads: null").replace("auto", "masked")
    run = created(tmp_path, text)
    run.require_recipe(other)
    for changed in ("device: y", "kernels: 2", "steps: 6"):
        was = {"device: y": "device: x", "kernels: 2": "kernels: 1", "steps: 6": "steps: 5"}[changed]
        with pytest.raises(ArtifactError, match="was begun with another recipe"):
            run.require_recipe(other.replace(was, changed))
    created(tmp_path, text.replace("steps: 5", "steps: 6"), NOON + timedelta(seconds=1))
    assert RunDirectory.latest(tmp_path, "mine", recipe=other, read=Path.read_text) == run


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    run = created(tmp_path)
    assert RunDirectory.open(run.path) == run
    with pytest.raises(ArtifactError, match="is no run directory"):
        RunDirectory.open(tmp_path)
    (run.path / "summary.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        _ = run.summary


def test_lock_keeps_others_out_and_is_freed(tmp_path: Path) -> None:
    run = created(tmp_path)
    with run.lock():
        code = (
            "import sys; from pathlib import Path; from sparseift_cli.runs.directory import RunDirectory\n"
            "try:\n    with RunDirectory(Path(sys.argv[1])).lock(): print('got it')\n"
            "except Exception as e: print(e.exit_code, e)"
        )
        said = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"4 {run.path} is in use by process ")
        with pytest.raises(ArtifactError, match="is in use"), run.lock():
            pass
        (run.path / "lock.json").unlink()
        with pytest.raises(ArtifactError, match="in use by another process"), run.lock():
            pass
    with run.lock():
        pass


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot make"):
        RunDirectory.create(tmp_path / "file", "x", RECIPE)


def test_sessions_group_kernels_and_say_what_changed() -> None:
    choices = [LayerChoice(f"{i}.weight", "blocks", 64, how="Triton, pointers") for i in range(3)]
    choices.insert(1, LayerChoice("stem.weight", "masked", None, "unstructured masks have no kernel"))
    before = provenance.session(device="cpu", seed=0, kernels=choices)
    assert before["kernels"] == [
        {
            "backend": "blocks",
            "block": 64,
            "how": "Triton, pointers",
            "reason": "",
            "weights": ["0.weight", "1.weight", "2.weight"],
        },
        {
            "backend": "masked",
            "block": None,
            "how": "",
            "reason": "unstructured masks have no kernel",
            "weights": ["stem.weight"],
        },
    ]
    said = "3 layers in blocks of 64 (Triton, pointers); 1 masked-dense: unstructured masks have no kernel"
    assert provenance.kernels_in_words(before) == said
    now = provenance.session(device="cpu", seed=0, kernels=choices[:2])
    (difference,) = provenance.differences(before, now)
    assert difference.startswith(f"kernels: {said} before, 1 layer in blocks of 64") and difference.endswith(" now")
    assert provenance.differences({k: v for k, v in before.items() if k != "kernels"}, now) == []


def test_sessions_on_one_device_have_one_identity() -> None:
    """Which runs were beside each other is read from it; it names no machine."""
    if not Path("/proc/sys/kernel/random/boot_id").is_file():
        pytest.skip("this system has no identifier of its boot")
    here, again = (provenance.session(device="cpu", seed=seed)["device_id"] for seed in (0, 1))
    assert here == again and re.fullmatch("[0-9a-f]{8}", here)
    assert provenance.session(device="mps", seed=0)["device_id"] != here
    if torch.cuda.device_count() > 1:
        assert len({provenance.session(device=f"cuda:{i}", seed=0)["device_id"] for i in range(2)}) == 2


def test_sessions_say_what_changed(tmp_path: Path) -> None:
    run = created(tmp_path)
    session = provenance.session(device="cpu", seed=3, data={"cifar100": "ab"}, command=["sparseift", "train"], step=5)
    assert session["versions"]["torch"] == torch.__version__
    assert (session["threads"], session["seed"], session["from_step"]) == (torch.get_num_threads(), 3, 5)
    assert run.begin(session) == []
    assert run.begin(session) == []
    changed: dict[str, Any] = {**session, "threads": 99, "data": {"cifar100": "cd", "new": "x"}}
    assert run.begin(changed) == [f"CPU threads: {session['threads']} before, 99 now", "data cifar100 has changed"]
    elsewhere = [
        {**session, "device": f"cuda:{i}", "device_name": name} for i, name in enumerate(["H100", "H100", "H200"])
    ]
    assert provenance.differences(elsewhere[0], elsewhere[1]) == []
    assert provenance.differences(elsewhere[1], elsewhere[2]) == ["device: H100 before, H200 now"]
    newer = {**session, "git": {"commit": "c0ffee", "dirty": False}}
    assert provenance.differences({**session, "git": {"commit": "beef", "dirty": False}}, newer) == [
        "commit of sparseift: beef before, c0ffee now"
    ]
    mine = [{**session, "source": {"mym": digest}} for digest in ("ab", "cd")]
    assert provenance.differences(*mine) == ["the source of mym has changed"]
    assert (
        provenance.differences({k: v for k, v in session.items() if k != "source"}, mine[0]) == []
    )  # an older version's
    written = json.loads((run.path / "provenance.json").read_text())
    assert written["schema"] == "sparseift.provenance/1"
    assert len(written["sessions"]) == 3


def test_commit_of_a_checkout_and_of_none(tmp_path: Path, root: Path) -> None:
    assert provenance.git_commit(tmp_path) is None
    assert provenance.git_commit(tmp_path / "none") is None
    if (root / ".git").exists():
        found = provenance.git_commit(root / "sparseift_cli")
        assert found is not None
        assert len(found["commit"]) == 40


def test_a_run_resumes_where_its_checkpoint_was(tmp_path: Path) -> None:
    run = created(tmp_path)
    found, metrics = run.resume()
    assert found is None
    with metrics:
        for step in range(1, 4):
            metrics.append({"step": step, "loss": 1 / step})
        run.save(3, {"w": torch.arange(3.0)}, {"rng": [1, 2]}, metrics, score=0.3)
        metrics.append({"step": 4, "loss": 9.0})
    found, metrics = run.resume()
    assert found is not None
    assert (found.step, found.state, found.score) == (3, {"rng": [1, 2]}, 0.3)
    with metrics:
        metrics.append({"step": 4, "loss": 0.25})
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": s, "loss": 1 / s} for s in (1, 2, 3, 4)]


def test_a_run_without_a_checkpoint_starts_its_metrics_anew(tmp_path: Path) -> None:
    run = created(tmp_path)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    found, metrics = run.resume()
    metrics.close()
    assert found is None
    assert (run.path / "metrics.jsonl").read_text() == ""
