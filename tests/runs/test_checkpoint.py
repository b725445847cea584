"""Checkpoints: every bit comes back; the newest and the best stay; the first that verifies is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseift_cli.errors import ArtifactError
from sparseift_cli.runs.checkpoint import Checkpoints, open_checkpoint
from sparseift_cli.runs.metrics import Metrics, read_metrics

W = {"w": torch.arange(6.0)}


def test_tensors_and_state_come_back_bit_by_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "tied.a": base,
        "tied.b": base,
        "part": base[1],
        "transposed": base.t(),
        "empty": torch.zeros(0, 3),
        "none": torch.zeros(0),
        "scalar": torch.tensor(7),
        "mask": torch.rand(5, 5) > 0.5,
        "rng": torch.get_rng_state(),
        "bf16": torch.randn(3).bfloat16(),
        "fp16": torch.randn(3).half(),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "param": torch.nn.Parameter(torch.ones(2)),
    }
    state = {
        "lr": 0.1 + 0.2,
        "small": 5e-324,
        "step": 2**53 + 1,
        "text": "é",
        "list": [1, [2.5]],
        "none": None,
        "inf": math.inf,
    }
    store = Checkpoints(tmp_path / "checkpoints")
    path = store.save(7, tensors, state)
    assert path.name == "step-00000007"
    assert {p.name for p in path.iterdir()} == {"tensors.safetensors", "state.json", "manifest.json"}
    assert path.stat().st_mode == path.parent.stat().st_mode
    loaded = store.newest()
    assert loaded is not None
    assert (loaded.step, loaded.state, loaded.path, loaded.skipped) == (7, state, path, ())
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in tensors.items():
        other = loaded.tensors[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            other.contiguous().view(-1).view(torch.uint8) if tensor.numel() else other,
            tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor,
        ), name


def test_state_must_be_json(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(TypeError, match="its keys are text, not 0"):
        store.save(1, W, {"optimizer": [{"state": {0: 1}}]})
    with pytest.raises(TypeError):
        store.save(1, W, {"x": torch.ones(1)})
    assert not (tmp_path / "checkpoints").exists()


def test_the_newest_two_and_the_best_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    for step, score in ((1, 0.1), (2, 0.9), (3, None), (4, 0.9), (5, math.nan), (6, 0.3)):
        store.save(step, W, {"step": step}, score=score)
    assert store.steps() == [2, 5, 6]
    best, newest = store.best(), store.newest()
    assert best is not None
    assert newest is not None
    assert (best.step, best.score, newest.step) == (2, 0.9, 6)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000002", "step-00000005", "step-00000006"}


def test_lowest_is_best_for_a_loss(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=1, better="lowest")
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
        store.save(step, W, {}, score=score)
    best = store.best()
    assert best is not None
    assert (best.step, store.steps()) == (2, [2, 3])


def test_none_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "no").newest() is None
    assert Checkpoints(tmp_path).best() is None
    Checkpoints(tmp_path).save(1, W, {})
    assert Checkpoints(tmp_path).best() is None


def test_saving_a_step_again_never_replaces_a_valid_one(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for i in range(12):
        store.save(5, W, {"i": i})
    assert store.steps() == [5]
    newest = store.newest()
    assert newest is not None
    assert (newest.state, newest.path.name) == ({"i": 11}, "step-00000005.11")
    assert len(list(tmp_path.iterdir())) == 3


def test_leftovers_of_a_writer_that_was_stopped_are_removed(tmp_path: Path) -> None:
    for name in (".step-00000009.abc", ".old-step-00000001", "step-00000001", "mine"):
        (tmp_path / name).mkdir()
    store = Checkpoints(tmp_path)
    store.save(2, W, {})
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "step-00000001", "step-00000002"}
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000003")
    with pytest.raises(ArtifactError) as caught:
        store.newest()
    assert "step-00000003: it is the checkpoint of step 2, in a folder of another name" in caught.value.message
    assert "step-00000001: manifest.json cannot be read: No such file" in caught.value.message


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "of the format None"),
        ('{"schema": "sparseift.checkpoint/9"}', "of the format 'sparseift.checkpoint/9', not"),
        ('{"schema": "sparseift.checkpoint/1"}', "does not say what it should"),
        ('{"schema": "sparseift.checkpoint/1", "files": 3}', "does not say what it should"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, manifest: str, said: str) -> None:
    path = Checkpoints(tmp_path).save(1, W, {})
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(ArtifactError) as caught:
        open_checkpoint(path)
    assert caught.value.message.startswith(str(path))
    assert said in caught.value.message


def test_a_hand_made_checkpoint_with_a_good_hash_must_still_be_one(tmp_path: Path) -> None:
    from sparseift_cli.runs.checkpoint import _own_hash, sha256

    path = Checkpoints(tmp_path).save(1, W, {})
    (path / "tensors.safetensors").write_bytes(b"not tensors")
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    manifest["files"]["tensors.safetensors"] = {"bytes": 11, "sha256": sha256(path / "tensors.safetensors")}
    manifest["sha256"] = _own_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="it cannot be read"):
        open_checkpoint(path)


def test_metrics_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(read_metrics(path)) == []
    with Metrics(path) as metrics:
        metrics.append({"step": 1, "loss": math.inf})
        assert metrics.sync() == path.stat().st_size
    metrics.close()
    with Metrics(path) as metrics:
        metrics.append({"step": 2, "loss": 0.1})
    assert list(read_metrics(path)) == [{"step": 1, "loss": math.inf}, {"step": 2, "loss": 0.1}]


@pytest.mark.parametrize("half", ['{"step": 3, "lo', "x" * 10_000, '{"step": 3}'])
def test_half_a_line_is_no_line(tmp_path: Path, half: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + half)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with Metrics(path) as metrics:
        metrics.append({"step": 3})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    path.write_text(half)
    Metrics(path).close()
    assert path.read_text() == ""


def test_a_broken_line_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ArtifactError, match=r"metrics.jsonl:2: this line is no JSON object"):
        list(read_metrics(path))


@pytest.mark.parametrize("position", [13, 25, 11])
def test_a_file_that_the_checkpoint_does_not_know_is_refused(tmp_path: Path, position: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    with pytest.raises(ArtifactError, match="does not match the checkpoint"):
        Metrics(path, position=position)
    assert path.stat().st_size == 24


def test_metrics_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot open"):
        Metrics(tmp_path / "no" / "metrics.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="cannot open"):
        Metrics(tmp_path / "folder")
