"""Small models for tests of the training loop, as SOURCEs: `tests.helpers.nets:mlp`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Tensor]


def mlp() -> Made:
    """[B, 3, 8, 8] -> 10, without batch norm: the same on one process or two."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.ReLU(),
        nn.Linear(16, 24),
        nn.ReLU(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )
    return model, torch.zeros(1, 3, 8, 8)


def cnn() -> Made:
    """[B, 3, 8, 8] -> 10, with batch norm and dropout."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8, 10),
    )
    return model, torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """Two convolutions around batch norm and dropout, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.drop(self.bn(self.conv1(x)).relu()))


def residual() -> Made:
    """[B, 3, 8, 8] -> 10: a stem, three numbered blocks with batch norm and dropout, a head."""
    blocks = nn.Sequential(*(Residual(8) for _ in range(3)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    parts = {"stem": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.BatchNorm2d(8), "blocks": blocks, "head": head}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model, torch.zeros(1, 3, 8, 8)


def letters() -> Made:
    """Bytes [B, 4] -> logits [B, 4, 256] of the byte that follows, by the byte before it alone."""
    return nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256)), torch.zeros(1, 4, dtype=torch.int64)


def overflowing() -> Made:
    """[B, 3, 8, 8] -> 10, with a finite loss and gradients that never are."""
    model, x = mlp()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient + torch.inf)
    return model, x


class NanInEvaluation(nn.Module):
    """Logits are finite in training and NaN in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.training else self.net(x) * torch.nan


def nan_in_evaluation() -> Made:
    """[B, 3, 8, 8] -> 10."""
    return NanInEvaluation(), torch.zeros(1, 3, 8, 8)


class Inverting(nn.Module):
    """An op between two layers that no rule counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x).relu()).relu()) @ torch.linalg.inv(torch.eye(4, device=x.device))


class SharedWeight(nn.Module):
    """Two layers of the body with one weight, which no member transforms, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.own = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.own(self.b(self.a(self.stem(x)).relu()).relu()).relu())


def shared_weight() -> Made:
    """[B, 4] -> 2."""
    return SharedWeight(), torch.zeros(1, 4)


def uncounted() -> Made:
    """[B, 16] -> 4."""
    return Inverting(), torch.zeros(1, 16)
