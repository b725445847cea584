"""Local members that start as the dense layer: weights split exactly, factors as near as their counts allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseift_cli.errors import UsageError
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.trace.build import trace
from sparseift_cli.transforms.compare import deviation
from sparseift_cli.transforms.edits import Surgery
from sparseift_cli.transforms.initialise import initialise, preserve
from sparseift_cli.transforms.members.parallel import distribute
from sparseift_cli.transforms.preserve import Preserved
from sparseift_cli.transforms.preserve.factors import factorizations, truncated_svd
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for


class Net(nn.Module):
    """A grouped convolution, a linear layer with a bias, and an encoder block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(F.relu(self.stem(x))))).flatten(2).transpose(1, 2)
        return self.head(self.block(F.relu(self.fc(x))).mean(1))


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def made(**spec: Any) -> tuple[Any, Any, Preserved, Surgery]:
    torch.manual_seed(0)
    dense = Net().eval()
    traced = trace(dense, (X,), name="net", input_shape=tuple(X.shape))
    plan = make_plan(traced.table, TransformSpec(**spec))
    surgery = surgery_for(plan, traced.structure, dense)
    new = apply_surgery(dense, surgery)
    initialise(new, dense, surgery)
    preserved = preserve(new, dense, plan, surgery, traced.structure)
    for m in surgery.masked:
        assert int(preserved.masks[m.key].sum()) == m.nnz
        assert not new.get_parameter(m.key)[~preserved.masks[m.key]].any()
    return dense, new, preserved, surgery


@pytest.mark.parametrize("projections", ["untouched", "transformed"])
@pytest.mark.parametrize("sparsity", ["0.3", "0.9"])
def test_parallel_splits_the_weights_over_its_branches(sparsity: str, projections: str) -> None:
    dense, new, preserved, surgery = made(
        member="sparse_parallel", branch_activation="sum", sparsity=sparsity, projections=projections
    )
    assert deviation(new, dense, (X,), {}) <= 1e-5
    branches = [m.key for m in surgery.masked if m.layer == "fc"]
    assert torch.equal(sum(new.get_parameter(k) for k in branches), dense.fc.weight)
    assert torch.equal(sum(preserved.masks[k].long() for k in branches), torch.ones(16, 16, dtype=torch.long))
    for key in branches[:8]:
        assert preserved.masks[key].any(1).sum() >= 14  # split row by row: a branch misses at most two outputs
    a, b = dense.train()(X), new.train()(X)
    assert torch.allclose(a, b, atol=1e-5)
    assert not any("not exact" in note for note in preserved.notes)


def test_splitting_over_too_few_and_too_many_positions() -> None:
    weight = torch.randn(6, 5)
    generator = torch.Generator().manual_seed(0)
    shared, masks = distribute(weight, [7, 9], generator)
    assert [int(m.sum()) for m in masks] == [7, 9]
    total = weight * shared[0] + weight * shared[1]
    assert set(total[total != 0].abs().tolist()) == set(weight.abs().flatten().topk(16).values.tolist())
    shared, masks = distribute(weight, [20, 25], generator)
    assert [int(m.sum()) for m in masks] == [20, 25]
    assert torch.equal(weight * shared[0] + weight * shared[1], weight)
    assert not (shared[0] & shared[1]).any()


def test_doped_is_the_best_low_rank_part_and_the_largest_residuals() -> None:
    dense, new, preserved, surgery = made(member="sparse_doped", sparsity="0.5")
    layer, (masked,) = new.fc, [m for m in surgery.masked if m.layer == "fc"]
    rank = layer.u.weight.shape[0]
    left, s, right = torch.linalg.svd(dense.fc.weight.detach())
    low = (left[:, :rank] * s[:rank]) @ right[:rank]
    assert torch.allclose(layer.v.weight @ layer.u.weight, low, atol=1e-5)
    rest = dense.fc.weight - low
    smallest = rest.abs().flatten().topk(masked.nnz).values[-1]
    expected = torch.where(rest.abs() >= smallest, rest, 0.0)
    assert torch.allclose(layer.sparse.weight, expected, atol=1e-5)
    assert torch.equal(layer.sparse.bias, dense.fc.bias)
    assert any(note.startswith("not exact: Sparse Doped") for note in preserved.notes)
    assert 1e-5 < deviation(new, dense, (X,), {}) < 0.5


def test_doped_convolutions_are_factorized_group_by_group() -> None:
    dense, new, _, _ = made(member="sparse_doped", sparsity="0.5")
    u, v = new.conv.u.weight, new.conv.v.weight
    rank = u.shape[0] // 2
    for group in range(2):
        matrix = dense.conv.weight[8 * group : 8 * group + 8].flatten(1)
        left, s, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
        mine = v[8 * group : 8 * group + 8].flatten(1) @ u[rank * group : rank * group + rank].flatten(1)
        assert torch.allclose(mine, (left[:, :rank] * s[:rank]) @ right[:rank], atol=1e-5)


@pytest.mark.parametrize("sparsity", ["0.3", "0.9"])
def test_factorized_reports_what_it_leaves_out(sparsity: str) -> None:
    dense, new, preserved, _ = made(member="sparse_factorized", inner="linear", sparsity=sparsity)
    assert deviation(new, dense, (X,), {}) < 0.6
    assert any(note.startswith("not exact: Sparse Factorized") for note in preserved.notes)
    lost = (new.fc.v.weight @ new.fc.u.weight - dense.fc.weight).detach()
    assert float(lost.norm() / dense.fc.weight.detach().norm()) < 0.5


def test_every_factorization_is_the_matrix_before_masks() -> None:
    matrix = torch.randn(2, 4, 6, dtype=torch.float64)
    ways = factorizations(matrix, 7)
    assert [w.method for w in ways] == [
        "U V is a truncated singular value decomposition",
        "the factors have an identity in U",
        "the factors have an identity in V",
    ]
    for way in ways:
        assert torch.allclose(way.v @ way.u, matrix)
    assert len(factorizations(matrix, 5)) == 2 and len(factorizations(matrix, 3)) == 1
    truncated = truncated_svd(matrix, 2)
    assert torch.linalg.matrix_rank(truncated.v @ truncated.u).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("spec", "option"),
    [({"member": "sparse_parallel"}, "branch-activation sum"), ({"member": "sparse_factorized"}, "inner linear")],
    ids=str,
)
def test_inner_non_linearities_are_refused(spec: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match="norm or activation inside") as caught:
        made(sparsity="0.9", **spec)
    assert option in (caught.value.hint or "")
