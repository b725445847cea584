"""From a run to its module: built without its data, equal to the bit, and measured again as the run measured it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseift_cli as sparseift
from sparseift_cli.errors import ArtifactError, UsageError
from sparseift_cli.kernels.convert import block_masks
from sparseift_cli.kernels.storage import to_dense_state
from sparseift_cli.recipe.load import load
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.runs.model import load_trained
from sparseift_cli.train.measure import measure_run
from sparseift_cli.train.run import run_jobs

BLOCKS = """
model: {name: bytes_gpt, seq: 16}
data: {name: stdlib, limit: 64}
transform: {member: wide, match: model, pattern: 32x32}
sparsity: 0.75
algorithm: {name: rigl, delta_t: 2}
training: {steps: 4, batch_size: 4, device: cpu, kernels: reference}
evaluation: {every: 4, limit: 4}
checkpoint: {every: 100}
"""


def trained(recipe: Path, runs: Path) -> Path:
    """The directory of a run of `recipe`, which is trained here."""

    def quiet(*_: Any, **__: Any) -> None:
        """Take a report or note and print nothing."""

    (summary,) = run_jobs([(load(recipe), 0)], runs, None, quiet, quiet)
    return Path(summary["path"])


def weights_of(run: Path) -> dict[str, Tensor]:
    """The dense state dict in the newest checkpoint, as the checkpoint itself has it."""
    loaded = RunDirectory.open(run).checkpoints.newest()
    assert loaded is not None
    return to_dense_state({k[6:]: t for k, t in loaded.tensors.items() if k.startswith("model/")})


@pytest.mark.parametrize("algorithm", [None, "rigl", "gmp"])
def test_a_run_gives_its_module_and_is_measured_as_it_measured_itself(
    algorithm: str | None, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = trained(write_recipe(algorithm, save=5, steps=10), tmp_path / "runs")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    model = sparseift.load(run, checkpoint="last")
    assert not model.training
    assert all(torch.equal(model.state_dict()[k], t) for k, t in weights_of(run).items())
    for key, mask in sparseift.masks(model).items():
        assert not model.get_parameter(key)[~mask].any()
    assert bool(sparseift.masks(model)) == (algorithm is not None)
    found = measure_run(run, "last", trust=True)
    assert found["recorded"] == found["metrics"]["test"] and found["checkpoint"]["step"] == 10
    assert measure_run(run, "5", ["evaluation.limit=16"], trust=True)["recorded"] is None
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}  # nothing was written


def test_a_run_of_blocks_comes_back_in_blocks_or_dense(tmp_path: Path) -> None:
    (tmp_path / "blocks.yaml").write_text(BLOCKS)
    run = trained(tmp_path / "blocks.yaml", tmp_path / "runs")
    in_blocks, dense = sparseift.load(run, kernels="reference"), sparseift.load(run, kernels="masked")
    assert block_masks(in_blocks) and not block_masks(dense)
    assert all(torch.equal(dense.state_dict()[k], t) for k, t in weights_of(run).items())
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(in_blocks(tokens), dense(tokens))
    sparseift.save(in_blocks, tmp_path / "out")
    assert torch.equal(sparseift.load(tmp_path / "out", kernels="masked")(tokens), dense(tokens))
    found = measure_run(run)
    for name, value in found["metrics"][found["split"]].items():
        assert value == pytest.approx(found["recorded"][name], rel=1e-5)  # dense products add up in another order


def test_data_and_start_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the data knew (classes) and what only the dense checkpoint knew (scales of norms) are kept with the run."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("one", "other", "third"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = bytes((i * 7 + j) % 256 for j in range(8 * 8 * 3))
                (tmp_path / "photos" / split / name / f"{i}.ppm").write_bytes(b"P6 8 8 255\n" + pixels)
    recipe = tmp_path / "photos.yaml"
    recipe.write_text(
        "model: {name: resnet20, input: 3x8x8}\ndata: {name: image-folder, root: photos}\n"
        "transform: wide\nsparsity: 0.75\ntraining: {steps: 1, batch_size: 4, device: cpu}\ncheckpoint: {best: loss}\n"
        "evaluation: {metrics: [loss]}\n"
    )
    run = trained(recipe, tmp_path / "runs")
    shutil.rmtree(tmp_path / "photos")
    assert sparseift.load(run)(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_which_checkpoint(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(write_recipe("static", save=5, steps=10), tmp_path / "runs")
    scores = {step: load_trained(run, str(step), trust=True).checkpoint.score for step in (5, 10)}
    best = load_trained(run, trust=True)
    assert best.best and best.checkpoint.score == max(score for score in scores.values() if score is not None)
    assert load_trained(run, "last", trust=True).checkpoint.step == 10
    for wrong in ("7", "first", "-1"):
        with pytest.raises(UsageError, match="checkpoint"):
            load_trained(run, wrong, trust=True)
    with pytest.raises(UsageError, match="would not change it"):
        measure_run(run, sets=["transform.member=doped"], trust=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ArtifactError, match="no checkpoint"):
        load_trained(run, trust=True)


def test_damage_is_named(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(write_recipe("static", steps=2), tmp_path / "runs")
    facts = json.loads((run / "model.json").read_text())
    for content, message in (
        ("{", "cannot be read"),
        ("[]", "unexpected content"),
        (json.dumps(facts | {"schema": "x"}), "format"),
        (json.dumps(facts | {"transformation": None}), "does not fit"),
    ):
        (run / "model.json").write_text(content)
        with pytest.raises(ArtifactError, match=message):
            load_trained(run, trust=True)
    (run / "model.json").unlink()
    with pytest.raises(ArtifactError, match="older version"):
        load_trained(run, trust=True)


def test_code_that_a_run_names_is_not_run_untrusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparseift: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_of_a_run.py").write_text(
        "from pathlib import Path\nfrom tests.helpers.nets import cnn\n\nPath('ran').touch()\n"
    )
    (tmp_path / "a.yaml").write_text(
        'model: {name: "net_of_a_run:cnn", input: 3x8x8}\ndata: synthetic-images\n'
        "training: {steps: 1, batch_size: 4, device: cpu}\nevaluation: {limit: 8}\n"
    )
    run = str(trained(tmp_path / "a.yaml", tmp_path / "runs"))
    monkeypatch.delitem(__import__("sys").modules, "net_of_a_run")
    (tmp_path / "ran").unlink()
    code, out, err = sparseift("train", "--evaluate-only", run)
    assert (code, out) == (2, "") and "whose code would run" in err and "--trust" in err
    assert not (tmp_path / "ran").exists()
    code, out, err = sparseift("train", "--evaluate-only", run, "--trust", "--json")
    assert code == 0, err
    assert json.loads(out)["runs"][0]["metrics"]["test"] and (tmp_path / "ran").exists()
    code, out, err = sparseift("train", "--evaluate-only", run, "--trust", "--seeds", "0..2")
    assert (code, out) == (2, "") and "--seeds is for training" in err
    code, out, err = sparseift("train", "a.yaml", "--checkpoint", "last")
    assert (code, out) == (2, "") and "--evaluate-only" in err
