"""A run that is saved at any step and resumed goes on to equal bytes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.errors import UsageError
from sparseift_cli.sparsity.algorithms import ALGORITHMS
from sparseift_cli.sparsity.sparsifier import Sparsifier
from tests.helpers.sparse_net import STEPS, make, sparse_net, train

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize("algorithm", tuple(ALGORITHMS))
@pytest.mark.parametrize(
    ("cls", "options"),
    [(SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}), (ADAMW, {"lr": 0.01})],
)
def test_resume_at_every_step_gives_equal_bytes(cls, options: dict, algorithm: str) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        net = sparse_net()
        optimizer = cls(net.parameters(), **options)
        return net, optimizer, make(net, optimizer, algorithm)

    def everything(net, optimizer, sparsifier) -> dict:
        return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}

    run = fresh()
    saved = [copy.deepcopy(everything(*run))]
    for t in range(STEPS):
        train(*run, t, t + 1)
        saved.append(copy.deepcopy(everything(*run)))
    for k in range(STEPS + 1):
        net, optimizer, sparsifier = fresh()
        held = {w.name: (w.mask.data_ptr(), w.mask_float.data_ptr()) for w in sparsifier.weights}
        net.load_state_dict(copy.deepcopy(saved[k]["model"]))
        optimizer.load_state_dict(copy.deepcopy(saved[k]["optimizer"]))
        sparsifier.load_state_dict(saved[k]["sparsifier"])
        assert held == {w.name: (w.mask.data_ptr(), w.mask_float.data_ptr()) for w in sparsifier.weights}
        stop = min(STEPS, k + 4)  # over the next update, one in three steps; equal states go on equally
        train(net, optimizer, sparsifier, k, stop)
        assert_equal(everything(net, optimizer, sparsifier), saved[stop])


def assert_equal(one: object, two: object) -> None:
    if isinstance(one, Tensor):
        assert isinstance(two, Tensor) and torch.equal(one, two)
    elif isinstance(one, dict):
        assert isinstance(two, dict) and one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list):
        assert isinstance(two, list) and len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    else:
        assert one == two


def test_weights_loaded_first_are_not_filled_over() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = make(net, optimizer, "granet")
    train(net, optimizer, sparsifier, 0, 10)  # step 9 was an update: some active weights are zero
    other = sparse_net()
    other.load_state_dict(net.state_dict())
    resumed = make(other, SGD(other.parameters(), lr=0.1, momentum=0.9), "granet", state=sparsifier.state_dict())
    assert_equal(other.state_dict(), net.state_dict())
    assert_equal(resumed.state_dict(), sparsifier.state_dict())


def test_the_state_is_json_and_tensors() -> None:
    net = sparse_net()
    state = make(net, SGD(net.parameters(), lr=0.1)).state_dict()
    tensors = {key: state.pop(key) for key in ("masks", "ever")}
    assert state.pop("state") == {}
    assert json.loads(json.dumps(state)) == state
    assert all(t.dtype == torch.bool for group in tensors.values() for t in group.values())
    assert tensors["masks"]["conv.weight"].data_ptr() != net.conv.weight_mask.data_ptr()


def test_a_state_of_another_run_is_refused() -> None:
    net = sparse_net()
    sparsifier = make(net, SGD(net.parameters(), lr=0.1))
    state = sparsifier.state_dict()
    for changed, message in (
        ({"schema": "x"}, "not the state of a Sparsifier"),
        ({"settings": state["settings"] | {"delta_t": 7, "seed": 1}}, "delta_t 7 -> 3, seed 1 -> 0"),
        ({"masks": {}}, "other weights"),
    ):
        with pytest.raises(UsageError, match=message):
            sparsifier.load_state_dict(state | changed)
