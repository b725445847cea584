"""init.zero_residual: the blocks of a ResNet start as the identity, dense or transformed, and learn from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparseift_cli.errors import UsageError
from sparseift_cli.recipe.load import load
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.train.prepare import prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.run import run_seeds

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = """
model: {{name: "tests.helpers.recipe_nets:{net}", input: 3x32x32}}
data: synthetic-images
{more}
init: {{zero_residual: true}}
training: {{steps: 3, batch_size: 8, device: cpu}}
"""
WIDE = "transform: wide\nsparsity: 0.5\nalgorithm: {name: rigl, delta_t: 2}"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # `tests.helpers.recipe_nets` is found from here


def write(tmp_path: Path, net: str, more: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(net=net, more=more))
    return path


@pytest.mark.parametrize(
    ("net", "last", "more"), [("resnet18_cifar", "bn2", ""), ("resnet18_cifar", "bn2", WIDE), ("botnet50", "bn3", "")]
)
def test_only_the_last_norm_of_a_block_starts_at_zero(tmp_path: Path, net: str, last: str, more: str) -> None:
    model = prepare(load(write(tmp_path, net, more)), 0, Processes(torch.device("cpu"))).model
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    zero = {name for name, norm in norms.items() if not norm.weight.any()}
    assert zero == {name for name in norms if name.startswith("layer") and name.endswith(last)}
    assert all(bool((norms[name].weight == 1).all()) for name in norms.keys() - zero)


def test_zeroed_blocks_learn(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, "resnet18_cifar", WIDE))
    (summary,) = run_seeds(recipe, [0], tmp_path / "runs", None, lambda *_: None, lambda *_: None)
    newest = RunDirectory.open(Path(summary["path"])).checkpoints.newest()
    assert newest is not None
    last = {
        k: v
        for k, v in load_file(newest.path / "tensors.safetensors").items()
        if k.endswith("bn2.weight") and "layer" in k
    }
    assert len(last) == 5  # a norm of each block
    assert all(bool(v.all()) for v in last.values())


def test_a_net_without_such_a_norm(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mobilenet_v2 has no residual block that ends with a norm"):
        prepare(load(write(tmp_path, "mobilenet_v2", "")), 0, Processes(torch.device("cpu")))


def test_a_preserved_function_is_not_zeroed(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: resnet18_cifar\ndata: cifar100\ntransform: wide\nsparsity: 0.5\n"
        "init: {start: preserve, checkpoint: a.pt, zero_residual: true}\ntraining: {steps: 1}\n"
    )
    with pytest.raises(UsageError, match="zero_residual: is for start fresh; preserve would ignore it"):
        load(path)
