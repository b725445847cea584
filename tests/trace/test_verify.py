"""`flops --verify`: the counts of FlopCounterMode and fvcore against ours, and what the verdict says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.trace.build import trace
from sparseift_cli.trace.verify import Verification, verify


class Attends(nn.Module):
    """x [batch, tokens, 8] -> the same shape, through nn.MultiheadAttention, whose CPU fast path no counter sees."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    """x [batch, tokens, 8] -> [batch, tokens, 12], through an LSTM, which fvcore has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def verified(make: type[nn.Module], **kwargs: Tensor) -> Verification:
    def build(device: str) -> Any:
        x = torch.zeros(2, 5, 8, device=device)
        return make().to(device).eval(), (x,), {k: v.to(device) for k, v in kwargs.items()}

    model, args, named = build("meta")
    table = trace(model, args, named, name="net", input_shape=(2, 5, 8)).table
    return verify(build, table)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_attention_of_a_multihead_module_agrees_on_meta_tensors() -> None:
    found = verified(Attends)
    # projections 10 tokens * (8 * 24 + 8 * 8), products 2 samples * 5 * 5 * 8 * 2
    assert found.flop_counter == found.ours == 10 * 256 + 800
    assert found.agree


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_fvcore_has_no_rule_for_is_named_and_does_not_fail() -> None:
    found = verified(Recurrent)
    assert found.flop_counter == found.ours == 10 * 48 * (8 + 12)
    assert found.fvcore is not None and found.fvcore.total == 0 and found.fvcore.unseen == {"aten::lstm": 1}
    assert found.agree
    assert "fvcore counts 0 MACs where sparseift counts 9,600, having no rule for some ops." in found.verdict
    assert "aten::lstm x1" in found.verdict


def test_a_difference_without_a_known_reason_disagrees() -> None:
    found = Verification(ours=100, flop_counter=99, fvcore=None)
    assert not found.agree and "FlopCounterMode DISAGREES: 99 MACs where sparseift counts 100." in found.verdict
    nothing = Verification(ours=100, flop_counter=None, fvcore=None)
    assert not nothing.agree and "nothing is verified" in nothing.verdict


class Returns(nn.Module):
    """Its call and its result have more in them than tensors: keywords, a flag, a mapping with None."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor, flag: bool = True) -> Any:
        y = self.linear(x if mask is None else x * mask) * scale
        return {"logits": y, "loss": None, "more": [y]} if flag else y


class OwnFunction(torch.autograd.Function):
    """A product that torch.jit does not look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def each_row(n: Any, x: Tensor) -> Tensor:
    return torch.vmap(torch.vmap(lambda row: n.linear(row)))(x)


def differentiates(n: Any, x: Tensor) -> Tensor:
    place = x.requires_grad_(True)
    return torch.autograd.grad(n.linear(place).square().sum(), place, create_graph=True)[0]


# What each counter says (None: it cannot run): ours, FlopCounterMode's and fvcore's MACs, for x [2, 5, 8]. The linear layer
# 8 > 4 costs 320; a complex convolution is made of three real ones of 2 * 8 places, 5 inputs and 8 outputs.
SEEN: dict[str, tuple[Callable[[Any, Tensor], Any], int, int, int | None]] = {
    "bilinear": (lambda n, x: nn.functional.bilinear(x, x, n.cube), 10 * 8 * 8 * 8 + 10 * 8 * 8, 0, 0),
    "vector": (lambda n, x: n.linear(x) * torch.mv(x[0], n.vector)[None, :, None], 320 + 5 * 8, 320, 320),
    "in place": (lambda n, x: (x[0] * 1).addmm_(x[0], n.square), 5 * 64, 0, 0),
    "distances": (lambda n, x: torch.cdist(x[0], n.square), 5 * 8 * 8, 0, 0),
    "einsum": (lambda n, x: torch.einsum("abi,j,ij->abj", x, n.vector, n.square), 640, 640, 672),
    "Function": (lambda n, x: OwnFunction.apply(x[0], n.square), 5 * 64, 5 * 64, 0),
    "complex": (lambda n, x: nn.functional.conv1d(x + 0j, torch.complex(n.taps, n.taps)).abs(), 1920, 1920, 1920),
    "vmap": (each_row, 320, 320, None),
    "gradient": (differentiates, 640, 640, None),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_another_counter_cannot_see_is_no_disagreement(name: str) -> None:
    forward, ours, flop_counter, fvcore = SEEN[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4, bias=False)
            self.vector, self.square = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8, 8))
            self.cube, self.taps = nn.Parameter(torch.ones(8, 8, 8)), nn.Parameter(torch.ones(8, 5, 1))

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    found = verified(Model)
    assert (found.ours, found.flop_counter) == (ours, flop_counter)
    assert (found.fvcore.total if found.fvcore else None) == fvcore
    assert found.agree and "DISAGREES" not in found.verdict
    assert (fvcore is None) == ("fvcore could not run" in found.verdict)
    assert (flop_counter == ours) != ("FlopCounterMode cannot see: aten." in found.verdict)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_counter_takes_keywords_and_mappings() -> None:
    found = verified(Returns, scale=torch.ones(4), mask=torch.ones(8))
    assert found.flop_counter == found.ours == 320 and found.fvcore is not None and found.fvcore.total == 320
