"""The replayed step against the step made operation by operation. Needs a GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from sparseift_cli.errors import DivergedError
from sparseift_cli.recipe.load import load
from sparseift_cli.sparsity.algorithms import ALGORITHMS
from sparseift_cli.train.graphed import GraphedStep
from sparseift_cli.train.prepare import Prepared, prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.step import EagerStep
from tests.helpers.gpu import never_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RECIPE = """
model: resnet18_cifar
data: {{name: synthetic-images, limit: 1024}}
transform: {{member: wide, match: model, width_multiple: 8, pattern: {pattern}}}
sparsity: 0.75
algorithm: {algorithm}
optimizer: {optimizer}
training: {{steps: 40, batch_size: 32, {training}}}
"""
SGD = "{name: sgd, lr: 0.05, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}"
ADAMW = "{name: adamw, lr: 0.001}"


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ready(
    tmp_path: Path,
    training: str = "clip: 1.0",
    algorithm: str = "rigl",
    optimizer: str = SGD,
    pattern: str = "unstructured",
    regrow: str = "allow",
) -> Prepared:
    path = tmp_path / "recipe.yaml"
    known = ALGORITHMS.get(algorithm).option_names()
    wanted = {"delta_t": 5, "drop_fraction": 0.3, "stop": 0.75, "regrow": regrow}
    section = ", ".join([f"name: {algorithm}", *(f"{key}: {value}" for key, value in wanted.items() if key in known)])
    path.write_text(RECIPE.format(training=training, algorithm=f"{{{section}}}", optimizer=optimizer, pattern=pattern))
    return prepare(load(path), 0, Processes(torch.device("cuda")))


def eager(run: Prepared) -> EagerStep:
    return EagerStep(run, GradScaler("cuda", enabled=False), Processes(torch.device("cuda")))


@pytest.mark.parametrize("clip", ["clip: 1.0", "clip: null"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("algorithm", ["static", "rigl", "set", "snfs", "gmp", "granet"])
def test_replayed_steps_are_the_eager_ones(
    tmp_path: Path, deterministic: None, algorithm: str, optimizer: str, clip: str
) -> None:
    compare([ready(tmp_path, clip, algorithm=algorithm, optimizer=optimizer) for _ in range(2)])


@pytest.mark.parametrize("pattern", ["unstructured", "4x4"])
def test_replayed_updates_of_blocks_and_without_regrowth(tmp_path: Path, deterministic: None, pattern: str) -> None:
    compare([ready(tmp_path, pattern=pattern, regrow="forbid") for _ in range(2)])


def compare(runs: list[Prepared]) -> None:
    steps = eager(runs[0]), GraphedStep(runs[1])
    for step in range(40):
        losses = [float(make(step)) for make in steps]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), step
        assert runs[0].sparsifier is not None and runs[1].sparsifier is not None
        assert runs[0].sparsifier.last == runs[1].sparsifier.last
        assert runs[0].sparsifier.statistics() == runs[1].sparsifier.statistics(), step
        masks = [run.sparsifier.masks() for run in runs if run.sparsifier is not None]
        assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items()), step
        for w in runs[1].sparsifier.weights:
            assert not w.dense_weight()[~w.mask].any()
    steps[1].check()


BLOCKS = """
model: {{name: bytes_gpt, seq: 64}}
data: {{name: stdlib, limit: 512}}
transform: {{member: wide, match: model, pattern: 32x32}}
sparsity: 0.75
algorithm: {algorithm}
optimizer: {{name: adamw, lr: 0.001}}
training: {{steps: 40, batch_size: 8, accumulate: {micro}, clip: 1.0, kernels: {kernels}, {training}}}
"""


def on_blocks(tmp_path: Path, algorithm: str, kernels: str = "blocks", micro: int = 1, training: str = "") -> Prepared:
    pytest.importorskip("triton")
    moves = "" if algorithm == "static" else ", delta_t: 5, stop: 0.75"
    path = tmp_path / "recipe.yaml"
    section = f"{{name: {algorithm}{moves}}}"
    path.write_text(BLOCKS.format(algorithm=section, kernels=kernels, micro=micro, training=training or "seed: 0"))
    run = prepare(load(path), 0, Processes(torch.device("cuda")))
    assert {choice.backend for choice in run.kernels} == {kernels}, run.kernels
    return run


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("algorithm", ["static", "set", "rigl", "snfs"])
def test_replayed_steps_of_stored_blocks(tmp_path: Path, deterministic: None, algorithm: str, micro: int) -> None:
    compare([on_blocks(tmp_path, algorithm, micro=micro) for _ in range(2)])


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
def test_stored_blocks_train_as_zeros_do(tmp_path: Path, algorithm: str) -> None:
    """Compiled, in bf16, replayed: the loss follows that of the masked run within what bf16 rounds."""
    fast = "precision: bf16, compile: auto"
    runs = [on_blocks(tmp_path, algorithm, kernels, training=fast) for kernels in ("blocks", "masked")]
    curves = [[float(make(step)) for step in range(40)] for make in map(GraphedStep, runs)]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.05
    assert curves[0][-1] < 0.9 * curves[0][0]


def test_blocks_move_without_compiling_or_recording_again(tmp_path: Path) -> None:
    run = on_blocks(tmp_path, "rigl", training="precision: bf16, compile: auto")
    make = GraphedStep(run)
    for step in range(5):
        make(step)
    before, graphs = dict(torch._dynamo.utils.counters["stats"]), make._graphs
    assert run.sparsifier is not None
    masks = run.sparsifier.masks()
    for step in range(5, 21):
        make(step)
    assert dict(torch._dynamo.utils.counters["stats"]) == before and make._graphs is graphs
    assert not all(torch.equal(mask, masks[name]) for name, mask in run.sparsifier.masks().items())


def test_compiled_bf16_trains_as_eager_fp32_does(tmp_path: Path) -> None:
    plain = ready(tmp_path)
    fast = ready(tmp_path, "precision: bf16, channels_last: true, compile: auto, clip: 1.0")
    steps = eager(plain), GraphedStep(fast)
    curves = [[float(make(step)) for step in range(40)] for make in steps]
    differences = [abs(a - b) for a, b in zip(*curves, strict=True)]
    assert max(differences[:3]) < 0.05
    means = [sum(curve[-10:]) / 10 for curve in curves]
    assert means[0] == pytest.approx(means[1], abs=0.2)
    assert means[0] < 0.9 * curves[0][0]  # and both do learn


def test_nothing_waits_for_the_device_between_updates(tmp_path: Path) -> None:
    run = ready(tmp_path, algorithm="static")
    make = GraphedStep(run)
    for step in range(5):
        make(step)
    with never_waiting():
        for step in range(5, 39):  # into the second epoch of 32 steps
            make(step)


def test_a_loss_that_is_no_number_leaves_the_weights_alone(tmp_path: Path) -> None:
    run = ready(tmp_path, "clip: null")
    make = GraphedStep(run)
    for step in range(12):
        make(step)
    make.check()
    *_, head = (m for m in run.model.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        head.bias.fill_(math.inf)
    kept = [p.detach().clone() for p in run.model.parameters()]
    for step in range(12, 15):
        make(step)
    with pytest.raises(DivergedError, match="step 12"):  # reported at a mask update at the latest
        make(15)
    assert all(torch.equal(a, b) for a, b in zip(kept, run.model.parameters(), strict=True))
