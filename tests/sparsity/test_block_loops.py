"""What programs do beside training, to layers of stored blocks: the masks stay those of training with zeros."""

from __future__ import annotations

import pytest
from torch import nn

from tests.helpers.block_net import make
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
