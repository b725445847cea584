"""What programs do beside training, to layers of stored blocks: the masks stay those of training with zeros."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from tests.helpers.block_net import dense_weights, make
from tests.helpers.block_pair import Pair


def move(net: nn.Module) -> None:
    """Put every buffer elsewhere in memory, as `net.cpu()` and `net.cuda()` do."""
    for module in net.modules():
        module._buffers = {k: None if b is None else b.clone() for k, b in module._buffers.items()}


@pytest.mark.parametrize("algorithm", ["rigl", "snfs"])
def test_a_model_that_was_elsewhere_between_two_steps(algorithm: str) -> None:
    pair = Pair(algorithm)
    for t in range(8):
        for net in pair.nets:
            move(net)
        pair.step(t)


def test_closing_a_sparsifier_leaves_the_next_one_its_gradients() -> None:
    pair = Pair("rigl")
    first = pair.sparsifiers
    pair.sparsifiers = [make(n, o) for n, o in zip(pair.nets, pair.optimizers, strict=True)]
    for t in range(8):
        if t == 3:
            for sparsifier in first:
                sparsifier.close()
        pair.step(t)


@pytest.mark.filterwarnings(
    "ignore:the weights were loaded from a run with other masks", "ignore:the optimiser's state was"
)
@pytest.mark.parametrize("with_state", [False, True], ids=["weights", "weights and moments"])
@pytest.mark.parametrize("algorithm", ["set", "rigl", "snfs"])
def test_weights_of_other_masks_that_are_loaded_in_the_middle(algorithm: str, with_state: bool) -> None:
    """The optimiser's moments stay with the weights that they are of, and are zero where no weight was."""
    pair, saved = Pair(algorithm), []
    for t in range(11):
        if t == 2:
            saved = [copy.deepcopy((n.state_dict(), o.state_dict())) for n, o, _ in pair.runs()]
        if t == 8:
            before = dense_weights(pair.nets[1])
            for (net, optimizer, _), (weights, state) in zip(pair.runs(), saved, strict=True):
                net.load_state_dict(weights)
                if with_state:
                    del state["param_groups"][0]["sparseift"]  # as of a loop that saves what it knows
                    optimizer.load_state_dict(state)
            moved = [not (w != 0).equal(before[name] != 0) for name, w in dense_weights(pair.nets[1]).items()]
            assert any(moved)
        pair.step(t)


def test_loaded_zeros_leave_the_blocks_where_they_are() -> None:
    pair = Pair("rigl")
    for t in range(11):
        if t == 5:
            (zeros, blocks), twice = pair.nets, pair.nets[0].twice.weight
            weight = twice.detach().clone()
            weight[:, :8] = 0
            zeros.load_state_dict(zeros.state_dict() | {"twice.weight": weight})
            state = {k: v for k, v in blocks.state_dict().items() if not k.startswith("twice.")}
            blocks.load_state_dict(state | {"twice.weight": weight, "twice.bias": blocks.twice.bias})
        pair.step(t)
