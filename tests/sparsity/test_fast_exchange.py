"""The exchange that never waits: the mask of the exact one, ties too, and a doubt wherever its guess was wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseift_cli.mask.mask import generator_for
from sparseift_cli.sparsity.drop_and_grow import Regrow, exchange
from sparseift_cli.sparsity.gpu.fast_exchange import Exchange, exchange_numbers, in_groups, on_device, quick_exchange
from sparseift_cli.sparsity.gpu.fast_selection import looks, spots

SHAPES = [(40, 50), (700, 900), (96, 64, 3, 3)]


def case(shape: tuple[int, ...], density: float, seed: int = 0) -> tuple[Tensor, int, Tensor, Tensor]:
    generator = generator_for(seed)
    mask = torch.rand(shape, generator=generator) < density
    drop, grow = (torch.randn(shape, generator=generator).abs() for _ in range(2))
    return mask, int(mask.count_nonzero()), drop, grow


def quick(
    mask: Tensor,
    active: int,
    drop: Tensor,
    grow: Tensor,
    n: int,
    key: int,
    regrow: Regrow = "allow",
    most: int | None = None,
) -> tuple[Tensor, int]:
    numbers = on_device([exchange_numbers(mask.numel(), active, n, key, regrow)], mask.device)[0]
    found, doubts = quick_exchange([Exchange(mask, active, drop, grow, numbers, n if most is None else most, regrow)])
    return found[0], int(doubts)


@pytest.mark.parametrize("form", ["distinct", "bfloat16", "few values", "channels_last"])
@pytest.mark.parametrize("regrow", ["allow", "forbid"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.95])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_exact_exchange(
    shape: tuple[int, ...], density: float, share: float, regrow: Regrow, form: str
) -> None:
    mask, active, drop, grow = case(shape, density)
    if form == "bfloat16":  # what weight gradients are under autocast
        drop, grow = (t.bfloat16().float() for t in (drop, grow))
    elif form == "few values":
        drop, grow = (t.mul(3).floor() for t in (drop, grow))
    elif form == "channels_last" and len(shape) == 4:
        mask, drop = (t.to(memory_format=torch.channels_last) for t in (mask, drop))  # grow stays as it is
    n = max(1, int(share * active))
    found, doubt = quick(mask, active, drop, grow, n, 7, regrow)
    assert found.stride() == mask.stride()
    if form != "few values":  # a third of all places tie with the pivot there: the guess may be told to be wrong
        assert doubt == 0
    if doubt == 0:
        assert torch.equal(found, exchange(mask, active, drop, grow, n, 7, regrow))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_either_sign_and_both_zeros(sign: int) -> None:
    mask, active, drop, _ = case((40, 50), 0.3)
    grow = torch.randn(40, 50, generator=generator_for(3)).mul(2).round().mul(sign)  # with -0.0
    found, doubt = quick(mask, active, drop, grow, active // 2, 7)
    assert doubt == 0 and torch.equal(found, exchange(mask, active, drop, grow, active // 2, 7))


def test_a_sample_that_misleads_is_doubted() -> None:
    """Every place that is looked at is high, so that the pivot lies above most of what should be taken."""
    size = 1 << 20
    mask = torch.zeros(size, dtype=torch.bool)
    mask[1:200_001] = True
    drop, grow = (torch.rand(size, generator=generator_for(s), dtype=torch.float64).float() for s in (1, 2))
    grow[spots(size, looks("cpu"))] += 5
    found, doubt = quick(mask, 200_000, drop, grow, 60_000, 7)
    expected = exchange(mask, 200_000, drop, grow, 60_000, 7)
    assert doubt > 0 or torch.equal(found, expected)
    assert doubt > 0


@pytest.mark.parametrize("last", [False, True])
def test_sizes_that_are_powers_of_two_mislead_no_sample(last: bool) -> None:
    """Gradients differ from channel to channel and from tap to tap, and equal distances would meet a few of these alone."""
    mask, active, drop, grow = case((128, 128, 3, 3), 0.25)
    for scores in (drop, grow):
        scores *= torch.arange(1.0, 10.0).view(3, 3)
        scores *= torch.arange(1.0, 129.0).view(-1, 1, 1)
    if last:
        mask, drop, grow = (t.to(memory_format=torch.channels_last) for t in (mask, drop, grow))
    n = int(0.3 * active)
    found, doubt = quick(mask, active, drop, grow, n, 7)
    assert doubt == 0 and torch.equal(found, exchange(mask, active, drop, grow, n, 7))


def test_fewer_free_places_than_the_sample_sees_are_doubted_or_right() -> None:
    mask, _, drop, grow = case((700, 900), 0.999)
    active = int(mask.count_nonzero())
    found, doubt = quick(mask, active, drop, grow, 10_000, 7, "forbid")
    assert doubt > 0 or torch.equal(found, exchange(mask, active, drop, grow, 10_000, 7, "forbid"))


@pytest.mark.parametrize("active", [1, 50, 99, 100])
def test_any_number_may_be_exchanged(active: int) -> None:
    generator = generator_for(active)
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask.view(-1)[torch.randperm(100, generator=generator)[:active]] = True
    drop, grow = (torch.rand(10, 10, generator=generator).mul(9).floor() for _ in range(2))
    for n in range(active + 1):
        for regrow in ("allow", "forbid"):
            found, doubt = quick(mask, active, drop, grow, n, 7, regrow, most=active)
            assert doubt == 0 and torch.equal(found, exchange(mask, active, drop, grow, n, 7, regrow)), (n, regrow)


def test_a_network_s_masks_are_those_of_each_alone() -> None:
    """Small and large, row-major and channels_last, one exchange beside another; keys of any size and sign."""
    cases = [
        (*case(shape, density, seed), 5 + 1000 * seed, -(1 << 62) + seed)
        for seed, (shape, density) in enumerate(
            [((40, 50), 0.3), ((96, 64, 3, 3), 0.2), ((700, 900), 0.6), ((9,), 0.5)]
        )
    ]
    cases = [(m, a, d, g, min(n, a), key) for m, a, d, g, n, key in cases]
    last = torch.channels_last
    cases[1] = (
        cases[1][0].to(memory_format=last),
        cases[1][1],
        *(t.to(memory_format=last) for t in cases[1][2:4]),
        *cases[1][4:],
    )
    rows = on_device(
        [exchange_numbers(m.numel(), a, n, key, "allow") for m, a, _, _, n, key in cases], torch.device("cpu")
    )
    wanted = [Exchange(m, a, d, g, row, n) for (m, a, d, g, n, _), row in zip(cases, rows, strict=True)]
    found, doubts = quick_exchange(wanted)
    assert doubts.tolist() == [0, 0, 0, 0]
    for mask, (m, a, d, g, n, key) in zip(found, cases, strict=True):
        assert torch.equal(mask, exchange(m, a, d, g, n, key))


def test_masks_are_exchanged_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseift_cli.sparsity.gpu.fast_exchange.AT_ONCE", 10)
    assert [list(group) for group in in_groups([4, 6, 1, 50, 3, 7, 1])] == [[0, 1], [2], [3], [4, 5], [6]]
    assert list(in_groups([])) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    mask, active, drop, grow = case((40, 50), 0.3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found, doubt = quick(mask, active, drop, grow, 20, 7)
    finally:
        torch.set_default_dtype(before)
    assert doubt == 0 and torch.equal(found, exchange(mask, active, drop, grow, 20, 7))
