"""How a Sparsifier starts, what patterns it keeps, what it records, and what it refuses."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn

from sparseift_cli import transform
from sparseift_cli.base.randomness import generator_for
from sparseift_cli.errors import UsageError
from sparseift_cli.mask.attached import attach
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.sparsity.sparsifier import Sparsifier
from sparseift_cli.sparsity.statistics import total
from tests.helpers.sparse_net import STEPS, Net, assert_zeros, loss_of, make, sparse_net, train

ALGORITHMS = ("static", "set", "snfs", "rigl", "gmp", "granet")
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(("algorithm", "density"), [("gmp", 1.0), ("granet", 0.5), ("dense", 1.0)])
def test_the_start_is_filled(algorithm: str, density: float) -> None:
    attached = sparse_net()
    net = sparse_net()
    make(net, SGD(net.parameters(), lr=0.1), algorithm)
    for name in ("conv.weight", "grouped.weight", "fc.weight"):
        weight, old = net.get_parameter(name).detach(), attached.get_parameter(name).detach()
        before, mask = attached.get_buffer(name + "_mask"), net.get_buffer(name + "_mask")
        assert int(mask.sum()) == int(mask.numel() * density)
        assert not (before & ~mask).any()
        assert torch.equal(weight[before], old[before])
        new = mask & ~before
        assert weight[new].ne(0).all() and not weight[~mask].any()
        assert 0.6 < float(weight[new].square().mean().sqrt() / old[before].square().mean().sqrt()) < 1.5


def test_fills() -> None:
    net = sparse_net()
    make(net, SGD(net.parameters(), lr=0.1), "gmp", fill="zeros")
    assert torch.equal(net.conv.weight, sparse_net().conv.weight)
    seen = []
    make(
        other := sparse_net(),
        SGD(other.parameters(), lr=0.1),
        "gmp",
        fill=lambda name, w: (seen.append(name), torch.full_like(w, 7.0))[1],
    )
    kept = sparse_net()
    assert torch.equal(other.fc.weight, torch.where(kept.fc.weight_mask, kept.fc.weight, 7.0))
    assert seen == ["conv.weight", "grouped.weight", "fc.weight"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocks_move_whole(algorithm: str) -> None:
    net = sparse_net("2x2")
    optimizer = ADAM(net.parameters(), lr=0.01)
    layouts = {name: {"pattern": "2x2"} for name in ("conv.weight", "grouped.weight", "fc.weight")}
    sparsifier = make(net, optimizer, algorithm, layouts=layouts)
    first = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    for t in range(STEPS):
        train(net, optimizer, sparsifier, t, t + 1)
        assert_zeros(sparsifier)
        for mask in sparsifier.masks().values():
            matrix = mask.flatten(1)
            cells = matrix[:, : matrix.shape[1] // 2 * 2].reshape(matrix.shape[0] // 2, 2, -1, 2).sum((1, 3))
            assert set(cells.unique().tolist()) <= {0, 4}
            assert int(cells.sum()) == int(mask.sum())
    assert (algorithm == "static") == all(torch.equal(first[n], m) for n, m in sparsifier.masks().items())


def test_masks_that_do_not_have_the_pattern() -> None:
    net = sparse_net()
    with pytest.raises(UsageError, match=r"conv\.weight is not made of whole 2x2 blocks"):
        make(net, SGD(net.parameters(), lr=0.1), layouts={"conv.weight": {"pattern": "2x2"}})
    net = Net()
    attach(net, {"fc.weight": make_mask((12, 8), 48, generator=generator_for(0), pattern="2:4")})
    with pytest.raises(UsageError, match=r"fc\.weight is 2:4") as caught:
        make(net, SGD(net.parameters(), lr=0.1), layouts={"fc.weight": {"pattern": "2:4"}})
    assert "static" in str(caught.value.hint)
    make(net, SGD(net.parameters(), lr=0.1), "static", layouts={"fc.weight": {"pattern": "2:4"}})


def test_records_add_up_to_the_cost_model() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    spent = dense = nnz = 0
    places = {w.name: w.mask.numel() for w in sparsifier.weights}
    for t in range(STEPS):
        train(net, optimizer, sparsifier, t, t + 1)
        assert sparsifier.last is not None and sparsifier.last.step == t
        nnz = sum(sparsifier.last.nnz.values())
        spent += 2 * nnz + (sum(places.values()) if sparsifier.last.dense_gradients else nnz)
        dense += sparsifier.last.dense_gradients
    updates = sparsifier.schedule.updates or 0
    assert dense == updates == 5
    assert spent == 3 * nnz * STEPS + updates * (sum(places.values()) - nnz)


def test_gmp_records_are_the_schedule() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer, "gmp", stop=1)
    counts = []
    for t in range(STEPS):
        train(net, optimizer, sparsifier, t, t + 1)
        counts.append(sparsifier.last.nnz["fc.weight"])
    want = [24 + (96 - 24) * (24 - t // 3 * 3) ** 3 // 24**3 for t in range(STEPS)]
    assert counts == want
    assert sparsifier.nnz["fc.weight"] == 24  # the last pruning comes with the last step


def test_statistics() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer, "set", schedule="constant", regrow="forbid")
    assert all(s.churn == 0 and s.itop_rate == s.density == 0.25 for s in [sparsifier.statistics()["fc.weight"]])
    train(net, optimizer, sparsifier, 0, 4)
    found = sparsifier.statistics()["fc.weight"]
    assert (found.weights, found.nnz, found.churned, found.ever_active) == (96, 24, 9, 33)
    assert found.churn == pytest.approx(9 / 24)
    assert total(sparsifier.statistics().values()).nnz == sum(sparsifier.nnz.values())


def test_dense_needs_no_masks() -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer, "dense", total_steps=None)
    loss_of(net, 0).backward()
    gradient = net.conv.weight.grad.clone()
    assert sparsifier.step()
    assert torch.equal(net.conv.weight.grad, gradient)
    assert sparsifier.nnz == {} and sparsifier.statistics() == {}


def test_frozen_weights_keep_their_masks() -> None:
    net = sparse_net()
    net.conv.requires_grad_(False)
    before = net.conv.weight_mask.clone()
    optimizer = SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for algorithm in ("set", "rigl", "gmp"):
        with pytest.warns(UserWarning, match=r"frozen weights keep their masks: conv\.weight$"):
            sparsifier = make(net, optimizer, algorithm)
        train(net, optimizer, sparsifier, 0, 7)
        sparsifier.close()
        assert torch.equal(net.conv.weight_mask, before)


def test_a_layer_without_a_gradient_sits_out_an_update() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    train(net, optimizer, sparsifier, 0, 3)
    before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    loss_of(net, 3).backward()
    net.conv.weight.grad = None
    sparsifier.step()
    optimizer.step()
    assert torch.equal(before["conv.weight"], net.conv.weight_mask)
    assert not torch.equal(before["fc.weight"], net.fc.weight_mask)


def test_closed_it_does_nothing_more() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    train(net, optimizer, sparsifier, 0, 3)
    loss_of(net, 3).backward()
    sparsifier.step()
    sparsifier.close()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in sparsifier.masks().items())


def test_the_wrong_order_is_told() -> None:
    """Pruned weights would fill up, and nothing else would show it."""
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    loss_of(net, 0).backward()
    with pytest.warns(UserWarning, match=r"optimizer.step\(\) without sparsifier.step\(\) before it"):
        optimizer.step()
    sparsifier.step()
    optimizer.step()  # no warning
    optimizer.zero_grad()
    optimizer.step()  # nor without gradients, as where a checkpoint's state is made


def test_a_loop_in_the_wrong_order_does_not_go_on() -> None:
    """Said once and gone on, it would train every pruned weight, and be sparse right after a mask update alone."""
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    loss_of(net, 0).backward()
    with pytest.warns(UserWarning, match="without sparsifier") as warned:
        optimizer.step()
    assert warned[0].filename == __file__  # the line that called it
    sparsifier.step()
    optimizer.zero_grad()
    loss_of(net, 1).backward()
    with pytest.raises(UsageError, match="comes too late") as refused:
        optimizer.step()
    assert refused.value.hint and "sparsifier.step(), optimizer.step()" in refused.value.hint


def test_steps_without_the_sparsifier_may_come_first() -> None:
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer)
    loss_of(net, 0).backward()
    with pytest.warns(UserWarning, match="without sparsifier"):
        optimizer.step()
    for t in range(1, 3):
        optimizer.zero_grad()
        loss_of(net, t).backward()
        sparsifier.step()
        optimizer.step()


def test_names_are_those_without_wrappers() -> None:
    one, two = sparse_net(), sparse_net()
    a, b = SGD(one.parameters(), lr=0.1), SGD(two.parameters(), lr=0.1)
    wrapped = nn.DataParallel(two)
    first, second = make(one, a, "set"), make(wrapped, b, "set")
    assert first.nnz == second.nnz
    train(one, a, first, 0, 7)
    train(two, b, second, 0, 7)
    assert all(torch.equal(m, second.masks()[n]) for n, m in first.masks().items())


def test_channels_last_and_bfloat16() -> None:
    net = sparse_net().to(memory_format=torch.channels_last).bfloat16()
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = make(net, optimizer)
    assert sparsifier.weights[0].mask_float.stride() == net.conv.weight.stride()
    assert sparsifier.weights[0].mask_float.dtype == torch.bfloat16
    for _ in range(STEPS):
        nn.functional.cross_entropy(net(torch.randn(4, 3, 5, 5).bfloat16()).float(), torch.arange(4)).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros(sparsifier)


# --- with the rest of the package ---


def test_a_transformed_model_with_its_plan() -> None:
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    net, plan = transform(dense, torch.zeros(2, 16), sparsity=0.75)
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = Sparsifier(net, plan, optimizer, total_steps=10, delta_t=2)
    planned = [part.nnz for layer in plan.layers for part in layer.parts if part.nnz < part.shape.weights]
    assert list(sparsifier.nnz.values()) == [n for n in planned if n] or sum(sparsifier.nnz.values()) == sum(planned)
    for _ in range(10):
        net(torch.randn(8, 16)).square().mean().backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros(sparsifier)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "rigel"}, "unknown mask algorithm 'rigel'"),
        ({"total_steps": None}, "rigl moves masks on a schedule, which needs total_steps"),
        ({"schedule": "cosin"}, "unknown decay 'cosin'"),
        ({"regrow": "maybe"}, "unknown regrow 'maybe'"),
        ({"drop_fraction": 1.5}, "drop fraction 1.5 must be at most 1"),
        ({"delta_t": 0}, "delta t 0 must be at least 1"),
        ({"total_steps": 0}, "total_steps 0 is not a positive number"),
        ({"stop": 1.5}, "stop '1.5' must be at most 1"),
        ({"momentum": 0.9}, "rigl has no option momentum"),
        ({"fill": "ones"}, "unknown fill 'ones'"),
        ({"layouts": {"nothing": {}}}, "layouts of nothing: no sparse weights"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    net = sparse_net()
    with pytest.raises(UsageError, match=message):
        Sparsifier(net, SGD(net.parameters(), lr=0.1), **({"total_steps": 10} | options))


def test_wrong_models_and_optimisers() -> None:
    net = sparse_net()
    with pytest.raises(UsageError, match="needs the optimiser"):
        Sparsifier(net, None)
    with pytest.raises(UsageError, match="no sparse weights"):
        make(plain := Net(), SGD(plain.parameters(), lr=0.1))
    with pytest.raises(UsageError, match=r"conv\.weight is trained but not in the optimiser"):
        make(net, SGD(net.fc.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="eps = 0"):
        make(net, ADAM(net.parameters(), eps=0))


def test_stop_is_read_as_written() -> None:
    net = sparse_net()
    for stop in (0.8, "0.8", "4/5", Fraction(4, 5)):
        assert make(net, SGD(net.parameters(), lr=0.1), stop=stop).schedule.stop == Fraction(4, 5)


def test_an_algorithm_as_recipes_write_it() -> None:
    net = sparse_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = Sparsifier(net, optimizer, algorithm={"name": "rigl", "delta_t": 7}, total_steps=70)
    assert (sparsifier.algorithm_name, sparsifier.schedule.delta_t) == ("rigl", 7)
    with pytest.raises(UsageError, match="unknown mask algorithm ''"):
        Sparsifier(sparse_net(), optimizer, algorithm={}, total_steps=70)
