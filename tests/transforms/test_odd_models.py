"""Unusual networks: transformed correctly, or refused with the name of the layer; never in part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.errors import SparseiftError, UsageError
from sparseift_cli.mask.attached import masks_of
from tests.helpers.parts import Net

torch.manual_seed(0)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def heads(n: Net, x: Tensor) -> Tensor:
    """Attention written by hand: fused QKV, heads counted by division, scores through einsum."""
    b, t, _ = x.shape
    q, k, v = n.qkv(n.inp(x)).reshape(b, t, 3, 4, -1).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return n.out(n.proj(mixed.flatten(2)))


def shuffle(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


IMAGE, TOKENS = (2, 3, 8, 8), (2, 6, 16)
WIDENED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense-net": (
        lambda: Net(
            lambda n, x: n.d(torch.cat([y := n.a(x), z := n.b(y), n.c(torch.cat([y, z], 1))], 1)),
            a=conv(3, 8),
            b=conv(8, 6),
            c=conv(14, 10),
            d=conv(24, 5),
        ),
        IMAGE,
    ),
    "shuffle-split": (
        lambda: Net(
            lambda n, x: n.c(shuffle(torch.cat([(s := n.a(x).chunk(2, 1))[0], n.b(s[1])], 1))),
            a=conv(3, 8),
            b=conv(4, 4),
            c=conv(8, 5),
        ),
        IMAGE,
    ),
    "squeeze-excite": (
        lambda: Net(
            lambda n, x: n.d((y := n.a(x)) * n.c(F.relu(n.b(y.mean((2, 3), keepdim=True)))).sigmoid()),
            a=conv(3, 16),
            b=conv(16, 4, 1),
            c=conv(4, 16, 1),
            d=conv(16, 5),
        ),
        IMAGE,
    ),
    "group-norm": (
        lambda: nn.Sequential(
            conv(3, 16), nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 12, groups=4), nn.GroupNorm(4, 12), conv(12, 5)
        ),
        IMAGE,
    ),
    "einsum-attention": (
        lambda: Net(heads, inp=nn.Linear(16, 24), qkv=nn.Linear(24, 72), proj=nn.Linear(24, 24), out=nn.Linear(24, 3)),
        TOKENS,
    ),
    "encoder-layer": (
        lambda: nn.Sequential(
            nn.Linear(16, 24), nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), nn.Linear(24, 3)
        ),
        TOKENS,
    ),
    "pre-norm-encoder": (
        lambda: nn.Sequential(
            nn.Linear(16, 24),
            nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, norm_first=True, activation="gelu"),
            nn.Linear(24, 3),
        ),
        TOKENS,
    ),
    "glu": (
        lambda: Net(
            lambda n, x: n.b((h := n.a(n.i(x)).chunk(2, -1))[0] * h[1].sigmoid()),
            i=nn.Linear(16, 12),
            a=nn.Linear(12, 40),
            b=nn.Linear(20, 3),
        ),
        TOKENS,
    ),
    "flatten": (
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 20), nn.Linear(20, 3)),
        IMAGE,
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(6, 12, 3), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 8, 3, dilation=2), nn.Conv1d(8, 4, 1)
        ),
        TOKENS,
    ),
    "transposed": (lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), conv(6, 4)), IMAGE),
    "scaled-embedding": (
        lambda: nn.Sequential(
            nn.Linear(16, 12),
            nn.LayerNorm(12),
            nn.Linear(12, 30),
            nn.GELU(),
            nn.Linear(30, 12),
            nn.RMSNorm(12),
            nn.Linear(12, 3),
        ),
        TOKENS,
    ),
}


# Only attention projections, or a transposed convolution: layers that the local members do not transform.
NOTHING_TO_DO = {(n, m) for n in ("einsum-attention", "transposed") for m in ("parallel", "factorized", "doped")}


def transformed(
    build: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any
) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = build(), torch.randn(shape)
    new, _ = sparseift.transform(model, x, **options)
    return model, new, x


LOCAL = ["parallel", "factorized", "doped"]
# Each model under Sparse Wide at both sparsities, and under each local member at one of them, which take turns.
TRANSFORMED = [
    *((name, sparsity, "wide") for name in WIDENED for sparsity in ("0.5", "0.9")),
    *((name, ("0.5", "0.9")[(i + j) % 2], member) for i, name in enumerate(WIDENED) for j, member in enumerate(LOCAL)),
]


@pytest.mark.parametrize(("name", "sparsity", "member"), TRANSFORMED)
def test_transformed_runs_and_costs_what_was_planned(name: str, sparsity: str, member: str) -> None:
    build, shape = WIDENED[name]
    if (name, member) in NOTHING_TO_DO:
        with pytest.raises(UsageError, match="leaves every layer"):
            transformed(build, shape, member=member, sparsity=sparsity)
        return
    model, new, x = transformed(build, shape, member=member, sparsity=sparsity)
    y, want = new.train()(x), model(x)
    assert y.shape == want.shape and y.isfinite().all()
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    for key, mask in masks_of(new).items():
        assert not new.get_parameter(key)[~mask].any()
    audit = sparseift.audit(new, x)  # measured again: raises where it is not what was planned
    assert audit.plan is not None
    for row in audit.plan.layers:
        if row.status == "transformed":
            assert row.dense_macs - row.positions < row.macs <= row.dense_macs


@pytest.mark.parametrize("name", WIDENED)
def test_wide_grows_every_side_of_every_transformed_layer(name: str) -> None:
    build, shape = WIDENED[name]
    _, new, x = transformed(build, shape, sparsity=0.75)
    plan = sparseift.audit(new, x).plan
    assert plan is not None
    for row in plan.layers:
        if row.layer.weighted and row.layer.role == "body":
            for side in (row.layer.inputs, row.layer.outputs):
                assert side.evaluate(plan.sizes) > side.evaluate(plan.table.sizes), row.layer.name


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "literal in a view": (
        lambda: Net(lambda n, x: n.b(n.a(x).view(2, 6, 4, 2).flatten(2)), a=nn.Linear(16, 8), b=nn.Linear(8, 3)),
        TOKENS,
        "constant",
    ),
    "one layer": (lambda: nn.Linear(16, 3), TOKENS, "no width"),
    "frozen by int()": (
        lambda: Net(lambda n, x: n.b(n.a(x)[..., : int(n.a.weight.shape[0])]), a=nn.Linear(16, 8), b=nn.Linear(8, 3)),
        TOKENS,
        "plain number",
    ),
    "matrix of two widths": (
        lambda: Net(
            lambda n, x: n.c(n.a(x).flatten(1) @ n.b.weight.flatten()[:48][:, None]),
            a=nn.Linear(16, 8),
            b=nn.Linear(8, 6),
            c=nn.Linear(1, 3),
        ),
        TOKENS,
        "constant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_widen_is_refused_by_name(name: str) -> None:
    build, shape, why = REFUSED[name]
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SparseiftError) as refused:
        sparseift.transform(model, torch.randn(shape), sparsity=0.5)
    assert why in refused.value.message
    assert refused.value.hint
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "rnn",
    [
        nn.LSTM(12, 10, batch_first=True),
        nn.GRU(12, 10, batch_first=True),
        nn.RNN(12, 10, batch_first=True),
        nn.LSTM(12, 10, num_layers=2, bidirectional=True, batch_first=True),
        nn.LSTM(12, 10, proj_size=4),
        nn.GRU(12, 10, bidirectional=True, batch_first=True),
        nn.LSTM(12, 10, proj_size=4, bidirectional=True),
    ],
    ids=["lstm", "gru", "rnn", "bidirectional", "projected", "gru-both", "projected-both"],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_layers_widen(rnn: nn.RNNBase) -> None:
    reads = (rnn.proj_size or rnn.hidden_size) * (1 + rnn.bidirectional)
    model = Net(
        lambda n, x: n.out(F.relu(n.h(n.rnn(n.inp(x))[0]))),
        inp=nn.Linear(16, 12),
        rnn=rnn,
        h=nn.Linear(reads, 20),
        out=nn.Linear(20, 3),
    )
    x = torch.randn(TOKENS)
    new, plan = sparseift.transform(model, x, sparsity=0.75)
    new(x).sum().backward()
    wide: Any = new.rnn
    assert (wide.input_size, wide.hidden_size, wide.proj_size) == (24, 20, 2 * rnn.proj_size)
    assert wide.weight_hh_l0.grad is not None  # the layer multiplies with its own parameters
    rows = {r.layer.name: r for r in plan.layers}
    assert rows["rnn.weight_ih_l0"].status == rows["rnn.weight_hh_l0"].status == "transformed"
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[type(rnn).__name__]
    assert rows["rnn.weight_ih_l0"].dense_macs == 12 * gates * 10 * 12
    assert rows["rnn.weight_hh_l0"].dense_macs == 12 * gates * 10 * (rnn.proj_size or 10)
    sparseift.audit(new, x)


def test_float_attributes_follow_the_head_dim() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = 4, 6
            self.scale = self.head_dim**-0.5
            self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(b, t, -1))

    model = nn.Sequential(nn.Linear(16, 24), Attention(), nn.Linear(24, 3))
    new, _ = sparseift.transform(model, torch.randn(TOKENS), sparsity=0.75)
    attention: Any = new[1]
    assert (attention.num_heads, attention.head_dim) == (4, 12)
    assert attention.scale == 12**-0.5
    assert model[1].scale == 6**-0.5


class Sliced(nn.Module):
    """A gate by hand: both halves of one weight, the bias of the first half alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Linear(8, 16), nn.Linear(16, 16)
        self.both, self.head, self.half = nn.Linear(16, 32), nn.Linear(16, 3), 16

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.both.weight, self.both.bias
        h = F.relu(self.mid(F.relu(self.stem(x))))
        return self.head(F.linear(h, w[: self.half], b[: self.half]) * F.linear(h, w[self.half :]).sigmoid())


@pytest.mark.parametrize(("sparsity", "half"), [("0.5", 23), ("0.75", 32), ("0.9", 51)])
def test_a_bias_read_in_part_follows_its_weight(sparsity: str, half: int) -> None:
    new, _ = sparseift.transform(Sliced(), x := torch.randn(2, 8), sparsity=sparsity)
    assert new.both.weight.shape == (2 * half, half) and new.both.bias.shape == (2 * half,)
    assert new(x).shape == (2, 3)


class BiasInParts(nn.Module):
    """Attention whose projection has a bias put together of three, as in Swin and BEiT: that of the key does not train."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.num_heads, self.key = 4, key
        self.stem, self.qkv, self.proj = nn.Linear(8, 48), nn.Linear(48, 144, bias=False), nn.Linear(48, 48)
        self.head = nn.Linear(48, 3)
        self.q_bias, self.v_bias = nn.Parameter(torch.ones(48)), nn.Parameter(torch.ones(48))
        if key == "parameter":
            self.k_bias = nn.Parameter(torch.zeros(48))
        if key == "buffer":
            self.register_buffer("k_bias", torch.zeros(48), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, c = x.shape
        k_bias = torch.zeros_like(self.v_bias) if self.key == "zeros_like" else self.k_bias
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, k_bias, self.v_bias)))
        q, k, v = qkv.reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))
        return self.head(x)


@pytest.mark.parametrize("key", ["parameter", "buffer", "zeros_like"])
@pytest.mark.parametrize(("sparsity", "width"), [("0.5", 68), ("0.75", 96), ("0.9", 152)])
def test_the_parts_of_a_bias_grow_alike(key: str, sparsity: str, width: int) -> None:
    """48 / sqrt(1 - s), rounded to whole heads; a sum alone would let one part grow for another."""
    new, _ = sparseift.transform(BiasInParts(key).eval(), x := torch.zeros(1, 5, 8), sparsity=sparsity)
    assert new.qkv.weight.shape == (3 * width, width)
    parts = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    assert {tuple(t.shape) for name, t in parts.items() if name.endswith("_bias")} == {(width,)}
    assert new(x).shape == (1, 5, 3)


class BiasOfGroups(nn.Module):
    """Grouped queries: 4 query heads, `kv` heads of keys and values, whose rows forward takes apart by `split`."""

    def __init__(self, kv: int, biases: int) -> None:
        super().__init__()
        self.kv, self.hd = kv, 12
        self.stem, self.proj, self.head = nn.Linear(8, 48), nn.Linear(48, 48), nn.Linear(48, 3)
        self.qkv = nn.Linear(48, (4 + 2 * kv) * 12, bias=False)
        sizes = (48, 12 * kv, 12 * kv) if biases == 3 else (48, 24 * kv)
        self.parts = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, _ = x.shape
        fused = F.linear(x, self.qkv.weight, torch.cat(tuple(self.parts)))
        split = fused.split([4 * self.hd, self.kv * self.hd, self.kv * self.hd], -1)
        q, k, v = (part.view(b, t, -1, self.hd).transpose(1, 2) for part in split)
        k, v = (part.repeat_interleave(4 // self.kv, 1) for part in (k, v))
        return self.head(x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)))


@pytest.mark.parametrize("biases", [2, 3])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_the_parts_of_a_bias_are_those_that_a_split_takes(kv: int, biases: int) -> None:
    """12 entries a head grow to 12 / sqrt(.4) = 18.97, so 19; a sum alone let q's part hold rows of k: 132, 48 and 48 of 228."""
    new, _ = sparseift.transform(BiasOfGroups(kv, biases).eval(), x := torch.zeros(1, 5, 8), sparsity="0.6")
    rows = (76, 19 * kv, 19 * kv) if biases == 3 else (76, 38 * kv)
    assert tuple(len(part) for part in new.parts) == rows
    assert new.qkv.weight.shape == (sum(rows), 76) and new(x).shape == (1, 5, 3)


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_shared_layers_are_replaced_once(member: str) -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(nn.Linear(16, 16), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(16, 3))
    new, plan = sparseift.transform(model, torch.randn(TOKENS), member=member, sparsity=0.5)
    assert new[1] is new[3] and new[1] is not shared
    row = next(r for r in plan.layers if r.status == "transformed")
    assert row.layer.calls == 2


@pytest.mark.filterwarnings("ignore:.*without being transformed")
def test_two_layers_with_one_weight_are_left_alone_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 20), nn.Linear(20, 3))
    model[2].weight = model[1].weight
    for member in ("parallel", "wide"):
        new, plan = sparseift.transform(model, torch.randn(TOKENS), member=member, sparsity=0.5)
        assert new[2].weight is new[1].weight
        assert [r.reason for r in plan.layers[1:3]] == ["weight shared with 2", "weight shared with 1"]


def test_a_body_of_parametrised_layers_is_refused_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 3))
    with pytest.raises(UsageError, match="its weight is used by ParametrizedLinear: only Sparse Wide can transform it"):
        sparseift.transform(model, torch.randn(TOKENS), member="doped", sparsity=0.5)


@pytest.mark.parametrize("member", ["wide", "parallel", "factorized", "doped"])
def test_dtype_flags_hooks_and_buffers_are_kept(member: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    calls: list[str] = []
    model[1].register_forward_hook(lambda *_: calls.append("after"))
    model[1].register_buffer("note", torch.ones(3))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    x = torch.randn(TOKENS).double()
    new, _ = sparseift.transform(model, x, member=member, sparsity=0.5)
    calls.clear()
    assert new(x).dtype == torch.float64
    assert calls == ["after"]
    assert torch.equal(new[1].note, torch.ones(3)) and new[1].note is not model[1].note
    assert not new[1].training and new[0].training
    assert not new[0].weight.requires_grad


def test_the_dense_model_does_not_change() -> None:
    build, shape = WIDENED["encoder-layer"]
    model, x = build(), torch.randn(shape)
    before = copy.deepcopy(model)
    new, _ = sparseift.transform(model, x, sparsity=0.75)
    with torch.no_grad():
        for p in new.parameters():
            p.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert torch.equal(model.eval()(x), before.eval()(x))
    assert repr(model) == repr(before)


def test_reported_sizes_are_those_of_the_weights() -> None:
    build, shape = WIDENED["group-norm"]
    _, new, _ = transformed(build, shape, sparsity=0.75)
    for module in new.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)


@pytest.mark.parametrize("projections", ["untouched", "transformed"])
def test_members_inside_multihead_attention(projections: str) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), nn.Linear(24, 3))
    x = torch.randn(TOKENS)
    new, plan = sparseift.transform(model, x, member="doped", sparsity=0.5, projections=projections)
    rows = {r.layer.name: r.status for r in plan.layers}
    assert rows["1.self_attn.in_proj"] == rows["1.self_attn.out_proj"] == projections
    assert rows["1.linear1"] == "transformed"
    for mode in (True, False):  # PyTorch's fast path in eval would read weights that are not there
        assert new.train(mode)(x).isfinite().all()


def test_member_attention_computes_what_the_original_does() -> None:
    """With the dense weights in the sparse copies and zero factors, a Doped attention is the attention it replaced."""
    torch.manual_seed(1)
    model = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 7, 24)
    stack = nn.Sequential(nn.Linear(24, 24), model, nn.Linear(24, 24))
    new, _ = sparseift.transform(stack, x, member="doped", sparsity=0.5, projections="transformed")
    attention: Any = new[1].self_attn
    for member, weight, bias in (
        (attention.in_proj, model.self_attn.in_proj_weight, model.self_attn.in_proj_bias),
        (attention.out_proj, model.self_attn.out_proj.weight, model.self_attn.out_proj.bias),
    ):
        with torch.no_grad():
            member.u.weight.zero_()
            member.sparse.weight.copy_(weight)
            member.sparse.bias.copy_(bias)
    mask = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    for options in (
        {},
        {"attn_mask": mask},
        {"key_padding_mask": padding},
        {"attn_mask": mask, "key_padding_mask": padding},
    ):
        for need in (True, False):
            want, weights = model.self_attn(x, x, x, need_weights=need, **options)
            have, ours = attention(x, x, x, need_weights=need, **options)
            torch.testing.assert_close(have, want)
            assert (weights is None) == (ours is None)
            if weights is not None:
                torch.testing.assert_close(ours, weights)
    with pytest.raises(UsageError, match="self-attention"):
        attention(x, x.flip(0), x)


def test_a_grouped_projection_has_one_head_a_group() -> None:
    """SqueezeBERT's attention: queries, keys and values by convolutions with four groups, each a head."""

    def attend(n: Net, x: Tensor) -> Tensor:
        h = n.inp(x)
        q, k, v = (layer(h).unflatten(1, (4, -1)) for layer in (n.q, n.k, n.v))  # [batch, heads, head_dim, tokens]
        mixed = (q.transpose(-2, -1) @ k * q.shape[2] ** -0.5).softmax(-1) @ v.transpose(-2, -1)
        return n.out(n.proj(mixed.transpose(-2, -1).flatten(1, 2)))

    grouped = {name: nn.Conv1d(16, 16, 1, groups=4) for name in "qkv"}
    model = Net(attend, inp=nn.Conv1d(3, 16, 1), proj=nn.Conv1d(16, 16, 1), out=nn.Conv1d(16, 5, 1), **grouped)
    new, _ = sparseift.transform(model, torch.randn(2, 3, 6), sparsity=0.75)
    masks = masks_of(new)
    for name in "qkv":  # 16 x 4 weights -> 32 x 8, as many of them non-zero
        assert (masks[f"{name}.weight"].shape, int(masks[f"{name}.weight"].sum())) == ((32, 8, 1), 64)
