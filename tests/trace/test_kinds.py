"""What a size counts, and which sizes a forward reads: what grows with the rest and what stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from tests.helpers.parts import Net


def weights(new: nn.Module, *names: str) -> list[tuple[int, ...]]:
    return [tuple(new.get_submodule(name).weight.shape) for name in names]


def test_a_depthwise_layer_keeps_its_outputs_per_input() -> None:
    """8 channels grow to 16 in a depthwise layer, as where PiT pools: both double at density 1/4, and 2 a channel stay 2."""
    net = Net(
        lambda n, x: n.head(n.b(n.pool(n.a(n.stem(x)))).mean((2, 3))),
        stem=nn.Conv2d(3, 8, 1),
        a=nn.Conv2d(8, 8, 1),
        pool=nn.Conv2d(8, 16, 3, groups=8),
        b=nn.Conv2d(16, 16, 1),
        head=nn.Linear(16, 5),
    )
    x = torch.randn(1, 3, 6, 6)
    new, _ = sparseift.transform(net, x, sparsity=0.75)
    assert weights(new, "a", "pool", "b", "head") == [(16, 16, 1, 1), (32, 1, 3, 3), (32, 32, 1, 1), (5, 32)]
    assert (new.pool.groups, new(x).shape) == (16, (1, 5))


def test_a_depthwise_layer_of_the_input_may_grow_by_more_outputs_per_input() -> None:
    """The three channels of an image cannot grow, so 4 outputs of each grow to 8."""
    net = Net(
        lambda n, x: n.head(n.b(n.stem(x)).mean((2, 3))),
        stem=nn.Conv2d(3, 12, 3, groups=3),
        b=nn.Conv2d(12, 12, 1),
        head=nn.Linear(12, 5),
    )
    new, _ = sparseift.transform(net, torch.randn(1, 3, 6, 6), sparsity=0.75)
    assert weights(new, "stem", "b", "head") == [(24, 1, 3, 3), (24, 24, 1, 1), (5, 24)]


class Fused(nn.Module):
    """Attention with keys of 4 and values of 8 entries a head, from one projection that is split within a head (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = 2, 4, 8
        self.qkv, self.out = nn.Linear(16, 2 * (4 + 4 + 8)), nn.Linear(2 * 8, 16)
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, tokens, _ = x.shape
        heads = self.qkv(x).view(batch, tokens, self.num_heads, -1)
        q, k, v = heads.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        mixed = (q @ k * self.key_dim**-0.5).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.val_dim)
        return self.head(x + self.out(mixed))


def test_the_parts_of_a_fused_head_grow_and_the_heads_stay() -> None:
    new, _ = sparseift.transform(Fused(), torch.randn(1, 5, 6), sparsity=0.75)
    assert (new.num_heads, new.key_dim, new.val_dim) == (2, 8, 16)
    assert weights(new, "qkv", "out") == [(2 * (8 + 8 + 16), 32), (32, 2 * 16)]


class Shifted(nn.Conv2d):
    """A convolution with a forward of its own, which reads a size that torch's own forward does not."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.reshape(self.out_channels, -1).view_as(self.weight)
        assert self.bias is not None
        return F.conv2d(input, weight) + self.bias.view(1, self.out_channels, 1, 1)


def test_a_layer_with_a_forward_of_its_own_may_read_its_sizes() -> None:
    net = Net(lambda n, x: n.c(n.b(n.a(x)).relu()), a=Shifted(3, 8, 1), b=Shifted(8, 12, 1), c=nn.Conv2d(12, 5, 1))
    x = torch.randn(1, 3, 4, 4)
    new, _ = sparseift.transform(net, x, sparsity=0.75)
    assert weights(new, "a", "b", "c") == [(16, 3, 1, 1), (24, 16, 1, 1), (5, 24, 1, 1)]
    assert (new.b.in_channels, new.b.out_channels, new(x).shape) == (16, 24, (1, 5, 4, 4))


@pytest.mark.parametrize("chunk", [lambda x: x.chunk(3, 1), lambda x: torch.chunk(x, dim=1, chunks=3)])
def test_the_last_of_uneven_chunks_is_the_rest(chunk: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """10 units in chunks of 4, 4 and 2: a chunk doubles to 8, the units are 3 * 8 - 2 = 22, and 6 are left."""
    net = Net(
        lambda n, x: n.head(torch.cat([n.mix(chunk(n.a(n.stem(x)))[0]), *chunk(n.a(n.stem(x)))[1:]], 1)),
        stem=nn.Linear(6, 8),
        a=nn.Linear(8, 10),
        mix=nn.Linear(4, 4),
        head=nn.Linear(10, 3),
    )
    new, _ = sparseift.transform(net, torch.randn(2, 6), sparsity=0.75)
    assert weights(new, "a", "mix", "head") == [(22, 16), (8, 8), (3, 22)]
    assert new(torch.randn(2, 6)).shape == (2, 3)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised in forward, as in BiT: what is zero in it does not stay zero."""

    def forward(self, input: Tensor) -> Tensor:
        rows = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(input, rows.reshape_as(self.weight), self.bias)


def test_a_model_of_standardised_weights_is_refused_for_that() -> None:
    net = Net(lambda n, x: n.b(n.a(n.stem(x))), stem=nn.Conv2d(3, 8, 1), a=Standardised(8, 8, 1), b=nn.Conv2d(8, 5, 1))
    with pytest.raises(
        UsageError, match=r"layers that stay dense \(the weight is computed in forward, not a parameter\)"
    ):
        sparseift.transform(net, torch.randn(1, 3, 4, 4), sparsity=0.75)


class Windows(nn.Module):
    """An image of 6 channels as windows of 3 x 3, a layer on each, and the sum of the windows (T2T, VOLO)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 6, 1), nn.Linear(54, 54), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(self.stem(x), 3, padding=1, stride=2).mT
        return self.head(F.fold(self.mix(columns).mT, (8, 8), (3, 3), padding=1, stride=2))


@pytest.mark.parametrize("batch", [(1,), ()])
def test_windows_of_an_image_grow_with_its_channels(batch: tuple[int, ...]) -> None:
    """At density 1/4 a window of 6 * 9 numbers becomes one of 12 * 9."""
    x = torch.randn(*batch, 3, 8, 8)
    new, plan = sparseift.transform(Windows(), x, sparsity=0.75)
    assert weights(new, "stem", "mix", "head") == [(12, 3, 1, 1), (108, 108), (2, 12, 1, 1)]
    assert new(x).shape == (*batch, 2, 8, 8)
    assert next(row.dense_macs for row in plan.layers if row.layer.name == "mix") == 16 * 54 * 54
