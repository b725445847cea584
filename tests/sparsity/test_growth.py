"""How weights grow: by what score, and with what state of the optimiser. Each option against a slow, obvious reference."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_cli.mask.layout import Layout
from sparseift_cli.sparsity.algorithms import WeightView, make_algorithm
from sparseift_cli.sparsity.drop_and_grow import balanced_drop_and_grow
from sparseift_cli.sparsity.gpu.graphed_update import GraphedUpdate
from sparseift_cli.sparsity.sparse_weight import SparseWeight
from sparseift_cli.sparsity.sparsifier import Sparsifier
from tests.helpers.block_net import STEPS as BLOCK_STEPS
from tests.helpers.block_pair import ADAMW, SGD, Pair
from tests.helpers.sparse_net import STEPS, assert_zeros, loss_of, make, sparse_net, train

OPTIMIZERS = [
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    (ADAMW, {"lr": 0.01}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
]
GROWTHS = ("magnitude", "normalised", "balanced")


@pytest.mark.parametrize(
    ("shape", "groups", "transposed"),
    [
        ((6, 5), 1, False),
        ((6, 5), 1, True),
        ((8, 3, 3, 3), 1, False),
        ((8, 2, 3, 1), 4, False),
        ((4, 3, 2, 2), 2, True),
    ],
)
def test_normalised_scores_are_divided_by_the_norms_of_row_and_column(
    shape: tuple[int, ...], groups: int, transposed: bool
) -> None:
    layout, gradient = Layout(shape, groups, transposed), torch.randn(shape, generator=torch.manual_seed(0))
    matrix = layout.to_matrix(gradient).double()
    matrix[1] = 0  # a dead unit
    gradient = layout.from_matrix(matrix.float())
    size, wanted = layout.rows // groups, torch.zeros_like(matrix)
    for r in range(layout.rows):
        group = matrix[r // size * size : (r // size + 1) * size]
        for c in range(layout.columns):
            if matrix[r, c]:
                wanted[r, c] = matrix[r, c].abs() / (matrix[r].norm() * group[:, c].norm())
    for name in ("rigl", "snfs"):
        algorithm = make_algorithm(name, {"growth": "normalised"})
        at = WeightView(torch.zeros(shape), gradient, {"momentum": gradient}, layout=layout)
        torch.testing.assert_close(algorithm.grow_scores(at), layout.from_matrix(wanted).float())
        plain = make_algorithm(name).grow_scores(at)
        assert torch.equal(plain, gradient.abs())


def test_no_gradient_is_too_small_to_be_normalised() -> None:
    gradient = torch.tensor([[1e-30, 1e-42], [0.0, 1e-42]])
    scores = WeightView(gradient).normalised(gradient)
    assert bool(scores.isfinite().all()) and scores[1, 0] == 0


def test_normalised_growth_spreads_connections() -> None:
    """One unit gets ten times the gradient of others: by magnitude it takes all that grows."""
    gradient = torch.randn(16, 16, generator=torch.manual_seed(1))
    gradient[3] *= 10
    found = {}
    for growth in GROWTHS[:2]:
        scores = make_algorithm("rigl", {"growth": growth}).grow_scores(WeightView(gradient, gradient))
        found[growth] = int((scores.flatten().topk(32).indices // 16 == 3).count_nonzero())
    assert found["magnitude"] > 12 and found["normalised"] < 6


# --- rows and columns that keep their numbers ---


def fans(w: SparseWeight) -> tuple[list[int], list[int]]:
    """How many active blocks each row has, and each column of each group."""
    layout, blocks = w.layout, w.active_blocks()
    cells = layout.to_matrix(blocks) if w.single_weights else blocks
    return cells.sum(1).tolist(), cells.unflatten(0, (layout.groups, -1)).sum(1).flatten().tolist()


@pytest.mark.parametrize("regrow", ["allow", "forbid"])
@pytest.mark.parametrize("density", [0.25, 0.8])
@pytest.mark.parametrize("name", ["set", "rigl", "snfs"])
def test_balanced_growth_keeps_fan_in_and_fan_out(name: str, density: float, regrow: str) -> None:
    net = sparse_net(density=density)
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = make(net, optimizer, name, growth="balanced", regrow=regrow)
    before = {w.name: (fans(w), w.mask.clone(), w.nnz) for w in sparsifier.weights}
    train(net, optimizer, sparsifier, 0, STEPS)
    assert_zeros(sparsifier)
    for w in sparsifier.weights:
        (rows, columns), _, nnz = before[w.name]
        assert w.nnz == nnz and fans(w)[0] == rows
        assert regrow == "forbid" or fans(w)[1] == columns
    assert any(not torch.equal(w.mask, before[w.name][1]) for w in sparsifier.weights)


def test_balanced_growth_takes_the_best_places_that_rows_and_columns_leave() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()
    drop = torch.tensor([[9.0, 1, 0, 0], [0, 0, 9, 1], [9, 0, 9, 0]])
    grow = torch.tensor([[0.0, 5, 0, 4], [0, 3, 0, 8], [7, 9, 7, 9]])
    found = balanced_drop_and_grow(mask, 6, drop, grow, 2, key=0)
    assert found.int().tolist() == [
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [1, 0, 1, 0],
    ]  # row 2 lost none, and takes none of the 9
    found = balanced_drop_and_grow(mask, 6, drop, grow, 2, key=0, regrow="forbid")
    assert found.int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]]


def test_by_magnitude_rows_crowd_and_balanced_they_do_not() -> None:
    """The weights of one output get ten times the gradient, so RigL gives it nearly all that grows."""
    spread = {}
    for growth in GROWTHS:
        net = sparse_net()
        w = make(net, SGD(net.parameters(), lr=0.1), growth=growth).weights[2]
        updates = make(net, SGD(net.parameters(), lr=0.1), growth=growth)
        gradient = torch.randn(w.weight_shape, generator=torch.manual_seed(2))
        gradient[0] *= 10
        spread[growth] = int(updates.updated(updates.weights[2], 3, gradient)[0].sum()) - int(w.mask[0].sum())
    assert spread["magnitude"] >= 3 and spread["normalised"] < spread["magnitude"] and not spread["balanced"]


# --- the optimiser's state of what grows ---


def mean_of_kept(state: dict[str, Tensor], kept: Tensor, grown: Tensor) -> dict[str, Tensor]:
    """What `grown_state: mean` makes of tensors [*shape], one place after the other in Python floats."""
    made = {}
    for name, tensor in state.items():
        values = [float(v) for v, k in zip(tensor.flatten(), kept.flatten(), strict=True) if k]
        filled = torch.zeros_like(tensor)
        for i, (k, g) in enumerate(zip(kept.flatten(), grown.flatten(), strict=True)):
            if k or g:
                filled.view(-1)[i] = tensor.flatten()[i] if k else sum(values) / len(values)
        made[name] = filled
    return made


def tensors_of(optimizer: torch.optim.Optimizer, parameter: Any) -> dict[str, Tensor]:
    values = optimizer.state[parameter]
    return {k: v.clone() for k, v in values.items() if isinstance(v, Tensor) and v.shape == parameter.shape}


@pytest.mark.parametrize("algorithm", ["set", "rigl"])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_grown_weights_have_the_mean_state_of_their_layer(cls: Any, options: Any, algorithm: str) -> None:
    runs = []
    for state in ("zero", "mean"):
        net = sparse_net()
        optimizer = cls(net.parameters(), **options)
        runs.append((net, optimizer, make(net, optimizer, algorithm, grown_state=state)))
    before = [w.mask.clone() for w in runs[0][2].weights]
    for run in runs:
        train(*run, 0, 4)  # the first update is that of step 3
    for old, zero, mean in zip(before, runs[0][2].weights, runs[1][2].weights, strict=True):
        assert torch.equal(zero.mask, mean.mask) and torch.equal(zero.parameter, mean.parameter)
        kept, grown = old & zero.mask, zero.mask & ~old
        assert bool(grown.any())
        wanted = mean_of_kept(tensors_of(runs[0][1], zero.parameter), kept, grown)
        found = tensors_of(runs[1][1], mean.parameter)
        assert wanted.keys() == found.keys() and wanted
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)
            assert name == "momentum_buffer" or bool((found[name][grown] != 0).all())
    for run in runs:
        train(*run, 4, STEPS)
        assert_zeros(run[2])


def test_the_first_step_of_a_grown_weight_under_adam() -> None:
    """3.15 times the learning rate from zero moments, after many steps; about one tenth with the layer's."""
    far = {}
    for state in ("zero", "mean"):
        net = sparse_net()
        optimizer = ADAMW(net.parameters(), lr=1e-3, weight_decay=0)
        sparsifier = Sparsifier(
            net, optimizer, algorithm="set", total_steps=3000, delta_t=1500, decay="constant", grown_state=state
        )
        w = sparsifier.weights[2]
        train(net, optimizer, sparsifier, 0, 1500)
        before = w.mask.clone()
        train(net, optimizer, sparsifier, 1500, 1501)
        grown = w.mask & ~before
        train(net, optimizer, sparsifier, 1501, 1502)
        far[state] = float(w.parameter.detach()[grown].abs().max()) / 1e-3
    assert 2.5 < far["zero"] < 3.2 and far["mean"] < 1


# --- together ---

OPTIONS = [
    {"name": name, "growth": growth, "grown_state": "mean"} for name in ("rigl", "snfs") for growth in GROWTHS
] + [{"name": "set", "growth": growth, "grown_state": "mean"} for growth in ("random", "balanced")]


@pytest.mark.parametrize("on_host", [False, True], ids=["", "as for a GPU"])
@pytest.mark.parametrize(("cls", "options"), [(ADAMW, {"weight_decay": 0.1}), (SGD, {"momentum": 0.9})])
@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_stored_blocks_train_as_weights_with_zeros(
    algorithm: Any, cls: Any, options: Any, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_host:
        monkeypatch.setattr("sparseift_cli.sparsity.sparsifier.FAST_ON", {"cpu"})
    pair = Pair(algorithm, cls, **options)
    for t in range(BLOCK_STEPS):
        pair.step(t)
        for zeros, blocks in zip(*(s.weights for s in pair.sparsifiers), strict=True):
            for a, b in zip(
                *(s.state_of(w) for s, w in zip(pair.sparsifiers, (zeros, blocks), strict=True)), strict=True
            ):
                torch.testing.assert_close(blocks.layer.blocks_of(a), b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_the_fast_update_makes_the_same(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for devices in (frozenset(), frozenset({"cpu"})):
        monkeypatch.setattr("sparseift_cli.sparsity.sparsifier.FAST_ON", devices)
        net = sparse_net()
        optimizer = ADAMW(net.parameters(), lr=0.01)
        train(net, optimizer, make(net, optimizer, algorithm), 0, STEPS)
        found.append(net.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_graph_holds_every_update_but_a_balanced_one(growth: str) -> None:
    net = sparse_net()
    sparsifier = make(net, ADAMW(net.parameters()), growth=growth, grown_state="mean")
    assert GraphedUpdate.fits(sparsifier) is (growth != "balanced")


@pytest.mark.parametrize("algorithm", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_resume_is_exact(algorithm: Any) -> None:
    def fresh() -> Any:
        net = sparse_net()
        optimizer = ADAMW(net.parameters(), lr=0.01)
        return net, optimizer, make(net, optimizer, algorithm)

    whole, first, second = fresh(), fresh(), fresh()
    train(*whole, 0, STEPS)
    train(*first, 0, 7)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))  # brings that of the Sparsifier
    train(*second, 7, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True))


def test_states_saved_before_these_options_go_on() -> None:
    net = sparse_net()
    sparsifier = make(net, ADAMW(net.parameters()))
    saved = sparsifier.state_dict()
    for name in ("growth", "grown_state"):
        del saved["settings"][name]
    sparsifier.load_state_dict(saved)
    loss_of(net, 0).backward()
    other = make(net, ADAMW(net.parameters()), growth="normalised")
    with warnings.catch_warnings(), pytest.raises(Exception, match="growth 'magnitude' -> 'normalised'"):
        other.load_state_dict(saved)
