"""Numbers that appear in no shape: rotary frequencies, scales in buffers, sizes in a configuration object."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.trace.build import trace
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for
from tests.helpers.rotary import Angles, rotate


class PretrainedConfig:
    """Has the name of Hugging Face's base class, by which a configuration is recognised."""

    def __init__(self, **sizes: int) -> None:
        self.__dict__.update(sizes)


class StrictConfig(PretrainedConfig):
    """Accepts only integers, as Hugging Face's configurations with typed fields do."""

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is not int:
            raise TypeError(f"{name}: {value}")
        super().__setattr__(name, value)


class Rotary(Angles):
    def __init__(self, config: PretrainedConfig, base: float, scaled: bool) -> None:
        super().__init__()
        self.base = base
        steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        frequencies = base**-steps
        self.register_buffer(
            "inv_freq", frequencies * torch.linspace(1, 0.2, len(steps)) if scaled else frequencies, persistent=False
        )


class Decoder(nn.Module):
    def __init__(self, *, scaled: bool = False, config: type[PretrainedConfig] = PretrainedConfig) -> None:
        super().__init__()
        self.config: Any = config(
            hidden_size=32, intermediate_size=80, num_attention_heads=4, head_dim=8, vocab_size=50
        )
        c = self.config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.register_buffer("embed_scale", torch.tensor(math.sqrt(c.hidden_size)), persistent=False)
        self.rotary = Rotary(c, 10000.0, scaled)
        self.q, self.k, self.v = (nn.Linear(32, n * 8, bias=False) for n in (4, 2, 2))
        self.o, self.norm = nn.Linear(32, 32, bias=False), nn.RMSNorm(32)
        self.up, self.down = nn.Linear(32, 80), nn.Linear(80, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.model_dim = 32

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.embed_scale
        cos, sin = self.rotary(x)
        q, k, v = (
            p(self.norm(x)).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.silu(self.up(x)))
        return self.head(x * self.model_dim**-0.5)


IDS = torch.randint(0, 50, (2, 6))


def test_everything_follows_the_new_sizes() -> None:
    model = Decoder()
    new, _ = sparseift.transform(model, IDS, sparsity=0.75)
    config: Any = new.config
    assert vars(config) == {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "head_dim": 16,
        "vocab_size": 50,
    }
    assert vars(model.config)["hidden_size"] == 32 and model.model_dim == 32
    assert float(new.embed_scale) == 8.0
    assert new.model_dim == 64
    want = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(new.rotary.inv_freq, want)
    assert new(IDS).isfinite().all()
    sparseift.audit(new, IDS)


def test_frequencies_that_follow_no_formula_keep_the_head_dim() -> None:
    """And all else grows: the stream and the MLP by 2, to [q, k, v, o, up, down] of the dense MACs."""
    new, plan = sparseift.transform(Decoder(scaled=True), IDS, sparsity=0.75)
    assert new.q.weight.shape == (32, 64) and new.k.weight.shape == (16, 64) and new.up.weight.shape == (160, 64)
    assert len(new.rotary.inv_freq) == 4
    reason = "tied to buffer rotary.inv_freq, whose frequencies follow no known formula"
    assert [w.fixed for w in plan.table.widths if w.name == "rotary.inv_freq[0]"] == [reason]
    assert new(IDS).isfinite().all()
    sparseift.audit(new, IDS)


def test_numbers_without_values_are_planned() -> None:
    """`embed_scale` is a buffer, whose value a model on meta does not have: no shape depends on it."""
    with torch.device("meta"):
        model = Decoder()
    found = trace(model, (IDS,), name="decoder", input_shape=(6,))
    plan = make_plan(found.table, TransformSpec(member="wide", sparsity="0.75"))
    surgery = surgery_for(plan, found.structure, model)
    assert apply_surgery(model, surgery).up.weight.shape == (160, 64)
    assert found.needs_values  # of the frequencies: a class without a configuration computes them


class Copying(Decoder):
    """Makes a configuration from another one in its forward, as encoder-decoders of Hugging Face do for their caches."""

    def forward(self, ids: Tensor) -> Tensor:
        self.config.num_attention_heads = self.config.num_attention_heads
        return super().forward(ids)


def test_a_configuration_that_takes_ints_alone_gets_its_new_sizes_by_value() -> None:
    new, _ = sparseift.transform(Copying(config=StrictConfig), IDS, sparsity=0.75)
    assert {n: vars(new.config)[n] for n in ("hidden_size", "intermediate_size", "vocab_size")} == {
        "hidden_size": 64,
        "intermediate_size": 160,
        "vocab_size": 50,
    }
    assert new(IDS).isfinite().all()
    sparseift.audit(new, IDS)


def test_a_configured_size_of_two_widths_stays() -> None:
    """A window of 16 tokens, beside a width of 16 that grows and one that does not."""
    model = Decoder()
    model.config.window = 50  # the rows of the embedding and the outputs, which stay
    model.config.other = 80  # only the hidden width
    new, _ = sparseift.transform(model, IDS, sparsity=0.75)
    config: Any = new.config
    assert (config.window, config.other) == (50, 160)
    model.keep = nn.Linear(80, 50)  # not reached in the forward: it stays
    model.config.other = 80
    kept, _ = sparseift.transform(model, IDS, sparsity=0.75)
    assert vars(kept.config)["other"] == 80
