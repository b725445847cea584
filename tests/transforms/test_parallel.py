"""The end of a branch of Sparse Parallel: the norm, and the activation of the replaced layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.models import zoo
from sparseift_cli.transforms.members.parallel import SparseParallel


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
    """The modules after the weights of a branch, by the layer that was replaced."""
    new, _ = sparseift.transform(model, torch.randn(2, 3, size, size), member="parallel", sparsity=0.75, **options)
    new(torch.randn(2, 3, size, size)).sum().backward()
    return {
        name: [type(module).__name__ for module in member.branches[0].children()][1:]
        for name, member in new.named_modules()
        if isinstance(member, SparseParallel)
    }


@pytest.mark.parametrize("in_place", [False, True])
def test_a_branch_with_a_norm_has_only_the_activation_of_its_own_layer(in_place: bool) -> None:
    """The relu after the sum follows no single layer."""
    assert ends(Residual(in_place=in_place), 8) == {
        "conv1": ["BatchNorm2d", "ReLU"],
        "conv2": ["BatchNorm2d"],
        "shortcut.0": ["BatchNorm2d"],
    }


def test_an_activation_by_name_is_in_every_branch() -> None:
    found = ends(Residual(in_place=False), 8, activation="gelu")
    assert set(map(tuple, found.values())) == {("BatchNorm2d", "GELU")}
    assert set(map(tuple, ends(Residual(in_place=False), 8, activation="none").values())) == {("BatchNorm2d",)}


def test_without_a_norm_every_branch_has_an_activation_or_it_would_be_one_matrix() -> None:
    assert ends(PlainConvs(), 12) == {"b": ["LeakyReLU"], "c": ["ReLU"], "d": ["GELU"]}


class Layered(nn.Module):
    """LayerNorm over the channels of an image, moved to the end and back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Used(nn.Module):
    """A convolution with BatchNorm whose output goes to `use`, with the input of the convolution."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *, norm: bool = True) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16) if norm else nn.Identity()
        self.head, self.use = nn.Linear(16, 10), use

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.head(self.use(self.norm(self.conv(x)), x).mean((2, 3)))


def part_of(y: Tensor, x: Tensor) -> Tensor:
    y[:, :8] += x[:, :8]
    return F.relu(y)


def flat_of(y: Tensor, x: Tensor) -> Tensor:
    y.view(-1).add_(x.reshape(-1))
    return F.relu(y)


def in_place(y: Tensor, x: Tensor) -> Tensor:
    y.relu_()
    return y


@pytest.mark.parametrize(
    ("use", "last"),
    [
        (part_of, None),
        (flat_of, None),
        (lambda y, x: F.relu(y) + y, None),
        (lambda y, x: F.relu(torch.cat([y, x], 1)[:, :16]), None),
        (lambda y, x: F.relu(y + F.avg_pool2d(y, 3, 1, 1)), None),
        (lambda y, x: F.relu(y) + x, "ReLU"),
        (in_place, "ReLU"),
        (lambda y, x: F.leaky_relu_(y, 0.2), "LeakyReLU(negative_slope=0.2)"),
        (lambda y, x: F.hardtanh(y, 0, 6), "Hardtanh(min_val=0, max_val=6)"),
        (lambda y, x: F.relu(0.5 * F.dropout(y, 0.1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "ReLU"),
    ],
)
def test_other_readers_of_a_layer_decide(use: Callable[[Tensor, Tensor], Tensor], last: str | None) -> None:
    new, _ = sparseift.transform(Used(use), torch.randn(2, 3, 8, 8), member="parallel", sparsity=0.75)
    (member,) = (m for m in new.modules() if isinstance(m, SparseParallel))
    found = [str(module) for module in member.branches[0].children()][2:]
    assert [f.replace("0.0", "0").replace("6.0", "6").removesuffix("()") for f in found] == ([last] if last else [])


def test_a_stream_that_is_normed_before_it_is_read_again_is_not_rectified() -> None:
    def use(y: Tensor, x: Tensor) -> Tensor:
        return F.relu(F.instance_norm(y)) + y

    assert ends(Used(use, norm=False), 8) == {"conv": ["BatchNorm2d"]}


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16), nn.InstanceNorm2d(16, affine=True), Layered(), None], ids=str)
def test_an_activation_after_any_norm_is_found(norm: nn.Module | None) -> None:
    assert ends(Normed(norm), 8) == {"conv": ["BatchNorm2d", "SiLU"]}


@pytest.mark.parametrize(
    ("name", "last", "inner"),
    [
        ("mobilenet_v2", "features.3.conv.2", "features.3.conv.0.0"),
        ("wrn_28_10", "block1.layer.0.conv2", "block1.layer.0.conv1"),
    ],
)
def test_layers_that_write_to_a_residual_stream_stay_linear(name: str, last: str, inner: str) -> None:
    """MobileNetV2's linear bottlenecks (Sandler et al. 2018), and the last convolution of a pre-activated block."""
    with torch.device("meta"):
        model, _ = sparseift.transform(zoo.build(name), torch.randn(2, 3, 32, 32), member="parallel", sparsity=0.75)
    found = {n: m for n, m in model.named_modules() if isinstance(m, SparseParallel)}
    behind = {n: [type(part).__name__ for part in found[n].branches[0].children()][1:] for n in (last, inner)}
    assert behind[last] == ["BatchNorm2d"] and len(behind[inner]) == 2
