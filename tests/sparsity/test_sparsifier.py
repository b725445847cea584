"""The Sparsifier in a loop: zeros stay zeros under every optimiser, what is skipped is lost, and numbers that rot stop it."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sparseift_cli.sparsity.guard import NonFiniteError
from tests.helpers.sparse_net import STEPS, assert_zeros, loss_of, make, sparse_net, train

ALGORITHMS = ("static", "set", "snfs", "rigl", "gmp", "granet")
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
CASES = [
    pytest.param(algorithm, cls, options | how, id=f"{algorithm}-{cls.__name__}-{len(options)}-{how}")
    for cls, options in (
        (SGD, {"lr": 0.1}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        (ADAM, {"lr": 0.01, "weight_decay": 0.01}),
        (ADAM, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
        (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}),
    )
    for algorithm in ALGORITHMS
    # one algorithm that keeps the number of non-zeros and one that lowers it, for the other ways to compute the same step
    for how in ({"foreach": True}, {"foreach": False}, {"fused": True})[: 3 if algorithm in ("rigl", "granet") else 1]
]


@pytest.mark.parametrize(("algorithm", "cls", "options"), CASES)
def test_zeros_stay_zeros(algorithm: str, cls, options: dict) -> None:
    net = sparse_net()
    final = {
        name: int(m.count_nonzero())
        for name, m in ((n, net.get_buffer(n + "_mask")) for n in ("conv.weight", "fc.weight"))
    }
    optimizer = cls(net.parameters(), **options)
    sparsifier = make(net, optimizer, algorithm)
    for t in range(STEPS):
        for _ in range(2):
            loss_of(net, t).backward()
        assert sparsifier.step()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros(sparsifier)
    assert {name: sparsifier.nnz[name] for name in final} == final


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("algorithm", ["rigl", "gmp"])
@pytest.mark.parametrize(("cls", "options"), [(SGD, {"momentum": 0.9}), (ADAMW, {})])
def test_updates_that_fp16_skips_are_lost(cls, options: dict, algorithm: str, unscale: bool, fused: bool) -> None:
    """Steps 3 and 9, updates both, overflow. A fused optimiser is called all the same and does nothing."""
    net = sparse_net()
    optimizer = cls(net.parameters(), lr=0.01, fused=fused, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    sparsifier = make(net, optimizer, algorithm)
    for t in range(STEPS):
        before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
        weights = copy.deepcopy(net.state_dict())
        loss = loss_of(net, t) * (torch.inf if t in (3, 9) else 1)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        sparsifier.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert_zeros(sparsifier)
        moved = any(not torch.equal(before[name], mask) for name, mask in sparsifier.masks().items())
        if algorithm == "rigl":
            assert moved == (t in (6, 12, 15))
            assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items()) == (t in (3, 9))
        else:
            assert moved == (t in (2, 5, 8, 11, 14, 17))
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_skipped_first_step_of_fused_sgd_leaves_no_rubbish() -> None:
    """torch makes the momentum buffers with torch.empty and then writes nothing into them."""
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    sparsifier = make(net, optimizer)
    rubbish = [torch.full_like(p, torch.nan) for p in net.parameters() for _ in range(20)]
    del rubbish
    scaler.scale(loss_of(net, 0) * torch.inf).backward()
    sparsifier.step()
    scaler.step(optimizer)
    assert optimizer.state and all(not s["momentum_buffer"].any() for s in optimizer.state.values())


def test_check_finite_leaves_gradients_to_the_caller() -> None:
    net = sparse_net()
    sparsifier = make(net, SGD(net.parameters(), lr=0.1), check_finite=True)
    for poison in (torch.nan, torch.inf):
        loss_of(net, 0).backward()
        net.head.bias.grad[0] = poison  # any gradient, not only a sparse weight's
        dense = net.conv.weight.grad.clone()
        assert not sparsifier.step()
        assert torch.equal(net.conv.weight.grad, dense)
        sparsifier.optimizer.zero_grad()
    loss_of(net, 1).backward()
    assert not sparsifier.step(found_inf=True)
    assert sparsifier.step()
    assert not net.conv.weight.grad[~net.get_buffer("conv.weight_mask")].any()
    assert sparsifier.steps == 4


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_are_harmed(poison: float) -> None:
    net = sparse_net()
    optimizer = ADAMW(net.parameters())
    sparsifier = make(net, optimizer)
    train(net, optimizer, sparsifier, 0, 3)
    before = copy.deepcopy(net.state_dict())
    masks = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    loss_of(net, 3).backward()
    net.fc.weight.grad[0, 0] = poison
    sparsifier.step()
    with pytest.raises(NonFiniteError, match=r"step 3: the gradient of fc\.weight is not finite") as caught:
        optimizer.step()
    assert caught.value.exit_code == 3
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(masks[k], v) for k, v in sparsifier.masks().items())


@pytest.mark.parametrize(("algorithm", "step"), [("set", 3), ("gmp", 2)])
def test_a_weight_that_is_not_finite_changes_no_mask(algorithm: str, step: int) -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer, algorithm)
    train(net, optimizer, sparsifier, 0, step)
    masks = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    loss_of(net, step).backward()
    with torch.no_grad():
        net.grouped.weight[net.grouped.weight_mask] = torch.nan
    update = optimizer.step if algorithm == "set" else sparsifier.step
    if algorithm == "set":
        sparsifier.step()
    with pytest.raises(NonFiniteError, match=r"the weight of grouped\.weight is not finite"):
        update()
    assert all(torch.equal(masks[k], v) for k, v in sparsifier.masks().items())


# --- other optimisers ---


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "ASGD", "Rprop", "Muon"])
@pytest.mark.parametrize("algorithm", ["rigl", "gmp"])
def test_other_optimisers_are_masked_again(name: str, algorithm: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this PyTorch has no {name}")
    net = sparse_net()
    cls = getattr(torch.optim, name)
    only = [net.fc.weight] if name == "Muon" else list(net.parameters())
    optimizer = cls(only, lr=0.01)
    if name == "Muon":  # for matrices alone
        optimizer = [optimizer, SGD([p for p in net.parameters() if p is not net.fc.weight], lr=0.1)]
    depends = pytest.warns(UserWarning, match="steps of Muon depend") if name == "Muon" else nullcontext()
    with depends, pytest.warns(UserWarning, match=f"^{name} may move"):
        sparsifier = make(net, optimizer, algorithm)
    for t in range(STEPS):  # a second warning would be an error
        loss_of(net, t).backward()
        sparsifier.step()
        for one in sparsifier.optimizers:
            one.step()
        net.zero_grad()
        assert_zeros(sparsifier)


def test_a_changed_step_is_another_optimiser() -> None:
    class Noisy(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1.0)

    net = sparse_net()
    optimizer = Noisy(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="Noisy may move"):
        sparsifier = make(net, optimizer, "static")
    train(net, optimizer, sparsifier, 0, 2)
    assert_zeros(sparsifier)
