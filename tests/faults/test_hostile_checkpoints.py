"""Files that are no checkpoints, or want to be more: one clear line, exit 2, nothing executed, nothing inflated."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparseift_cli.checkpoint import open_checkpoint, read_tensor
from sparseift_cli.errors import CheckpointError


class Payload:
    """A pickle that would leave a file behind if anybody ran it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def header(data: dict, body: bytes = b"") -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + body


def good(folder: Path, kind: str) -> Path:
    state = {"a.weight": torch.zeros(4, 6), "b.weight": torch.ones(3)}
    path = folder / f"good.{kind}"
    if kind == "safetensors":
        save_file(state, str(path))
    else:
        torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "pt")
    return path


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, bytes] = {
    "empty.pt": b"",
    "text.pt": b"hello, this is no checkpoint\n",
    "page.pth": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "huge-header.safetensors": struct.pack("<Q", 1 << 60) + b"{}",
    "no-json.safetensors": struct.pack("<Q", 8) + b"xxxxxxxx",
    "deep.safetensors": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "beyond.safetensors": header({"a": {**F32, "data_offsets": [0, 1 << 50]}}),
    "negative.safetensors": header({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8)),
    "overlap.safetensors": header({"a": F32, "b": F32}, bytes(8)),
    "hole.safetensors": header({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "behind.safetensors": header({"a": F32}, bytes(12)),
    "short.safetensors": header({"a": F32}, bytes(4)),
    "misfit.safetensors": header({"a": {**F32, "shape": [3]}}, bytes(8)),
    "metadata.safetensors": header({"a": F32, "__metadata__": {"n": 3}}, bytes(8)),
    "dimensions.safetensors": header({"a": {**F32, "shape": [2] + [1] * 64}}, bytes(8)),
    "absurd.safetensors": header({"a": {**F32, "shape": [1 << 62, 1 << 62]}}, bytes(8)),
    "dtype.safetensors": header({"a": {**F32, "dtype": "F99"}}, bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_checkpoint(sparseift, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    code, out, err = sparseift("inspect", str(path))
    assert code == 2 and not out and err.startswith("sparseift: ") and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("huge-header", "its header claims 1,152,921,504,606,846,976 bytes, the file has 10"),
        ("overlap", "two of its tensors overlap, or bytes between them belong to no tensor"),
        ("hole", "two of its tensors overlap, or bytes between them belong to no tensor"),
        ("behind", "truncated, or with bytes that belong to no tensor"),
        ("short", "truncated, or with bytes that belong to no tensor"),
        ("misfit", "the shape of a tensor does not fit the bytes that it claims"),
        ("absurd", "the shape of a tensor is impossible"),
        ("dtype", "unknown variant `F99`"),
        ("dimensions", "has 65 dimensions; up to 64 are read"),
    ],
)
def test_what_is_wrong_with_a_safetensors_file_is_said(sparseift, tmp_path: Path, name: str, said: str) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(HOSTILE[path.name])
    assert said in sparseift("inspect", str(path))[2]


def test_offsets_of_a_safetensors_header_are_those_of_the_file(tmp_path: Path) -> None:
    """The library lists names in the order of the data; each tensor begins where the one before it ends."""
    state = {
        "z": torch.arange(5.0),
        "a": torch.ones(3, 2, dtype=torch.bfloat16),
        "m": torch.zeros(0, 4),
        "b": torch.tensor(7),
    }
    save_file(state, str(tmp_path / "four.safetensors"), metadata={"format": "pt"})
    found = open_checkpoint(tmp_path / "four.safetensors")
    raw = (tmp_path / "four.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    claimed = {k: v["data_offsets"] for k, v in json.loads(raw[8 : 8 + length]).items() if k != "__metadata__"}
    at = {t.name: [t.storage.offset - 8 - length, t.storage.offset + t.nbytes - 8 - length] for t in found.tensors}
    assert at == claimed and found.metadata == {"format": "pt"}
    for name, tensor in state.items():
        assert torch.equal(read_tensor(found, name), tensor)


def test_listing_a_safetensors_file_imports_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, str(tmp_path / "a.safetensors"))
    code = (
        "import sys; from sparseift_cli.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(tmp_path / 'a.safetensors')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_never_runs(sparseift, tmp_path: Path, legacy: bool) -> None:
    trace, path = tmp_path / "ran", tmp_path / "evil.pt"
    if legacy:
        path.write_bytes(pickle.dumps(Payload(trace)))
    else:
        torch.save({"state_dict": Payload(trace)}, path)
    code, out, err = sparseift("inspect", str(path))
    assert code == 2 and not out and "Traceback" not in err and not trace.exists()


def test_zip_bomb_and_other_archives(sparseift, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
        archive.writestr("x/data/0", bytes(50_000_000))
    other = tmp_path / "other.pt"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    for path in (bomb, other, tmp_path, tmp_path / "missing.pt"):
        code, out, err = sparseift("inspect", str(path))
        assert code == 2 and not out and "Traceback" not in err


@pytest.mark.parametrize("kind", ["safetensors", "pt", "legacy"])
def test_mutations_never_crash(sparseift, tmp_path: Path, kind: str) -> None:
    """Truncated anywhere, or with bytes flipped: an answer or a clear refusal, never another exception."""
    whole = good(tmp_path, kind).read_bytes()
    code, out, _ = sparseift("inspect", str(good(tmp_path, kind)), "--values")
    assert code == 0 and "a.weight" in out
    chance = random.Random(0)
    path = tmp_path / f"mutated.{'safetensors' if kind == 'safetensors' else 'pt'}"
    for _ in range(30):
        data = bytearray(whole)
        if chance.random() < 0.4:
            data = data[: chance.randrange(len(data))]
        for _ in range(chance.randrange(1, 6)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        code, _, err = sparseift("inspect", str(path), "--values")
        assert code in (0, 2) and "Traceback" not in err


def test_a_ten_gigabyte_header_lists_without_its_data(sparseift, tmp_path: Path) -> None:
    rows, columns = 50_000, 51_200
    text = json.dumps(
        {"big.weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}}
    ).encode()
    path = tmp_path / "big.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + 4 * rows * columns)
    code, out, _ = sparseift("inspect", str(path), "--json")
    assert code == 0
    assert json.loads(out)["schema"] == "sparseift.inspect/1" and "2560000000" in out


def test_values_find_zeros_and_patterns(sparseift, tmp_path: Path) -> None:
    weight = torch.ones(8, 16)
    for row in range(8):  # two zeros in every four, elsewhere in every row
        weight[row, row % 4 :: 4] = 0
        weight[row, (row + 1 + row // 4) % 4 :: 4] = 0
    path = tmp_path / "pruned.safetensors"
    save_file({"fc.weight": weight, "fc.bias": torch.tensor([float("nan"), 1.0])}, str(path))
    code, out, _ = sparseift("inspect", str(path), "--values", "--json")
    assert code == 0 and "2:4" in out
    text = io.StringIO(out)
    row = next(r for r in json.load(text)["tensors"] if r["name"] == "fc.weight")
    assert row["zeros"] == 64


def test_the_foreign_checkpoints(sparseift, shared: Path) -> None:
    folder = shared / "data" / "checkpoints"
    code, out, _ = sparseift("inspect", str(folder / "resnet20-12fca82f.th"))
    assert code == 0 and "269,722 parameters" in out and "fits resnet20, exactly" in out
    assert sparseift("inspect", str(folder / "torchtune-tiny_fair_checkpoint.pt"))[0] == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_tensors_of_unreadable_layouts_are_named(sparseift, tmp_path: Path) -> None:
    eye = torch.eye(4)
    torch.save({"a": eye.to_sparse(), "b": eye.to_sparse_csr()}, tmp_path / "sparse.pt")
    code, out, err = sparseift("inspect", str(tmp_path / "sparse.pt"))
    assert code == 2 and not out
    assert "of a layout that is not read: sparse_tensor" in err and ".to_dense()" in err


def test_what_fits_adds_up(sparseift, tmp_path: Path) -> None:
    """Counters of batches may be left out, and are counted on neither side."""
    from sparseift_cli.models.zoo import registry

    state = {k: v for k, v in registry.build("resnet20").state_dict().items() if "num_batches" not in k}
    del state["linear.weight"]
    save_file(state, str(tmp_path / "part.safetensors"))
    _, out, _ = sparseift("inspect", str(tmp_path / "part.safetensors"))
    assert f"{len(state)} of {len(state) + 1} tensors of resnet20, 1 missing" in out


class Phase(enum.Enum):
    WARM_UP = 1


@dataclasses.dataclass
class Settings:
    learning_rate: float = 0.1
    kind: type = dict
    annotation: object = Any  # OmegaConf's metadata hold such


class EasyDict(dict):
    """A dict whose items are attributes too, as the package of that name has."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("beside", "kind"),
    [
        (Phase.WARM_UP, f"{__name__}.Phase"),
        (Settings(), f"{__name__}.Settings"),
        (EasyDict(a=1), f"{__name__}.EasyDict of 1"),
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (Path("runs"), "pathlib"),
        (datetime.datetime(2026, 1, 1), "datetime.datetime"),
        (np.float64(0.5), "multiarray.scalar"),
        ({Phase.WARM_UP: 1}, "dict of 1"),
    ],
    ids=str,
)
def test_what_scripts_save_beside_the_tensors_is_named_and_not_built(
    tmp_path: Path, beside: object, kind: str, zipped: bool
) -> None:
    path = tmp_path / "settings.pt"
    torch.save({"model": {"w": torch.ones(2, 3)}, "args": beside}, path, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(path)
    assert [(t.name, t.shape) for t in checkpoint.tensors] == [("w", (2, 3))]
    (entry,) = checkpoint.other
    assert entry.path == "args" and kind in entry.type
    assert torch.equal(read_tensor(checkpoint, "w"), torch.ones(2, 3))


def test_a_state_dict_in_a_subclass_of_dict(tmp_path: Path) -> None:
    path = tmp_path / "easy.pt"
    torch.save(EasyDict(net=EasyDict(w=torch.ones(2)), args=Settings()), path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.nested_under == "net" and [t.name for t in checkpoint.tensors] == ["w"]


@pytest.mark.parametrize("saved", [Settings(), {"model": Settings(), "epoch": 1}])
def test_an_object_without_tensors_is_no_checkpoint(tmp_path: Path, saved: object) -> None:
    path = tmp_path / "object.pt"
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r"an object of .*Settings, not a state dict") as refused:
        open_checkpoint(path)
    assert "pickled model" in (refused.value.hint or "")
