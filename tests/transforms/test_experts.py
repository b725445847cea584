"""Experts stacked in one tensor [experts, out, in]: each token uses top_k of them, all have equally many non-zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import UsageError
from sparseift_cli.plan.audit import audit, to_json
from sparseift_cli.plan.spec import TrainingSpec
from sparseift_cli.sparsity.sparsifier import Sparsifier
from sparseift_cli.train.flop_meter import FlopMeter
from sparseift_cli.transforms.transformation import Options, transformation_of

WIDTH, HIDDEN, EXPERTS, TOP, TOKENS = 8, 12, 5, 2, 6
ROUTED = TOKENS * TOP  # 12 products of a token with an expert: no multiple of 5
EXAMPLE = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """As in transformers: by `grouped_mm` on tokens sorted by expert, or by one gathered matrix a token and `bmm`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.3)

    def forward(self, x: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        ids, order = torch.sort(chosen.reshape(-1))
        tokens = x[order // TOP]
        ends = torch.cumsum(torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1), 0, dtype=torch.int32)
        y = self.product(self.product(tokens, self.up, ids, ends).relu(), self.down, ids, ends)
        weighted = y * share.reshape(-1)[order][:, None]
        return torch.zeros_like(x).index_add(0, order // TOP, weighted)

    def product(self, x: Tensor, weight: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        if self.how == "gathered":
            return torch.bmm(weight[ids], x[..., None])[..., 0]
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


class Mixture(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(4, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.experts, self.head = Experts(how), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        share, chosen = self.router(x).softmax(-1).topk(TOP, -1)
        return self.head(x + self.experts(x, chosen, share))


def mixture(how: str = "grouped") -> Mixture:
    torch.manual_seed(0)
    return Mixture(how).eval()


def nonzeros(module: nn.Module) -> dict[str, list[int]]:
    """Of every expert, from the masks."""
    masks = {k: m for k, m in sparseift.masks(module).items() if m.dim() == 3}
    return {key: [int(expert.count_nonzero()) for expert in mask] for key, mask in masks.items()}


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch without grouped_mm")
@pytest.mark.parametrize("how", ["grouped", "gathered"])
def test_every_expert_has_the_non_zeros_of_its_dense_self(how: str) -> None:
    """8 -> 12 becomes 16 -> 24 with the 96 non-zeros of the dense matrix; 12 routed tokens cost 12 * 96 MACs."""
    module, plan = sparseift.transform(mixture(how), EXAMPLE, sparsity=0.75)
    rows = {row.layer.name: row for row in plan.layers if row.layer.kind == "experts"}
    assert list(rows) == ["experts.up", "experts.down"]
    for row in rows.values():
        assert (row.dense_macs, row.macs, row.status) == (ROUTED * 96, ROUTED * 96, "transformed")
    assert module.experts.up.shape == (EXPERTS, 24, 16) and module.router.weight.shape == (EXPERTS, 16)
    assert nonzeros(module) == {"experts.up": [96] * EXPERTS, "experts.down": [96] * EXPERTS}
    first, second = sparseift.masks(module)["experts.up"][:2]
    assert not torch.equal(first, second)
    assert sparseift.audit(module, EXAMPLE).growth() is None
    assert module(EXAMPLE).isfinite().all()


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch without grouped_mm")
def test_rows_of_grouped_products_stay_aligned() -> None:
    """`grouped_mm` wants rows of whole 16 bytes: 8 * 1.58 is 12.6, 16 in whole 8s; 12 * 1.58 is 19.0, 20 in whole 4s."""
    module, plan = sparseift.transform(mixture(), EXAMPLE, sparsity=0.6)
    assert module.experts.up.shape == (EXPERTS, 20, 16)
    assert module(EXAMPLE).isfinite().all()
    module(EXAMPLE).sum().backward()
    assert all(row.macs == ROUTED * 96 for row in plan.layers if row.layer.kind == "experts")


def test_active_parameters_are_those_that_a_token_uses() -> None:
    """Two of five experts: 2 * (96 + 96) of 5 * (96 + 96), dense; four times as many in the wide model, as many non-zeros."""
    module, _ = sparseift.transform(mixture("gathered"), EXAMPLE, sparsity=0.75)
    result = sparseift.flops(module)
    totals = to_json(result)["totals"]
    for which, factor in (("dense", 1), ("transformed", 4)):
        assert totals[which]["params"] - totals[which]["active_params"] == factor * (EXPERTS - TOP) * 192
    saved = totals["transformed"]["nonzero_params"] - totals["transformed"]["active_nonzero_params"]
    assert saved == (EXPERTS - TOP) * 192
    assert "parameters a token uses" in str(result) and "Experts: MACs are tokens" in str(result)


@pytest.mark.parametrize("match", ["layer", "model", "train"])
@pytest.mark.parametrize("algorithm", ["rigl", "gmp"])
def test_mask_updates_keep_the_experts_equal(match: str, algorithm: str) -> None:
    steps, options = 8, {"delta_t": 2}
    training = TrainingSpec(algorithm=algorithm, steps=steps, **options)
    module, plan = sparseift.transform(
        mixture("gathered"), EXAMPLE, sparsity=0.5, match=match, scope="all", training=training
    )
    done = transformation_of(module.train())
    assert done is not None
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    sparsifier = Sparsifier(module, optimizer, algorithm=algorithm, total_steps=steps, **options)
    meter = FlopMeter(plan.layers, done.surgery.masked, 1, recompute=False)
    for _ in range(steps):
        module(EXAMPLE).square().mean().backward()
        sparsifier.step()
        meter.add(sparsifier.last)
        optimizer.step()
        optimizer.zero_grad()
    assert all(len(set(counts)) == 1 for counts in nonzeros(module).values())
    run = audit(plan, training).transformed
    assert run is not None and meter.macs == steps * run.training_macs
    sparseift.audit(module.eval(), EXAMPLE)


def test_the_wide_mixture_starts_as_the_dense_one_and_is_loaded_as_it_was(tmp_path: Path) -> None:
    dense = mixture("gathered")
    module, _ = sparseift.transform(
        dense, EXAMPLE, sparsity=0.75, options=Options(start="preserve", preserve_slack=0.0)
    )
    done = transformation_of(module)
    assert done is not None and done.deviation is not None and done.deviation < 1e-5
    sparseift.save(module, tmp_path / "out")
    loaded = sparseift.load(tmp_path / "out", into=dense)
    assert torch.equal(loaded(EXAMPLE), module.eval()(EXAMPLE)) and nonzeros(loaded) == nonzeros(module)


def test_other_members_and_patterns_leave_or_refuse_experts_by_name() -> None:
    plan = sparseift.flops(mixture("gathered"), EXAMPLE, sparsity=0.75, member="doped").plan
    assert plan is not None
    reasons = {row.reason for row in plan.layers if row.layer.kind == "experts"}
    assert reasons == {"its weight is used by Experts: only Sparse Wide can transform it"}
    with pytest.raises(UsageError, match=r"pattern 4x4 does not fit experts\.up"):
        sparseift.transform(mixture("gathered"), EXAMPLE, sparsity=0.75, pattern="4x4")
