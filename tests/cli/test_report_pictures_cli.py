"""What `sparseift report` draws: curves and bars in its tables, spectra of masks, Figure 4."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.runs.metrics import Metrics
from tests.helpers.report_runs import make_run, seeds


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Two seeds of a wide net with two checkpoints each: a full mask of six inputs, then a perfect matching. And a dense one."""
    for path in seeds(tmp_path / "runs", "net_wide75_rigl", [71.0, 72.0], member="wide"):
        run = RunDirectory(path)
        for step, mask in ((390, torch.ones(4, 3, 1, 2)), (780, torch.eye(4, 6).reshape(4, 3, 1, 2))):
            with run.lock(), Metrics(path / "metrics.jsonl") as metrics:
                run.save(step, {"model/conv.weight": mask, "masks/conv.weight": mask != 0}, {}, metrics)
    make_run(tmp_path / "runs", "net_dense", 0)
    return tmp_path / "runs"


def test_curves_and_bars_are_of_the_table_alone(sparseift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs", "net_dense", 0, (50.0, 60.0, 70.0))
    make_run(tmp_path / "runs", "net_dense", 1, (50.0, 50.0, 50.0, 50.0), finished=False, steps=8)
    out = sparseift("report")[1]
    assert "▁▅█" in out and "progress" in out
    assert "▁▅█" in sparseift("report", "--group-by", "run")[1]
    for fmt in ("json", "csv", "md"):
        assert not {"▁", "curve", "progress"} & set(sparseift("report", "-f", fmt)[1].split())
    assert "▁" not in sparseift("report", "--columns", "group,mean")[1]
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    sparseift("report")
    plain.seek(0)
    assert " _=# " in plain.read()


def test_spectra_in_every_format(sparseift, masked: Path) -> None:
    payload = json.loads(sparseift("report", "--spectral", "--json")[1])
    full = 24**0.5
    assert [(r["group"], r["step"], r["runs"], r["layers"]) for r in payload["spectra"]] == [
        ("net_wide75_rigl", 390, 2, 1),
        ("net_wide75_rigl", 780, 2, 1),
    ]
    assert [r["spectral_gap"] for r in payload["spectra"]] == pytest.approx([full, 0])
    assert [r["ramanujan_gap"] for r in payload["spectra"]] == pytest.approx([5**0.5 + 3**0.5, -1])
    assert [r["ramanujan"] for r in payload["spectra"]] == [1, 0]
    assert [(r["step"], r["layer"]) for r in payload["spectra_layers"]] == [
        (390, "conv.weight"),
        (780, "conv.weight"),
    ] * 2
    table = sparseift("report", "--spectral")[1]
    rows = list(csv.DictReader(io.StringIO(sparseift("report", "--spectral", "-f", "csv")[1].rsplit("\n\n", 1)[1])))
    assert [float(row["spectral_gap"]) for row in rows] == [r["spectral_gap"] for r in payload["spectra"]]
    assert "How well the masks connect" in table and "4.8990" in table and "100 %" in table
    code, page, _ = sparseift("report", "--spectral", "-f", "html", "--plots", "figures")
    assert code == 0 and "net_wide75_rigl: 1 masked layers" in page and "wide75 rigl at step 780: spectral gap" in page
    assert (masked.parent / "figures" / "resnet18-cifar-on-cifar100-spectra.svg").is_file()


def test_spectra_are_only_where_they_are_asked_for_and_there(sparseift, masked: Path) -> None:
    payload = json.loads(sparseift("report", "--json")[1])
    assert payload["spectra"] == payload["spectra_layers"] == []
    assert "How well" not in sparseift("report", "-f", "html")[1]
    out = sparseift("report", "runs/net_dense", "--spectral")[1]
    assert "no run here keeps a checkpoint with masks" in out
    damaged = min((masked / "net_wide75_rigl").iterdir()) / "checkpoints" / "step-00000390" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    payload = json.loads(sparseift("report", "--spectral", "--json")[1])
    assert [r["runs"] for r in payload["spectra"]] == [1, 2]
    assert any("tensors.safetensors" in note for note in payload["notes"])


def test_figure4_is_told_and_drawn(sparseift, tmp_path: Path) -> None:
    data = json.loads(sparseift("report", "figure4", "--json")[1])
    code, table, _ = sparseift("report", "figure4")
    assert code == 0
    for claim in data["claims"]:
        assert claim["claim"] in table and claim["answer"] in table
    models, claims = sparseift("report", "figure4", "-f", "csv")[1].split("\n\n")
    rows = list(csv.DictReader(io.StringIO(models)))
    assert [int(row["training_flops"]) for row in rows] == [row["training_flops"] for row in data["rows"]]
    assert [row["answer"] for row in csv.DictReader(io.StringIO(claims))] == [c["answer"] for c in data["claims"]]
    for name, start in (("f.svg", b"<?xml"), ("f.PNG", b"\x89PNG")):
        code, out, err = sparseift("report", "figure4", "-o", name)
        assert (code, out, err) == (0, "", f"drew {name}\n")
        assert (tmp_path / name).read_bytes().startswith(start)
    assert sparseift("report", "figure4", "-f", "md", "-o", "rows.md")[0] == 0
    assert (tmp_path / "rows.md").read_text("utf-8").startswith("**Published")
    assert "report figure4 -o figure4.svg" in sparseift("report", "figure4", "--help")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "f.pdf"), ".svg or .png"),
        (("-o", "f.svg", "--json"), "--format json does not apply"),
        (("-f", "github"), "no gates to annotate"),
        (("-o", "no/f.svg"), "cannot write no/f.svg"),
    ],
)
def test_figure4_refuses_what_it_cannot_write(sparseift, words: tuple[str, ...], message: str) -> None:
    code, out, err = sparseift("report", "figure4", *words)
    assert (code, out) == (2, "") and message in err and "hint:" in err
