"""Models that are not in the zoo: MACs as PyTorch's counter has them, widths tied as they must be, nothing left changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.errors import UsageError
from sparseift_cli.plan.audit import audit
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.table.table import LayerTable
from sparseift_cli.trace.build import layer_table
from tests.helpers.dynamo import trace_and_compile
from tests.helpers.forked import in_processes
from tests.helpers.parts import Net


def shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def split_heads(n: Net, x: Tensor) -> Tensor:
    q, k, v = n.qkv(x).chunk(3, dim=-1)
    b, t, d = q.shape
    q, k, v = (z.view(b, t, 4, d // 4).transpose(1, 2) for z in (q, k, v))
    scores = (q @ k.transpose(-2, -1)).softmax(-1)
    return n.out((scores @ v).transpose(1, 2).reshape(b, t, d))


def multi_query(n: Net, x: Tensor) -> Tensor:
    """Four heads of queries, one of keys and one of values, from one projection, as in Falcon."""
    b, t, _ = x.shape
    heads = n.qkv(x).view(b, t, 4 + 2, -1).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads[:, :-2], heads[:, [-2]], heads[:, [-1]])
    return n.out(mixed.transpose(1, 2).reshape(b, t, -1))


def latent(n: Net, x: Tensor) -> Tensor:
    """Three learned queries that every sample shares, as in Perceiver."""
    b, t, _ = x.shape
    q = n.q(n._parameters["latents"]).view(1, 3, 4, -1).transpose(1, 2)
    k, v = n.kv(x).view(b, t, 2, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return n.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 3, -1))


def latent_net() -> Net:
    net = Net(latent, q=nn.Linear(16, 16), kv=nn.Linear(16, 32), out=nn.Linear(16, 3))
    net.register_parameter("latents", nn.Parameter(torch.randn(1, 3, 16)))
    return net


ROUTERS: dict[str, Callable[[Tensor], Any]] = {
    "topk": lambda p: p.topk(2, dim=-1),
    "sort": lambda p: [t[:, :2] for t in p.sort(dim=-1, descending=True)],
    "argsort": lambda p: (p[:, :2], torch.argsort(p, -1)[:, :2]),
    "max": lambda p: [t[:, None].expand(-1, 2) for t in p.max(-1)],
    "argmax": lambda p: (p[:, :2], p.argmax(-1)[:, None].expand(-1, 2)),
    "multinomial": lambda p: (p[:, :2], torch.multinomial(p, 2)),
}


class Experts(nn.Module):
    """Two of four experts for each token (or the best), as one product over tokens sorted by expert."""

    def __init__(self, router: str = "topk") -> None:
        super().__init__()
        if not hasattr(F, "grouped_mm"):
            pytest.skip("this PyTorch has no grouped_mm")
        self.choose = ROUTERS[router]
        self.first, self.router, self.head = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 3)
        self.mid = nn.Linear(16, 16)
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 16)), nn.Parameter(torch.randn(4, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(F.relu(self.first(x)))
        tokens = x.flatten(0, 1)
        shares, chosen = self.choose(self.router(tokens).softmax(-1))
        order = chosen.flatten().argsort()
        sizes = torch.histc(chosen.flatten().float(), bins=4, min=0, max=3)
        ends = sizes.cumsum(0).to(torch.int32)
        inner = F.relu(F.grouped_mm(tokens[order // 2], self.up.transpose(1, 2), offs=ends))
        each = F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends) * shares.flatten()[order, None]
        return self.head(torch.zeros_like(tokens).index_add(0, order // 2, each).view(x.shape))


def conv(i: int, o: int, **k: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **k)


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 16)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (
        lambda: Net(lambda n, x: n.c((y := n.a(x)) + n.b(y)), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)),
        IMAGE,
    ),
    "concat": (
        lambda: Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 8), b=conv(3, 6), c=conv(14, 4)),
        IMAGE,
    ),
    "chunk": (lambda: Net(lambda n, x: n.b(n.a(x).chunk(2, 1)[0]), a=conv(3, 8), b=conv(4, 4)), IMAGE),
    "shuffle": (lambda: Net(lambda n, x: n.b(shuffle(n.a(x))), a=conv(3, 8), b=conv(8, 4)), IMAGE),
    "squeeze-excite": (
        lambda: Net(
            lambda n, x: n.d((y := n.a(x)) * n.c(n.b(y.mean((2, 3), keepdim=True))).sigmoid()),
            a=conv(3, 8),
            b=nn.Conv2d(8, 2, 1),
            c=nn.Conv2d(2, 8, 1),
            d=conv(8, 4),
        ),
        IMAGE,
    ),
    "grouped": (lambda: nn.Sequential(conv(3, 8), conv(8, 8, groups=2), conv(8, 8, groups=8), conv(8, 5)), IMAGE),
    "flatten": (
        lambda: nn.Sequential(conv(3, 6), nn.Flatten(), nn.Linear(6 * 64, 10), nn.ReLU(), nn.Linear(10, 3)),
        IMAGE,
    ),
    "attention": (lambda: Net(split_heads, qkv=nn.Linear(16, 48), out=nn.Linear(16, 3)), TOKENS),
    "multi-query": (lambda: Net(multi_query, qkv=nn.Linear(16, 24), out=nn.Linear(16, 3)), TOKENS),
    "shared queries": (latent_net, TOKENS),
    "multihead": (
        lambda: Net(
            lambda n, x: n.out(n.a(x, x, x)[0]), a=nn.MultiheadAttention(16, 4, batch_first=True), out=nn.Linear(16, 3)
        ),
        TOKENS,
    ),
    "encoder-layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3)),
        TOKENS,
    ),
    "einsum": (
        lambda: Net(
            lambda n, x: n.b(torch.einsum("btd,od->bto", x, n.a.weight)),
            a=nn.Linear(16, 8, bias=False),
            b=nn.Linear(8, 3),
        ),
        TOKENS,
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), conv(6, 4)),
        IMAGE,
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(5, 8, 3), nn.Conv1d(8, 4, 3, dilation=2)), TOKENS),
    "twice": (lambda: Net(lambda n, x: n.b(n.a(F.relu(n.a(x)))), a=nn.Linear(16, 16), b=nn.Linear(16, 3)), TOKENS),
    "literals": (
        lambda: Net(lambda n, x: n.b(n.a(x).view(2, 5, 4, 2).flatten(2)), a=nn.Linear(16, 8), b=nn.Linear(8, 3)),
        TOKENS,
    ),
    "weight-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 3)),
        TOKENS,
    ),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3)).bfloat16(), TOKENS),
}


def traced(model: nn.Module, shape: tuple[int, ...]) -> LayerTable:
    dtype = next(model.parameters()).dtype
    return layer_table(model.eval(), (torch.zeros(shape, dtype=dtype),), name="net", input_shape=shape)


@pytest.mark.parametrize("name", MODELS)
def test_macs_and_parameters(name: str) -> None:
    build, shape = MODELS[name]
    model = build()
    table = traced(model, shape)
    assert table.untraceable is None
    # on meta: on real CPU tensors PyTorch's counter reports 0 for fused attention
    with FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.zeros(shape, dtype=next(model.parameters()).dtype, device="meta", requires_grad=True))
    assert 2 * table.macs == counter.get_total_flops()
    assert table.params == sum(p.numel() for p in model.parameters())
    assert table.uncounted == ()
    assert LayerTable.from_json(table.to_json()) == table


@pytest.mark.parametrize("name", ["residual", "squeeze-excite", "grouped", "flatten", "encoder-layer", "transposed"])
@pytest.mark.parametrize("sparsity", ["0.5", "0.9"])
def test_wide_keeps_every_row_iso_flop(name: str, sparsity: str) -> None:
    build, shape = MODELS[name]
    table = traced(build(), shape)
    assert table.untraceable is None
    plan = make_plan(table, TransformSpec(sparsity=sparsity))
    rows = [r for r in plan.layers if r.status == "transformed"]
    assert rows
    assert all(r.dense_macs - r.positions < r.macs <= r.dense_macs for r in rows)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x @ w": lambda x, w: x @ w,
    "x @ w.T": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("bti,ij->btj", x, w),
}


@pytest.mark.parametrize("name", ["w", "weight", "proj", "matrix"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_matrix_is_a_layer_whatever_it_is_called(product: str, name: str) -> None:
    """10 tokens by [32, 32]: 10,240 MACs, before and after."""
    model = Net(
        lambda n, x: n.c(F.relu(n.b(F.relu(PRODUCTS[product](F.relu(n.a(x)), n._parameters[name]))))),
        a=nn.Linear(16, 32),
        b=nn.Linear(32, 32),
        c=nn.Linear(32, 3),
    )
    model.register_parameter(name, nn.Parameter(torch.randn(32, 32)))
    plan = make_plan(traced(model, TOKENS), TransformSpec(sparsity="0.75"))
    row = next(p for p in plan.layers if p.layer.weight == name)
    assert (row.layer.role, row.status, row.dense_macs, row.macs) == ("body", "transformed", 10240, 10240)
    assert (row.weights, row.nnz) == (64 * 64, 32 * 32)


class RelativeTable(nn.Module):
    """4 heads of 8 entries: each query with 5 positions, 2 * 4 * 5 * 5 * 8 MACs."""

    def __init__(self, name: str, by: str) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.head = (nn.Linear(16 if i == 0 else 32, 32 if i < 3 else 3) for i in range(4))
        self.table_name, self.by = name, by
        self.register_parameter(name, nn.Parameter(torch.randn(5, 8)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        q, k = (f(x).view(2, 5, 4, 8).transpose(1, 2) for f in (self.q, self.k))
        table = self.get_parameter(self.table_name)
        near = q @ table.t() if self.by == "@" else torch.einsum("bhid,jd->bhij", q, table)
        weights = (q @ k.transpose(-2, -1) + near).softmax(-1)
        return self.head((weights @ x.view(2, 5, 4, 8).transpose(1, 2)).transpose(1, 2).reshape(2, 5, 32))


@pytest.mark.parametrize("by", ["@", "einsum"])
@pytest.mark.parametrize("name", ["rel", "rel_weight"])
def test_a_table_that_each_head_reads_is_no_layer(name: str, by: str) -> None:
    table = traced(RelativeTable(name, by), TOKENS)
    row = next(row for row in table.layers if row.weight == name)
    assert (row.kind, row.role, row.macs.evaluate(table.sizes)) == ("matmul", "attention", 2 * 4 * 5 * 5 * 8)


def test_experts_that_each_see_every_token_cost_what_they_cost() -> None:
    """As in Llama 4: [4, 10, 16] by [4, 16, 32], 4 * 10 * 16 * 32 MACs."""
    model = Net(
        lambda n, x: n.c(torch.bmm(n.b(n.a(x)).flatten(0, 1).expand(4, -1, -1), n._parameters["up"]).sum(0)),
        a=nn.Linear(16, 16),
        b=nn.Linear(16, 16),
        c=nn.Linear(32, 3),
    )
    model.register_parameter("up", nn.Parameter(torch.randn(4, 16, 32)))
    table = traced(model, TOKENS)
    plan = make_plan(table, TransformSpec(sparsity="0.75"))
    up = next(p for p in plan.layers if p.layer.name == "up")
    assert (up.layer.kind, up.status, up.dense_macs, up.macs) == ("experts", "transformed", 20480, 20480)
    assert (up.weights, up.nnz, up.copies) == (4 * 32 * 64, 4 * 16 * 32, 4)


def test_experts_cost_what_their_tokens_cost() -> None:
    """10 tokens go to two experts each, and each of those 20 costs 16 x 32 MACs a product."""
    table = traced(Experts(), TOKENS)
    rows = {row.name: row for row in table.layers}
    assert [rows[n].macs.evaluate(table.sizes) for n in ("up", "down", "router")] == [20 * 16 * 32, 20 * 32 * 16, 640]
    plan = make_plan(table, TransformSpec(sparsity="0.75"))
    assert {p.layer.name: (p.status, p.macs) for p in plan.layers if p.layer.name in ("up", "down", "router")} == {
        "up": ("transformed", 10240),
        "down": ("transformed", 10240),
        "router": ("transformed", 640),
    }
    assert {p.layer.name: p.layer.active for p in plan.layers if p.layer.kind == "experts"} == {"up": 0.5, "down": 0.5}


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_keeps_as_many_outputs_as_there_are_experts(router: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), Experts(router))
    plan = make_plan(traced(model, TOKENS), TransformSpec(sparsity="0.75"))
    rows = {p.layer.name: p for p in plan.layers}
    assert rows["2.router"].layer.outputs.evaluate(plan.sizes) == 4 and "1" in {
        n for n in rows if rows[n].status == "transformed"
    }


def test_places_whose_values_alone_are_read_may_grow() -> None:
    """The quarter of the units that is largest (k winners take all), and a maximum over channels."""
    winners = Net(
        lambda n, x: n.c(F.relu((y := n.b(n.a(x))) * (y >= y.topk(y.shape[-1] // 4, dim=-1)[0][..., -1:]))),
        a=nn.Linear(16, 32),
        b=nn.Linear(32, 32),
        c=nn.Linear(32, 3),
    )
    largest = Net(
        lambda n, x: n.c((y := n.b(n.a(x))) - y.max(-1, keepdim=True).values),
        a=nn.Linear(16, 32),
        b=nn.Linear(32, 32),
        c=nn.Linear(32, 3),
    )
    for model in (winners, largest):
        plan = make_plan(traced(model, TOKENS), TransformSpec(sparsity="0.75"))
        assert [p.layer.name for p in plan.layers if p.status == "transformed"] == ["b"]


@pytest.mark.parametrize("member", ["sparse_parallel", "sparse_factorized", "sparse_doped"])
def test_a_weight_that_other_code_reads_stays(member: str) -> None:
    """A Mamba mixer multiplies with its layers' weights by itself."""
    model = Net(
        lambda n, x: n.c(n.b(F.relu(n.a(x))) @ n.read.weight.T),
        a=nn.Linear(16, 16),
        b=nn.Linear(16, 16),
        read=nn.Linear(16, 16),
        c=nn.Linear(16, 3),
    )
    plan = make_plan(traced(model, TOKENS), TransformSpec(member=member, sparsity="0.75"))
    status = {p.layer.name: (p.status, p.reason) for p in plan.layers}
    assert status["b"][0] == "transformed"
    assert status["read"] == ("untouched", "its weight is used by Net: only Sparse Wide can transform it")


def test_a_layer_called_without_hooks_is_no_weight_that_other_code_reads() -> None:
    model = Net(
        lambda n, x: n.c(n.b.forward(F.relu(n.a(x)))), a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 3)
    )
    plan = make_plan(traced(model, TOKENS), TransformSpec(member="sparse_parallel", sparsity="0.75"))
    assert [p.layer.name for p in plan.layers if p.status == "transformed"] == ["b"]
    assert "forward" not in vars(model.b)


def test_rnn_is_never_silently_free() -> None:
    for rnn in (nn.LSTM(16, 8, batch_first=True), nn.GRU(16, 8, batch_first=True)):
        model = Net(lambda n, x: n.out(n.rnn(x)[0]), rnn=rnn, out=nn.Linear(8, 3))
        table = traced(model, TOKENS)
        gates = 4 if isinstance(rnn, nn.LSTM) else 3
        counted = 2 * 5 * (gates * 8 * (16 + 8) + 8 * 3)
        assert table.uncounted or table.macs == counted


def test_frozen_layers_need_no_gradients() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    macs = [10 * 16 * 8, 10 * 8 * 8, 10 * 8 * 3]
    assert audit(traced(model, TOKENS)).dense.training_flops == 2 * (macs[0] + macs[1] + 2 * macs[2])
    model[0].requires_grad_(True)  # now the frozen one in between must pass a gradient on
    assert audit(traced(model, TOKENS)).dense.training_flops == 2 * (2 * macs[0] + 2 * macs[1] + 3 * macs[2])


def test_a_gradient_stops_at_detach_and_no_grad() -> None:
    def detached(n: Net, x: Tensor) -> Tensor:
        return n.b(n.a(x).detach())

    def without(n: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = n.a(x)
        return n.b(y)

    macs = [10 * 16 * 8, 10 * 8 * 3]
    for forward in (detached, without):
        model = Net(forward, a=nn.Linear(16, 8), b=nn.Linear(8, 3))
        assert audit(traced(model, TOKENS)).dense.training_flops == 2 * (macs[0] + 2 * macs[1])


def test_tied_weights_count_once_as_parameters() -> None:
    model = Net(
        lambda n, x: n.head(n.norm(n.emb(x))),
        emb=nn.Embedding(11, 6),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, 11, bias=False),
    )
    model.head.weight = model.emb.weight
    table = layer_table(model, (torch.zeros((2, 5), dtype=torch.int64),), name="net", input_shape=(2, 5))
    head = next(layer for layer in table.layers if layer.macs.terms)
    assert (head.name, head.tied_to, head.role) == ("head", "emb", "output")
    assert table.params == 11 * 6 + 12 and table.macs == 10 * 66


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    def forward(n: Net, x: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("no")
        return n.b(n.a(x, x, x)[0])

    model = Net(forward, a=nn.MultiheadAttention(16, 4, batch_first=True), b=nn.Linear(16, 3)).train()
    before = {k: id(p) for k, p in model.named_parameters()}
    attributes = {
        name: {k: v for k, v in m.__dict__.items() if isinstance(v, (int, tuple))} for name, m in model.named_modules()
    }
    hooks = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    if fails:
        with pytest.raises(UsageError, match="does not run on input 2x5x16: RuntimeError: no"):
            layer_table(model, (torch.zeros(TOKENS),), name="net", input_shape=TOKENS)
    else:
        layer_table(model, (torch.zeros(TOKENS),), name="net", input_shape=TOKENS)
    assert {k: id(p) for k, p in model.named_parameters()} == before
    assert attributes == {
        name: {k: v for k, v in m.__dict__.items() if isinstance(v, (int, tuple))} for name, m in model.named_modules()
    }
    assert hooks == (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks))
    assert model.training
    assert fails or torch.isfinite(model.eval()(torch.randn(TOKENS)) if not fails else torch.zeros(1)).all()


def test_an_unknown_op_is_listed() -> None:
    model = Net(lambda n, x: n.a(torch.cdist(x, x, p=1)), a=nn.Linear(5, 3))
    assert any("cdist" in op for op in traced(model, TOKENS).uncounted)


def test_torch_compile_still_keeps_out_after_a_trace() -> None:
    """The stand-in for torch._dynamo leaves nothing behind."""
    traced(nn.Linear(16, 3), TOKENS)
    assert type(sys.modules.get("torch._dynamo")).__name__ != "_StandIn"
    import torch._dynamo.config

    assert isinstance(torch._dynamo.config.fake_tensor_cache_enabled, bool)


def test_a_call_that_needs_no_input_gradient_pays_for_none() -> None:
    """A layer called twice: the model's input takes no gradient, the second call's input does."""
    model = Net(lambda n, x: n.b(n.a(F.relu(n.a(x)))), a=nn.Linear(16, 16), b=nn.Linear(16, 3))
    first, second, head = 10 * 256, 10 * 256, 10 * 48
    assert audit(traced(model, TOKENS)).dense.training_flops == 2 * (2 * first + 3 * second + 3 * head)


def test_a_forward_that_needs_the_real_dynamo_gets_it() -> None:
    """In processes of their own: a test that loads torch._dynamo would hide it from the rest."""
    for done in in_processes(trace_and_compile, [("constant",), ("checkpoint",)]):
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y * y.sum().item(),
        lambda y: y if y.sum() > 0 else -y,
        lambda y: y[y.sum(1) > 0],
        lambda y: y[(y > 0).any(1).nonzero().flatten()],
        lambda y: torch.cat(y.split(torch.bincount(torch.tensor([0, 1])).tolist(), 0)),
    ],
    ids=["item", "branch", "mask", "nonzero", "tolist"],
)
def test_a_forward_that_depends_on_values_is_refused_in_words(use: Callable[[Tensor], Tensor]) -> None:
    """It was `does not run on input`, with an AttributeError of a class of ours."""
    net = Net(lambda s, x: s.c(use(torch.relu(s.a(x)))), a=nn.Linear(8, 16), c=nn.Linear(16, 4))
    with pytest.raises(UsageError, match="computes with the values of tensors") as error:
        layer_table(net, (torch.zeros(2, 8),), name="net", input_shape=(2, 8))
    assert "torch.where" in (error.value.hint or "")


def test_a_number_kept_in_a_tensor_may_be_multiplied() -> None:
    """The scale of DeBERTa's attention."""
    model = Net(lambda n, x: n.a(x) / torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float) * 3), a=nn.Linear(16, 3))
    assert traced(model, TOKENS).macs == 10 * 48
