"""Sizes that a forward keeps as attributes and computes with in Python: the widths that they are grow with the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.trace.build import layer_table
from sparseift_cli.trace.symint import Facts, poly_of

X = torch.randn(2, 16)


class Net(nn.Module):
    """Linear 16 > 24 > 64 > 24 > 10; `use(self, h)` is what happens to the 64 hidden units."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **numbers: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(16, 24), nn.Linear(24, 64), nn.Linear(64, 24), nn.Linear(24, 10)
        self.mid = nn.Linear(32, 32)
        self.use = use
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, x: Tensor) -> Tensor:
        h = self.use(self, self.b(self.a(x).relu()).relu())
        return self.d(self.c(h).relu())


def halves(n: Any, parts: tuple[Tensor, ...]) -> Tensor:
    first, second = parts
    return torch.cat([first, n.mid(second)], 1)


@pytest.mark.parametrize("name", ["hidden", "head_hidden", "header_size", "lookahead", "num_slots"])
def test_a_width_is_one_whatever_its_attribute_is_called(name: str) -> None:
    new, _ = sparseift.transform(Net(lambda n, h: h.view(-1, getattr(n, name)), **{name: 64}), X, sparsity=0.75)
    assert (getattr(new, name), new.b.weight.shape, new.c.weight.shape) == (128, (128, 48), (48, 128))


# How 64 hidden units become two halves of 32; and the attributes of the model before and after.
SPLITS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Any], dict[str, Any]]] = {
    "half an attribute": (lambda n, h: h.split(n.width // 2, 1), {"width": 64}, {"width": 128}),
    "an attribute": (lambda n, h: h.split(n.part, 1), {"part": 32}, {"part": 64}),
    "two attributes": (lambda n, h: h.split([n.p0, n.p1], 1), {"p0": 32, "p1": 32}, {"p0": 64, "p1": 64}),
    "a list": (lambda n, h: h.split(n.parts, 1), {"parts": [32, 32]}, {"parts": [64, 64]}),
    "half a size": (lambda n, h: h.split(h.shape[1] // 2, 1), {}, {}),
    "floor": (lambda n, h: h.split(math.floor(h.shape[1] / 2), 1), {}, {}),
    "ceil": (lambda n, h: h.split(math.ceil(n.width * 0.5), 1), {"width": 64}, {"width": 128}),
    "round": (lambda n, h: h.split(round(h.shape[1] * 0.5), 1), {}, {}),
    "divmod": (lambda n, h: h.split(divmod(h.shape[1], 2)[0], 1), {}, {}),
    "chunk": (lambda n, h: h.chunk(n.parts, 1), {"parts": 2}, {"parts": 2}),
    "slices": (lambda n, h: (h[:, : n.part], h[:, n.part :]), {"part": 32}, {"part": 64}),
    "narrow": (lambda n, h: (h.narrow(1, 0, n.part), h.narrow(1, n.part, n.part)), {"part": 32}, {"part": 64}),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_by_a_size_splits_the_wider_layer(split: str) -> None:
    function, before, after = SPLITS[split]
    new, plan = sparseift.transform(Net(lambda n, h: halves(n, function(n, h)), **before), X, sparsity=0.75)
    shapes = [tuple(new.get_submodule(name).weight.shape) for name in ("a", "b", "mid", "c", "d")]
    assert shapes == [(48, 16), (128, 48), (64, 64), (48, 128), (10, 48)]
    assert {name: getattr(new, name) for name in after} == after
    assert [r.layer.name for r in plan.layers if r.status == "transformed"] == ["b", "mid", "c"]
    assert new(X).shape == (2, 10)


# Numbers that are computed with a size: nothing in their place keeps the width.
COMPUTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "float / size": lambda n, h: h * (2.0 / h.shape[-1]),
    "size / float": lambda n, h: h * (h.shape[-1] / 2.0),
    "float / attribute": lambda n, h: h * (2.0 / n.grid),
    "power": lambda n, h: h * (1.0 / h.shape[-1] ** 0.5),
    "float ** size": lambda n, h: h * 0.9 ** h.shape[-1],
    "logarithm": lambda n, h: h / math.log2(h.shape[-1]),
    "math.prod": lambda n, h: h.reshape(-1)[: math.prod(h.shape)].view(h.shape),
    "numpy.prod": lambda n, h: h / float(__import__("numpy").prod(h.shape)),
    "tensor": lambda n, h: h / torch.sqrt(torch.tensor(h.shape[-1], dtype=torch.float) * 3),
    "tensor of several": lambda n, h: h / torch.tensor([h.shape[-1], h.shape[0]]).prod(),
    "full": lambda n, h: h / h.new_full((1,), h.shape[-1]) + torch.full((1,), fill_value=h.shape[-1]),
    "eye": lambda n, h: h @ torch.eye(h.shape[-1]),
    "triangle": lambda n, h: h @ torch.triu(torch.ones(h.shape[-1], h.shape[-1])),
    "minimum": lambda n, h: h[:, : min(h.shape[-1], n.c.in_features)],
    "truth": lambda n, h: h if h.shape[-1] else -h,
    "bits": lambda n, h: h if n.grid & (n.grid - 1) == 0 and n.grid << 1 == 8 and n.grid | 1 == 5 else h[:, :0],
    "count of samples": lambda n, h: torch.stack([h[i] for i in range(len(h))]),
    "floor division of a float": lambda n, h: h * (h.shape[-1] // 2.0),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_number_computed_from_a_size_keeps_no_width(case: str) -> None:
    new, _ = sparseift.transform(Net(COMPUTED[case], grid=4), X, sparsity=0.75)
    assert (new.b.weight.shape, new.c.weight.shape) == ((128, 48), (48, 128))
    assert new.grid == 4
    assert new(X).isfinite().all()
    sparseift.audit(new, X)


@pytest.mark.parametrize("name", ["p", "patch_size", "num_layers", "in_features", "vocab_size"])
def test_a_name_that_is_seldom_a_width_can_be_one(name: str) -> None:
    new, _ = sparseift.transform(Net(lambda n, h: h.view(-1, getattr(n, name)), **{name: 64}), X, sparsity=0.75)
    assert (getattr(new, name), new.b.weight.shape, new.c.weight.shape) == (128, (128, 48), (48, 128))


@lru_cache
def ramp(size: int) -> Tensor:
    return torch.arange(size) / size


@lru_cache
def doubled(shape: tuple[int, ...]) -> int:
    return 2 * shape[-1]


def remembered(n: Any, h: Tensor) -> Tensor:
    if h.shape not in n.seen:
        n.seen[h.shape] = torch.linspace(0, 1, h.shape[-1])
    return h * n.seen[h.shape]


KEYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a shape in a dict": remembered,
    "a size in a set": lambda n, h: h * len({h.shape[-1], h.shape[0]}),
    "one size in a set": lambda n, h: h if len({h.shape[-1], n.c.weight.shape[1]}) == 1 else h[:, :0],
    "a cached function": lambda n, h: h * ramp(h.shape[-1]),
    "a cached function of a shape": lambda n, h: h * doubled(h.shape),
    "an f-string": lambda n, h: h * n.table[f"depth_{n.grid - 1}"],
    "%s": lambda n, h: h * n.table["depth_%s" % (n.grid - 1)],
    "%d": lambda n, h: h * n.table["depth_%d" % (n.grid - 1)],  # noqa: UP031
    "format": lambda n, h: h * n.table["depth_{:d}".format(n.grid - 1)],  # noqa: UP032
    "text of a shape": lambda n, h: h if f"{h.shape[-1]}" else -h,
}


@pytest.mark.parametrize("case", KEYS)
def test_a_size_can_be_a_key(case: str) -> None:
    model = Net(KEYS[case], seen={}, table={"depth_3": 0.5}, grid=4)
    before = model(X)
    new, _ = sparseift.transform(model, X, sparsity=0.75)
    assert (new.b.weight.shape, new.c.weight.shape, new.grid) == ((128, 48), (48, 128), 4)
    assert new(X).isfinite().all()
    torch.testing.assert_close(model(X), before)  # no cache holds what the trace put there


class Positions(nn.Module):
    """Remembers its table, as a method of the class and as one of the instance; both read the module's own width."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.table = lru_cache(maxsize=4)(self.ramp) if own else self.ramp_of_the_class

    def ramp(self, rows: int) -> Tensor:
        return torch.arange(rows)[:, None] + torch.zeros(self.b.weight.shape[0])

    @lru_cache  # noqa: B019
    def ramp_of_the_class(self, rows: int) -> Tensor:
        return self.ramp(rows)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table(len(x)) if "table" in self.__dict__ else self.ramp_of_the_class(len(x))
        return self.c(self.b(self.a(x) + table))


@pytest.mark.parametrize("own", [True, False])
def test_a_cached_method_gives_each_module_its_own_table(own: bool) -> None:
    model = Positions(own)
    if not own:
        del model.table  # a bound method among the attributes would be the dense model's
    before = model(X)  # fills the cache with real tensors
    new, _ = sparseift.transform(model, X, sparsity=0.75)
    assert new.b.weight.shape == (64, 64)
    assert new(X).isfinite().all()
    torch.testing.assert_close(model(X), before)


def remembering(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As transformers decorates its tables of positions: the cache is inside the wrapper."""
    cached = lru_cache(function)
    return lambda owner, size: cached(owner, size)


class WithTables(Net):
    @lru_cache  # noqa: B019
    def method(self, size: int) -> Tensor:
        return torch.arange(size)

    @remembering
    def wrapped(self, size: int) -> Tensor:
        return torch.arange(size)

    @staticmethod
    @remembering
    def static(_: Any, size: int) -> Tensor:
        return torch.arange(size)


CACHED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "function": lambda n, h: h * ramp(len(h))[:, None],
    "method": lambda n, h: h * n.method(len(h))[:, None],
    "wrapped": lambda n, h: h * n.wrapped(len(h))[:, None],
    "static": lambda n, h: h * n.static(None, len(h))[:, None],
}


@pytest.mark.parametrize("case", CACHED)
def test_a_cache_that_a_trace_filled_is_emptied(case: str) -> None:
    """The key is a plain int, that of a later call with real tensors."""
    model = WithTables(CACHED[case])
    new, _ = sparseift.transform(model, X, sparsity=0.75)
    assert [type(y(X)) for y in (model, new)] == [Tensor, Tensor]


CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "compared with a number": lambda n, h: h if h.size(1) == 64 else h[:, :0],
    "read by int()": lambda n, h: h[:, : int(h.shape[1])],
    "half read by int()": lambda n, h: torch.cat([h[:, : int(h.shape[1] / 2)], h[:, int(h.shape[1] * 0.5) :]], 1),
    "a list of its length": lambda n, h: h * sum([1] * h.shape[1]),
    "a loop over channels": lambda n, h: torch.stack([h[:, i] for i in range(h.shape[1])], 1),
    "a literal": lambda n, h: h.view(-1, 64),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_a_width_that_python_reads_as_a_number_stays_and_says_why(case: str) -> None:
    model = Net(CONSTANTS[case])
    new, plan = sparseift.transform(model, X, sparsity=0.75)
    assert (new.a.weight.shape, new.b.weight.shape, new.c.weight.shape) == ((48, 16), (64, 48), (48, 64))
    assert plan.widening is not None
    reasons = plan.widening.solution.reasons
    why = reasons[[w.name for w in plan.table.widths].index("b.weight[0]")]
    assert why in ("must equal a constant", "forward reads it as a plain number", "part of a sum of fixed size")
    assert new(X).isfinite().all()


class Paths(nn.Module):
    """SKNet: each of two paths reads its part of the channels, and their outputs are weighed by an attention over paths."""

    def __init__(self, channels: int, paths: int) -> None:
        super().__init__()
        self.in_channels, self.num_paths = channels, paths
        self.paths = nn.ModuleList(nn.Linear(channels // paths, channels) for _ in range(paths))
        self.weigh = nn.Linear(channels, channels * paths)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.in_channels // self.num_paths, 1)
        y = torch.stack([path(part) for path, part in zip(self.paths, parts, strict=True)], 1)
        weights = self.weigh(y.sum(1)).view(len(x), self.num_paths, -1).softmax(1)
        return (y * weights).sum(1)


class TwoHeadDims(nn.Module):
    """LeViT: 4 heads, keys of 8 and values of 16, in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.num_slots, self.key_dim, self.value_dim, self.tau = 4, 8, 16, 8**-0.5
        self.qkv, self.out = nn.Linear(64, 4 * (8 + 8 + 16)), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(1, len(x), self.num_slots, -1)
        q, k, v = (t.transpose(1, 2) for t in heads.split([self.key_dim, self.key_dim, self.value_dim], dim=3))
        mixed = (q @ k.mT * self.tau).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(len(x), self.num_slots * self.value_dim))


def test_a_part_of_an_attribute_is_a_width_beside_a_count() -> None:
    model = Net(lambda n, h: n.inner(h))
    model.inner = Paths(64, 2)
    new, _ = sparseift.transform(model, X, sparsity=0.75)
    inner: Any = new.inner
    assert (inner.in_channels, inner.num_paths, new.b.weight.shape) == (128, 2, (128, 48))
    assert [tuple(path.weight.shape) for path in inner.paths] == [(128, 64)] * 2
    assert inner.weigh.weight.shape == (256, 128)
    assert new(X).isfinite().all()


def test_values_have_a_head_dim_of_their_own() -> None:
    model = Net(lambda n, h: n.inner(h))
    model.inner = TwoHeadDims()
    new, _ = sparseift.transform(model, X, sparsity=0.75)
    inner = new.inner
    assert (inner.num_slots, inner.key_dim, inner.value_dim, inner.tau) == (4, 16, 32, 0.25)
    assert (inner.qkv.weight.shape, inner.out.weight.shape) == ((256, 128), (128, 128))
    assert new(X).isfinite().all()


class Split(nn.Module):
    """A layer that keeps the lengths of axes as einops does: names and ints."""

    def __init__(self, lengths: Any) -> None:
        super().__init__()
        self.lengths = lengths

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, dict(self.lengths)["d"]))


@pytest.mark.parametrize("lengths", [{"h": 4, "d": 8}, (("h", 4), ("d", 8))])
def test_a_size_beside_its_name_grows(lengths: Any) -> None:
    """Heads of 8 in a stream of 32: at 75 % heads of 16 in one of 64."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.q, self.k, self.v, self.o = (nn.Linear(a, b) for a, b in [(16, 32), *[(32, 32)] * 3, (32, 10)])
            self.split = Split(lengths)

        def forward(self, x: Tensor) -> Tensor:
            h = self.i(x)
            q, k, v = (self.split(layer(h)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.o(h + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    new, _ = sparseift.transform(Attention(), torch.randn(2, 5, 16), sparsity=0.75)
    assert (new.q.weight.shape, dict(new.split.lengths)) == ((64, 64), {"h": 4, "d": 16})
    assert type(new.split.lengths) is type(lengths)


@pytest.mark.parametrize("tokens", [5, 8, 4])
def test_a_size_that_equals_the_number_of_tokens_grows_too(tokens: int) -> None:
    """Heads of 8 beside 8 tokens, or 4 heads beside 4 tokens: what is equal by chance is no fact."""

    def attend(n: Any, h: Tensor) -> Tensor:
        q, k, v = h.unflatten(-1, (4, 3, -1)).unbind(-2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        mixed = torch.einsum("bhij,bjhd->bihd", scores, v).flatten(2)
        return mixed @ n.mix.weight.t()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.qkv, self.mix, self.o = (
                nn.Linear(16, 32),
                nn.Linear(32, 96),
                nn.Linear(32, 32),
                nn.Linear(32, 10),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.i(x)
            return self.o(h + attend(self, self.qkv(h)))

    new, _ = sparseift.transform(Attention(), torch.randn(2, tokens, 16), sparsity=0.75)
    assert (new.i.weight.shape, new.qkv.weight.shape) == ((64, 16), (192, 64))


DIVISIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "b.weight[0] / groups": lambda n, h: h.view(2, n.groups, -1).softmax(-1).flatten(1),
    "(b.weight[0] - a.weight[0]) / 8": lambda n, h: h + h.new_ones(2, (h.shape[1] - n.a.weight.shape[0]) // 8).mean(),
    "b.weight[0] / (groups * ways)": lambda n, h: h.view(2, n.groups, n.ways, -1).softmax(-1).flatten(1),
    "(b.weight[0] / groups) / 8": lambda n, h: h + h.new_ones(h.shape[1] // n.groups // 8).mean(),
}


@pytest.mark.parametrize("name", DIVISIONS)
@pytest.mark.parametrize("unused", [{}, {"depth": 12, "stages": 3}], ids=["alone", "beside other numbers"])
def test_a_size_that_only_a_division_makes_is_named_after_it(name: str, unused: dict[str, int]) -> None:
    net = Net(DIVISIONS[name], **unused, groups=4, ways=2)
    assert name in [width.name for width in layer_table(net, (X,), name="net", input_shape=(2, 16)).widths]


def joined_if_equal(n: Any, h: Tensor) -> Tensor:
    """A block that needs no projection where its two sizes are equal, as Hiera's; neither is a size of a tensor."""
    return h + (n.mid(h) if n.hidden_size == n.size_of_output else n.projection(n.mid(h)))


def test_sizes_that_are_compared_stay_equal() -> None:
    """The name of one says that it is the stream's width; with the other it is 2 * 64, or the model has no `projection`."""
    net = Net(joined_if_equal, mid=nn.Linear(64, 64), hidden_size=64, size_of_output=64)
    new, _ = sparseift.transform(net, X, sparsity=0.75)
    assert (new.hidden_size, new.size_of_output, new.mid.weight.shape) == (128, 128, (128, 128))
    assert new(X).shape == (2, 10)


ADDED = [torch.addcmul, Tensor.addcmul, Tensor.addcmul_, torch.addcdiv, Tensor.addcdiv, Tensor.addcdiv_]


@pytest.mark.parametrize("add", ADDED, ids=["addcmul", ".addcmul", "addcmul_", "addcdiv", ".addcdiv", "addcdiv_"])
def test_a_product_that_is_added_in_one_op_grows(add: Any) -> None:
    """64 channels of a gated sum are 128; the two gates broadcast over the samples."""
    gate, scale = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(1, 64))
    net = Net(lambda n, h: add(h * 1, n.gate * h, n.scale, value=0.5), gate=gate, scale=scale)
    new, _ = sparseift.transform(net, X, sparsity=0.75)
    assert (new.b.weight.shape, new.gate.shape, new.scale.shape) == ((128, 48), (128,), (1, 128))
    assert new(X).shape == (2, 10)


def test_a_size_has_no_symbol_without_a_value() -> None:
    """PyTorch 2.11 asks for them in some operations, whose models could not be traced there."""
    facts = Facts()
    size = facts.symint(facts.new_variable(8))
    assert poly_of(size).free_symbols == frozenset()
