"""Checkpoints with weights in stored blocks, as `inspect` shows them and others read them: as their dense twins."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparseift_cli.checkpoint import open_checkpoint, read_tensor, scan
from sparseift_cli.checkpoint import reading as reading_module
from sparseift_cli.checkpoint import values as values_module
from sparseift_cli.errors import CheckpointError
from sparseift_cli.kernels.layer import BlockLayer
from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.kernels.storage import to_compact_state, to_dense_state
from sparseift_cli.models.weights import load_into
from tests.kernels.test_storage import HOSTILE, edited


def blocks() -> nn.ModuleDict:
    """A linear layer, a Conv1D, a convolution and a tied layer, in blocks of 8, in a model with a head and a norm."""
    generator = torch.Generator().manual_seed(0)

    def layer(rows: int, columns: int, **form: object) -> BlockLayer:
        mask = torch.rand(rows, columns, generator=generator) < 0.4
        mask[0, 0] = True
        return BlockLayer(mask, 8, **form)

    first = layer(6, 5)
    return nn.ModuleDict(
        {
            "fc": first,
            "c_fc": layer(3, 7, transposed=True),
            "conv": layer(4, 2, kernel=(3, 3), bias=False),
            "norm": nn.BatchNorm1d(40),
            "tied": first,
        }
    )


def write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: t.clone().contiguous() for name, t in state.items()}, path)
    else:
        torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_weight_in_blocks_is_one_weight(sparseift, tmp_path: Path, kind: str) -> None:
    model = blocks()
    path = write(model.state_dict(), tmp_path / f"model.{kind}")
    code, out, _ = sparseift("inspect", str(path), "--json")
    data = json.loads(out)
    by_name = {t["name"]: t for t in data["tensors"]}
    fc = model["fc"]
    assert code == 0
    assert set(by_name) == set(to_dense_state(model.state_dict()))
    assert by_name["c_fc.weight"]["shape"] == [56, 24] and by_name["conv.weight"]["shape"] == [32, 16, 3, 3]
    stored = len(fc.values)
    assert by_name["fc.weight"]["blocks"] == {
        "pattern": "8x8",
        "grid": [6, 5],
        "stored": stored,
        "nnz": 64 * stored,
        "density": stored / 30,
        "transposed": False,
    }
    assert by_name["conv.weight"]["blocks"]["pattern"] == "8x72"
    assert by_name["fc.weight"]["parameters"] == fc.values.numel() and by_name["fc.weight"]["elements"] == 48 * 40
    copies = 1 if kind == "pt" else 2  # safetensors holds no two names of one tensor
    extra = 0 if kind == "pt" else fc.values.numel() + fc.bias.numel()
    assert data["totals"]["parameters"] == sum(p.numel() for p in model.parameters()) + extra
    assert by_name["tied.weight"]["tied_to"] == ("fc.weight" if kind == "pt" else None)
    own = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    if copies == 1:
        assert data["totals"]["bytes"] == sum(t.numel() * t.element_size() for t in own.values())
    code, out, _ = sparseift("inspect", str(path))
    assert code == 0 and f"{stored} of 30 blocks 8x8, density 0." in out
    assert f"stored in blocks: {2 + copies} weights" in out and "row_offsets" not in out


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("tile", [reading_module.TILE, 5000])
def test_values_are_those_of_the_dense_twin(
    sparseift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tile: int
) -> None:
    for module in (reading_module, values_module):
        monkeypatch.setattr(module, "TILE", tile)
    model = blocks()
    with torch.no_grad():
        values = model.get_parameter("fc.values")
        values[0, 0, :3] = torch.tensor([0.0, torch.nan, torch.inf])
        values[1] = 0
    path = write(model.state_dict(), tmp_path / f"blocks.{kind}")
    twin = write(to_dense_state(model.state_dict()), tmp_path / f"dense.{kind}")
    ours, theirs = open_checkpoint(path), open_checkpoint(twin)
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    for a, b in zip(scan(ours), scan(theirs), strict=True):
        assert (a.numel, a.zeros, a.nans, a.infs) == (b.numel, b.zeros, b.nans, b.infs)
        if b.pattern:
            assert a.pattern
            empty = b.pattern.empty_rows, b.pattern.empty_columns
            assert (a.pattern.empty_rows, a.pattern.empty_columns) == empty and a.pattern.most == b.pattern.most
    for info in theirs.tensors:
        torch.testing.assert_close(
            read_tensor(ours, info.name), read_tensor(theirs, info.name), equal_nan=True, rtol=0, atol=0
        )
    rows = json.loads(sparseift("inspect", str(path), "--values", "--json")[1])["tensors"]
    forms = {row["name"]: row["zeros_form"] for row in rows}
    assert forms["fc.weight"] == forms["c_fc.weight"] == "blocks 8x8"
    whole = tile > 9 * 64 * 32
    assert not whole or forms["conv.weight"] == "blocks 8x72 (8 channels of 9 taps)"


def test_spectra_are_those_of_the_masks(sparseift, tmp_path: Path) -> None:
    model = blocks()
    with torch.no_grad():
        model.get_parameter("fc.values")[1] = 0  # a block that just grew: it is in the mask
    path = write(model.state_dict(), tmp_path / "blocks.safetensors")
    rows = {r["layer"]: r for r in json.loads(sparseift("inspect", str(path), "--spectral", "--json")[1])["layers"]}
    assert set(rows) == {"fc.weight", "c_fc.weight", "conv.weight", "tied.weight"}
    for name, row in rows.items():
        layer = model[name.partition(".")[0]]
        assert row["nnz"] == layer.values.numel() and row["shape"] == list(layer.weight_shape)
        values = torch.linalg.svdvals(layer.weight_mask.flatten(1).double())
        assert row["s1"] == pytest.approx(float(values[0])) and row["s2"] == pytest.approx(float(values[1]))


def test_listing_needs_no_torch(tmp_path: Path, root: Path) -> None:
    path = write(blocks().state_dict(), tmp_path / "blocks.pt")
    code = (
        "import sys; from sparseift_cli.checkpoint import open_checkpoint; "
        f"print([t.name for t in open_checkpoint({str(path)!r}).tensors if t.blocks], 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['fc.weight', 'c_fc.weight', 'conv.weight', 'tied.weight'] False"


def test_a_checkpoint_in_blocks_is_loaded_into_a_dense_model(tmp_path: Path) -> None:
    source = nn.Sequential(BlockLayer(torch.eye(4, dtype=torch.bool), 4), nn.BatchNorm1d(16))
    path = write(source.state_dict(), tmp_path / "blocks.safetensors")
    dense = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    load_into(dense, open_checkpoint(path))
    assert torch.equal(dense[0].weight, source[0].dense()) and torch.equal(dense[0].bias, source[0].bias)
    with pytest.raises(CheckpointError, match=r"0.weight is 16x16, the model's is 16x8"):
        load_into(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)), open_checkpoint(path))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("case", HOSTILE)
def test_damage_is_refused_by_name(sparseift, tmp_path: Path, kind: str, case: str) -> None:
    change, message = HOSTILE[case]
    path = write(edited(change), tmp_path / f"bad.{kind}")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.message.startswith(str(path)) and "fc" in caught.value.message
    code, out, err = sparseift("inspect", str(path))
    assert code == 2 and not out and "Traceback" not in err and "fc" in err


def test_a_stride_in_a_torch_file_is_refused(tmp_path: Path) -> None:
    for name, wrong in (("values", "has a stride"), ("columns", "not a list of int32")):
        state = edited(lambda s: None)
        state[f"fc.{name}"] = state[f"fc.{name}"][:1].expand(state[f"fc.{name}"].shape)
        path = tmp_path / f"{name}.pt"
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=wrong):
            open_checkpoint(path)


def test_a_layer_by_itself(sparseift, tmp_path: Path) -> None:
    only = BlockLinear(torch.eye(4, dtype=torch.bool), 4)
    path = write(dict(only.state_dict()), tmp_path / "one.safetensors")
    assert torch.equal(read_tensor(open_checkpoint(path), "weight"), only.dense())
    assert "4 of 16 blocks 4x4, density 0.25" in sparseift("inspect", str(path))[1]
    path = write(dict(only.state_dict()) | {"columns": only.columns - 1}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"the weight is stored in blocks.*outside the grid"):
        open_checkpoint(path)


def test_names_from_a_file_are_printable(sparseift, tmp_path: Path) -> None:
    state = {name.replace("fc", "\x1b[31mfc"): t for name, t in edited(HOSTILE["no layout"][0]).items()}
    code, _, err = sparseift("inspect", str(write(state, tmp_path / "bad.pt")))
    assert code == 2 and "\x1b[31mfc" not in err and "fc is stored in blocks" in err


def test_any_damage_to_the_bytes_of_the_index_is_an_error_or_a_weight(tmp_path: Path) -> None:
    state = to_compact_state(edited(lambda s: None), edited(lambda s: None))
    path = write(state, tmp_path / "good.safetensors")
    raw, random_ = bytearray(path.read_bytes()), random.Random(0)
    spans = [p.storage.offset for t in open_checkpoint(path).tensors if t.blocks for p in t.blocks.parts[1:]]
    refused = 0
    for _ in range(200):
        copy = bytearray(raw)
        at = random_.choice(spans) + random_.randrange(12)
        copy[at] = random_.randrange(256)
        path.write_bytes(copy)
        try:
            opened = open_checkpoint(path)
            assert opened["fc.weight"].numel <= 2**24
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_preserve_begins_at_a_checkpoint_in_blocks(sparseift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does at its dense twin: to the bit."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = (
        nn.Linear(4, 8),
        nn.ReLU(),
        BlockLinear(torch.eye(4, dtype=torch.bool)[:, :2], 4),
        nn.ReLU(),
        nn.Linear(16, 3),
    )
    state = nn.Sequential(*layers).state_dict()
    (tmp_path / "net_of_blocks.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n"
        "    layers = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)\n"
        "    return nn.Sequential(*layers), torch.zeros(1, 4)\n"
    )
    made = []
    for name, tensors in (("blocks", state), ("dense", to_dense_state(state))):
        write(tensors, tmp_path / f"{name}.safetensors")
        source = (f"{name}.safetensors", "--model", "net_of_blocks:net", "-s", "0.5", "--init", "preserve", "-o", name)
        code, _, err = sparseift("transform", *source)
        assert code == 0, err
        made.append(open_checkpoint(tmp_path / name / "model.safetensors"))
    for info in made[0].tensors:
        assert torch.equal(read_tensor(made[0], info.name), read_tensor(made[1], info.name))


RECIPE = """
model: {name: bytes_gpt, seq: 16}
data: {name: stdlib, limit: 64}
transform: {member: wide, match: model, pattern: 32x32}
sparsity: 0.75
algorithm: {name: set, delta_t: 2}
training: {steps: 4, batch_size: 2, device: cpu, kernels: reference}
evaluation: {every: 2, limit: 2}
checkpoint: {every: 2, keep: 2}
"""


def test_a_run_on_blocks(sparseift, tmp_path: Path) -> None:
    """Its checkpoints are listed, and their masks have spectra, in `inspect` and in a report."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    code, out, err = sparseift("train", str(tmp_path / "small.yaml"), "--runs", str(tmp_path / "runs"), "--json")
    assert code == 0, err
    run = Path(json.loads(out)["runs"][0]["path"])
    newest = max((run / "checkpoints").iterdir())
    data = json.loads(sparseift("inspect", str(newest / "tensors.safetensors"), "--json")[1])
    stored = {t["name"]: t["blocks"]["nnz"] for t in data["tensors"] if t["blocks"]}
    assert len(stored) == 16 and not any("row_offsets" in t["name"] for t in data["tensors"])
    rows = json.loads(sparseift("inspect", str(run), "--spectral", "--every-checkpoint", "--json")[1])["layers"]
    assert [row["step"] for row in rows] == [2] * 16 + [4] * 16
    assert {f"model/{row['layer']}": row["nnz"] for row in rows[16:]} == stored
    assert any(a["s2"] != b["s2"] for a, b in zip(rows[:16], rows[16:], strict=True))  # blocks have moved
    code, out, err = sparseift("report", str(tmp_path / "runs"), "--spectral")
    assert code == 0, err
    assert "How well the masks connect" in out and "no run here keeps" not in out
