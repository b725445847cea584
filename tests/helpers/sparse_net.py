"""A small net with masks and a loop around it, for the tests of sparse training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.mask.attached import attach
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.sparsity.algorithms import MaskAlgorithm
from sparseift_cli.sparsity.sparsifier import Sparsifier

STEPS = 24
OPTIONS = {"delta_t": 3, "drop_fraction": 0.4}


class Net(nn.Module):
    """A convolution, a grouped one and a linear layer; a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.conv(x))))
        return self.head(torch.relu(self.fc(x.mean((2, 3)))))


def sparse_net(pattern: str = "unstructured", density: float = 0.25) -> Net:
    torch.manual_seed(0)
    net, masks = Net(), {}
    for name in ("conv.weight", "grouped.weight", "fc.weight"):
        weight = net.get_parameter(name)
        masks[name] = make_mask(
            weight.shape,
            int(weight.numel() * density) // 4 * 4,
            generator=generator_for(1, name),
            pattern=pattern,
            groups=2 if "grouped" in name else 1,
        )
    attach(net, masks)
    return net


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = generator_for(2, str(step))
    x = torch.randn(4, 3, 5, 5, generator=generator)
    return nn.functional.cross_entropy(net(x), torch.randint(4, (4,), generator=generator))


def make(
    net: nn.Module, optimizer: torch.optim.Optimizer, algorithm: str | MaskAlgorithm = "rigl", **options
) -> Sparsifier:
    given = {"total_steps": STEPS} | ({} if isinstance(algorithm, MaskAlgorithm) else OPTIONS) | options
    return Sparsifier(net, optimizer, algorithm=algorithm, **given)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, first: int, last: int) -> None:
    for t in range(first, last):
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()


def assert_zeros(sparsifier: Sparsifier) -> None:
    for w in sparsifier.weights:
        for tensor in (w.parameter.detach(), *sparsifier.state_of(w)):
            assert not tensor[~w.mask].any()
        assert torch.equal(w.mask_float.bool(), w.mask)
        assert w.nnz == int(w.mask.count_nonzero()) == sparsifier.nnz[w.name]
        assert not (w.mask & ~w.ever_active).any()
