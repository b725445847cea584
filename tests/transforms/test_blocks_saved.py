"""Models with layers of stored blocks, saved and loaded: in blocks, dense, and as plain state dicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli.errors import ArtifactError, CheckFailed, UsageError
from sparseift_cli.kernels.convert import block_masks, to_masked, use_kernels
from sparseift_cli.kernels.layer import BlockLayer
from sparseift_cli.mask.attached import mask_names, pattern_of
from tests.helpers.preserve_models import tiny_gpt

X = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """A stem, convolutions of 3x3 (blocks of 4x36) and 1x1 (of 4x4) that are widened, linear layers and a head."""
    torch.manual_seed(0)
    convs = (nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU())
    more = (nn.Conv2d(16, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 24), nn.ReLU())
    return nn.Sequential(*convs, *more, nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


def compact(pattern: str) -> nn.Module:
    exclude = () if pattern == "4x4" else ("5", "9", "11")
    new, _ = sparseift.transform(net(), X, sparsity=0.75, pattern=pattern, exclude=exclude)
    choices = use_kernels(new, "reference")
    assert any(choice.backend == "reference" for choice in choices)
    return new


def layers(model: nn.Module) -> dict[str, BlockLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BlockLayer)}


@pytest.fixture(params=["4x4", "4x36"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Path]:
    model = compact(request.param)
    assert layers(model)
    return model, sparseift.save(model, tmp_path / "out", state_dict=True)


@pytest.mark.parametrize("meta", [True, False])
def test_blocks_come_back_as_blocks(written, meta: bool, tmp_path: Path) -> None:
    model, path = written
    dense = net().to("meta") if meta else net()
    back = sparseift.load(path, into=dense)
    assert layers(back).keys() == layers(model).keys()
    ours, theirs = model.state_dict(), back.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(t.is_meta for t in (*back.parameters(), *back.buffers()))
    torch.testing.assert_close(back(X), model.eval()(X))
    assert mask_names(back) == mask_names(model)
    for name, layer in layers(model).items():
        other = back.get_submodule(name)
        assert isinstance(other, BlockLayer) and other.backend == "auto"
        assert pattern_of(other, "weight") == pattern_of(layer, "weight")
    assert sparseift.save(back, tmp_path / "again").is_dir()
    assert sparseift.audit(back, X).forward_ratio == sparseift.flops(str(path)).forward_ratio
    assert sparseift.flops(back).forward_ratio == sparseift.flops(str(path)).forward_ratio


def test_layers_in_blocks_are_counted_as_the_ordinary_ones() -> None:
    model, masked = compact("4x4"), compact("4x4")
    to_masked(masked)
    assert sparseift.inspect(model, X) == sparseift.inspect(masked, X)
    assert layers(model)


def test_files_hold_the_blocks_alone(written) -> None:
    model, path = written
    weights, masks = load_file(path / "model.safetensors"), load_file(path / "masks.safetensors")
    for name, layer in layers(model).items():
        assert weights[f"{name}.values"].shape == layer.values.shape and f"{name}.weight" not in weights
        assert torch.equal(masks[f"{name}.weight"], layer.block_mask)
    stored = sum(t.numel() for t in weights.values() if t.is_floating_point())
    params = sum(p.numel() for p in model.parameters())
    assert stored == params + sum(b.numel() for b in model.buffers() if b.is_floating_point())
    assert not (path / "buffers.safetensors").exists()


def test_the_dense_form(written, tmp_path: Path) -> None:
    model, path = written
    back = sparseift.load(path, into=net(), kernels="masked")
    assert not layers(back) and mask_names(back) == mask_names(model)
    torch.testing.assert_close(back(X), model.eval()(X))
    to_masked(model)
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, mask in sparseift.masks(back).items():
        assert torch.equal(mask, sparseift.masks(model)[name])
        module = back.get_submodule(name.removesuffix(".weight"))
        assert pattern_of(module, "weight") == pattern_of(model.get_submodule(name.removesuffix(".weight")), "weight")
    plain = torch.load(path / "state_dict.pt", weights_only=True)
    assert plain.keys() == theirs.keys() and all(torch.equal(plain[name], theirs[name]) for name in plain)
    assert sparseift.save(back, tmp_path / "again").is_dir()


def test_a_transformed_architecture_without_this_package_loads_the_plain_state_dict(tmp_path: Path) -> None:
    model, _ = sparseift.transform(tiny_gpt(), IDS, sparsity=0.5, pattern="4x4")
    use_kernels(model, "reference")
    assert any(layer.transposed for layer in layers(model).values())
    plain = torch.load(sparseift.save(model, tmp_path / "out", state_dict=True) / "state_dict.pt", weights_only=True)
    twin, _ = sparseift.transform(tiny_gpt(), IDS, sparsity=0.5, pattern="4x4")
    twin.load_state_dict(plain)
    torch.testing.assert_close(twin.eval()(IDS), model.eval()(IDS))


def test_conv1d_and_tied_embeddings_survive(tmp_path: Path) -> None:
    model, _ = sparseift.transform(tiny_gpt(), IDS, sparsity=0.5, pattern="4x4")
    use_kernels(model, "reference")
    path = sparseift.save(model, tmp_path / "out")
    back = sparseift.load(path, into=tiny_gpt())
    assert {n: layer.transposed for n, layer in layers(back).items()} == {
        n: x.transposed for n, x in layers(model).items()
    }
    torch.testing.assert_close(back(IDS), model.eval()(IDS))
    to_masked(back)
    torch.testing.assert_close(back(IDS), model(IDS))


def test_training_goes_on_and_is_saved(written, tmp_path: Path) -> None:
    _, path = written
    model = sparseift.load(path, into=net()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier = sparseift.Sparsifier(model, optimizer, algorithm="set", total_steps=8, delta_t=2)
    before = block_masks(model)
    for _ in range(8):
        model(X).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    after = block_masks(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    back = sparseift.load(sparseift.save(model, tmp_path / "trained"), into=net())
    torch.testing.assert_close(back(X), model.eval()(X))
    assert all(torch.equal(mask, after[name]) for name, mask in block_masks(back).items())


def test_damage_is_named(written) -> None:
    _, path = written
    name = next(iter(block_masks(sparseift.load(path, into=net()))))
    weights, masks = load_file(path / "model.safetensors"), load_file(path / "masks.safetensors")

    def refused(weights: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], message: str) -> None:
        save_file(weights, path / "model.safetensors")
        save_file(masks, path / "masks.safetensors")
        for kernels in ("auto", "masked"):
            with pytest.raises(ArtifactError, match=message):
                sparseift.load(path, into=net(), kernels=kernels)

    layer = name.removesuffix(".weight")
    refused(weights, {k: m for k, m in masks.items() if k != name}, f"the mask of {name} is missing")
    refused(weights, masks | {name: masks[name].flip(1)}, f"the mask of {name} is missing, or not where its blocks are")
    refused(weights | {f"{layer}.columns": weights[f"{layer}.columns"] + 1000}, masks, f"{layer} is stored in blocks")
    wider = weights[f"{layer}.layout"].clone()
    wider[2] *= 2
    refused(weights | {f"{layer}.layout": wider}, masks, f"{name} is .* and the model's is")
    head = {f"13.{part}": weights[f"{layer}.{part}"].clone() for part in ("values", "row_offsets", "columns", "layout")}
    refused({k: t for k, t in weights.items() if k != "13.weight"} | head, masks, "the plan has no mask for it")
    with pytest.raises(UsageError, match="unknown kernel backend 'cutlass'"):
        sparseift.load(path, into=net(), kernels="cutlass")


def test_a_mask_count_that_changed_is_refused(tmp_path: Path) -> None:
    model = compact("4x4")
    name, layer = next(iter(layers(model).items()))
    fewer = layer.block_mask
    fewer.view(-1)[int(fewer.flatten().nonzero()[0])] = False
    other = type(layer).from_dense(
        torch.zeros(layer.weight_shape),
        fewer,
        layer.bias,
        **({"stride": layer.stride, "padding": layer.padding} if hasattr(layer, "stride") else {}),
    )
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, other)
    with pytest.raises(CheckFailed, match="planned numbers of non-zeros"):
        sparseift.save(model, tmp_path / "out")


def test_inspect_of_a_folder_in_blocks(written, sparseift_command) -> None:
    model, path = written
    code, out, _ = sparseift_command("inspect", str(path), "--values", "--json")
    rows = {row["name"]: row for row in json.loads(out)["tensors"]}
    assert code == 0
    for name, layer in layers(model).items():
        row = rows[f"{name}.weight"]
        assert row["blocks"]["nnz"] == layer.values.numel() and row["shape"] == list(layer.weight_shape)
    code, out, _ = sparseift_command("inspect", str(path), "--spectral", "--json")
    spectra = {row["layer"]: row["nnz"] for row in json.loads(out)["layers"]}
    assert code == 0 and spectra.keys() == set(mask_names(model))
    assert all(spectra[f"{name}.weight"] == layer.values.numel() for name, layer in layers(model).items())


@pytest.fixture
def sparseift_command(request: pytest.FixtureRequest):
    return request.getfixturevalue("sparseift")
