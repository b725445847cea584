"""Averages, copies and dense checkpoints beside training that stores blocks alone: as beside training with zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparseift_cli.kernels.storage import to_dense_state
from tests.helpers.block_net import PATTERNS, STEPS, block_net, dense_weights, loss_of, make


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
def test_an_average_that_is_kept_sparse_is_that_of_training_with_zeros(algorithm: str) -> None:
    averages: list[list[dict[str, torch.Tensor]]] = []
    for compact in (False, True):
        net = block_net(compact=compact)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        sparsifier = make(net, optimizer, algorithm)
        average: Any = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        sparsifier.keep_sparse(average)
        found = []
        for t in range(STEPS):
            loss_of(net, t).backward()
            sparsifier.step()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(net)
            found.append(dense_weights(average.module))
        averages.append(found)
        state = to_dense_state(average.module.state_dict())
        assert all(torch.equal(state[name], found[-1][name]) for name in PATTERNS)
    for t, (zeros, blocks) in enumerate(zip(*averages, strict=True)):
        for name in PATTERNS:
            torch.testing.assert_close(blocks[name], zeros[name], rtol=1e-4, atol=1e-5, msg=f"{name} after step {t}")


def train(net: nn.Module, after: Callable[[], object], algorithm: str = "set", keep: nn.Module | None = None) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer, algorithm)
    if keep is not None:
        sparsifier.keep_sparse(keep)
    for t in range(STEPS):
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        after()


@pytest.mark.filterwarnings("error")
def test_copies_that_are_no_averages_are_left_alone() -> None:
    net = block_net(compact=True)
    best, newest, twin = copy.deepcopy(net), copy.deepcopy(net), copy.deepcopy(net)
    before = dense_weights(best)
    train(twin, lambda: None, "static")
    twin.load_state_dict(copy.deepcopy(twin.state_dict()))
    train(twin, lambda: None, "static")
    train(net, lambda: newest.load_state_dict(net.state_dict()))
    assert all(torch.equal(weight, before[name]) for name, weight in dense_weights(best).items())
    assert all(torch.equal(weight, dense_weights(net)[name]) for name, weight in dense_weights(newest).items())


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_average_whose_blocks_are_left_behind_is_said(by_hand: bool) -> None:
    """It would mix blocks of different places, and nothing would fail."""
    net = block_net(compact=True)
    average: Any = copy.deepcopy(net) if by_hand else AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    @torch.no_grad()
    def update() -> None:
        if not by_hand:
            average.update_parameters(net)
            return
        for ours, theirs in zip(average.parameters(), net.parameters(), strict=True):
            ours.lerp_(theirs, 0.2)

    with pytest.warns(UserWarning, match="keep_sparse") as caught:
        train(net, update)
    assert 1 <= sum("as an average does" in str(w.message) for w in caught) <= 4  # once a layer


@pytest.mark.filterwarnings("error")
def test_an_average_of_static_masks_or_that_is_kept_sparse_is_fine() -> None:
    for algorithm in ("static", "set"):
        net = block_net(compact=True)
        average = AveragedModel(net)
        train(net, lambda n=net, a=average: a.update_parameters(n), algorithm, average if algorithm == "set" else None)


@pytest.mark.parametrize("model_first", [True, False])
def test_a_checkpoint_with_zeros_after_an_update_is_loaded_block_for_block(model_first: bool) -> None:
    """Blocks that just grew are all zero: where they are, the Sparsifier's state alone knows."""
    masked, net = block_net(compact=False), block_net(compact=True, seed=1)
    saved = make(masked, optimizer := torch.optim.AdamW(masked.parameters(), lr=0.01), "set")
    sparsifier = make(net, torch.optim.AdamW(net.parameters(), lr=0.01), "set")
    for t in range(4):  # masks move after step 3
        loss_of(masked, t).backward()
        saved.step()
        optimizer.step()
        optimizer.zero_grad()
    weights = dense_weights(masked)
    masks = saved.masks()
    assert any(bool((weights[name] == 0)[masks[name]].any()) for name in PATTERNS)
    loads = (net.load_state_dict, masked.state_dict()), (sparsifier.load_state_dict, saved.state_dict())
    for load, state in loads if model_first else loads[::-1]:
        load(state)
    assert all(torch.equal(weight, weights[name]) for name, weight in dense_weights(net).items())
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks().items())
