"""The callbacks of the Hugging Face Trainer and Lightning, in stand-ins that call what the real loops call, in their order."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.errors import UsageError
from sparseift_cli.mask.attached import attach
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.sparsity.integrations import STATE_FILE, hugging_face_callback, lightning_callback

STEPS = 12
OPTIONS = {"algorithm": "granet", "delta_t": 2, "drop_fraction": 0.5}


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name in (("transformers", "TrainerCallback"), ("lightning", "Callback")):
        module = ModuleType(package)
        setattr(module, name, type(name, (), {}))
        monkeypatch.setitem(sys.modules, package, module)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    attach(model, {"0.weight": make_mask((16, 6), 20, generator=generator_for(0))})
    return model


def loss_of(model: nn.Module, t: int) -> Tensor:
    return model(torch.randn(8, 6, generator=generator_for(1, str(t)))).square().mean()


class Accelerated(torch.optim.Optimizer):
    """As Accelerate wraps: an Optimizer that is not called by its own hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.optimizer.step()


def hugging_face(folder: Path, model: nn.Module, optimizer, first: int, last: int, callback) -> None:
    args = SimpleNamespace(output_dir=str(folder))
    state = SimpleNamespace(global_step=first, max_steps=STEPS, is_world_process_zero=True)
    around = {"model": model, "optimizer": Accelerated(optimizer)}
    callback.on_train_begin(args, state, None, **around)
    for t in range(first, last):
        loss_of(model, t).backward()
        callback.on_pre_optimizer_step(args, state, None, **around)
        around["optimizer"].step()
        optimizer.zero_grad()
        state.global_step = t + 1
    (folder / f"checkpoint-{last}").mkdir(exist_ok=True)
    callback.on_save(args, state, None, **around)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    callback.on_train_end(args, state, None, **around)


def fresh() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = net()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize("lost", [False, True])
def test_hugging_face_resumes_to_the_bit(tmp_path: Path, lost: bool) -> None:
    model, optimizer = fresh()
    callback = hugging_face_callback(**OPTIONS)
    hugging_face(tmp_path, model, optimizer, 0, STEPS, callback)
    assert callback.sparsifier.nnz == {"0.weight": 20}
    assert int(model[0].weight.count_nonzero()) == 20
    assert not optimizer._optimizer_step_post_hooks

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    half, its_optimizer = fresh()
    hugging_face(first, half, its_optimizer, 0, 5, hugging_face_callback(**OPTIONS))
    first.rename(second)
    if lost:
        (second / "checkpoint-5" / STATE_FILE).unlink()
    again, resumed = fresh()
    again.load_state_dict(half.state_dict())
    if lost:
        resumed.load_state_dict(torch.load(second / "optimizer.pt", weights_only=True))
    else:  # a checkpoint of an older version: the optimiser's state is its own alone
        resumed.load_state_dict(copy.deepcopy(its_optimizer.state_dict()))
    hugging_face(second, again, resumed, 5, STEPS, hugging_face_callback(**OPTIONS))
    assert torch.equal(model[0].weight, again[0].weight)
    assert torch.equal(model[0].weight_mask, again[0].weight_mask)


def test_hugging_face_without_a_saved_state(tmp_path: Path) -> None:
    model, optimizer = fresh()
    with pytest.raises(UsageError, match=STATE_FILE):
        hugging_face(tmp_path, model, optimizer, 5, 6, hugging_face_callback(**OPTIONS))


def test_lightning_resumes_to_the_bit() -> None:
    def fit(model, optimizer, first: int, last: int, callback) -> None:
        other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        trainer = SimpleNamespace(optimizers=[other, optimizer], estimated_stepping_batches=float(STEPS))
        callback.on_train_start(trainer, model)
        for t in range(first, last):

            def closure(t: int = t) -> Tensor:  # Lightning runs all of this inside the optimiser's step
                optimizer.zero_grad()
                loss = loss_of(model, t)
                loss.backward()
                callback.on_before_optimizer_step(trainer, model, other)
                callback.on_before_optimizer_step(trainer, model, optimizer)
                return loss

            optimizer.step(closure)

    model, optimizer = fresh()
    callback = lightning_callback(**OPTIONS)
    assert callback.state_dict() == {}
    fit(model, optimizer, 0, STEPS, callback)
    assert callback.sparsifier.steps == STEPS
    assert int(model[0].weight.count_nonzero()) == 20

    half, its_optimizer = fresh()
    before = lightning_callback(**OPTIONS)
    fit(half, its_optimizer, 0, 5, before)
    again, resumed = fresh()
    again.load_state_dict(half.state_dict())
    resumed.load_state_dict(copy.deepcopy(its_optimizer.state_dict()))
    after = lightning_callback(**OPTIONS)
    after.load_state_dict(before.state_dict())
    fit(again, resumed, 5, STEPS, after)
    assert torch.equal(model[0].weight, again[0].weight)
    assert torch.equal(model[0].weight_mask, again[0].weight_mask)
    after.on_train_end(None, again)
    assert not resumed._optimizer_step_post_hooks


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="needs transformers") as caught:
        hugging_face_callback()
    assert caught.value.hint == "pip install transformers"
    with pytest.raises(UsageError, match="needs lightning"):
        lightning_callback()
