"""Modules of other code: they keep activations, report sizes, share buffers; and mistakes of users."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import ArtifactError, CheckFailed, UsageError
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.transforms import transformation
from sparseift_cli.transforms.members.base import MemberModule
from sparseift_cli.transforms.transformation import Options

MEMBERS = ("wide", "parallel", "factorized", "doped")
X = torch.randn(4, 8)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Keeping(Mlp):
    """Keeps its last activation, a list of them, a count, and a buffer made on first use."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = torch.relu(self.a(x))
        self.seen.append(self.hidden)
        self.register_buffer("last", self.hidden.detach())
        return self.c(torch.relu(self.b(self.hidden)))


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("ran", [False, True])
def test_tensors_that_a_forward_stores_do_not_keep_the_trace(member: str, ran: bool) -> None:
    model = Keeping()
    if ran:
        model(X)
    before = model.__dict__.copy()
    new, _ = sparseift.transform(model, X, member=member, sparsity=0.75)
    assert model.__dict__ == before and len(model.seen) == int(ran) and ("last" in model._buffers) == ran
    assert new(X).shape == (4, 4) and new.calls == 1 + int(ran)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hooks(member: str) -> None:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)
    )
    torch.nn.utils.weight_norm(model[2])
    new, _ = sparseift.transform(model, X, member=member, sparsity=0.75)
    assert new(X).shape == (4, 4)


@pytest.mark.parametrize("member", MEMBERS[1:])
def test_members_report_the_sizes_of_the_layer_they_replace(member: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 2)), nn.Conv2d(12, 4, 1)
    )
    new, _ = sparseift.transform(net, torch.randn(1, 3, 16, 16), member=member, sparsity=0.75)
    layer: Any = new[2]
    assert isinstance(layer, MemberModule)
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels")
    assert [getattr(layer, n) for n in names] == [getattr(net[2], n) for n in names]
    assert not hasattr(layer, "in_features") and not hasattr(layer, "nonsense")
    assert isinstance(copy.deepcopy(layer), MemberModule)


class Shared(Mlp):
    """A buffer outside the state dict under two names, and one inside it under two names."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        table, held = torch.full((3,), fill), torch.full((5,), fill)
        for module in (self.a, self.b):
            module.register_buffer("table", table, persistent=False)
            module.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        sums = [t.sum() for m in (self.a, self.b) for t in m.buffers(recurse=False) if t.dtype.is_floating_point]
        return super().forward(x) + sum(sums)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_outside_the_state_dict_are_restored(member: str, device: str, tmp_path: Path) -> None:
    new, _ = sparseift.transform(Shared(7.0), X, member=member, sparsity=0.75)
    with torch.device(device):
        other = Shared(1.0)
    back = sparseift.load(sparseift.save(new, tmp_path / "out"), into=other)
    assert torch.equal(back(X), new.eval()(X))
    assert back.a.table is back.b.table and back.a.held is back.b.held
    assert not any(t.is_meta for t in back.buffers())


class Extra(Mlp):
    def get_extra_state(self) -> Any:
        return {"steps": 3}


def test_extra_state_that_is_not_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    new, _ = sparseift.transform(Extra(), X, sparsity=0.75)
    with pytest.raises(UsageError, match="_extra_state is dict"):
        sparseift.save(new, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_audit_reports_weights_outside_masks_and_missing_masks() -> None:
    new, _ = sparseift.transform(Mlp(), X, sparsity=0.75)
    sparseift.audit(new, X)
    new.load_state_dict({k: torch.ones_like(v) for k, v in new.state_dict().items()})
    with pytest.raises(CheckFailed, match=r"not zero: b\.weight: 768"):
        sparseift.audit(new, X)
    with pytest.raises(CheckFailed, match=r"not zero: b\.weight: 768"):  # the masks stay masks
        sparseift.audit(new.type(torch.float64), X.double())
    new.b = torch.nn.Linear(new.b.in_features, new.b.out_features).double()
    with pytest.raises(CheckFailed, match=r"masks are missing: b\.weight"):
        sparseift.audit(new, X.double())


@pytest.mark.parametrize("pattern", ["2:4", "1:3", "3:8", "5:6"])
@pytest.mark.parametrize("member", MEMBERS)
def test_n_of_m_under_every_member(pattern: str, member: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 30, 3), nn.ReLU(), nn.Conv2d(30, 4, 1))
    n, m = map(int, pattern.split(":"))
    new, plan = sparseift.transform(
        net, torch.randn(1, 3, 8, 8), member=member, sparsity=f"{m - n}/{m}", pattern=pattern
    )
    planned = sum(p.nnz for row in plan.layers if row.status == "transformed" for p in row.parts if not p.dense)
    assert planned == sum(int(mask.sum()) for mask in sparseift.masks(new).values())


def test_a_single_glob_may_be_a_string() -> None:
    assert TransformSpec.of({"exclude": "c*"}).exclude == ("c*",)
    with pytest.raises(UsageError, match="left out by"):  # Mlp has no other body layer
        sparseift.transform(Mlp(), X, member="doped", sparsity=0.75, exclude="b*")


@pytest.mark.parametrize(
    "wrong",
    [{"base_width": 0}, {"base_width": -3}, {"width_multiple": 1.5}, {"width_multiple": 0}, {"width_multiple": True}],
)
def test_widths_are_positive_whole_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"is not a whole number|must be at least 1"):
        TransformSpec(**wrong)


def test_integers_of_numpy_are_integers() -> None:
    multiple: Any = np.int64(8)
    assert json.loads(json.dumps(TransformSpec(width_multiple=multiple).to_json()))["width_multiple"] == 8


@pytest.mark.parametrize("wrong", [{"start": "perserve"}, {"init": "kaiming"}, {"scores": "magnitud"}])
def test_options_that_do_not_exist_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="unknown"):
        Options(**wrong)


class Sliced(nn.Module):
    """Its slice keeps every channel, up to a number that no shape is compared with, as GhostNet's does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cheap, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)
        self.kept = 16

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.cat([y, self.cheap(y)], 1)[:, : self.kept])


def test_a_slice_up_to_a_stored_width_is_followed() -> None:
    new, _ = sparseift.transform(Sliced(), torch.randn(1, 3, 4, 4), sparsity=0.75)
    assert new.kept == 32 and new(torch.randn(1, 3, 4, 4)).shape == (1, 4, 4, 4)


class SoftmaxAttention(nn.Module):
    """Has its softmax in a module of its own, as timm's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.qkv, self.proj, self.out = (
            nn.Linear(8, 16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )
        self.scale, self.softmax = 4**-0.5, nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.inp(x)).reshape(b, n, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.softmax(q * self.scale @ k.transpose(-2, -1)) @ v
        return self.out(self.proj(mixed.transpose(1, 2).reshape(b, n, -1)))


def test_a_softmax_module_counts_as_part_of_the_attention_that_calls_it() -> None:
    torch.manual_seed(0)
    model, x = SoftmaxAttention(), torch.randn(2, 6, 8)
    table = sparseift.inspect(model, x)
    assert [row.kind for row in table.layers if row.kind in ("qk", "av")] == ["qk", "av"]
    new, _ = sparseift.transform(model, x, sparsity=0.75, options=Options(start="preserve", preserve_slack=0))
    assert torch.allclose(new.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_transformed_model_that_does_not_run_is_not_blamed_on_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise UsageError("it does not run on input 4x8")

    monkeypatch.setattr(transformation, "measure", failing)
    with pytest.raises(CheckFailed, match="the transformed model does not run"):
        sparseift.transform(Mlp(), X, sparsity=0.75)


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, _ = sparseift.transform(Mlp(), X, sparsity=0.75)
    out = sparseift.save(new, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    real, calls = os.replace, []

    def once_full(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:  # the old folder is aside, the new one not yet there
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", once_full)
    with pytest.raises(ArtifactError, match="No space left"):
        sparseift.save(new, out, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_plan_only_has_nothing_to_export() -> None:
    arguments = ["transform", "resnet20", "-s", "0.75", "--plan-only", "--export", "dense"]
    done = subprocess.run(
        [sys.executable, "-m", "sparseift_cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "no weights to export" in done.stderr


class TiedByFunction(nn.Module):
    """The head is a function that holds the model, as in x-transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.head = lambda x: x @ self.embed.weight.t()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(self.embed(ids))))


@pytest.mark.parametrize("member", ["wide", "parallel"])
def test_a_function_that_holds_the_model_holds_the_new_one(member: str) -> None:
    model, ids = TiedByFunction().eval(), torch.zeros(2, 3, dtype=torch.long)
    kept = model.head
    new, _ = sparseift.transform(model, ids, member=member, sparsity=0.75)
    assert new(ids).shape == (2, 3, 20)
    new.embed.weight.data.zero_()
    assert not new(ids).any() and model(ids).any()
    assert model.head is kept
