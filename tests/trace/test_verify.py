"""`flops --verify`: the counts of FlopCounterMode and fvcore against ours, and what the verdict says of them."""

from __future__ import annotations

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


class NeedsKeyword(nn.Module):
    """x [batch, tokens, 8] -> [batch, tokens, 4] times `scale` [4]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.linear(x) * scale


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


def test_a_counter_that_cannot_run_is_said() -> None:
    found = verified(NeedsKeyword, scale=torch.ones(4))
    assert found.flop_counter == found.ours == 320 and found.agree
    assert found.fvcore is None and "fvcore could not run" in found.verdict


def test_a_difference_without_a_known_reason_disagrees() -> None:
    found = Verification(ours=100, flop_counter=99, fvcore=None)
    assert not found.agree and "FlopCounterMode DISAGREES: 99 MACs where sparseift counts 100." in found.verdict
    nothing = Verification(ours=100, flop_counter=None, fvcore=None)
    assert not nothing.agree and "nothing is verified" in nothing.verdict
