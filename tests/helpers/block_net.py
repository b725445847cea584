"""A small net of linear layers and convolutions whose masks are blocks of 4 x 4 (all taps), and a loop around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.kernels.convert import use_kernels
from sparseift_cli.mask.attached import attach
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.models.zoo.gpt import Conv1D
from sparseift_cli.sparsity.sparsifier import Sparsifier

STEPS = 24


class BlockNet(nn.Module):
    """Convolutions of 3x3 (stride 2) and 1x1, a Conv1D and a linear layer that is used twice; a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(16, 8, 1)
        self.up = Conv1D(8, 16)
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        nn.init.normal_(self.up.weight, std=0.3)
        nn.init.normal_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(F.relu(self.conv(F.relu(self.stem(x))))).mean((2, 3))
        x = F.gelu(self.up(x))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


PATTERNS = {"conv.weight": "4x36", "point.weight": "4x4", "up.weight": "4x4", "twice.weight": "4x4"}


def block_net(*, compact: bool, seed: int = 0) -> BlockNet:
    """The same net for the same seed, with its zeros or without."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = BlockNet()
    for name, pattern in PATTERNS.items():
        weight = net.get_parameter(name)
        transposed = name == "up.weight"
        mask = make_mask(
            weight.shape,
            weight.numel() // 2,
            generator=generator_for(seed, name),
            pattern=pattern,
            transposed=transposed,
        )
        attach(net, {name: mask}, {name: pattern})
    if compact:
        choices = use_kernels(net, "reference")
        assert [choice.backend for choice in choices] == ["reference"] * 4, choices
    return net


def make(net: nn.Module, optimizer: torch.optim.Optimizer, algorithm: str = "rigl", **options: object) -> Sparsifier:
    given = {"delta_t": 3, "drop_fraction": 0.5} | options
    return Sparsifier(net, optimizer, algorithm=algorithm, total_steps=STEPS, **given)


def loss_of(net: nn.Module, step: int, part: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = generator_for(2, str(step), str(part))
    x = torch.randn(4, 3, 9, 9, generator=generator).to(device)
    return F.cross_entropy(net(x), torch.randint(4, (4,), generator=generator).to(device))


def dense_weights(net: nn.Module) -> dict[str, Tensor]:
    """Every weight with its zeros, by name."""
    return {name: net.get_submodule(name.rpartition(".")[0]).weight.detach().clone() for name in PATTERNS}
