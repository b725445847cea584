"""The training loop: resuming to the bit, FLOPs that add up, a run that diverges, one that is stopped."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_cli.base.atomic import read_json
from sparseift_cli.cli.progress import Lines
from sparseift_cli.data import order
from sparseift_cli.errors import ArtifactError, DivergedError, InterruptedRun, UsageError
from sparseift_cli.kernels import LayerChoice
from sparseift_cli.mask.attached import masks_of
from sparseift_cli.recipe.load import load
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.runs.metrics import read_metrics
from sparseift_cli.train import loop
from sparseift_cli.train.evaluate import evaluate
from sparseift_cli.train.prepare import prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.run import run_jobs, run_seeds
from sparseift_cli.train.state import unpack
from sparseift_cli.train.step import EagerStep
from tests.helpers.two_processes import all_on_two_processes, on_two_processes

Write = Callable[..., Path]
CPU = Processes(torch.device("cpu"))


def quiet(*_: Any) -> None:
    """Take a report and print nothing."""


def run(
    recipe: Path, root: Path, resume: str | None = None, seeds: tuple[int, ...] = (0,), **sets: Any
) -> list[dict[str, Any]]:
    loaded = load(recipe, [f"{k.replace('__', '.')}={v}" for k, v in sets.items()])
    return run_seeds(loaded, list(seeds), root, resume, quiet, quiet)


def final_state(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    newest = RunDirectory.open(Path(path)).checkpoints.newest()
    assert newest is not None
    state = {k: v for k, v in newest.state.items() if k != "seconds"}
    state["last"] = {k: v for k, v in state["last"].items() if k not in ("seconds", "peak_bytes")}
    return dict(newest.tensors), state


ALL = [*((a, o) for a in ("static", "set", "snfs", "rigl", "gmp", "granet") for o in ("sgd", "adamw")), (None, "sgd")]


@pytest.mark.parametrize(("algorithm", "optimizer"), ALL)
def test_resuming_anywhere_gives_the_same_bytes(
    write_recipe: Write, tmp_path: Path, algorithm: str | None, optimizer: str
) -> None:
    # masks change at every second step up to 18, and every fifth is evaluated
    every = range(1, 24, 3) if (algorithm, optimizer) == ("rigl", "sgd") else (2, 13, 23)
    recipe = write_recipe(algorithm, optimizer, steps=24, save=1)
    (whole,) = run(recipe, tmp_path / "runs")
    want, want_state = final_state(whole["path"])
    for k in every:
        copy = tmp_path / "copy" / Path(whole["path"]).name
        shutil.copytree(whole["path"], copy)
        (copy / "summary.json").unlink()
        for checkpoint in (copy / "checkpoints").glob("step-*"):
            if int(checkpoint.name[5:13]) > k:
                shutil.rmtree(checkpoint)
        (again,) = run(recipe, tmp_path / "runs", resume=str(copy))
        have, have_state = final_state(again["path"])
        assert have.keys() == want.keys()
        assert [n for n in want if not torch.equal(have[n], want[n])] == []
        assert have_state == want_state
        rows = [
            [
                {k: v for k, v in r.items() if k not in ("seconds", "peak_bytes")}
                for r in read_metrics(Path(p) / "metrics.jsonl")
            ]
            for p in (whole["path"], again["path"])
        ]
        assert rows[0] == rows[1]
        shutil.rmtree(copy.parent)


@pytest.mark.parametrize("algorithm", [None, "static", "set", "snfs", "rigl", "gmp", "granet"])
def test_flops_spent_are_the_flops_audited(write_recipe: Write, tmp_path: Path, algorithm: str | None) -> None:
    (summary,) = run(write_recipe(algorithm, steps=21), tmp_path / "runs")
    flops = summary["flops"]
    assert flops["spent"] == flops["audited"]
    rows = list(read_metrics(Path(summary["path"]) / "metrics.jsonl"))
    assert [r["step"] for r in rows] == [5, 10, 15, 20, 21]
    assert rows[-1]["flops"] == flops["spent"] and rows[-1]["executed_flops"] == flops["executed"]
    assert (flops["executed"] > flops["spent"]) == (algorithm is not None)
    assert json.loads((Path(summary["path"]) / "summary.json").read_text())["flops"] == flops


def test_a_run_says_how_its_layers_are_computed(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = (LayerChoice("a.weight", "masked", None, "unstructured masks have no kernel"),)
    made, notes = prepare, list[str]()
    monkeypatch.setattr("sparseift_cli.train.run.prepare", lambda *given: replace(made(*given), kernels=choices))
    recipe = load(write_recipe("static", steps=2))
    (done,) = run_jobs([(recipe, 0)], tmp_path / "runs", None, quiet, lambda text, *_: notes.append(text))
    assert "kernels: 1 layer masked-dense: unstructured masks have no kernel" in notes
    (session,) = read_json(Path(done["path"]) / "provenance.json")["sessions"]
    assert [group["weights"] for group in session["kernels"]] == [["a.weight"]]


@pytest.mark.parametrize("algorithm", ["static", "rigl", "set"])
def test_masks_hold_after_every_step(write_recipe: Write, monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    ready = prepare(load(write_recipe(algorithm, "adamw")), 0, Processes(torch.device("cpu")))
    assert ready.transformation is not None
    planned = {m.key: m.nnz for m in ready.transformation.surgery.masked}
    scaler: Any = torch.amp.grad_scaler.GradScaler("cpu", enabled=False)
    make_step = EagerStep(ready, scaler, Processes(torch.device("cpu")))
    first = {k: m.clone() for k, m in masks_of(ready.model).items()}
    for step in range(12):
        make_step(step)
        for key, mask in masks_of(ready.model).items():
            weight = ready.model.get_parameter(key)
            assert int(mask.count_nonzero()) == planned[key]
            assert not weight.detach()[~mask].any()
            for name in ("exp_avg", "exp_avg_sq"):
                assert not ready.optimizer.state[weight][name][~mask].any()
    moved = any(not torch.equal(m, first[k]) for k, m in masks_of(ready.model).items())
    assert moved == (algorithm != "static")


def test_a_run_that_diverges_stops_before_the_weights_are_harmed(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("rigl", save=1)
    with pytest.raises(DivergedError) as error:
        run(recipe, tmp_path / "runs", optimizer__lr=1e30, training__clip="null")
    assert error.value.exit_code == 3 and "optimizer.lr" in (error.value.hint or "")
    (path,) = (tmp_path / "runs" / "rigl_sgd").iterdir()
    tensors, _ = final_state(str(path))
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_weights_that_overflowed_are_not_saved(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gradient was finite, and the next loss will not be: the checkpoint in between would be of no use."""

    class Overflowing(EagerStep):
        def __call__(self, step: int) -> Tensor:
            loss = super().__call__(step)
            if step == 3:
                next(self._run.model.parameters()).data[0] = torch.inf
            return loss

    monkeypatch.setattr(loop, "EagerStep", Overflowing)
    with pytest.raises(DivergedError, match="step 3: a weight is not finite"):
        run(write_recipe("rigl", save=1), tmp_path / "runs")
    (path,) = (tmp_path / "runs" / "rigl_sgd").iterdir()
    tensors, state = final_state(str(path))
    assert state["step"] == 3
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


DENSE = """
model: {{name: "tests.helpers.nets:{net}", input: 3x8x8}}
data: {{name: synthetic-images, limit: 32}}
optimizer: {{name: sgd, lr: 0.001}}
training: {{steps: {steps}, batch_size: 2, device: cpu, precision: {precision}}}
evaluation: {{every: {every}, limit: 4, metrics: [top1]}}
"""


@pytest.mark.parametrize(
    ("net", "precision", "steps", "every", "said", "evaluations"),
    [
        ("overflowing", "fp16", 50, 50, r"step 31: 32 of 32 steps were skipped, 32 of them in a row", 0),
        ("overflowing", "fp16", 5, 5, r"step 4: all 5 steps were skipped", 0),
        ("nan_in_evaluation", "fp32", 5, 2, r"step 1: the loss on the split \w+ is nan after it", 1),
    ],
)
def test_a_run_without_a_result_is_not_done(
    sparseift: Any, tmp_path: Path, net: str, precision: str, steps: int, every: int, said: str, evaluations: int
) -> None:
    """Finite losses of training alone are no success: exit 3, no summary, no checkpoint after the fault."""
    (tmp_path / "bad.yaml").write_text(DENSE.format(net=net, precision=precision, steps=steps, every=every))
    code, out, err = sparseift("train", str(tmp_path / "bad.yaml"), "--runs", str(tmp_path / "runs"))
    assert code == 3 and not out
    assert re.search(said, err) and "bf16" in err
    (path,) = (tmp_path / "runs" / "bad").iterdir()
    assert not (path / "summary.json").exists()
    assert len(list(read_metrics(path / "metrics.jsonl"))) == evaluations
    assert all(manifest["score"] is None for manifest in map(read_json, path.glob("checkpoints/*/manifest.json")))


@pytest.mark.parametrize("fused", ["true", "false"])
def test_a_few_overflows_are_no_fault(tmp_path: Path, fused: str) -> None:
    """The first steps of fp16 find the scale: they are counted, change nothing, and leave no state in the optimiser."""
    text = DENSE.format(net="mlp", precision="fp16", steps=8, every=8)
    (tmp_path / "some.yaml").write_text(text.replace("lr: 0.001", f"lr: 0.001, momentum: 0.9, fused: {fused}"))
    made = prepare(load(tmp_path / "some.yaml"), 0, CPU)
    step = EagerStep(made, torch.amp.grad_scaler.GradScaler("cpu", init_scale=2.0**21, enabled=True), CPU)
    start = [p.detach().clone() for p in made.model.parameters()]
    for number in range(made.steps):
        step(number)
        if step.skipped == number + 1:
            assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), start, strict=True))
    step.check()
    assert 0 < step.skipped < made.steps
    moved = [float((p - q).detach().abs().max()) for p, q in zip(made.model.parameters(), start, strict=True)]
    assert all(0 < m < 0.1 for m in moved)


def test_a_score_that_is_no_number_is_never_the_best(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([math.nan, 20.0, math.inf])
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"loss": 1.0, "top1": next(scores)})
    (summary,) = run(write_recipe("static"), tmp_path / "runs")
    assert summary["best"] == 20.0


def sigterm_in(step: int) -> Callable[[int], None]:
    """A `tick` that is no more polite."""
    return lambda made: os.kill(os.getpid(), signal.SIGTERM) if made == step else None


def test_a_signal_saves_and_the_run_goes_on(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("rigl")
    (whole,) = run(recipe, tmp_path / "whole")
    with pytest.raises(InterruptedRun) as stopped:
        run_jobs([(load(recipe), 0)], tmp_path / "runs", None, quiet, quiet, tick=sigterm_in(7))
    assert stopped.value.exit_code == 143 and "step 7 of 12" in stopped.value.message
    (again,) = run(recipe, tmp_path / "runs", resume="latest")
    have, want = final_state(again["path"]), final_state(whole["path"])
    assert all(torch.equal(have[0][n], t) for n, t in want[0].items())
    assert run(recipe, tmp_path / "runs", resume="latest") == [again]  # done: read, not repeated
    (tmp_path / "runs").rename(tmp_path / "moved")
    (moved,) = run(recipe, tmp_path / "moved", resume="latest")
    assert moved == again | {"path": again["path"].replace(str(tmp_path / "runs"), str(tmp_path / "moved"))}


def test_every_step_is_told_from_where_the_run_goes_on(write_recipe: Write, tmp_path: Path) -> None:
    recipe = load(write_recipe("rigl"))
    ticks: list[int] = []
    stop = sigterm_in(7)

    def tick(step: int) -> None:
        ticks.append(step)
        stop(step)

    with pytest.raises(InterruptedRun):
        run_jobs([(recipe, 0)], tmp_path / "runs", None, quiet, quiet, tick=tick)
    assert ticks == [*range(1, 8)]
    run_jobs([(recipe, 0)], tmp_path / "runs", "latest", quiet, quiet, tick=ticks.append)
    assert ticks == [*range(1, 13)]


def test_resuming_another_recipe_is_refused_with_the_difference(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("rigl")
    (done,) = run(recipe, tmp_path / "runs")
    with pytest.raises(ArtifactError, match="begun with another recipe") as error:
        run(recipe, tmp_path / "runs", resume=done["path"], optimizer__lr=0.01)
    assert "-  lr: 0.05" in error.value.message and "+  lr: 0.01" in error.value.message


def test_a_run_goes_on_with_other_kernels_and_threads(write_recipe: Write, tmp_path: Path) -> None:
    path, seen = write_recipe("rigl"), list[int]()
    with pytest.raises(InterruptedRun):
        run_jobs([(load(path, ["training.threads=1"]), 0)], tmp_path / "runs", None, quiet, quiet, tick=sigterm_in(7))
    other = load(path, ["training.threads=2", "training.kernels=masked"])
    run_jobs([(other, 0)], tmp_path / "runs", "latest", quiet, quiet, tick=seen.append)
    assert seen == [*range(8, 13)]


def test_a_run_that_began_in_another_order_is_refused(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(write_recipe("rigl"))
    with monkeypatch.context() as older:
        older.setattr(order, "VERSION", None)
        with pytest.raises(InterruptedRun):
            run_jobs([(recipe, 0)], tmp_path / "runs", None, quiet, quiet, tick=sigterm_in(7))
    with pytest.raises(ArtifactError, match="shuffled the training images in another order"):
        run_jobs([(recipe, 0)], tmp_path / "runs", "latest", quiet, quiet)


def test_a_run_of_an_older_version_goes_on(write_recipe: Write, tmp_path: Path) -> None:
    """Its recipe lacks keys that have come since; a key with another value is still refused."""
    recipe = write_recipe("rigl")
    (done,) = run(recipe, tmp_path / "runs")
    kept = Path(done["path"]) / "recipe.yaml"
    older = kept.read_text().replace("  test: false\n", "")
    assert older != kept.read_text()
    kept.write_text(older)
    Path(done["path"]).rename(
        Path(done["path"]).with_name("20260101T000000Z-01234567")
    )  # of another text, so another hash
    (newer,) = run(recipe, tmp_path / "runs", optimizer__lr=0.01)  # the newest of the same seed, but another recipe
    (again,) = run(recipe, tmp_path / "runs", resume="latest")
    assert again["metrics"] == done["metrics"] != newer["metrics"]
    with pytest.raises(ArtifactError, match="begun with another recipe"):
        run(recipe, tmp_path / "runs", resume=newer["path"])


def test_seeds_are_runs_of_their_own_and_resumable(write_recipe: Write, tmp_path: Path) -> None:
    recipe = write_recipe("static", steps=6)
    results = run(recipe, tmp_path / "runs", seeds=(0, 1))
    assert [r["seed"] for r in results] == [0, 1]
    assert results[0]["metrics"]["loss"] != results[1]["metrics"]["loss"]
    assert run(recipe, tmp_path / "runs", resume="latest", seeds=(0, 1)) == results
    assert len(list((tmp_path / "runs" / "static_sgd").iterdir())) == 2


def test_accumulation_gives_the_gradients_of_the_whole_batch(write_recipe: Write, tmp_path: Path) -> None:
    plain = run(write_recipe("rigl", net="mlp"), tmp_path / "a")[0]
    parts = run(write_recipe("rigl", net="mlp"), tmp_path / "b", training__accumulate=4)[0]
    one, four = final_state(plain["path"])[0], final_state(parts["path"])[0]
    for name in one:
        if name.startswith("model/"):
            torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-6)
        if name.startswith("masks/"):
            assert torch.equal(four[name], one[name])


def test_channels_last_goes_on_too(write_recipe: Write, tmp_path: Path) -> None:
    """Fused optimisers refuse state that is laid out otherwise than the weights."""
    recipe = write_recipe("rigl", save=6)
    sets = {"training__channels_last": "true"}
    (whole,) = run(recipe, tmp_path / "runs", **sets)
    copy = tmp_path / "copy" / Path(whole["path"]).name
    shutil.copytree(whole["path"], copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    (again,) = run(recipe, tmp_path / "runs", resume=str(copy), **sets)
    want, have = final_state(whole["path"])[0], final_state(again["path"])[0]
    assert [n for n in want if not torch.equal(have[n], want[n])] == []


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_runs(write_recipe: Write, tmp_path: Path, precision: str) -> None:
    (summary,) = run(write_recipe("rigl"), tmp_path / "runs", training__precision=precision)
    assert summary["metrics"]["loss"] < 5


def test_every_line_has_the_masks_of_every_weight(write_recipe: Write, tmp_path: Path) -> None:
    (summary,) = run(write_recipe("rigl"), tmp_path / "runs")
    rows = list(read_metrics(Path(summary["path"]) / "metrics.jsonl"))
    assert all(set(row["masks"]) == {"3.weight", "6.weight"} for row in rows)
    rates = [row["masks"]["3.weight"]["itop_rate"] for row in rows]
    assert rates == sorted(rates) and rates[-1] > rows[-1]["masks"]["3.weight"]["density"]


def test_tensorboard_gets_every_number(write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the writer; and without the package one sentence says what to do."""
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, *of: Any) -> None:
            scalars.append(of)

        def flush(self) -> None:
            """Nothing is buffered."""

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("module", (), {"SummaryWriter": Writer}))
    loaded = load(write_recipe("rigl"))
    run_seeds(loaded, [0], tmp_path / "runs", None, quiet, quiet, tensorboard=True)
    assert {"loss", "flops", "churn/3.weight"} <= {name for name, _, _ in scalars}
    assert {step for _, _, step in scalars} == {5, 10, 12}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="needs the package tensorboard"):
        run_seeds(loaded, [0], tmp_path / "runs", None, quiet, quiet, tensorboard=True)


@pytest.fixture(scope="module")
def two_runs_on_two_processes(
    write_recipe_in: Callable[[Path], Write], tmp_path_factory: pytest.TempPathFactory, root: Path
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name -> recipe and summary of two runs that one torchrun makes in turn: `rigl_sgd`, and `dense_sgd` of the digits."""
    folder = tmp_path_factory.mktemp("two")
    write = write_recipe_in(folder)
    rigl, dense = write("rigl", net="mlp", save=7), write(None, steps=20)
    digits = dense.read_text()
    for old, new in (
        ('{name: "tests.helpers.nets:cnn", input: 3x8x8}', "digits_mlp"),
        ("data: synthetic-images", "data: digits"),
        ("limit: 32", "limit: 200"),
    ):
        assert old in digits
        digits = digits.replace(old, new)
    dense.write_text(digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # `tests.helpers.nets` is found from here
        summaries = all_on_two_processes([rigl, dense], folder / "runs")
    assert [summary["recipe"] for summary in summaries] == ["rigl_sgd", "dense_sgd"]
    return {summary["recipe"]: (recipe, summary) for recipe, summary in zip((rigl, dense), summaries, strict=True)}


def test_two_processes_compute_what_one_does(two_runs_on_two_processes: Any, tmp_path: Path) -> None:
    """Half the batch each, on a net without batch norm: equal masks, weights within 1e-5 of their size (sums in another order)."""
    recipe, together = two_runs_on_two_processes["rigl_sgd"]
    (alone,) = run(recipe, tmp_path / "one")
    one, two = final_state(alone["path"])[0], final_state(together["path"])[0]
    for name, tensor in one.items():
        if name.startswith("masks/"):
            assert torch.equal(two[name], tensor), name
        elif name.startswith("model/"):
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))
    assert together["flops"] == alone["flops"]
    assert together["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-5)


def test_two_processes_go_on_where_two_were_stopped(two_runs_on_two_processes: Any, tmp_path: Path) -> None:
    recipe, together = two_runs_on_two_processes["rigl_sgd"]
    copy = (
        tmp_path / "copy" / Path(together["path"]).name
    )  # after step 7: losses of steps 6 and 7 are in the checkpoint
    shutil.copytree(together["path"], copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    again = on_two_processes(recipe, tmp_path / "two", "--resume", str(copy), forked=True)
    two, resumed = final_state(together["path"])[0], final_state(again["path"])[0]
    assert [n for n in two if not torch.equal(resumed[n], two[n])] == []
    losses = [[row["train_loss"] for row in read_metrics(Path(r["path"]) / "metrics.jsonl")] for r in (together, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_two_processes_measure_the_model_that_is_saved(two_runs_on_two_processes: Any) -> None:
    """Each has batch statistics of its own after a step; rank 0's are those of the checkpoint."""
    recipe, together = two_runs_on_two_processes["dense_sgd"]
    ready = prepare(load(recipe), 0, CPU)
    newest = RunDirectory.open(Path(together["path"])).checkpoints.newest()
    assert newest is not None
    unpack(newest, ready.model, ready.optimizer, ready.sparsifier)
    alone = evaluate(ready.model, ready.held_out, ("top1", "loss"), CPU, ready.autocast)
    assert alone["top1"] == together["metrics"]["top1"]
    assert alone["loss"] == pytest.approx(together["metrics"]["loss"], rel=1e-5)


def test_masks_are_not_sent_with_every_forward(write_recipe: Write, tmp_path: Path) -> None:
    """That would cost as much as the weights, and a mask that differs would be overwritten instead of reported."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        ready = prepare(load(write_recipe("rigl")), 0, CPU)
        wrapped: Any = Processes(CPU.device, 0, 2).wrap(ready.model)
    finally:
        torch.distributed.destroy_process_group()
    sent = {name for name, _ in ready.model.named_buffers()} - set(wrapped.parameters_to_ignore)
    assert sent == {f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_sigterm_ends_the_command_with_143(
    sparseift: Callable[..., tuple[int, str, str]],
    write_recipe: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process; tests/train/test_parallel.py and tests/cli/test_streams_cli.py stop processes of their own."""
    recipe = write_recipe("rigl", steps=100_000)
    monkeypatch.setattr(Lines, "row", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, out, err = sparseift("train", str(recipe), "--runs", str(tmp_path / "runs"))
    assert (code, out) == (143, "")
    assert "the checkpoint is in" in err and "--resume latest" in err and "Traceback" not in err
