"""An average of weights beside training that stores blocks alone: as beside training with zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
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


def test_a_copy_that_is_no_average_is_left_alone() -> None:
    net = block_net(compact=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer, "set")
    best = copy.deepcopy(net)
    before = dense_weights(best)
    for t in range(STEPS):
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(weight, before[name]) for name, weight in dense_weights(best).items())
