"""Loops that others wrote: their own checkpoints, wrapped optimisers, several of them, averages, and calls in the wrong place.

Each is an imitation of a public program, down to what it saves and in which order it loads.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparseift_cli as sparseift
from sparseift_cli.base.randomness import generator_for
from sparseift_cli.errors import CheckFailed, UsageError
from sparseift_cli.mask.attached import attach, masks_of
from sparseift_cli.mask.mask import make_mask
from tests.helpers.sparse_net import Net, assert_zeros, loss_of, sparse_net, train


def outside_masks(model: nn.Module) -> dict[str, int]:
    """How many weights outside its mask are not zero, for every weight that has such ones."""
    counts = {
        key: int(model.get_parameter(key).detach().masked_fill(mask, 0).count_nonzero())
        for key, mask in masks_of(model).items()
    }
    return {key: n for key, n in counts.items() if n}


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
ALGORITHMS = ("static", "set", "snfs", "rigl", "gmp", "granet")
STEPS, HALF = 20, 10
OPTIONS = {"total_steps": STEPS, "delta_t": 3, "drop_fraction": 0.4}


def other_net() -> Net:
    """The same network as `sparse_net`, with other weights and other masks of the same sizes."""
    torch.manual_seed(7)
    net, masks = Net(), {}
    for name, mask in sparseift.masks(sparse_net()).items():
        masks[name] = make_mask(mask.shape, int(mask.count_nonzero()), generator=generator_for(7, name))
    attach(net, masks)
    return net


def through_disk(checkpoint: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def nnz_of(net: nn.Module) -> dict[str, int]:
    return {name: int(net.get_parameter(name).count_nonzero()) for name in sparseift.masks(net)}


def equal(one: nn.Module, two: nn.Module) -> bool:
    theirs = two.state_dict()
    return all(torch.equal(t, theirs[name]) for name, t in one.state_dict().items())


# --- a program's own checkpoint ---


@pytest.mark.parametrize("order", ["sparsifier first", "model first", "optimizer first", "sparsifier last"])
@pytest.mark.parametrize(("algorithm", "cls"), [*((name, SGD) for name in ALGORITHMS), ("rigl", ADAMW), ("gmp", ADAMW)])
def test_model_and_optimizer_alone_resume_to_the_bit(algorithm: str, cls: Callable[..., Any], order: str) -> None:
    options = {"lr": 0.1, "momentum": 0.9} if cls is SGD else {"lr": 0.01}

    def start(net: nn.Module, resume: dict[str, Any] | None = None) -> tuple[Any, Any]:
        def load(what: str) -> None:
            if resume is not None:
                {"model": net, "optimizer": optimizer}[what].load_state_dict(resume[what])

        optimizer = cls(net.parameters(), **options)
        if order == "sparsifier last":
            load("model")
            load("optimizer")
        if order == "model first":
            load("model")
        sparsifier = sparseift.Sparsifier(net, optimizer, algorithm=algorithm, **OPTIONS)
        if order == "sparsifier first":
            load("model")
        if order in ("sparsifier first", "model first", "optimizer first"):
            load("optimizer")
        if order == "optimizer first":
            load("model")
        return optimizer, sparsifier

    straight = sparse_net()
    train(straight, *start(straight), 0, STEPS)
    first = sparse_net()
    optimizer, sparsifier = start(first)
    train(first, optimizer, sparsifier, 0, HALF)
    saved = through_disk({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    again = other_net()
    optimizer, sparsifier = start(again, saved)
    assert sparsifier.steps == HALF
    for t in range(HALF, STEPS):
        train(again, optimizer, sparsifier, t, t + 1)
        assert_zeros(sparsifier)
    assert equal(straight, again)


def test_keys_of_checkpoints_are_those_of_the_plain_model() -> None:
    net = sparse_net()
    optimizer = ADAMW(net.parameters())
    sparseift.Sparsifier(net, optimizer, **OPTIONS)
    assert net.state_dict().keys() == Net().state_dict().keys()
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert "sparseift" not in optimizer.param_groups[0]
    plain = Net()
    plain.load_state_dict(net.state_dict())
    ADAMW(plain.parameters()).load_state_dict(saved)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("algorithm", ["static", "rigl"])
def test_masks_are_read_from_loaded_zeros(algorithm: str, when: str) -> None:
    """The weights alone, as of a program that saves no optimiser: the masks follow, and the schedule is said to begin again."""
    first = sparse_net()
    optimizer = SGD(first.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(first, optimizer, algorithm=algorithm, **OPTIONS)
    train(first, optimizer, sparsifier, 0, HALF + 1)  # step 9 grew weights, which are not zero after step 10
    again = other_net()
    optimizer = SGD(again.parameters(), lr=0.1)
    if when == "before":
        again.load_state_dict(first.state_dict())
    sparsifier = sparseift.Sparsifier(again, optimizer, algorithm=algorithm, **OPTIONS)
    if when == "after":
        again.load_state_dict(first.state_dict())
    loss_of(again, HALF).backward()
    with pytest.warns(UserWarning, match="masks are read from their zeros") as said:
        sparsifier.step()
    assert ("starts at step 0" in str(said[0].message)) == (algorithm == "rigl")
    assert equal(first, again)
    for name, mask in sparsifier.masks().items():
        assert torch.equal(mask, sparseift.masks(first)[name])
    optimizer.step()
    assert_zeros(sparsifier)


def test_checkpoints_of_torch_distributed() -> None:
    """They make a step of the optimiser with zero gradients to have a state to load into: it must change no loaded weight."""
    first = sparse_net()
    optimizer = ADAMW(first.parameters(), lr=0.01)
    train(first, optimizer, sparseift.Sparsifier(first, optimizer, **OPTIONS), 0, HALF)
    again = other_net()
    other = ADAMW(again.parameters(), lr=0.01)
    sparsifier = sparseift.Sparsifier(again, other, **OPTIONS)
    dcp.set_model_state_dict(again, dcp.get_model_state_dict(first))
    dcp.set_optimizer_state_dict(again, other, dcp.get_optimizer_state_dict(first, optimizer))
    assert sparsifier.steps == HALF
    assert equal(first, again)
    for t in range(HALF, STEPS):
        train(again, other, sparsifier, t, t + 1)
        assert_zeros(sparsifier)


def test_exact_zeros_inside_the_masks_are_filled_to_the_planned_number() -> None:
    first = sparse_net()
    with torch.no_grad():
        first.fc.weight[first.get_buffer("fc.weight_mask").nonzero()[:5].unbind(1)] = 0
    again = other_net()
    again.load_state_dict(first.state_dict())
    sparsifier = sparseift.Sparsifier(again, SGD(again.parameters(), lr=0.1), algorithm="static")
    assert sparsifier.nnz["fc.weight"] == int(again.get_buffer("fc.weight_mask").count_nonzero()) == 24
    assert not again.fc.weight[~again.get_buffer("fc.weight_mask")].any()
    loss_of(again, 0).backward()
    with pytest.warns(UserWarning, match="and 5 places that are zero were added"):
        sparsifier.step()


@pytest.mark.parametrize("when", ["before", "after", "mid-run"])
def test_dense_weights_are_refused(when: str) -> None:
    net, dense = sparse_net(), Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    message = r"conv\.weight has 216 non-zeros, 164 of them outside its mask of 52"
    if when == "before":
        net.load_state_dict(dense.state_dict())
        with pytest.raises(UsageError, match=message) as refused:
            sparseift.Sparsifier(net, optimizer, **OPTIONS)
        assert refused.value.hint and "copy_masks(model, model)" in refused.value.hint
        sparseift.copy_masks(net, net)
        sparseift.Sparsifier(net, optimizer, **OPTIONS)
        return
    sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    if when == "mid-run":
        train(net, optimizer, sparsifier, 0, 5)
    net.load_state_dict(dense.state_dict())
    loss_of(net, 5).backward()
    with pytest.raises(UsageError, match=message):
        sparsifier.step()


def test_gmp_may_begin_with_dense_weights() -> None:
    net, dense = sparse_net(), Net()
    net.load_state_dict(dense.state_dict())
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(net, optimizer, algorithm="gmp", **OPTIONS)
    assert torch.equal(net.conv.weight, dense.conv.weight)
    train(net, optimizer, sparsifier, 0, STEPS)
    assert sparsifier.nnz == nnz_of(sparse_net())


def test_momentum_outside_the_masks_is_cleared() -> None:
    dense = Net()
    other = ADAMW(dense.parameters(), lr=0.01)
    loss_of(dense, 0).backward()
    other.step()
    net = sparse_net()
    optimizer = ADAMW(net.parameters(), lr=0.01)
    sparsifier = sparseift.Sparsifier(net, optimizer, algorithm="static")
    optimizer.load_state_dict(other.state_dict())
    loss_of(net, 0).backward()
    with pytest.warns(
        UserWarning, match=r"not zero outside the masks of conv\.weight, grouped\.weight, fc\.weight: it was set"
    ):
        sparsifier.step()
    optimizer.step()
    assert_zeros(sparsifier)


def test_an_optimizer_that_goes_on_without_its_sparsifier_is_said() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    train(net, optimizer, sparsifier, 0, 4)
    sparsifier.close()
    again = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    loss_of(net, 4).backward()
    with pytest.warns(
        UserWarning, match="brings a state, but none of a Sparsifier; the schedule of rigl starts at step 0"
    ):
        again.step()


def test_a_run_can_grow() -> None:
    """From the step it was saved at on, the schedule is that of the new length: the next updates are those of a longer run."""
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    train(net, optimizer, sparsifier, 0, STEPS)
    saved = through_disk({"optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()})
    for how in ("optimizer", "sparsifier"):
        again = copy.deepcopy(net)
        other = SGD(again.parameters(), lr=0.1)
        longer = sparseift.Sparsifier(again, other, **OPTIONS | {"total_steps": 2 * STEPS})
        with pytest.warns(UserWarning, match="total_steps 20 -> 40: from step 20 on masks move .* until step 30;"):
            {"optimizer": other, "sparsifier": longer}[how].load_state_dict(saved[how])
        moved = []
        for t in range(STEPS, 2 * STEPS):
            before = again.get_buffer("conv.weight_mask").clone()
            train(again, other, longer, t, t + 1)
            moved += [] if torch.equal(before, again.get_buffer("conv.weight_mask")) else [t]
            assert_zeros(longer)
        assert moved == [21, 24]  # and at 27 it drops floor(0.2 (1 + cos(0.9 pi)) 52) = 0


def test_masks_of_another_algorithm_are_taken_and_its_schedule_is_not() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, sparseift.Sparsifier(net, optimizer, **OPTIONS), 0, HALF)
    again = other_net()
    other = SGD(again.parameters(), lr=0.1)
    static = sparseift.Sparsifier(again, other, algorithm="static")
    again.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert static.steps == 0
    assert all(torch.equal(m, sparseift.masks(net)[n]) for n, m in static.masks().items())
    with pytest.warns(UserWarning, match="another algorithm .*: this one begins with its masks, at step 0"):
        sparseift.Sparsifier(again, loaded(SGD(again.parameters(), lr=0.1), optimizer), algorithm="set", **OPTIONS)
    denser = sparseift.Sparsifier(again, loaded(SGD(again.parameters(), lr=0.1), optimizer), algorithm="dense")
    assert denser.nnz == {name: m.numel() for name, m in denser.masks().items()}


def loaded(optimizer: torch.optim.Optimizer, saved: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.load_state_dict(saved.state_dict())
    return optimizer


def test_masks_of_a_run_that_was_still_denser_are_not_taken() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    train(net, optimizer, sparseift.Sparsifier(net, optimizer, algorithm="gmp", **OPTIONS), 0, 4)
    again = sparse_net()
    other = SGD(again.parameters(), lr=0.1)
    static = sparseift.Sparsifier(again, other, algorithm="static")
    again.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    loss_of(again, 4).backward()
    with pytest.raises(UsageError, match=r"weights do not fit their masks: conv\.weight"):
        static.step()


def test_masks_without_their_weights_are_said() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    train(net, optimizer, sparsifier, 0, HALF)
    again = other_net()
    sparsifier = sparseift.Sparsifier(again, SGD(again.parameters(), lr=0.1), state=sparsifier.state_dict(), **OPTIONS)
    loss_of(again, 0).backward()
    with pytest.warns(UserWarning, match="the loaded masks zeroed .* weights, and none were loaded since"):
        sparsifier.step()


# --- the optimiser in other hands ---


class Wrapper(torch.optim.Optimizer):
    """As Accelerate, Opacus and timm's Lookahead do: an Optimizer whose own step calls no hook."""

    def __init__(self, optimizer: torch.optim.Optimizer, attribute: str) -> None:
        setattr(self, attribute, optimizer)
        self._inner = optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._inner.step()


@pytest.mark.parametrize("attribute", ["optimizer", "original_optimizer", "_base_optimizer"])
def test_wrapped_optimizers(attribute: str) -> None:
    plain, net = sparse_net(), sparse_net()
    optimizer = SGD(plain.parameters(), lr=0.1)
    train(plain, optimizer, sparseift.Sparsifier(plain, optimizer, **OPTIONS), 0, 7)
    inner = SGD(net.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(net, Wrapper(Wrapper(inner, attribute), attribute), **OPTIONS)
    for t in range(7):
        loss_of(net, t).backward()
        sparsifier.step()
        Wrapper(inner, attribute).step()
        inner.zero_grad()
    assert equal(plain, net)


def test_an_optimizer_that_is_never_called_is_said() -> None:
    net = sparse_net()
    sparsifier = sparseift.Sparsifier(net, SGD(net.parameters(), lr=0.1), algorithm="static")
    used = SGD(net.parameters(), lr=0.1)
    for t in range(31):
        train(net, used, sparsifier, t, t + 1)
    with pytest.warns(UserWarning, match=r"called 32 times and the optimiser made 0 steps: call it once a step"):
        sparsifier.step()


def test_what_is_no_optimizer_is_refused() -> None:
    net = sparse_net()
    with pytest.raises(UsageError, match=r"GradScaler is no torch\.optim\.Optimizer"):
        sparseift.Sparsifier(net, torch.amp.GradScaler("cpu"))


def test_two_optimizers_are_one() -> None:
    """Weights in two optimisers of one kind and rate train as in one, also when both are saved and loaded on the way."""
    plain = sparse_net()
    optimizer = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    train(plain, optimizer, sparseift.Sparsifier(plain, optimizer, **OPTIONS), 0, STEPS)
    net, saved = sparse_net(), dict[str, Any]()
    for first, last in ((0, HALF), (HALF, STEPS)):
        halves = [list(net.conv.parameters()), [p for n, p in net.named_parameters() if not n.startswith("conv")]]
        both = [SGD(half, lr=0.1, momentum=0.9) for half in halves]
        sparsifier = sparseift.Sparsifier(net, both, **OPTIONS)
        for name, one in zip("ab", both, strict=True):
            if saved:
                one.load_state_dict(saved[name])
        for t in range(first, last):
            loss_of(net, t).backward()
            sparsifier.step()
            for one in both:
                one.step()
            net.zero_grad()
            assert_zeros(sparsifier)
        saved = through_disk({"net": net.state_dict(), "a": both[0].state_dict(), "b": both[1].state_dict()})
        net = other_net()
        net.load_state_dict(saved["net"])
    assert equal(plain, net)


def test_closures_that_are_evaluated_several_times() -> None:
    """LBFGS: `step()` in the closure masks every time and counts once; beside it the closure's gradients are refused."""
    net = sparse_net()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4)
    with pytest.warns(UserWarning, match="LBFGS may move"):
        sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        sparsifier.step()
        return loss

    for t in range(8):
        optimizer.step(closure)
        assert sparsifier.steps == t + 1
        assert not outside_masks(net)
    assert evaluations > 8

    def unmasked() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    net = sparse_net()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4)
    with pytest.warns(UserWarning, match="LBFGS may move"):
        sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    unmasked()
    sparsifier.step()
    with pytest.raises(UsageError, match=r"optimizer\.step\(closure\) made gradients that are not masked"):
        optimizer.step(unmasked)


def test_gradients_that_are_changed_after_masking() -> None:
    """As differential privacy does: noise in every gradient, inside the wrapper's step."""
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sparseift.Sparsifier(net, optimizer, algorithm="static")
    for t in range(3):
        loss_of(net, t).backward()
        sparsifier.step()
        for p in net.parameters():
            assert p.grad is not None
            p.grad += torch.randn_like(p) * 0.01
        if t:
            optimizer.step()
        else:
            with pytest.warns(UserWarning, match=r"the step of SGD moved weights outside the masks of conv\.weight"):
                optimizer.step()
        assert_zeros(sparsifier)


class Cautious(SGD):
    """Steps divided by the share of weights whose gradient is not zero, as cautious optimisers do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / (p.grad != 0).float().mean(), alpha=group["lr"])


def test_steps_that_depend_on_the_zeros_are_measured() -> None:
    """52 of 216 weights: a mean over all places is 0.241 of that over the weights, and steps are 216 / 52 = 4.2 times as long."""
    net = sparse_net()
    schedule = torch.optim.lr_scheduler.StepLR(Cautious(net.parameters(), lr=0.1), 10)
    with (
        pytest.warns(UserWarning, match="Cautious may move"),
        pytest.warns(
            UserWarning, match=r"steps of Cautious depend on the zeros: at density 0\.241 they are about 4\.2 times"
        ),
    ):
        sparseift.Sparsifier(net, schedule, algorithm="static")


# --- the model in other hands ---


def test_training_without_a_sparsifier_is_said_once() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    loss_of(net, 0).backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="training fills the masks: .* and nothing sets them back") as said:
        loss_of(net, 1).backward()
    assert len(said) == 1
    for t in range(2, 9):  # said once
        loss_of(net, t).backward()
        optimizer.step()


def test_training_that_masks_by_itself_is_left_alone() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    for t in range(9):
        loss_of(net, t).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in sparseift.masks(net).items():
                net.get_parameter(name).mul_(mask)
    assert not outside_masks(net)


def test_an_average_stays_sparse() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    kept, left = (AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for _ in range(2))
    sparsifier.keep_sparse(kept)
    for t in range(STEPS):
        train(net, optimizer, sparsifier, t, t + 1)
        kept.update_parameters(net)
        left.update_parameters(net)
        assert not outside_masks(kept.module)
        assert all(torch.equal(m, sparseift.masks(kept.module)[n]) for n, m in sparsifier.masks().items())
    assert nnz_of(left.module)["fc.weight"] > sparsifier.nnz["fc.weight"]
    sparseift.copy_masks(net, left)
    assert nnz_of(left.module)["fc.weight"] <= sparsifier.nnz["fc.weight"]


def test_type_and_dtype_keep_the_masks() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    before = {name: mask.clone() for name, mask in sparseift.masks(net).items()}
    net.type(torch.float64)
    assert all(torch.equal(mask, sparseift.masks(net)[name]) for name, mask in before.items())
    for _ in range(4):
        nn.functional.cross_entropy(net(torch.randn(4, 3, 5, 5, dtype=torch.float64)), torch.arange(4)).backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        assert_zeros(sparsifier)
    assert sparsifier.weights[0].mask_float.dtype == torch.float64


def test_another_parameter_is_refused() -> None:
    net = sparse_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    sparsifier = sparseift.Sparsifier(net, optimizer, **OPTIONS)
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    loss_of(net, 0).backward()
    with pytest.raises(UsageError, match=r"conv\.weight is not the parameter any more"):
        sparsifier.step()
    nn.utils.parametrizations.weight_norm(net.fc)
    with pytest.raises(UsageError, match=r"fc\.weight has a mask and is no parameter any more"):
        sparseift.Sparsifier(net, optimizer, **OPTIONS)


def test_a_run_shorter_than_its_first_update_is_said() -> None:
    net = sparse_net()
    with pytest.warns(UserWarning, match="rigl moves no mask in this run: the first update would be that of step 100"):
        sparseift.Sparsifier(net, SGD(net.parameters(), lr=0.1), total_steps=100)
    sparseift.Sparsifier(net, SGD(net.parameters(), lr=0.1), total_steps=136)  # 100 < .75 * 136
    sparseift.Sparsifier(net, SGD(net.parameters(), lr=0.1), algorithm="static")


def wide_mlp(seed: int = 0) -> tuple[nn.Module, int]:
    """A transformed network, and the non-zeros of its one sparse layer."""
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    net, plan = sparseift.transform(dense, torch.zeros(2, 16), sparsity=0.75, options=sparseift.Options(seed=seed))
    return net, next(layer.parts[0].nnz for layer in plan.layers if layer.status == "transformed")


def test_an_audit_of_a_module_that_was_filled_says_so() -> None:
    net, nnz = wide_mlp()
    planned = sparseift.flops(net).forward_ratio
    with torch.no_grad():
        net.get_parameter("2.weight").fill_(1.0)
    message = rf"the module costs more: 4,096 non-zeros in 2\.weight where {nnz:,} were planned"
    with pytest.warns(UserWarning, match=message):
        assert sparseift.flops(net).forward_ratio == planned


def test_audit_and_save_read_masks_of_loaded_weights(tmp_path: Path) -> None:
    first, nnz = wide_mlp()
    net, _ = wide_mlp(seed=3)
    net.load_state_dict(first.state_dict())
    assert sparseift.audit(net, torch.zeros(2, 16)).forward_ratio == sparseift.flops(first).forward_ratio
    assert torch.equal(sparseift.masks(net)["2.weight"], sparseift.masks(first)["2.weight"])
    sparseift.save(net, tmp_path / "net")
    with torch.no_grad():
        net.get_parameter("2.weight").fill_(1.0)
    with pytest.raises(CheckFailed, match=f"2.weight: {4096 - nnz:,}"):
        sparseift.audit(net, torch.zeros(2, 16))


def test_a_whole_module_on_disk_names_no_class_of_ours() -> None:
    net, _ = wide_mlp()
    sparseift.Sparsifier(net, SGD(net.parameters(), lr=0.1), algorithm="static")
    file = io.BytesIO()
    torch.save(net, file)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU, set]):
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for copied in (again, copy.deepcopy(net)):
        assert torch.equal(copied(torch.ones(2, 16)), net(torch.ones(2, 16)))
        assert sparseift.audit(copied, torch.zeros(2, 16)) == sparseift.audit(net, torch.zeros(2, 16))
