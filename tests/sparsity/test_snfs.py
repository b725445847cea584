"""SNFS: its mean of dense gradients is state like any other; masks follow it and nothing spoils it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.sparsity.guard import NonFiniteError
from sparseift_cli.sparsity.sparsifier import Sparsifier
from tests.helpers.sparse_net import STEPS, assert_zeros, loss_of, make, sparse_net

SGD = torch.optim.SGD


def means(sparsifier: Sparsifier) -> dict[str, Tensor]:
    """The saved mean of past dense gradients [*shape] of every sparse weight."""
    return {key.partition("/")[2]: t for key, t in sparsifier.state_dict()["state"].items()}


def test_the_mean_is_that_of_dense_gradients_and_masks_do_not_touch_it() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = make(net, optimizer, "snfs", momentum=0.75)
    expected = {name: torch.zeros_like(t) for name, t in means(sparsifier).items()}
    assert set(expected) == {"conv.weight", "grouped.weight", "fc.weight"}
    moved = 0
    for t in range(STEPS):
        loss_of(net, t).backward()
        for name, mean in expected.items():
            gradient = net.get_parameter(name).grad
            assert gradient is not None and bool(gradient[~sparsifier.masks()[name]].any())
            mean.mul_(0.75).add_(gradient, alpha=0.25)
        before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
        sparsifier.step()
        assert sparsifier.last is not None and sparsifier.last.dense_gradients
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros(sparsifier)
        for name, mask in sparsifier.masks().items():
            assert torch.equal(means(sparsifier)[name], expected[name])
            grown = mask & ~before[name]
            if grown.any():  # every place that grew was at least as large as every one that stayed free
                moved += 1
                assert expected[name][grown].abs().min() >= expected[name][~mask].abs().max()
    assert moved > 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_the_mean_alone(fused: bool) -> None:
    net = sparse_net()
    optimizer: Any = SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
    sparsifier = make(net, optimizer, "snfs")
    for t in range(4):
        loss_of(net, t).backward()
        before = means(sparsifier)
        if t in (1, 3):  # what a GradScaler does: other optimisers are not called, fused ones do nothing
            for p in net.parameters():
                assert p.grad is not None
                p.grad[0] = torch.inf
            sparsifier.step()
            if fused:
                optimizer.found_inf = torch.ones(())
                optimizer.step()
        else:
            optimizer.found_inf = torch.zeros(()) if fused else None
            sparsifier.step()
            optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(m, before[name]) == (t in (1, 3)) for name, m in means(sparsifier).items())
        assert all(bool(m.isfinite().all()) for m in means(sparsifier).values())


def test_a_mean_that_is_not_finite_stops_the_run_before_masks_follow_it() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.0)
    sparsifier = make(net, optimizer, "snfs")
    for t in range(4):  # step 3 is the first update
        loss_of(net, t).backward()
        assert net.fc.weight.grad is not None
        if t == 1:
            net.fc.weight.grad[~net.fc.get_buffer("weight_mask")] = torch.inf
        sparsifier.step()
        if t == 3:
            with pytest.raises(NonFiniteError, match=r"the momentum of fc\.weight is not finite"):
                optimizer.step()
            return
        net.fc.weight.grad.nan_to_num_()  # inf * 0 is NaN; no weight sees it here
        optimizer.step()
        optimizer.zero_grad()


def test_a_layer_without_a_part_in_a_step_keeps_its_mean_and_mask() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer, "snfs", delta_t=1)
    loss_of(net, 0).backward()
    sparsifier.step()
    optimizer.step()
    optimizer.zero_grad()
    before, masks = means(sparsifier), {name: m.clone() for name, m in sparsifier.masks().items()}
    net.head(net.fc(torch.randn(4, 8)).relu()).square().sum().backward()
    sparsifier.step()
    optimizer.step()
    assert torch.equal(means(sparsifier)["conv.weight"], before["conv.weight"])
    assert torch.equal(sparsifier.masks()["conv.weight"], masks["conv.weight"])
    assert not torch.equal(means(sparsifier)["fc.weight"], before["fc.weight"])
    assert not torch.equal(sparsifier.masks()["fc.weight"], masks["fc.weight"])


def test_accumulated_micro_batches_count_once() -> None:
    net, together = sparse_net(), sparse_net()
    runs = [make(n, SGD(n.parameters(), lr=0.1), "snfs") for n in (net, together)]
    for part in range(3):
        (loss_of(net, part) / 3).backward()
    (sum(loss_of(together, part) for part in range(3)) / 3).backward()
    for sparsifier in runs:
        sparsifier.step()
        sparsifier.optimizer.step()
    for name, mean in means(runs[0]).items():
        torch.testing.assert_close(mean, means(runs[1])[name])


def test_blocks_move_whole() -> None:
    net = sparse_net("2x2")
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(
        net, optimizer, "snfs", layouts={name: {"pattern": "2x2"} for name in ("conv.weight", "fc.weight")}
    )
    before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    for t in range(STEPS):
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("conv.weight", "fc.weight"):
        mask = sparsifier.masks()[name]
        assert not torch.equal(mask, before[name])
        cells = nn.functional.avg_pool2d(mask.flatten(1).float()[None], 2)[0]
        assert bool(((cells == 0) | (cells == 1)).all())
