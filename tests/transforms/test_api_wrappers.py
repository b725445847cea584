"""The Python API in users' training loops: wrapped models, patterns that last, weights outside masks, paths."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli import ArtifactError, CheckFailed, UsageError
from sparseift_cli.mask.patterns import has_pattern

X = torch.randn(4, 16)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def compiled(model: nn.Module) -> Any:
    """A wrapper; nothing is compiled before it is called."""
    return torch.compile(model, backend="eager")


def train(model: nn.Module, steps: int = 12, **options: Any) -> sparseift.Sparsifier:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = sparseift.Sparsifier(model, optimizer, total_steps=steps, delta_t=2, **options)
    for _ in range(steps):
        model(torch.randn(8, 16)).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


# --- wrappers ---


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrapped_models_are_unwrapped(wrap: Any, tmp_path: Path) -> None:
    new, _ = sparseift.transform(wrap(net()), X, sparsity=0.75)
    assert isinstance(new, nn.Sequential)
    wrapped = wrap(new)
    assert list(sparseift.masks(wrapped)) == list(sparseift.masks(new)) == ["2.weight"]
    assert sparseift.audit(wrapped, X).forward_ratio == sparseift.audit(new, X).forward_ratio
    back = sparseift.load(sparseift.save(wrapped, tmp_path / "out"), into=wrap(net()))
    assert torch.equal(back(X), new.eval()(X))


# --- patterns ---


def by_hand(mask: Tensor, pattern: str) -> bool:
    """Every 2x2 block full or empty, or two in every four inputs."""
    if pattern == "2x2":
        sums = {
            int(mask[i : i + 2, j : j + 2].sum()) for i in range(0, len(mask), 2) for j in range(0, mask.shape[1], 2)
        }
        return sums <= {0, 4}
    return {int(row[j : j + 4].sum()) for row in mask for j in range(0, len(row), 4)} == {2}


@pytest.mark.parametrize("again", [False, True], ids=["transformed", "loaded"])
@pytest.mark.parametrize("algorithm", ["rigl", "set"])
def test_blocks_stay_whole_without_the_plan(algorithm: str, again: bool, tmp_path: Path) -> None:
    model, _ = sparseift.transform(net(), X, sparsity=0.75, pattern="2x2")
    if again:
        model = sparseift.load(sparseift.save(model, tmp_path / "out"), into=net())
    first = sparseift.masks(model)["2.weight"].clone()
    train(model, algorithm=algorithm)
    mask = sparseift.masks(model)["2.weight"]
    assert not torch.equal(mask, first)
    assert by_hand(mask, "2x2")
    assert sparseift.audit(model, X).plan is not None


def test_n_of_m_does_not_move_without_the_plan_either() -> None:
    model, _ = sparseift.transform(net(), X, sparsity=0.5, pattern="2:4")
    with pytest.raises(UsageError, match="2:4, which only static sparsity keeps"):
        train(model, algorithm="rigl")
    train(model, algorithm="static")
    assert by_hand(sparseift.masks(model)["2.weight"], "2:4")


@pytest.mark.parametrize(("pattern", "sparsity"), [("2x2", 0.75), ("2:4", 0.5)])
def test_a_lost_pattern_is_an_error(pattern: str, sparsity: float, tmp_path: Path) -> None:
    model, _ = sparseift.transform(net(), X, sparsity=sparsity, pattern=pattern)
    mask, weight = sparseift.masks(model)["2.weight"], model.get_parameter("2.weight")
    assert has_pattern(mask, pattern) and by_hand(mask, pattern)
    row = mask[0].clone()
    mask[0] = torch.roll(row, 1)  # as many non-zeros as before
    assert not has_pattern(mask, pattern) and not by_hand(mask, pattern)
    with torch.no_grad():
        weight.mul_(mask)
    for look in (lambda: sparseift.audit(model, X), lambda: sparseift.save(model, tmp_path / "out")):
        with pytest.raises(CheckFailed, match=f"masks are no longer {pattern}: 2.weight"):
            look()


def test_patterns_of_odd_shapes() -> None:
    """Rows and columns that fill no block are empty; the last group of an odd number of inputs has its share."""
    block = torch.zeros(5, 7, dtype=torch.bool)
    block[:2, 2:4] = True
    assert has_pattern(block, "2x2")
    block[4, 0] = True
    assert not has_pattern(block, "2x2")
    assert has_pattern(block, "unstructured")
    rest = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 1]], dtype=torch.bool)
    assert has_pattern(rest, "2:4")
    rest[0, 5] = True
    assert not has_pattern(rest, "2:4")


# --- weights that a mask leaves out ---


def test_weights_outside_masks_are_not_saved(tmp_path: Path) -> None:
    model, _ = sparseift.transform(net(), X, sparsity=0.75)
    with torch.no_grad():
        model.get_parameter("2.weight").add_(1)
    with pytest.raises(CheckFailed, match=r"weights outside the masks are not zero: 2\.weight"):
        sparseift.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_outside_masks_are_not_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = sparseift.transform(net(), X, sparsity=0.75)
    folder = sparseift.save(model, tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match="weights outside the masks are not zero"):
        sparseift.load(folder, into=net())


def test_an_infinite_weight_inside_a_mask_is_not_reported_as_outside() -> None:
    model, _ = sparseift.transform(net(), X, sparsity=0.75)
    with torch.no_grad():
        weight = model.get_parameter("2.weight")
        weight[sparseift.masks(model)["2.weight"]] = math.inf
    assert sparseift.audit(model, X).plan is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("start", ["fresh", "preserve"])
def test_a_dense_weight_that_is_not_finite_is_named(start: Any, value: float) -> None:
    dense = net()
    with torch.no_grad():
        dense.get_parameter("2.weight")[3, 5] = value
    with pytest.raises(UsageError, match=r"2\.weight is NaN or infinite in places"):
        sparseift.transform(dense, X, sparsity=0.75, options=sparseift.Options(start=start))


# --- what is given ---


def test_an_audit_at_another_input_is_refused() -> None:
    model, _ = sparseift.transform(net(), X, sparsity=0.75)
    for look in (sparseift.audit, sparseift.flops):
        with pytest.raises(UsageError, match="planned at input 4x16, not 1x16"):
            look(model, X[:1])


def test_paths_are_sources(tmp_path: Path) -> None:
    model, _ = sparseift.transform(net(), X, sparsity=0.75)
    folder = sparseift.save(model, tmp_path / "out")
    assert isinstance(folder, Path)
    assert sparseift.flops(folder).forward_ratio == sparseift.flops(str(folder)).forward_ratio
    assert sparseift.inspect(folder) == sparseift.inspect(str(folder))
    with pytest.raises(UsageError, match="transform takes a module, not 'resnet18'"):
        sparseift.transform("resnet18", X, sparsity=0.75)


def test_a_transform_without_its_sparsity_is_not_dense() -> None:
    for given in ({"match": "model"}, {"member": "doped"}):
        with pytest.raises(UsageError, match="a transform needs its sparsity"):
            sparseift.flops(net(), X, **given)


# --- averages of weights ---


@pytest.mark.parametrize("pattern", ["unstructured", "2x2"])
def test_an_average_of_weights_is_sparse_after_copy_masks(tmp_path: Path, pattern: str) -> None:
    wide, _ = sparseift.transform(net(), X, sparsity=0.75, pattern=pattern)
    average = torch.optim.swa_utils.AveragedModel(wide)
    for _ in range(3):
        train(wide)
        average.update_parameters(wide)
    with pytest.raises(CheckFailed):
        sparseift.save(average.module, tmp_path / "before")
    sparseift.copy_masks(compiled(wide), average.module)
    masks = sparseift.masks(wide)
    assert all(torch.equal(mask, masks[key]) for key, mask in sparseift.masks(average.module).items())
    for key, mask in masks.items():
        assert not average.module.get_parameter(key)[~mask].any()
    assert sparseift.audit(average.module, X).forward_ratio == sparseift.audit(wide, X).forward_ratio
    again = sparseift.load(sparseift.save(average.module, tmp_path / "after"), into=net())
    assert torch.equal(again(X), average.module.eval()(X))
    train(wide)  # the average has masks of its own
    sparseift.audit(average.module, X)


def test_masks_are_copied_only_to_copies_of_the_model() -> None:
    wide, _ = sparseift.transform(net(), X, sparsity=0.75)
    for other in (net(), nn.Linear(2, 2)):
        with pytest.raises(UsageError, match=r"has no 0\.weight|has no 2\.weight"):
            sparseift.copy_masks(wide, other)


def test_masks_are_copied_all_or_none() -> None:
    deep = nn.Sequential(*list(net())[:-1], nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    wide, _ = sparseift.transform(deep, X, sparsity=0.75)
    assert list(sparseift.masks(wide)) == ["2.weight", "4.weight"]
    other = copy.deepcopy(wide)
    other[4] = nn.Linear(3, 3)
    train(wide)
    before = {name: buffer.clone() for name, buffer in other.named_buffers()}
    with pytest.raises(UsageError, match=r"has no 4\.weight"):
        sparseift.copy_masks(wide, other)
    assert not torch.equal(before["2.weight_mask"], sparseift.masks(wide)["2.weight"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in other.named_buffers())
