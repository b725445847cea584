"""What ends a branch of Sparse Parallel: the norm, and the activation that is the layer's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli import zoo
from sparseift_cli.transforms.sparse_parallel import SparseParallel


class Residual(nn.Module):
    """conv-norm-relu-conv-norm, added to a projection of the input, in place or not; then a relu behind the sum."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.shortcut = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32))
        self.head, self.in_place = nn.Linear(32, 10), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.in_place:
            y += self.shortcut(x)
        else:
            y = y + self.shortcut(x)
        return self.head(F.relu(y).mean((2, 3)))


class PlainConvs(nn.Module):
    """No norm: conv-relu, conv-leaky_relu, conv, and a gelu behind the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3 if i == 0 else 16, 16, 3) for i in range(4))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.b(F.relu(self.a(x))), 0.2)
        return self.head(F.gelu(self.d(F.relu(self.c(x))).mean((2, 3))))


class Normed(nn.Module):
    """Another norm than BatchNorm behind a convolution, as a module or a function; BatchNorm elsewhere."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv, self.norm, self.act = nn.Conv2d(16, 16, 3, padding=1), norm, nn.SiLU()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.bn(self.stem(x))))
        y = F.group_norm(y, 4) if self.norm is None else self.norm(y)
        return self.head(self.act(y).mean((2, 3)))


def ends(model: nn.Module, size: int, **options: Any) -> dict[str, list[str]]:
    """What stands behind the weights of a branch, by the layer that was replaced."""
    new, _ = sparseift.transform(model, torch.randn(2, 3, size, size), member="parallel", sparsity=0.75, **options)
    new(torch.randn(2, 3, size, size)).sum().backward()
    return {
        name: [type(module).__name__ for module in member.branches[0].children()][1:]
        for name, member in new.named_modules()
        if isinstance(member, SparseParallel)
    }


@pytest.mark.parametrize("in_place", [False, True])
def test_behind_a_norm_a_branch_has_the_activation_of_its_own_layer_alone(in_place: bool) -> None:
    """The relu of the sum is nobody's: in every branch, of shortcuts too, it costs ResNet-18 3.5 points on CIFAR-100."""
    assert ends(Residual(in_place=in_place), 8) == {
        "conv1": ["BatchNorm2d", "ReLU"],
        "conv2": ["BatchNorm2d"],
        "shortcut.0": ["BatchNorm2d"],
    }


def test_an_activation_by_name_is_in_every_branch() -> None:
    found = ends(Residual(in_place=False), 8, activation="gelu")
    assert set(map(tuple, found.values())) == {("BatchNorm2d", "GELU")}
    assert set(map(tuple, ends(Residual(in_place=False), 8, activation="none").values())) == {("BatchNorm2d",)}


def test_without_a_norm_every_branch_has_an_activation_or_they_would_fold() -> None:
    assert ends(PlainConvs(), 12) == {"b": ["LeakyReLU"], "c": ["ReLU"], "d": ["GELU"]}


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16), nn.InstanceNorm2d(16, affine=True), None], ids=str)
def test_an_activation_behind_any_norm_is_seen(norm: nn.Module | None) -> None:
    assert ends(Normed(norm), 8) == {"conv": ["BatchNorm2d", "SiLU"]}


@pytest.mark.parametrize(
    ("name", "last", "inner"),
    [
        ("mobilenet_v2", "features.3.conv.2", "features.3.conv.0.0"),
        ("wrn_28_10", "block1.layer.0.conv2", "block1.layer.0.conv1"),
    ],
)
def test_what_a_residual_stream_takes_stays_linear(name: str, last: str, inner: str) -> None:
    """MobileNetV2's linear bottlenecks (Sandler et al. 2018), and the last convolution of a pre-activated block."""
    with torch.device("meta"):
        model, _ = sparseift.transform(zoo.build(name), torch.randn(2, 3, 32, 32), member="parallel", sparsity=0.75)
    found = {n: m for n, m in model.named_modules() if isinstance(m, SparseParallel)}
    behind = {n: [type(part).__name__ for part in found[n].branches[0].children()][1:] for n in (last, inner)}
    assert behind[last] == ["BatchNorm2d"] and len(behind[inner]) == 2
