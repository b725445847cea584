"""The update that never waits for the device: the mask of the exact one, ties too, and a flag wherever its estimate was wrong."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.sparsity.drop_and_grow import Regrow, drop_and_grow
from sparseift_cli.sparsity.gpu.fast_drop_and_grow import (
    FastUpdate,
    fast_drop_and_grow,
    in_groups,
    on_device,
    update_numbers,
)
from sparseift_cli.sparsity.gpu.fast_selection import sample_indices, sample_shares

SHAPES = [(40, 50), (700, 900), (96, 64, 3, 3)]


def case(shape: tuple[int, ...], density: float, seed: int = 0) -> tuple[Tensor, int, Tensor, Tensor]:
    generator = generator_for(seed)
    mask = torch.rand(shape, generator=generator) < density
    drop, grow = (torch.randn(shape, generator=generator).abs() for _ in range(2))
    return mask, int(mask.count_nonzero()), drop, grow


def fast(
    mask: Tensor,
    active: int,
    drop: Tensor,
    grow: Tensor,
    n: int,
    key: int,
    regrow: Regrow = "allow",
    most: int | None = None,
) -> tuple[Tensor, int]:
    numbers = on_device([update_numbers(mask.numel(), active, n, key, regrow)], mask.device)[0]
    found, uncertain = fast_drop_and_grow(
        [FastUpdate(mask, active, drop, grow, numbers, n if most is None else most, regrow)]
    )
    return found[0], int(uncertain)


@pytest.mark.parametrize("regrow", ["allow", "forbid"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.95])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(
    ("shape", "form"),
    [*product(SHAPES, ["distinct", "bfloat16", "few values"]), (SHAPES[-1], "channels_last")],
)
def test_equals_the_exact_update(
    shape: tuple[int, ...], density: float, share: float, regrow: Regrow, form: str
) -> None:
    mask, active, drop, grow = case(shape, density)
    if form == "bfloat16":  # what weight gradients are under autocast
        drop, grow = (t.bfloat16().float() for t in (drop, grow))
    elif form == "few values":
        drop, grow = (t.mul(3).floor() for t in (drop, grow))
    elif form == "channels_last":
        mask, drop = (t.to(memory_format=torch.channels_last) for t in (mask, drop))  # grow stays as it is
    n = max(1, int(share * active))
    found, uncertain = fast(mask, active, drop, grow, n, 7, regrow)
    assert found.stride() == mask.stride()
    if form != "few values":  # a third of all places tie with the pivot there: the guess may be reported as wrong
        assert uncertain == 0
    if uncertain == 0:
        assert torch.equal(found, drop_and_grow(mask, active, drop, grow, n, 7, regrow))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_either_sign_and_both_zeros(sign: int) -> None:
    mask, active, drop, _ = case((40, 50), 0.3)
    grow = torch.randn(40, 50, generator=generator_for(3)).mul(2).round().mul(sign)  # with -0.0
    found, uncertain = fast(mask, active, drop, grow, active // 2, 7)
    assert uncertain == 0 and torch.equal(found, drop_and_grow(mask, active, drop, grow, active // 2, 7))


def test_a_sample_that_misleads_is_uncertain() -> None:
    """Every place that is looked at is high, so that the pivot lies above most of what should be taken."""
    size = 1 << 20
    mask = torch.zeros(size, dtype=torch.bool)
    mask[1:200_001] = True
    drop, grow = (torch.rand(size, generator=generator_for(s), dtype=torch.float64).float() for s in (1, 2))
    grow[sample_indices(size, sample_shares("cpu"))] += 5
    found, uncertain = fast(mask, 200_000, drop, grow, 60_000, 7)
    expected = drop_and_grow(mask, 200_000, drop, grow, 60_000, 7)
    assert uncertain > 0 or torch.equal(found, expected)
    assert uncertain > 0


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
    found, uncertain = fast(mask, active, drop, grow, n, 7)
    assert uncertain == 0 and torch.equal(found, drop_and_grow(mask, active, drop, grow, n, 7))


def test_fewer_free_places_than_the_sample_sees_are_uncertain_or_right() -> None:
    mask, _, drop, grow = case((700, 900), 0.999)
    active = int(mask.count_nonzero())
    found, uncertain = fast(mask, active, drop, grow, 10_000, 7, "forbid")
    assert uncertain > 0 or torch.equal(found, drop_and_grow(mask, active, drop, grow, 10_000, 7, "forbid"))


@pytest.mark.parametrize("active", [1, 50, 99, 100])
def test_any_number_may_be_dropped(active: int) -> None:
    generator = generator_for(active)
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask.view(-1)[torch.randperm(100, generator=generator)[:active]] = True
    drop, grow = (torch.rand(10, 10, generator=generator).mul(9).floor() for _ in range(2))
    for n in range(active + 1):
        for regrow in ("allow", "forbid"):
            found, uncertain = fast(mask, active, drop, grow, n, 7, regrow, most=active)
            assert uncertain == 0 and torch.equal(found, drop_and_grow(mask, active, drop, grow, n, 7, regrow)), (
                n,
                regrow,
            )


def test_a_network_s_masks_are_those_of_each_alone() -> None:
    """Small and large, row-major and channels_last, one update beside another; keys of any size and sign."""
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
        [update_numbers(m.numel(), a, n, key, "allow") for m, a, _, _, n, key in cases], torch.device("cpu")
    )
    wanted = [FastUpdate(m, a, d, g, row, n) for (m, a, d, g, n, _), row in zip(cases, rows, strict=True)]
    found, uncertain = fast_drop_and_grow(wanted)
    assert uncertain.tolist() == [0, 0, 0, 0]
    for mask, (m, a, d, g, n, key) in zip(found, cases, strict=True):
        assert torch.equal(mask, drop_and_grow(m, a, d, g, n, key))


def test_masks_are_updated_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseift_cli.sparsity.gpu.fast_drop_and_grow.AT_ONCE", 10)
    assert [list(group) for group in in_groups([4, 6, 1, 50, 3, 7, 1])] == [[0, 1], [2], [3], [4, 5], [6]]
    assert list(in_groups([])) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    mask, active, drop, grow = case((40, 50), 0.3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found, uncertain = fast(mask, active, drop, grow, 20, 7)
    finally:
        torch.set_default_dtype(before)
    assert uncertain == 0 and torch.equal(found, drop_and_grow(mask, active, drop, grow, 20, 7))
