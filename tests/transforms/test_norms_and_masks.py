"""Norms, activations with parameters, masks and conversions of torch.nn's own modules: no width stays because of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from tests.helpers.parts import Net

# At 75 % sparsity every width is doubled, so a body layer of 32 x 32 weights must become one of 64 x 64.
IMAGE, TOKENS = (2, 3, 12, 12), (2, 6, 8)
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": nn.InstanceNorm2d,
    "instance affine": lambda c: nn.InstanceNorm2d(c, affine=True),
    "instance tracking": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "local response": lambda c: nn.LocalResponseNorm(3),
    "sync batch": nn.SyncBatchNorm,
    "batch without parameters": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
    "one group": lambda c: nn.GroupNorm(1, c),
    "groups": lambda c: nn.GroupNorm(8, c),
    "a group a channel": lambda c: nn.GroupNorm(c, c),
    "groups without parameters": lambda c: nn.GroupNorm(8, c, affine=False),
    "one slope": lambda c: nn.PReLU(),
    "slopes": nn.PReLU,
}


def through(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        norm,
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def require_doubled(model: nn.Module, x: Tensor, layers: dict[str, tuple[int, int]]) -> Any:
    """Transform; the layers named have these (inputs, outputs) and cost what they did; forward and backward run."""
    new, plan = sparseift.transform(model, x, sparsity=0.75)
    rows = {r.layer.name: r for r in plan.layers}
    for name, sizes in layers.items():
        row = rows[name]
        assert (row.status, row.macs) == ("transformed", row.dense_macs), name
        assert (row.parts[0].shape.inputs, row.parts[0].shape.outputs) == sizes, name
    training = not any(isinstance(m, nn.SyncBatchNorm) for m in new.modules())  # which trains on a GPU alone
    y = new.train(training)(x)
    assert y.shape == model(x).shape
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    return new


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_follows_its_channels(name: str) -> None:
    model = through(NORMS[name](32)).eval()
    new = require_doubled(model, torch.randn(IMAGE), {"3": (64, 64)})
    sizes = [getattr(new[1], n) for n in ("num_features", "num_channels") if hasattr(new[1], n)]
    assert all(size == 64 for size in sizes)


@pytest.mark.parametrize("spatial", [1, 3])
def test_an_instance_norm_of_any_dimension_follows(spatial: int) -> None:
    conv, norm = (getattr(nn, f"{kind}{spatial}d") for kind in ("Conv", "InstanceNorm"))
    model = nn.Sequential(conv(3, 32, 3), norm(32), nn.ReLU(), conv(32, 32, 3), norm(32), conv(32, 5, 1))
    require_doubled(model, torch.randn(2, 3, *[8] * spatial), {"3": (64, 64)})


def encoder(forward: Callable[[Net, Tensor], Tensor]) -> Net:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    return Net(forward, i=nn.Linear(8, 32), t=nn.TransformerEncoder(layer, 1), o=nn.Linear(32, 3))


def causal(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.size(1), device=x.device)


MASKS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "padding": lambda n, x: n.o(n.t(n.i(x), src_key_padding_mask=x.sum(-1) == 0)),
    "causal": lambda n, x: n.o(n.t(n.i(x), mask=causal(x))),
    "causal, said": lambda n, x: n.o(n.t(n.i(x), mask=causal(x), is_causal=True)),
    "both": lambda n, x: n.o(n.t(n.i(x), mask=causal(x), src_key_padding_mask=causal(x)[0].expand(x.shape[:2]))),
}


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:Support for mismatched")
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_a_stock_encoder_stop_no_width(name: str) -> None:
    model = encoder(MASKS[name]).eval()
    names = {
        "t.layers.0.self_attn.in_proj": (64, 192),
        "t.layers.0.self_attn.out_proj": (64, 64),
        "t.layers.0.linear1": (64, 128),
        "t.layers.0.linear2": (128, 64),
    }
    require_doubled(model, x := torch.randn(TOKENS), names)
    tokens, scores = 2 * 6, 2 * 6 * 6 * 32  # batch * queries * keys * width
    weights = 8 * 32 + 32 * 96 + 32 * 32 + 2 * 32 * 64 + 32 * 3
    assert sparseift.flops(model, x).dense.forward_macs == tokens * weights + 2 * scores


class Translator(nn.Module):
    """A whole nn.Transformer with a causal target."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(8, 32), nn.Linear(32, 3)
        self.t = nn.Transformer(32, 4, 1, 1, 64, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.i(x), self.i(x[:, :4])
        return self.o(self.t(source, target, tgt_mask=causal(target), src_key_padding_mask=x.sum(-1) == 0))


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:Support for mismatched")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_stock_transformer_grows_in_full_at_any_batch(batch: int) -> None:
    x = torch.randn(batch, 6, 8)
    cross = "t.decoder.layers.0.multihead_attn"
    names = {f"{cross}.in_proj.q": (64, 64), f"{cross}.in_proj.kv": (64, 128), f"{cross}.out_proj": (64, 64)}
    require_doubled(Translator().eval(), x, {**names, "t.encoder.layers.0.self_attn.in_proj": (64, 192)})


@pytest.mark.parametrize("shape", [(6, 6), (8, 6, 6)])
def test_a_mask_whose_attention_weights_are_returned_stops_no_width(shape: tuple[int, ...]) -> None:
    model = Net(
        lambda n, x: n.o(n.a(y := n.i(x), y, y, attn_mask=torch.zeros(shape))[0] + y),
        i=nn.Linear(8, 32),
        a=nn.MultiheadAttention(32, 4, batch_first=True),
        o=nn.Linear(32, 3),
    )
    require_doubled(model.eval(), torch.randn(TOKENS), {"a.in_proj": (64, 192), "a.out_proj": (64, 64)})


class Moved(nn.Module):
    """Converts a layer in forward to the dtype of its input, and assigns it again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 32), nn.Linear(32, 32).double(), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.b = self.b.to(x.dtype)
        return self.o(self.b(x).relu())


def test_a_layer_converted_in_forward_is_the_layer_it_was() -> None:
    model, x = Moved(), torch.randn(2, 8)
    weight = model.b.weight
    assert sparseift.flops(model, x).dense.forward_macs == 2 * (8 * 32 + 32 * 32 + 32 * 3)
    assert model.b.weight is weight and weight.dtype == torch.float64
    assert nn.Module._apply.__module__ == "torch.nn.modules.module"
    require_doubled(model, x, {"b": (64, 64)})
