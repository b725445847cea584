"""Models for other programs: the same tensors and outputs, all of it or nothing, and by name what a form cannot say."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparseift_cli
from sparseift_cli.errors import ArtifactError, UsageError
from sparseift_cli.kernels.convert import block_masks
from sparseift_cli.models.request import Request
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.transforms import export as exporting
from sparseift_cli.transforms.convert import convert

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def transformed(folder: Path, name: str, member: str) -> Path:
    """A folder with a transformed zoo model."""
    model, _ = convert(Request(name), TransformSpec.of({"member": member, "sparsity": "0.75"}))
    return sparseift_cli.save(model, folder / name)


def loaded(file: Path) -> dict[str, torch.Tensor]:
    """What is in an exported file, read by the libraries that others use."""
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True)
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize(("to", "name"), [("state_dict", "a.pt"), ("safetensors", "a.safetensors")])
def test_a_folder_as_one_file(sparseift: Any, tmp_path: Path, to: str, name: str) -> None:
    made, file = tmp_path / "wide", tmp_path / "new" / name
    words = ("transform", "resnet20", "-s", "0.75", "-o", str(made), "--export", "dense", "--summary")
    assert sparseift(*words)[0] == 0
    code, out, err = sparseift("export", str(made), "--to", to, "-o", str(file), "--json")
    assert code == 0, err
    facts, state = json.loads(out), loaded(file)
    assert facts["files"] == {name: file.stat().st_size} and facts["schema"] == "sparseift.export/1"
    assert facts["nonzeros"] == sum(int(p.count_nonzero()) for n, p in state.items() if n.endswith(("weight", "bias")))
    same = torch.load(made / "state_dict.pt", weights_only=True)
    assert state.keys() == same.keys() and all(torch.equal(state[k], same[k]) for k in same)
    assert [p.name for p in file.parent.iterdir()] == [name]
    model = sparseift_cli.load(made)
    want = model(IMAGE)
    for p in model.parameters():
        nn.init.zeros_(p)
    model.load_state_dict(state)
    assert torch.equal(model(IMAGE), want)
    assert sparseift("export", str(made), "--to", to, "-o", str(file))[0] == 4
    assert sparseift("export", str(made), "--to", to, "-o", str(file), "--force")[0] == 0


def test_blocks_are_written_dense_and_tied_weights_under_every_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 32), nn.Linear(32, 16, bias=False)
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return self.head(x + self.down(self.up(x).relu()))

    tokens = torch.arange(16)[None]
    model, _ = sparseift_cli.transform(Tied().eval(), tokens, sparsity=0.5, pattern="4x4", scope="inner")
    want, state = model(tokens), {k: t.clone() for k, t in model.state_dict().items()}
    sparseift_cli.use_kernels(model, "reference")
    for to, name in (("safetensors", "a.safetensors"), ("state_dict", "a.pt")):
        sparseift_cli.export(model, tmp_path / name, to)
        found = loaded(tmp_path / name)
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    again, _ = sparseift_cli.transform(Tied().eval(), tokens, sparsity=0.5, pattern="4x4", scope="inner")
    again.load_state_dict(found)
    assert torch.equal(again.eval()(tokens), want)
    assert block_masks(model)  # the model itself is as before


def test_the_training_flag_stays(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    model[1].eval()
    sparseift_cli.export(model, tmp_path / "a.pt", "state_dict")
    assert model.training and model[0].training and not model[1].training


def test_nothing_is_left_of_an_export_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.pt").write_text("before")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match="No space left"):
        sparseift_cli.export(nn.Linear(2, 2), tmp_path / "a.pt", "state_dict", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_text() == "before"


def test_mistakes_are_explained(sparseift: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sparseift("transform", "resnet20", "-s", "0.75", "-o", "wide", "--summary")[0] == 0
    assert sparseift("transform", "resnet20", "-s", "0.75", "-o", "plan", "--plan-only", "--summary")[0] == 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").touch()
    before = sorted(tmp_path.iterdir())
    for words, exit_code, said in (
        (("wide", "--to", "hf", "-o", "new"), 2, "is no model of transformers"),
        (("wide", "--to", "pickle", "-o", "new"), 2, "pickle"),
        (("wide", "--to", "state_dict", "-o", "folder"), 4, "was not written by this export"),
        (("wide", "--to", "hf", "-o", "folder", "--force"), 4, "was not written by this export"),
        (("wide", "--to", "state_dict", "-o", "new", "--checkpoint", "last"), 2, "no checkpoints"),
        (("folder", "--to", "state_dict", "-o", "new"), 4, "neither a run nor"),
        (("nowhere", "--to", "state_dict", "-o", "new"), 4, "neither a run nor"),
        (("plan", "--to", "state_dict", "-o", "new"), 2, "plan without weights"),
    ):
        code, out, err = sparseift("export", *words)
        assert (code, out) == (exit_code, "") and said in err and "Traceback" not in err, (words, err)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(exporting, "_package", lambda name: None)
    with pytest.raises(UsageError, match="its input is not known"):
        sparseift_cli.export(nn.Linear(2, 2), "a.onnx", "onnx")


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(exporting.importlib, "import_module", missing)
    with pytest.raises(UsageError, match="needs the package onnxscript") as raised:
        sparseift_cli.export(nn.Linear(2, 2), tmp_path / "a.onnx", "onnx", example_input=torch.zeros(1, 2))
    assert "pip install onnxscript onnxruntime" in (raised.value.hint or "")


@pytest.mark.parametrize(("member", "name"), [("wide", "resnet20"), ("factorized", "digits_mlp")])
def test_onnxruntime_computes_the_same(tmp_path: Path, member: str, name: str) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime: Any = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    folder = transformed(tmp_path, name, member)
    done = sparseift_cli.export(folder, tmp_path / "a.onnx", "onnx")
    assert done.difference is not None and done.difference < 1e-5 and not done.notes
    shape = (5, 3, 32, 32) if name == "resnet20" else (5, 1, 8, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    session = runtime.InferenceSession(str(tmp_path / "a.onnx"))
    (found,) = session.run(["output"], {"input": x.numpy()})  # another batch size
    torch.testing.assert_close(torch.from_numpy(found), sparseift_cli.load(folder)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_from_pretrained_loads_the_same_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, sparseift: Any
) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs transformers")
    transformers: Any = importlib.import_module("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": 96}
    more = {"intermediate_size": 64, "max_position_embeddings": 32} if family == "llama" else {"n_positions": 32}
    config = transformers.AutoConfig.for_model(family, **sizes, **more, bos_token_id=1, eos_token_id=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("dense")
    (tmp_path / "dense" / "tokenizer_config.json").write_text("{}")
    made = ("transform", "hf:dense", "--seq", "16", "-s", "0.75", "--init", "preserve", "--summary", "-o", "wide")
    assert sparseift(*made)[0] == 0
    code, out, err = sparseift("export", "wide", "--to", "hf", "-o", "out", "--json")
    assert code == 0 and json.loads(out)["difference"] == 0, err
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and "copied from dense" in err
    again = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert again.config.hidden_size == 64
    tokens = torch.arange(16)[None]
    assert torch.equal(again(tokens).logits, sparseift_cli.load("wide")(tokens).logits)
    assert sparseift("transform", *made[1:6], "-t", "doped", "--init", "fresh", "--summary", "-o", "doped")[0] == 0
    code, _, err = sparseift("export", "doped", "--to", "hf", "-o", "new")
    assert code == 2 and "no place for what replaces" in err and not (tmp_path / "new").exists()
