"""The optimiser's state of stored blocks: it goes with its blocks, and from one form of a checkpoint to the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseift_cli.kernels.storage import to_dense_state
from sparseift_cli.sparsity.sparsifier import Sparsifier
from tests.helpers.block_net import block_net, loss_of, make
from tests.helpers.block_pair import ADAMW, Pair


@pytest.mark.parametrize("order", ["model first", "optimizer first", "before the Sparsifier"])
@pytest.mark.parametrize("compact", [False, True], ids=["with zeros", "in blocks"])
def test_a_loop_goes_on_in_the_other_form(compact: bool, order: str) -> None:
    """Model and optimiser as torch.save keeps them, of a run that had its layers in the form that is not `compact`."""
    pair = Pair("rigl")
    for t in range(5):
        pair.step(t)
    weights, state = copy.deepcopy((pair.nets[not compact].state_dict(), pair.optimizers[not compact].state_dict()))
    net = block_net(compact=compact)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = None if order == "before the Sparsifier" else make(net, optimizer)
    if order == "optimizer first":
        optimizer.load_state_dict(state)
    net.load_state_dict(to_dense_state(weights))
    if order != "optimizer first":
        optimizer.load_state_dict(state)
    sparsifier = sparsifier or make(net, optimizer)
    pair.nets = (pair.nets[0], net) if compact else (net, pair.nets[1])
    pair.optimizers[compact], pair.sparsifiers[compact] = optimizer, sparsifier
    for t in range(5, 10):
        pair.step(t)


def steps(cls: type[torch.optim.Optimizer]) -> tuple[nn.Module, Sparsifier]:
    net = block_net(compact=True)
    optimizer = cls(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer)
    for t in range(2):
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
    return net, sparsifier


def test_means_over_a_part_of_a_block_go_with_it() -> None:
    with pytest.warns(UserWarning, match="the steps of Adafactor depend on the shape of a weight, and of layers"):
        _, sparsifier = steps(torch.optim.Adafactor)
    for w in sparsifier.weights:
        before, old = w.active_blocks(), [t.clone() for t in sparsifier.state_of(w)]
        assert len(old) == 2
        moved = before.clone()
        moved.view(-1)[int(before.flatten().nonzero()[-1])] = False
        moved.view(-1)[int((~before).flatten().nonzero()[0])] = True
        w.set_mask(moved, sparsifier.state_of(w))
        for was, now in zip(old, sparsifier.state_of(w), strict=True):
            grids = [t.new_zeros(*before.shape, *t.shape[1:]) for t in (was, now)]
            grids[0][before], grids[1][w.active_blocks()] = was, now
            both = before & w.active_blocks()
            assert both.any() and torch.equal(grids[0][both], grids[1][both])
            assert not grids[1][~before].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "Adamax", "RMSprop", "Adagrad", "Rprop"])
def test_optimizers_that_treat_every_weight_by_itself_are_not_warned_of(name: str) -> None:
    steps(getattr(torch.optim, name))
