"""The mask update that a CUDA graph can hold, here without a graph: masks and weights are those of the Sparsifier's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparseift_cli.sparsity.gpu.graphed_update import GraphedUpdate
from tests.helpers.sparse_net import STEPS, assert_zeros, make, sparse_net


@pytest.fixture(autouse=True, params=[1 << 27, 1], ids=["at once", "one by one"])
def _at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseift_cli.sparsity.gpu.fast_drop_and_grow.AT_ONCE", request.param)


WHOLE = pytest.mark.parametrize("whole", [False, True], ids=["masked", "whole"])
"""What the optimiser sees of the gradients at an update."""


@WHOLE
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("regrow", ["allow", "forbid"])
@pytest.mark.parametrize(
    ("cls", "_at_once"),
    [(torch.optim.SGD, 1 << 27), (torch.optim.AdamW, 1 << 27), (torch.optim.AdamW, 1)],
    indirect=["_at_once"],
)
@pytest.mark.parametrize("algorithm", ["rigl", "set"])
def test_equals_the_sparsifiers_own_update(algorithm: str, cls: Any, regrow: str, ties: bool, whole: bool) -> None:
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    nets = [sparse_net(), sparse_net()]
    optimizers = [cls(net.parameters(), lr=0.01, **options) for net in nets]
    plain, fed = (make(net, o, algorithm, regrow=regrow) for net, o in zip(nets, optimizers, strict=True))
    update, unset = GraphedUpdate(fed), torch.zeros(())
    assert GraphedUpdate.fits(fed)
    x, y = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    moved = 0
    for _ in range(STEPS):
        before = {name: mask.clone() for name, mask in fed.masks().items()}
        for net in nets:
            nn.functional.cross_entropy(net(x), y).backward()
            if ties:  # coarse gradients, as bfloat16 gives them
                for p in net.parameters():
                    assert p.grad is not None
                    p.grad.mul_(8).round_().div_(8)
        plain.step()
        optimizers[0].step()
        still = fed.still
        if still:
            fed.mask_gradients()
            optimizers[1].step()
            fed.count_still_step()
        else:
            update.load_numbers()
            update.mask_gradients(whole=whole)
            optimizers[1].step()
            churned = {w.name: w.num_grown for w in fed.weights}
            update.drop_and_grow(unset)
            assert {w.name: w.num_grown for w in fed.weights} == churned  # a recording would know nothing yet
            assert update.finish()
        for o in optimizers:
            o.zero_grad()
        assert plain.last == fed.last
        assert plain.statistics() == fed.statistics()
        for name, mask in plain.masks().items():
            assert torch.equal(mask, fed.masks()[name])
            moved += not torch.equal(mask, before[name])
            assert not (still and not torch.equal(mask, before[name]))
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(a, b)
        assert_zeros(fed)
    assert moved


@pytest.mark.parametrize("regrow", ["allow", "forbid"])
@pytest.mark.parametrize("algorithm", ["rigl", "set"])
def test_the_fast_update_is_the_exact_one(monkeypatch: pytest.MonkeyPatch, algorithm: str, regrow: str) -> None:
    """What a GPU does at an update of a loop without graphs, here on the CPU."""
    nets = [sparse_net(), sparse_net()]
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.01) for net in nets]
    both = [make(net, o, algorithm, regrow=regrow) for net, o in zip(nets, optimizers, strict=True)]
    x, y = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    moved = 0
    for _ in range(STEPS):
        before = both[0].masks()["fc.weight"].clone()
        for devices, net, sparsifier, o in zip((set(), {"cpu"}), nets, both, optimizers, strict=True):
            monkeypatch.setattr("sparseift_cli.sparsity.sparsifier.FAST_ON", devices)
            nn.functional.cross_entropy(net(x), y).backward()
            sparsifier.step()
            o.step()
            o.zero_grad()
        assert both[0].statistics() == both[1].statistics()
        assert all(torch.equal(mask, both[1].masks()[name]) for name, mask in both[0].masks().items())
        assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
        moved += not torch.equal(both[0].masks()["fc.weight"], before)
    assert moved


@WHOLE
@pytest.mark.parametrize("algorithm", ["rigl", "set"])
def test_a_layer_without_a_part_in_the_step_takes_no_other_gradient(algorithm: str, whole: bool) -> None:
    nets = [sparse_net(), sparse_net()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]
    plain, fed = (make(net, o, algorithm) for net, o in zip(nets, optimizers, strict=True))
    update = GraphedUpdate(fed)
    while fed.still:
        plain.count_still_step()
        fed.count_still_step()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for net in nets:  # past the convolutions
        net.head(net.fc(x).relu()).square().sum().backward()
    plain.step()
    optimizers[0].step()
    update.load_numbers()
    update.mask_gradients(whole=whole)
    optimizers[1].step()
    update.drop_and_grow(torch.zeros(()))
    update.finish()
    assert plain.statistics() == fed.statistics()
    assert fed.statistics()["fc.weight"].churned
    assert bool(fed.statistics()["conv.weight"].churned) == (algorithm == "set")
    assert all(torch.equal(mask, fed.masks()[name]) for name, mask in plain.masks().items())


@WHOLE
def test_a_step_that_diverged_moves_no_mask(whole: bool) -> None:
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer, "rigl")
    update = GraphedUpdate(sparsifier)
    while sparsifier.still:
        sparsifier.count_still_step()
    for w in sparsifier.weights:
        w.parameter.grad = torch.full_like(w.parameter, torch.nan)
    before, steps = {name: mask.clone() for name, mask in sparsifier.masks().items()}, sparsifier.steps
    update.load_numbers()
    update.mask_gradients(whole=whole)
    update.drop_and_grow(torch.ones(()))
    assert not update.finish()
    assert sparsifier.steps == steps
    assert all(torch.equal(mask, before[name]) for name, mask in sparsifier.masks().items())


@pytest.mark.parametrize(
    ("algorithm", "fits"), [("static", False), ("gmp", False), ("granet", False), ("set", True), ("snfs", False)]
)
def test_only_steady_numbers_of_non_zeros_fit(algorithm: str, fits: bool) -> None:
    net = sparse_net()
    assert GraphedUpdate.fits(make(net, torch.optim.SGD(net.parameters(), lr=0.01), algorithm)) == fits
