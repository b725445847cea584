"""What an Audit derives from its totals and its plan."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.plan.audit import Totals, to_json
from tests.helpers import nets


@pytest.mark.parametrize(("macs", "flops"), [(Fraction(11, 12), 2), (Fraction(13, 12), 2), (Fraction(7), 14)])
def test_training_flops_are_the_nearest_whole_number(macs: Fraction, flops: int) -> None:
    assert Totals(1, macs, 1, 1, 1, 1, 1).training_flops == flops


def test_a_control_has_no_sparsity_that_it_can_match_up_to() -> None:
    """Its layers are sparse at their dense size, so it costs less than the dense model at any sparsity."""
    assert sparseift.flops("resnet20", sparsity=0.5, scope="none", match="off").s_max is None
    assert sparseift.flops("resnet20", sparsity=0.5).s_max == pytest.approx(0.99, abs=0.01)


def test_a_width_multiple_counts_the_factor_of_a_width() -> None:
    """Four heads, and two of keys, of 32 features are 128 and 64: multiples of 64, though 32 is none."""
    audit = sparseift.flops("llama_tiny", sparsity=0.75, width_multiple=64)
    assert audit.plan is not None and audit.plan.widening is not None
    assert {(w.dense, w.size) for w in audit.plan.widening.widened} == {(256, 512), (688, 1408), (16, 32)}


def test_a_body_row_that_grows_untransformed_is_named_and_owned() -> None:
    """Two layers 16 -> 16 become 32 -> 32 and dense: 2 * (1024 - 256) MACs that no other row causes."""
    with pytest.warns(UserWarning, match=r"2 layers of the body cost 4\.00000x dense .*: a, b \(weight shared"):
        module, _ = sparseift.transform(*nets.shared_weight(), sparsity=0.75)
    audit = sparseift.flops(module)
    assert [row.layer.name for row in audit.growing] == ["a", "b"]
    assert audit.owners() == {"stem": 64, "head": 32, "other untouched": 1536}
    assert to_json(audit)["warnings"] == [audit.growth()]
    assert f"Warning: {audit.growth()}." in str(audit)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_depthwise_rows_that_stay_dense_as_asked_are_no_warning(name: str) -> None:
    assert sparseift.flops(name, sparsity=0.75).growth() is None


class Attention(nn.Module):
    """x [2, 10, 16] through one head of attention, with its scores in memory or not, and a layer behind it."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return self.out((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v)


@pytest.mark.parametrize("fused", [False, True])
def test_scores_that_are_stored_are_activations(fused: bool) -> None:
    """20 tokens: 48 of a projection, 16 of the attention, 3 at the end; 2 x 10 x 10 scores. Four times fewer weights: k = 2."""
    model = nn.Sequential(nn.Linear(16, 16), Attention(fused))
    result = sparseift.flops(model, torch.zeros(2, 10, 16), sparsity=0.75)
    scores = 0 if fused else 200
    assert (result.dense.activations, result.dense.scores) == (20 * (16 + 48 + 16 + 3) + scores, scores)
    assert result.transformed is not None
    assert result.transformed.activations == 20 * (32 + 96 + 32 + 3) + scores
    data = to_json(result)["totals"]["transformed"]
    assert data["activation_factor"] == (3260 + scores) / (1660 + scores) and data["stored_scores"] == scores
    assert data["activation_factor_without_scores"] == 3260 / 1660
