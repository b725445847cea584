"""Training that stores blocks alone against the same training with zeros, step by step: equal masks, weights within rounding."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.convert import to_masked
from sparseift_cli.sparsity.algorithms import DropAndGrow, RigL, WeightView
from sparseift_cli.sparsity.block_weight import BlockGradients
from sparseift_cli.sparsity.guard import NonFiniteError
from sparseift_cli.sparsity.sparsifier import Sparsifier
from tests.helpers.block_net import STEPS, block_net, loss_of, make
from tests.helpers.block_pair import ADAMW, SGD, Pair

ALGORITHMS = ("static", "set", "rigl", "snfs")


@pytest.mark.parametrize("how", [{}, {"micro": 3, "clip": 0.1}], ids=["plain", "accumulated and clipped"])
@pytest.mark.parametrize(
    ("cls", "options"), [(ADAMW, {"weight_decay": 0.1}), (SGD, {"momentum": 0.9, "nesterov": True})]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_masks_are_those_of_training_with_zeros(algorithm: str, cls: Any, options: Any, how: Any) -> None:
    pair = Pair(algorithm, cls, **options)
    before = pair.sparsifiers[1].masks()
    for t in range(STEPS):
        pair.step(t, **how)
    moved = any(not torch.equal(mask, before[name]) for name, mask in pair.sparsifiers[1].masks().items())
    assert moved is (algorithm != "static")


@dataclass(frozen=True, kw_only=True)
class Sensitivity(DropAndGrow):
    """An algorithm of somebody else, whose scores need weight and gradient."""

    dense_gradient: ClassVar = "at updates"

    def drop_scores(self, at: WeightView) -> Tensor:
        assert at.gradient is not None
        return (at.weight * at.gradient).abs()

    def grow_scores(self, at: WeightView) -> Tensor:
        assert at.gradient is not None
        return (at.gradient * (1 + at.weight.abs())).abs()


def test_an_algorithm_that_reads_weights_and_gradients() -> None:
    pair = Pair(f"{__name__}:Sensitivity")
    for t in range(STEPS):
        pair.step(t, micro=2)
    assert not Sensitivity.grows_by_gradient_alone


@pytest.mark.parametrize("algorithm", ["set", "rigl", "snfs", f"{__name__}:Sensitivity"])
def test_masks_that_are_chosen_on_the_host_as_for_a_gpu(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseift_cli.sparsity.sparsifier.FAST_ON", {"cpu"})
    pair = Pair(algorithm)
    before = pair.sparsifiers[1].masks()
    for t in range(STEPS):
        pair.step(t)
    assert any(not torch.equal(mask, before[name]) for name, mask in pair.sparsifiers[1].masks().items())


def test_scores_of_a_subclass_of_rigl_are_its_own() -> None:
    class Signed(RigL):
        def grow_scores(self, at: WeightView) -> Tensor:
            assert at.gradient is not None
            return at.gradient * at.weight.sign()

    assert RigL.grows_by_gradient_alone and not Signed.grows_by_gradient_alone


@pytest.mark.parametrize("algorithm", ["rigl", "snfs"])
def test_skipped_steps_lose_their_update(algorithm: str) -> None:
    pair = Pair(algorithm)
    for t in range(12):
        pair.step(t, skip=t in (3, 4, 9))


def test_gradients_that_are_thrown_away_do_not_count() -> None:
    pair = Pair("rigl")
    for t in range(12):
        for net, optimizer, _ in pair.runs():
            if t in (2, 6):
                loss_of(net, 99).backward()
                optimizer.zero_grad()
        pair.step(t)


def test_gradients_scaled_since_the_backward_pass() -> None:
    pair = Pair("snfs")
    for t in range(STEPS):
        for net, optimizer, sparsifier in pair.runs():
            (loss_of(net, t) * 1024).backward()
            for p in net.parameters():
                p.grad /= 1024
            sparsifier.step()
            optimizer.step()
            optimizer.zero_grad()
        pair.require_equal(t)


def test_one_dense_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """RigL's are scored during the backward pass; at other steps there is none at all."""
    alive, most, made = weakref.WeakSet(), [0], [0]
    finish = BlockGradients._finished

    def counted(self: BlockGradients, w: Any, dense: Tensor) -> Tensor:
        found = finish(self, w, dense)
        gc.collect()
        alive.add(found)
        made[0] += 1
        most[0] = max(most[0], len(alive))
        return found

    monkeypatch.setattr(BlockGradients, "_finished", counted)
    net = block_net(compact=True)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer)
    for t in range(7):
        before = made[0]
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        updates = sparsifier.algorithm.updates_at(t, sparsifier.schedule)
        assert made[0] - before == (4 if updates else 0), t
    assert made[0] == 8 and most[0] == 1


def test_more_backward_passes_than_before_are_said_and_lose_one_update() -> None:
    net = block_net(compact=True)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer)
    for t in range(10):
        for part in range(1 if t < 3 else 2):
            loss_of(net, t, part).backward()
        before = sparsifier.masks()
        if t == 3:
            with pytest.warns(UserWarning, match="more backward passes in this step than before"):
                sparsifier.step()
        else:
            sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        same = all(torch.equal(before[name], mask) for name, mask in sparsifier.masks().items())
        assert same is (t not in (6, 9)), t


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("at", range(1, STEPS, 4))
def test_resume_is_exact(algorithm: str, at: int) -> None:
    def run(net: nn.Module, optimizer: Any, sparsifier: Sparsifier, first: int, last: int) -> None:
        for t in range(first, last):
            loss_of(net, t).backward()
            sparsifier.step()
            optimizer.step()
            optimizer.zero_grad()

    net = block_net(compact=True)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer, algorithm)
    run(net, optimizer, sparsifier, 0, at)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    run(net, optimizer, sparsifier, at, STEPS)

    again = block_net(compact=True, seed=1)
    other = ADAMW(again.parameters(), lr=0.01)
    resumed = make(again, other, algorithm)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    run(again, other, resumed, at, STEPS)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert sparsifier.statistics() == resumed.statistics()
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@pytest.mark.parametrize("compact_first", [True, False])
def test_masks_go_from_one_form_to_the_other(compact_first: bool) -> None:
    first, second = block_net(compact=compact_first), block_net(compact=not compact_first, seed=1)
    optimizer = SGD(first.parameters(), lr=0.01)
    sparsifier = make(first, optimizer)
    for t in range(8):
        loss_of(first, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    other = make(second, SGD(second.parameters(), lr=0.01))
    other.load_state_dict(sparsifier.state_dict())
    assert other.steps == 8 and other.statistics() == sparsifier.statistics()
    for name, mask in sparsifier.masks().items():
        assert torch.equal(mask, other.masks()[name])


def test_what_begins_denser_is_refused() -> None:
    net = block_net(compact=True)
    for algorithm in ("gmp", "granet"):
        with pytest.raises(UsageError, match=f"{algorithm} begins denser than the planned masks"):
            Sparsifier(net, SGD(net.parameters(), lr=0.1), algorithm=algorithm, total_steps=10)
    to_masked(net)
    Sparsifier(net, SGD(net.parameters(), lr=0.1), algorithm="gmp", total_steps=10)


def test_a_gradient_that_is_no_number_ends_the_run_before_a_weight_changes() -> None:
    net = block_net(compact=True)
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    for t in range(3):
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    (loss_of(net, 3) * float("nan")).backward()
    sparsifier.step()
    with pytest.raises(NonFiniteError, match="the gradient of"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_copies_keep_the_blocks() -> None:
    net = block_net(compact=True)
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer)
    sparsifier.keep_sparse(average)
    for t in range(8):
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
    theirs = dict(average.module.named_buffers())
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in net.named_buffers())


def test_nothing_keeps_a_run_alive() -> None:
    net = block_net(compact=True)
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    loss_of(net, 0).backward()
    gone = weakref.ref(net.twice), weakref.ref(sparsifier)
    del net, optimizer, sparsifier
    gc.collect()
    assert [found() for found in gone] == [None, None]
