"""The scale of an attention, written in the ways that people write it: a float made of a width holds no width in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.transforms.transformation import Options

SCALES: dict[str, Callable[[Any], Any]] = {
    "power": lambda size: size**-0.5,
    "math.sqrt": lambda size: 1.0 / math.sqrt(size),
    "float": lambda size: float(size) ** -0.5,
    "numpy.sqrt": lambda size: 1.0 / np.sqrt(size),
}


class Block(nn.Module):
    """Causal self-attention and an MLP on a residual stream, as in small GPTs written by hand."""

    def __init__(self, scale: Callable[[Any], Any], *, attribute: bool) -> None:
        super().__init__()
        self.scale, self.attribute = scale, attribute
        self.n_head, self.n_embd, self.head_dim = 4, 32, 8
        self.embed, self.c_attn, self.c_proj = nn.Linear(10, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, c = x.size()
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-2, -1)) * self.scale(self.head_dim if self.attribute else k.size(-1))
        x = x + self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("attribute", [False, True], ids=["size", "attribute"])
@pytest.mark.parametrize("scale", SCALES)
def test_every_width_grows(scale: str, attribute: bool) -> None:
    x = torch.randn(2, 7, 10)
    model = Block(SCALES[scale], attribute=attribute)
    new, plan = sparseift.transform(model, x, sparsity=0.75)
    shapes = {n: tuple(p.shape) for n, p in new.named_parameters() if n.endswith("weight")}
    assert shapes == {
        "embed.weight": (64, 10),
        "c_attn.weight": (192, 64),
        "c_proj.weight": (64, 64),
        "up.weight": (128, 64),
        "down.weight": (64, 128),
        "head.weight": (5, 64),
    }
    assert [r.layer.name for r in plan.layers if r.status == "transformed"] == ["c_attn", "c_proj", "up", "down"]
    sparseift.audit(new, x)


@pytest.mark.parametrize("scale", SCALES)
def test_a_preserved_model_computes_what_it_did(scale: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 10)
    model = Block(SCALES[scale], attribute=False).eval()
    new, _ = sparseift.transform(model, x, sparsity=0.75, options=Options(start="preserve", preserve_slack=0.0))
    torch.testing.assert_close(new.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_sizes_are_as_they_were_afterwards() -> None:
    before = dict(vars(torch.SymInt))
    sparseift.flops(Block(partial(pow, 1), attribute=False), torch.randn(2, 7, 10))
    assert dict(vars(torch.SymInt)) == before


class Named(nn.Module):
    """One attention whose head dim is an attribute of the given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.h = name, 4
        setattr(self, name, 8)
        self.embed, self.qkv, self.out, self.head = (
            nn.Linear(10, 32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, _ = x.shape
        d = getattr(self, self.name)
        q, k, v = self.qkv(x).view(b, t, 3, self.h, d).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) / math.sqrt(d)).softmax(-1) @ v
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, t, self.h * d)))


@pytest.mark.parametrize("name", ["head_dim", "d_k", "hd", "pieces", "num_slots"])
def test_what_the_scores_sum_over_is_a_head_dim_whatever_its_name(name: str) -> None:
    new, _ = sparseift.transform(Named(name), torch.randn(2, 7, 10), sparsity=0.75)
    assert (getattr(new, name), new.get_parameter("out.weight").shape) == (16, (64, 64))


class Attention(nn.Module):
    """Four heads of 8 on a stream of 32; `score(self, q, k)` makes the scores [B, 4, T, T] from queries and keys."""

    def __init__(self, score: Callable[[Any, Tensor, Tensor], Tensor], **numbers: Any) -> None:
        super().__init__()
        self.score = score
        for name, number in numbers.items():
            self.register_buffer(name, number) if isinstance(number, Tensor) else setattr(self, name, number)
        self.embed, self.qkv, self.out = nn.Linear(10, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = self.score(self, q, k).softmax(-1) @ v
        return self.head(x + self.out(mixed.transpose(1, 2).reshape(b, t, -1)))


def added(n: Any, q: Tensor, k: Tensor) -> Tensor:
    """As Falcon and Bloom: the scale is an argument of the product."""
    flat = torch.zeros(1).baddbmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=n.tau)
    return flat.view(q.shape[0], q.shape[1], q.shape[2], -1)


D, WIDE = 8, 16
PLACES: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], float, float]] = {
    "score": (lambda n, q, k: q @ k.mT * n.tau, D**-0.5, WIDE**-0.5),
    "divided": (lambda n, q, k: q @ k.mT / n.tau, D**0.5, WIDE**0.5),
    "query": (lambda n, q, k: (q * n.tau) @ k.mT, D**-0.5, WIDE**-0.5),
    "number first": (lambda n, q, k: n.tau * q @ k.mT, D**-0.5, WIDE**-0.5),
    "in place": (lambda n, q, k: q.clone().mul_(n.tau) @ k.mT, D**-0.5, WIDE**-0.5),
    "query and key": (lambda n, q, k: (q * n.tau) @ (k * n.tau).mT, D**-0.25, WIDE**-0.25),
    "inverse": (lambda n, q, k: q @ k.mT * (1 / n.tau), D**0.5, WIDE**0.5),
    "beside another": (lambda n, q, k: q @ k.mT * (n.tau * 0.5), D**-0.5, WIDE**-0.5),
    "muP": (lambda n, q, k: q @ k.mT / n.tau, float(D), float(WIDE)),
    "tensor": (lambda n, q, k: q @ k.mT * torch.tensor(n.tau), D**-0.5, WIDE**-0.5),
    "full": (lambda n, q, k: q @ k.mT / torch.full([], n.tau), D**0.5, WIDE**0.5),
    "einsum": (lambda n, q, k: torch.einsum("bhqd,bhkd->bhqk", q * n.tau, k), D**-0.5, WIDE**-0.5),
    "alpha": (added, D**-0.5, WIDE**-0.5),
    "masked": (
        lambda n, q, k: (q @ k.mT * n.tau).masked_fill(torch.ones(7, 7).triu(1) > 0, -1e9),
        D**-0.5,
        WIDE**-0.5,
    ),
    "of all heads": (lambda n, q, k: q @ k.mT * n.tau, 32**-0.5, 64**-0.5),
    "unrelated": (lambda n, q, k: q @ k.mT * n.tau * q.shape[-1] ** -0.5, 0.77, 0.77),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_scale_follows_the_head_dim_whatever_its_name_and_place(place: str) -> None:
    score, dense, wide = PLACES[place]
    model = Attention(score, tau=dense)
    new, _ = sparseift.transform(model, torch.randn(2, 7, 10), sparsity=0.75)
    assert new.qkv.weight.shape == (192, 64)
    assert new.tau == pytest.approx(wide, rel=1e-12)
    assert model.tau == dense
    assert new(torch.randn(2, 7, 10)).isfinite().all()


@pytest.mark.parametrize("place", ["score", "query and key", "muP", "alpha", "of all heads"])
def test_preserve_makes_up_for_any_scale(place: str) -> None:
    score, dense, _ = PLACES[place]
    torch.manual_seed(0)
    model, x = Attention(score, tau=dense), torch.randn(2, 7, 10)
    new, _ = sparseift.transform(model, x, sparsity=0.75, options=Options(start="preserve", preserve_slack=0.0))
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_scale_in_a_buffer_follows_and_one_that_is_learned_does_not() -> None:
    model = Attention(lambda n, q, k: q @ k.mT * n.tau * n.learned, tau=torch.tensor(D**-0.5))
    model.learned = nn.Parameter(torch.full((4, 1, 1), D**-0.5))
    new, _ = sparseift.transform(model, torch.randn(2, 7, 10), sparsity=0.75)
    assert float(new.tau) == pytest.approx(WIDE**-0.5) and new.learned.shape == (4, 1, 1)
    torch.testing.assert_close(new.learned, torch.full((4, 1, 1), D**-0.5))


@pytest.mark.parametrize("scale", [*SCALES, "sqrt"])
def test_an_int_in_a_formula_alone_is_the_dim_that_it_scales(scale: str) -> None:
    function = SCALES.get(scale, lambda size: 1 / sqrt(size))
    model = Attention(lambda n, q, k: q @ k.mT * function(n.slots), slots=8)
    new, _ = sparseift.transform(model, torch.randn(2, 7, 10), sparsity=0.75)
    assert (new.slots, new.qkv.weight.shape) == (16, (192, 64))


LEFT: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], str]] = {
    "a number of the code": (lambda n, q, k: q @ k.mT / 8**0.5, r"scaled by 0\.3536, .*8 -> 16.* 1\.41 times sharper"),
    "an attribute": (lambda n, q, k: q @ k.mT * n.tau, r"scaled by tau = 0\.3, .*8 -> 16"),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_scale_that_follows_no_width_is_said(case: str) -> None:
    score, text = LEFT[case]
    with pytest.warns(UserWarning, match=text):
        new, _ = sparseift.transform(Attention(score, tau=0.3), torch.randn(2, 7, 10), sparsity=0.75)
    assert new.tau == 0.3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_by_size_is_no_warning(scale: str) -> None:
    model = Attention(lambda n, q, k: q @ k.mT * SCALES[scale](q.shape[-1]))
    new, _ = sparseift.transform(model, torch.randn(2, 7, 10), sparsity=0.75)
    assert new.qkv.weight.shape == (192, 64)


def test_factors_of_the_stream_follow_its_width() -> None:
    """An embedding times sqrt(width), a norm times sqrt(width) by hand; a residual factor that is no power of it stays."""

    def score(n: Any, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * q.shape[-1] ** -0.5

    class Scaled(Attention):
        down: float

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.normalize(self.embed(x) * self.up, dim=-1) * self.down
            return self.head(x + self.residual * self.out(torch.relu(self.mid(x))))

    model = Scaled(score, up=32**0.5, down=32**0.5, residual=0.2)
    model.mid = nn.Linear(32, 32)
    new, _ = sparseift.transform(model, torch.randn(2, 7, 10), sparsity=0.75)
    assert (new.up, new.down, new.residual) == (8.0, 8.0, 0.2)


def test_the_attributes_are_plain_floats_afterwards() -> None:
    model = Attention(PLACES["score"][0], tau=D**-0.5)
    sparseift.inspect(model, torch.randn(2, 7, 10))
    assert type(model.tau) is float
