"""What a model returns keeps its shape, by-products apart; the classes of a loss keep their number; heads stay dense."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparseift_cli import transform
from sparseift_cli.errors import CheckFailed, UsageError
from sparseift_cli.trace.build import layer_table, trace
from sparseift_cli.trace.outputs import returned
from sparseift_cli.transforms.check import measure, require_as_planned
from sparseift_cli.transforms.transformation import transformation_of
from tests.helpers.parts import Net

WIDTH, WIDER = 32, 64  # at sparsity 0.75 widths double
CLASSES = 50
X = torch.zeros(6, 8)


@dataclass
class Boxes:
    scores: Tensor
    sides: list[Tensor]


class KeyCache:
    """Keys and values of each layer, as DynamicCache of transformers holds them: no container that PyTorch knows."""

    def __init__(self, keys: Tensor) -> None:
        self.layers = [{"keys": keys}]


def net(forward: Callable[[Net, Tensor], Any], **heads: nn.Module) -> Net:
    """8 features -> 32 -> 32, and what `forward` makes of them."""
    return Net(
        lambda n, x: forward(n, n.b(n.a(x).relu()).relu()), a=nn.Linear(8, WIDTH), b=nn.Linear(WIDTH, WIDTH), **heads
    )


def heads(**outputs: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(WIDTH, n) for name, n in outputs.items()}


def roles(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    table = layer_table(model, inputs or (X,), name="net", input_shape=(6, 8))
    return {row.name: row.role for row in table.layers if row.weighted}


RETURNED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a mapping": lambda c, b: {"logits": c, "pred_boxes": b},
    "without logits": lambda c, b: {"scores": c, "boxes": b},
    "mappings in a list": lambda c, b: {"logits": c, "auxiliary": [{"logits": c, "boxes": b}]},
    "a tuple": lambda c, b: (c, [b]),
    "a named tuple": lambda c, b: namedtuple("Out", "logits boxes")(c, b),
    "a dataclass": lambda c, b: Boxes(c, [b]),
    "a dataclass in a tuple": lambda c, b: (c, Boxes(c, [b])),
    "a distribution": lambda c, b: (c, torch.distributions.Normal(b, b.exp(), validate_args=False)),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_every_result_keeps_its_shape(kind: str) -> None:
    model = net(lambda n, h: RETURNED[kind](n.classes(h), n.boxes(h)), **heads(classes=5, boxes=4))
    new, plan = transform(model.eval(), X, sparsity=0.75)
    shapes = [[tuple(t.shape) for t in returned(m(X)).results.values()] for m in (model, new)]
    assert shapes[0] == shapes[1]
    assert {(6, 5), (6, 4)} <= set(shapes[0])
    assert new.b.weight.shape == (WIDER, WIDER)
    assert {p.layer.name: p.status for p in plan.layers} == {
        "a": "boundary",
        "b": "transformed",
        "classes": "boundary",
        "boxes": "boundary",
    }


def test_by_products_may_grow_and_are_named() -> None:
    def forward(n: Net, h: Tensor) -> Any:
        return {"loss": h.mean(), "logits": n.head(h), "hidden_states": (h,), "past_key_values": KeyCache(h)}

    model = net(forward, **heads(head=5))
    new, plan = transform(model.eval(), X, sparsity=0.75)
    out = new(X)
    assert out["logits"].shape == (6, 5)
    assert out["hidden_states"][0].shape == (6, WIDER) == out["past_key_values"].layers[0]["keys"].shape
    assert plan.grown_by_products == ["hidden_states", "past_key_values"]
    assert plan.table.from_json(plan.table.to_json()) == plan.table


@pytest.mark.parametrize(
    ("beside", "kept"),
    [({}, True), ({"hidden_states": (X,)}, True), ({"loss": X.sum()}, True), ({"pred_boxes": X}, False)],
    ids=["alone", "with hidden states", "with a loss", "with boxes"],
)
def test_features_are_the_result_where_no_head_returns_one(beside: dict[str, Any], kept: bool) -> None:
    model = net(lambda n, h: {"last_hidden_state": h, **beside})
    table = layer_table(model, (X,), name="net", input_shape=(6, 8))
    fixed = {w.name: w.fixed for w in table.widths}
    assert fixed["b.weight[0]"] == ("output of the model: last_hidden_state" if kept else None)


TOKENS, TARGETS = torch.randint(0, CLASSES, (6,)), torch.randint(0, CLASSES, (6,))
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "a module": lambda z, y: nn.CrossEntropyLoss()(z, y),
    "classes in dim 1": lambda z, y: F.cross_entropy(z.view(2, 3, -1).transpose(1, 2), y.view(2, 3)),
    "one sample": lambda z, y: F.cross_entropy(z[0], y[0]),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "margin": F.multi_margin_loss,
    "gather": lambda z, y: z.log_softmax(-1).gather(-1, y[:, None]).mean(),
    "torch.gather": lambda z, y: torch.gather(z, dim=1, index=y[:, None]).mean(),
    "take along": lambda z, y: z.take_along_dim(y[:, None], 1).mean(),
    "index": lambda z, y: z[torch.arange(6), y].mean(),
    "index behind an ellipsis": lambda z, y: z[..., y].mean(),
    "select": lambda z, y: z.index_select(1, y).mean(),
    "scattered targets": lambda z, y: F.binary_cross_entropy_with_logits(
        z, torch.zeros_like(z).scatter_(1, y[:, None], 1.0)
    ),
    "one hot": lambda z, y: -(z.log_softmax(-1) * F.one_hot(y, CLASSES)).sum(-1).mean(),
    "regression": lambda z, y: F.mse_loss(z, torch.ones(6, CLASSES)),
    "ctc": lambda z, y: F.ctc_loss(z[:, None].log_softmax(-1), y[None, :2], torch.tensor([6]), torch.tensor([2])),
    "no classes at all": lambda z, y: z.square().mean(),
}


@pytest.mark.parametrize(
    ("loss", "more"),
    [*((loss, False) for loss in LOSSES), *((loss, True) for loss in LOSSES if loss != "no classes at all")],
)
def test_the_classes_of_a_loss_keep_their_number(loss: str, more: bool) -> None:
    """ln(50) is the loss of 50 classes; a head of 100 outputs would give ln(100). `more`: it returns x beside the loss."""

    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = net(lambda n, h: h)
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor, targets: Tensor) -> Any:
            z = self.head(self.features(x))
            return (LOSSES[loss](z, targets), x) if more else LOSSES[loss](z, targets)

    given = (X, TARGETS)
    new, plan = transform(Training().eval(), given, sparsity=0.75)
    assert new.head.weight.shape == (CLASSES, WIDER)
    assert new.features.b.weight.shape == (WIDER, WIDER)
    assert {p.layer.name: p.layer.role for p in plan.layers}["head"] == "output"
    if loss == "cross entropy" and not more:
        new.head.weight.data.zero_()
        new.head.bias.data.zero_()
        assert float(new(*given).detach()) == pytest.approx(3.912023, abs=1e-6)


def test_a_loss_beside_another_still_has_its_head() -> None:
    """A router feeds a loss of its own, and layers read what it chose: it is no head."""

    def forward(n: Net, h: Tensor) -> Tensor:
        gate = n.router(h).softmax(-1)
        return n.head(n.c(h * gate[:, :1])).square().mean() + gate.square().mean()

    model = net(forward, router=nn.Linear(WIDTH, 4), c=nn.Linear(WIDTH, WIDTH), **heads(head=7))
    assert roles(model) == {"a": "input", "b": "body", "router": "body", "c": "body", "head": "output"}


HEADS: dict[str, Callable[[Net, Tensor], Any]] = {
    "averaged": lambda n, h: (n.one(h) + n.two(h)) / 2,
    "stacked": lambda n, h: torch.stack([n.one(h), n.two(h)]).mean(0),
    "joined": lambda n, h: torch.cat([n.one(h), n.two(h)], -1),
    "gated": lambda n, h: n.one(h) * n.two(h).sigmoid(),
    "scaled": lambda n, h: (n.one(h).softmax(-1) * 3.0, n.two(h).flatten().clamp(0, 1)),
    "in parts": lambda n, h: (*n.one(h).chunk(2, -1), n.two(h)[:, :1]),
    "reduced": lambda n, h: (n.one(h).sum(-1), n.two(h).amax(-1)),
    "in place": lambda n, h: n.one(h).add_(n.two(h)),
    "normed": lambda n, h: F.normalize(n.one(h), dim=-1) @ F.normalize(n.two(h), dim=-1).T,
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_last_layer_on_every_path_is_a_head(kind: str) -> None:
    model = net(HEADS[kind], **heads(one=4, two=4))
    assert roles(model) == {"a": "input", "b": "body", "one": "output", "two": "output"}
    new, plan = transform(model.eval(), X, sparsity=0.75)
    assert [p.layer.name for p in plan.layers if p.status == "transformed"] == ["b"]
    for before, after in zip(tree_leaves(model(X)), tree_leaves(new(X)), strict=True):
        assert before.shape == after.shape


@pytest.mark.parametrize("member", ["wide", "factorized"])
def test_a_head_of_one_output_is_a_head(member: str) -> None:
    model = net(lambda n, h: (n.policy(h), n.value(h)), **heads(policy=4, value=1))
    _, plan = transform(model.eval(), X, sparsity=0.75, member=member)
    assert [p.layer.name for p in plan.layers if p.status == "transformed"] == ["b"]
    assert roles(model)["value"] == "output"


def test_the_last_block_of_a_stream_without_a_head_is_no_head() -> None:
    model = Net(
        lambda n, x: (y := n.a(x)) + n.c(n.b(y).relu()),
        a=nn.Linear(8, WIDTH),
        b=nn.Linear(WIDTH, WIDTH),
        c=nn.Linear(WIDTH, WIDTH),
    )
    assert roles(model) == {"a": "input", "b": "body", "c": "body"}


STREAM = {"*": lambda h: h, "0": lambda h: (h, h.mean()), "last_*": lambda h: {"last_hidden_state": h}}


@pytest.mark.parametrize("glob", STREAM)
def test_an_output_grows_where_the_user_says_so(glob: str) -> None:
    def forward(n: Net, x: Tensor) -> Any:
        h = n.a(x)
        return STREAM[glob](h + n.c(n.b(h).relu()))

    parts = {"a": nn.Linear(8, WIDTH), "b": nn.Linear(WIDTH, WIDTH), "c": nn.Linear(WIDTH, WIDTH)}
    model = Net(forward, **parts).eval()
    kept, plan = transform(model, X, sparsity=0.75)
    assert kept.c.weight.shape == (WIDTH, WIDER) and plan.outputs_of_stream == [
        "" if glob == "*" else glob.replace("*", "hidden_state")
    ]
    new, plan = transform(model, X, sparsity=0.75, free_outputs=glob)
    assert new.c.weight.shape == (WIDER, WIDER) and plan.outputs_of_stream == []
    assert returned(new(X)).results[next(iter(returned(model(X)).results))].shape == (6, WIDER)


def test_an_output_that_does_not_exist_is_refused_by_name() -> None:
    model = Net(lambda n, x: {"last_hidden_state": n.a(x)}, a=nn.Linear(8, WIDTH)).eval()
    with pytest.raises(UsageError, match="'last_hidden_stat' matches no output of Net") as error:
        transform(model, X, sparsity=0.75, free_outputs="last_hidden_stat")
    assert "last_hidden_state" in str(error.value.hint)


def test_a_changed_output_is_named() -> None:
    model = net(lambda n, h: {"logits": n.one(h), "boxes": n.two(h)}, **heads(one=5, two=4)).eval()
    new, plan = transform(model, X, sparsity=0.75)
    surgery = transformation_of(new).surgery
    measured, after = measure(new, (X,), {}, plan, surgery, None)
    before = trace(model, (X,), name="net", input_shape=(6, 8))
    shapes = {"logits": (6, 5), "boxes": (6, 8), "masks": (6, 1)}
    after = replace(after, structure=replace(after.structure, output_shapes=shapes))
    with pytest.raises(CheckFailed, match="output boxes has shape 6x8, not 6x4; output masks is new"):
        require_as_planned(measured, plan, before, after)


class Counting(nn.Module):
    """Returns a cache of which one dim is an attribute that no weight has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o, self.states = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), 5

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.b(self.a(x).relu())
        return {"logits": self.o(h), "cache": h.new_zeros(len(x), self.states)}


def test_a_by_product_may_have_sizes_that_no_weight_has() -> None:
    table = trace(Counting(), (X,), name="net", input_shape=(6, 8)).table
    assert table.by_products == {"cache": ()}
