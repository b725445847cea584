"""`sparseift inspect --spectral` as a user types it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.runs.metrics import Metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a mask that loses edges between two checkpoints, and the plan that a transformed one has."""
    directory = RunDirectory.create(tmp_path / "runs", "toy", "name: toy\n", plan={"layers": []})
    (directory.path / "provenance.json").write_text("{}")
    with directory.lock():
        metrics = Metrics(directory.path / "metrics.jsonl")
        for step, mask in ((10, torch.ones(4, 3, 1, 2)), (20, torch.eye(4, 6).reshape(4, 3, 1, 2))):
            directory.save(step, {"model/conv.weight": mask * 2, "masks/conv.weight": mask != 0}, {}, metrics)
        metrics.close()
    return directory.path


def layers(out: str) -> list[dict]:
    data = json.loads(out)
    assert data["schema"] == "sparseift.spectral/1"
    return data["layers"]


def test_a_transformed_model_and_its_weights_alone(sparseift, tmp_path: Path) -> None:
    out = tmp_path / "wide"
    assert sparseift("transform", "resnet20", "-s", "0.75", "-o", str(out))[0] == 0
    code, stdout, _ = sparseift("inspect", str(out), "--spectral", "--json")
    rows = layers(stdout)
    masks = load_file(out / "masks.safetensors")
    assert code == 0 and [row["layer"] for row in rows] == list(masks)
    for row in rows[:3]:
        values = torch.linalg.svdvals(masks[row["layer"]].flatten(1).double())
        assert row["s1"] == pytest.approx(float(values[0])) and row["s2"] == pytest.approx(float(values[1]))
        assert row["nnz"] == int(masks[row["layer"]].sum())
    again = layers(sparseift("inspect", str(out / "model.safetensors"), "--spectral", "--json")[1])
    assert {r["layer"]: r["s2"] for r in again} == pytest.approx({r["layer"]: r["s2"] for r in rows})
    code, stdout, _ = sparseift("inspect", str(out), "--spectral")
    assert code == 0 and "Ramanujan gap" in stdout and "layer1.0.conv1.weight" in stdout


def test_a_run_newest_named_and_every_checkpoint(sparseift, run: Path) -> None:
    rows = layers(sparseift("inspect", str(run), "--spectral", "--json")[1])
    assert [(r["step"], r["shape"], r["spectral_gap"]) for r in rows] == [(20, [4, 3, 1, 2], 0)]
    rows = layers(sparseift("inspect", str(run), "--spectral", "--every-checkpoint", "--json")[1])
    assert [r["step"] for r in rows] == [10, 20]
    assert rows[0]["spectral_gap"] == pytest.approx(24**0.5)
    assert rows[0]["weighted_spectral_gap"] == pytest.approx(2 * 24**0.5)
    named = run / "checkpoints" / "step-00000010"
    for source in (named, named / "tensors.safetensors"):
        assert layers(sparseift("inspect", str(source), "--spectral", "--json")[1]) == rows[:1]
    _, stdout, _ = sparseift("inspect", str(run), "--spectral")
    assert "step 20" in stdout and "1 older checkpoint too" in stdout


def test_formats(sparseift, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "spectra.csv"
    assert sparseift("inspect", str(run), "--spectral", "-f", "csv", "-o", str(file)) == (0, "", "")
    (row,) = csv.DictReader(io.StringIO(file.read_text()))
    assert (row["layer"], row["components"], row["ramanujan_gap_imdb"]) == ("conv.weight", "4", "")
    assert "| conv.weight |" in sparseift("inspect", str(run), "--spectral", "-f", "md")[1]


def test_foreign_checkpoints(sparseift, tmp_path: Path) -> None:
    mask = torch.tensor(np.random.default_rng(0).random((8, 9)) < 0.5)
    dense = torch.ones(8, 9)
    path = tmp_path / "model.pth"
    torch.save(
        {
            "state_dict": {
                "a.weight": mask * 3.0,
                "b.weight": dense,
                "a.bias": torch.zeros(8),
                "c.weight_orig": dense.clone(),
                "c.weight_mask": mask.float(),
            }
        },
        path,
    )
    code, stdout, _ = sparseift("inspect", str(path), "--spectral", "--json")
    rows = layers(stdout)
    assert code == 0 and [row["layer"] for row in rows] == ["a.weight", "c.weight"]
    s1 = float(torch.linalg.svdvals(mask.double())[0])
    assert [row["s1"] for row in rows] == [pytest.approx(s1)] * 2
    assert rows[0]["weighted_s1"] == pytest.approx(3 * s1)
    assert json.loads(stdout)["notes"] == ["1 other weight has fewer than 1 % zeros"]
    half = tmp_path / "half.safetensors"
    save_file({"a.weight": (mask * 3.0).bfloat16()}, half)
    assert layers(sparseift("inspect", str(half), "--spectral", "--json")[1])[0]["s1"] == pytest.approx(s1)


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (("resnet18", "--spectral"), 2, "sparseift transform"),
        ((".", "--spectral"), 2, "not a transformed model"),
        (("nowhere.pth", "--spectral"), 2, "nowhere.pth"),
        (("dense.safetensors", "--spectral"), 2, "is sparse"),
        (("dense.safetensors", "--every-checkpoint"), 2, "--spectral"),
        (("dense.safetensors", "--spectral", "--every-checkpoint"), 2, "not a run directory"),
        (("dense.safetensors", "--spectral", "--values"), 2, "--values"),
        (("dense.safetensors", "--spectral", "--why"), 2, "--why"),
        (("run", "--spectral"), 2, "no checkpoint yet"),
        (("run", "--spectral", "--key", "ema"), 2, "--key"),
        (("broken/step-00000001", "--spectral"), 4, "manifest.json is damaged"),
    ],
)
def test_mistakes_are_explained(
    sparseift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, printed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.ones(3, 3)}, "dense.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: toy\n")
    folder = tmp_path / "broken" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    (folder / "tensors.safetensors").write_text("")
    got, stdout, stderr = sparseift("inspect", *words)
    assert (got, stdout) == (code, "")
    assert printed in stderr and "Traceback" not in stderr
