"""The scale of an attention, written in the ways that people write it: a float made of a width holds no width in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.plan.widths import solve
from sparseift_cli.table.table import LayerTable
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


@pytest.mark.parametrize("name", ["head_dim", "d_k", "hd"])
def test_a_head_dim_is_known_by_its_name(name: str) -> None:
    new, _ = sparseift.transform(Named(name), torch.randn(2, 7, 10), sparsity=0.75)
    assert (getattr(new, name), new.get_parameter("out.weight").shape) == (16, (64, 64))


def test_a_number_that_no_name_tells_is_named_as_the_reason() -> None:
    table = sparseift.inspect(Named("pieces"), torch.randn(2, 7, 10))
    assert isinstance(table, LayerTable)
    reasons = solve(table.widths, table.equations).reasons
    assert reasons[[w.name for w in table.widths].index("out.weight[1]")] == "must fit h, pieces: a count, not a width"
