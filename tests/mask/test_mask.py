"""Masks by hand: which places a pattern means, chance that favours none, and every refusal."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.checkpoint import open_checkpoint, scan
from sparseift_cli.errors import UsageError
from sparseift_cli.mask.mask import disjoint_masks, empty_rows_and_columns, make_mask
from sparseift_cli.mask.patterns import room
from sparseift_cli.mask.select import nth_largest, top


def draw(shape: tuple[int, ...], nnz: int, seed: int = 0, **options) -> Tensor:
    return make_mask(shape, nnz, generator=generator_for(seed), **options)


def picture(mask: Tensor) -> list[str]:
    return ["".join(".x"[int(v)] for v in row) for row in mask]


# --- generators ---


def test_generators_are_named() -> None:
    """The hash is part of what a seed means: a change gives every run other masks."""
    assert generator_for(0).initial_seed() == 11243728523470438572
    assert generator_for(0, "layer1.conv", "U").initial_seed() == 5207828075294369918
    seeds = [
        generator_for(seed, *names).initial_seed()
        for seed in (0, 1, -1)
        for names in ((), ("a",), ("b",), ("a", "b"), ("ab",), ("a,b",), ("1",))
    ]
    assert len(set(seeds)) == len(seeds)


def test_a_mask_depends_on_its_own_name_only() -> None:
    def of(names: str) -> dict[str, Tensor]:
        return {n: make_mask((16, 16), 60, generator=generator_for(7, n)) for n in names}

    one, other = of("abc"), of("cab")
    assert all(torch.equal(one[n], other[n]) for n in "abc")
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(one["a"], make_mask((16, 16), 60, generator=generator_for(8, "a")))


def test_bits_do_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    one = draw((700, 1000), 70_001)
    try:
        torch.set_num_threads(2)
        two = draw((700, 1000), 70_001)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


# --- chance ---


def chi_square(counts: list[int]) -> float:
    mean = sum(counts) / len(counts)
    return sum((n - mean) ** 2 for n in counts) / mean


@pytest.mark.parametrize("scores", [None, torch.zeros(2, 3), torch.tensor([[9.0, 9, 9], [9, 9, 9]])])
def test_every_mask_is_as_likely(scores: Tensor | None) -> None:
    generator = generator_for(3)
    drawn = [make_mask((2, 3), 2, generator=generator, scores=scores, connect=False) for _ in range(3000)]
    counts = Counter(tuple(m.flatten().tolist()) for m in drawn)
    assert len(counts) == 15
    assert chi_square(list(counts.values())) < 36.1  # 14 degrees of freedom, p = .001


@pytest.mark.parametrize("options", [{}, {"row_balance": 2}, {"column_balance": 4}, {"pattern": "2x1"}, {"groups": 4}])
def test_every_place_is_as_likely(options: dict) -> None:
    """In a sample small enough that connecting empty rows is the rule."""
    generator = generator_for(4)
    total = torch.stack([make_mask((8, 12), 12, generator=generator, **options) for _ in range(1000)]).sum(0)
    assert total.sum() == 12_000
    statistic = chi_square(total.flatten().tolist()) / (1 - 12 / 96)
    assert statistic < 96 + 5 * (2 * 96 * (2 if "pattern" in options else 1)) ** 0.5


def test_every_branch_is_as_likely() -> None:
    generator = generator_for(5)
    total = torch.zeros(4, 6, 6)
    for _ in range(800):
        total += torch.stack(disjoint_masks((6, 6), [9, 9, 9, 9], generator=generator))
    for branch in total:
        assert chi_square(branch.flatten().tolist()) < 70  # 35 degrees of freedom, at p < .001


def test_ties_of_a_row_are_chosen_by_chance() -> None:
    """An empty row of equal scores is connected anywhere, and any of the equal worst may leave."""
    scores = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
    generator = generator_for(6)
    total = torch.stack([make_mask((2, 3), 3, generator=generator, scores=scores) for _ in range(2000)]).sum(0)
    assert total.sum(1).tolist() == [4000, 2000]
    assert chi_square(total[0].tolist()) < 13.8 and chi_square(total[1].tolist()) < 13.8


# --- what a pattern means ---


def test_n_of_m_runs_along_the_input_channels_of_each_tap(tmp_path) -> None:
    """As sparse tensor cores want it, and as inspection of a checkpoint recognises it."""
    conv, linear = draw((8, 16, 3, 3), 8 * 72, pattern="2:4"), draw((64, 32), 512, pattern="1:4")
    assert conv.view(8, 4, 4, 9).sum(2).eq(2).all()
    turned = draw((32, 64), 512, pattern="1:4", transposed=True)
    assert turned.view(8, 4, 64).sum(1).eq(1).all()
    torch.save({"conv.weight": conv.float(), "linear.weight": linear.float()}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    found = {values.name: str(values.pattern.nm) for values in scan(checkpoint)}
    assert found == {"conv.weight": "2:4 along dim 1", "linear.weight": "1:4 along dim 1"}


def test_blocks_leave_the_ragged_edge_empty() -> None:
    assert picture(draw((5, 5), 16, pattern="2x2")) == ["xxxx.", "xxxx.", "xxxx.", "xxxx.", "....."]
    groups = draw((6, 4), 16, pattern="2x2", groups=2)  # three outputs a group: the third of each fills no block
    assert picture(groups) == ["xxxx", "xxxx", "....", "xxxx", "xxxx", "...."]


def test_block_scores_are_sums() -> None:
    scores = torch.tensor([[9.0, 0, 4, 4], [0, 0, 4, 4]])
    assert picture(draw((2, 4), 4, pattern="2x2", scores=scores)) == ["..xx", "..xx"]


def test_scores_of_a_transposed_weight() -> None:
    """Conv1D [in, out]: an output is a column, and its best input is forced in."""
    scores = torch.tensor([[9.0, 1.0], [8.0, 2.0], [7.0, 0.0]])
    assert picture(draw((3, 2), 3, scores=scores, transposed=True)) == ["x.", "xx", ".."]
    assert picture(draw((3, 2), 3, scores=scores, transposed=True, connect=False)) == ["x.", "x.", "x."]


def test_connecting_columns_blocks_keeps_their_shares() -> None:
    """Row 1 is empty at first; its best place is in the left block, whose worst leaves."""
    scores = torch.tensor([[9.0, 8, 9, 8], [3, 0, 2, 0]])
    assert picture(draw((2, 4), 4, scores=scores, column_balance=2)) == ["x.xx", "x..."]


def test_connect_prefers_a_block_with_room() -> None:
    """The left block has nothing to give (both places are a row's only one), so the third row goes to the right."""
    scores = torch.tensor([[9.0, 0, 8, 7], [0, 9, 6, 5], [4, 4, 1, 0]])
    assert picture(draw((3, 4), 4, scores=scores, column_balance=2)) == ["x.x.", ".x..", "..x."]


def test_depthwise_branches_share_out_few_taps() -> None:
    """Ten branches over nine taps: every branch has each of its weights in another channel."""
    masks = disjoint_masks((40, 1, 3, 3), [36] * 10, generator=generator_for(0), groups=40)
    assert torch.stack(masks).sum(0).eq(1).all()
    assert [empty_rows_and_columns(m, 40)[0] for m in masks[:9]] == [4] * 9


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: nn.Linear(6, 4), {}),
        (lambda: nn.Conv2d(6, 4, 3, groups=2), {"groups": 2}),
        (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), {"groups": 2, "transposed": True}),
    ],
)
def test_empty_rows_and_columns_mean_what_the_module_does(make, options: dict) -> None:
    """An empty output is constant; an unread input channel changes nothing."""
    torch.manual_seed(0)
    layer = make()
    mask = draw(tuple(layer.weight.shape), 3, **options)
    layer.weight.data.mul_(mask)
    shape = (1, 6) if isinstance(layer, nn.Linear) else (1, 6, 5, 5)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    silent = sum(not torch.autograd.grad(out[0, o].sum(), x, retain_graph=True)[0].any() for o in range(4))
    read = torch.autograd.grad(out.square().sum(), x)[0][0].flatten(1) if x.dim() == 4 else None
    read = torch.autograd.grad(layer(x).square().sum(), x)[0][0].view(6, -1) if read is None else read
    assert empty_rows_and_columns(mask, **options) == (silent, int((~read.any(1)).sum()))


def test_scores_are_compared_in_float32() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        scores = torch.tensor([[3, 1], [2, 4]]).to(dtype)
        assert picture(draw((2, 2), 2, scores=scores)) == ["x.", ".x"]
    assert picture(draw((1, 4), 2, scores=torch.tensor([[-torch.inf, 0, torch.inf, -1]]))) == [".xx."]


# --- refusals ---


@pytest.mark.parametrize(
    ("shape", "nnz", "options", "message"),
    [
        ((4, 4), 17, {}, "17 non-zeros do not fit a weight of 4 outputs x 4: unstructured has room for 16"),
        ((4, 4), -1, {}, "-1 non-zeros do not fit"),
        ((4, 4), 6, {"pattern": "2x2"}, "6 non-zeros are not whole 2x2 blocks of 4"),
        ((5, 5), 20, {"pattern": "2x2"}, "has room for 16"),
        ((4, 6), 11, {"pattern": "2:4"}, "2:4 gives a weight of 4 outputs x 6 12 non-zeros, not 11"),
        ((4, 4), 1, {"pattern": "4:2"}, "unknown pattern '4:2'"),
        ((4, 4), 1, {"pattern": "0x2"}, "unknown pattern"),
        ((4, 4), 1, {"groups": 3}, "shape 4x4 does not split into 3 groups"),
        ((4,), 1, {}, "two dimensions or more, none of them empty, not shape 4"),
        ((4, 4), 4, {"row_balance": 3}, "4 rows are not 3 equal parts"),
        ((4, 4), 4, {"column_balance": 0}, "4 columns are not 0 equal parts"),
        ((6, 4), 4, {"row_balance": 2, "pattern": "2x2"}, "6 rows are not 2 equal parts of whole blocks of 2"),
        ((4, 4), 4, {"row_balance": 2, "column_balance": 2}, "not both"),
        ((4, 4), 4, {"row_balance": 2, "groups": 2}, "no heads"),
        ((2, 2), 1, {"scores": torch.zeros(4)}, r"scores of shape \(4,\)"),
        ((2, 2), 1, {"scores": torch.tensor([[0.0, torch.nan], [1, 2]])}, "1 of 4 scores are NaN"),
        ((1, 2), 2, {"scores": torch.tensor([[torch.inf, -torch.inf]]), "pattern": "1x2"}, "1 of 1 scores are NaN"),
    ],
)
def test_refusals(shape: tuple[int, ...], nnz: int, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(shape, nnz, **options)


def test_disjoint_refusals() -> None:
    with pytest.raises(UsageError, match=r"9 \+ 8 non-zeros do not fit"):
        disjoint_masks((4, 4), [9, 8], generator=generator_for(0))
    with pytest.raises(UsageError, match=r"3 disjoint 2:4 masks need groups of 6 inputs"):
        disjoint_masks((4, 4), [8, 8, 8], generator=generator_for(0), pattern="2:4")
    assert disjoint_masks((4, 4), [], generator=generator_for(0)) == []


def test_room() -> None:
    assert [room((5, 7), p) for p in ("unstructured", "2x2", "8x1", "2:4")] == [35, 24, 0, 5 * 3]
    assert draw((5, 7), 0, pattern="8x1").sum() == 0


# --- selection in large tensors, which is by pivots ---

N = 300_000


@pytest.mark.parametrize(
    "values",
    [
        torch.rand(N, generator=generator_for(0)),
        torch.arange(N).float(),
        -torch.arange(N).float(),
        torch.zeros(N),
        (torch.arange(N) % 5).float(),
        torch.rand(N, generator=generator_for(1)).sub(0.9).clamp(min=0),
        torch.cat([torch.zeros(N - 1), torch.tensor([torch.inf])]),
        torch.cat([torch.full((N // 2,), -torch.inf), torch.rand(N // 2, generator=generator_for(2))]),
        (torch.arange(N) < N // 10 + 5).float(),
        torch.where(torch.arange(N) % 5 == 0, 1e-3, 1.0) * torch.rand(N, generator=generator_for(3)),
    ],
    ids=[
        "random",
        "rising",
        "falling",
        "zeros",
        "levels",
        "half zeros",
        "one infinity",
        "half -inf",
        "edge",
        "periodic",
    ],
)
def test_nth_largest(values: Tensor) -> None:
    ordered = values.sort(descending=True).values
    for n in (1, 2, 17, 3000, N // 10, N // 2, N - 2, N):
        assert nth_largest(values, n) == ordered[n - 1]
        mask = top(values, n, generator_for(0))
        assert int(mask.sum()) == n
        assert values[mask].min() == ordered[n - 1]


def test_a_weight_that_holds_no_whole_block_gets_an_empty_mask() -> None:
    assert not make_mask((2, 1), 0, generator=generator_for(0), pattern="1x2").any()
