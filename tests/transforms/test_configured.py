"""Models that their library builds from a configuration alone: what is saved with it is what was transformed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseift_cli as sparseift
from sparseift_cli import Options
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.trace.build import trace
from sparseift_cli.transforms.edits import SetAttribute
from sparseift_cli.transforms.layers import set_attribute
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for
from sparseift_cli.transforms.transformation import transformation_of
from tests.helpers.rotary import Angles, rotate


class PretrainedConfig:
    """Has the name of Hugging Face's base class, by which a configuration is recognised, and refuses as Llama's does."""

    def __init__(self, **sizes: Any) -> None:
        self.__dict__.update(sizes)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")

    hidden_size: int
    num_attention_heads: int

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(vars(self))

    @classmethod
    def from_dict(cls, sizes: dict[str, Any]) -> PretrainedConfig:
        return cls(**sizes)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class Rotary(Angles):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
        self.register_buffer("inv_freq", frequencies, persistent=False)


class Attention(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        inner = self.head_dim * c.num_attention_heads
        self.q, self.k, self.v = (nn.Linear(c.hidden_size, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """One layer of Llama; without `head_dim` in its configuration a head is hidden_size / heads, as in GPT-2."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = c = config
        feed = getattr(c, "intermediate_size", 4 * c.hidden_size)
        self.embed, self.rotary, self.attention = nn.Embedding(50, c.hidden_size), Rotary(c), Attention(c)
        self.norm, self.last = Norm(c.hidden_size, c.rms_norm_eps), Norm(c.hidden_size, c.rms_norm_eps)
        self.up, self.down = nn.Linear(c.hidden_size, feed), nn.Linear(feed, c.hidden_size, bias=False)
        self.head = nn.Linear(c.hidden_size, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.norm(x), *self.rotary(x))
        return self.head(self.last(x + self.down(nn.functional.silu(self.up(self.norm(x))))))


SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "rms_norm_eps": 1e-3,  # large, so that one that is not scaled shows
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}
IDS = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))


def rebuilt(new: nn.Module) -> nn.Module:
    """What from_pretrained makes of what save_pretrained wrote: the class, its configuration, the state dict."""
    built = type(new)(new.config.from_dict(new.config.to_dict()))
    built.load_state_dict(new.state_dict())
    return built


@pytest.mark.parametrize(
    ("sparsity", "more"),
    [("0.5", {}), ("0.75", {}), ("0.9", {}), ("0.9", {"head_dim": 10, "intermediate_size": 80})],
)
def test_a_saved_model_is_the_preserved_one(sparsity: str, more: dict[str, int]) -> None:
    """Widths that the configuration can say, rotary frequencies and eps where the library reads them."""
    torch.manual_seed(0)
    dense = Decoder(PretrainedConfig(**SIZES, **more))
    options = Options(start="preserve", preserve_slack=0)
    new, _ = sparseift.transform(dense, IDS, sparsity=sparsity, options=options)
    ideal = 48 * (1 - float(sparsity)) ** -0.5
    assert new.config.hidden_size % 6 == 0 and abs(new.config.hidden_size - ideal) <= 6
    with torch.no_grad():
        want, kept, again = dense(IDS), new(IDS), rebuilt(new)(IDS)
    assert float((kept - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert float((again - want).abs().max()) <= 1e-5 * float(want.abs().max())
    n = len(dense.rotary.inv_freq)
    torch.testing.assert_close(new.rotary.inv_freq[:n], 100.0 ** -(torch.arange(n) / n))
    assert dense.config.rope_parameters["rope_theta"] == 100.0 and dense.config.rms_norm_eps == 1e-3
    assert not any("save_pretrained" in note for note in transformation_of(new).notes)


def test_a_wide_model_is_one_that_its_class_builds() -> None:
    """Fresh weights: 48 * sqrt 2 is 67.9, of which 6 heads make 66; a head has 12 (even, for its pairs) without a size of its own."""
    own, _ = sparseift.transform(
        Decoder(PretrainedConfig(**SIZES, head_dim=10, intermediate_size=80)), IDS, sparsity=0.5
    )
    assert (own.config.hidden_size, own.config.head_dim, own.config.intermediate_size) == (66, 14, 113)
    derived, _ = sparseift.transform(Decoder(PretrainedConfig(**SIZES)), IDS, sparsity=0.5)
    assert (derived.config.hidden_size, derived.attention.head_dim, derived.up.out_features) == (72, 12, 288)
    for new in (own, derived):
        assert torch.equal(rebuilt(new)(IDS), new(IDS))


class Slowed(Rotary):
    """Its second half is slower, as Llama 3 has it; how many there are, a number in a dict may say."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        nested = config.rope_parameters.get("size")
        n = nested or config.head_dim // 2
        frequencies = 100.0 ** -(torch.arange(n).float() / n)
        frequencies[n // 2 :] /= 8
        self.register_buffer("inv_freq", frequencies, persistent=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_frequencies_of_no_formula_grow_where_the_configuration_says_how_many(device: str) -> None:
    """A head_dim of its own makes twice as many of the same class; a number inside a dict does not, so that width stays."""
    rope: dict[str, Any] = SIZES["rope_parameters"]
    for nested, head_dim in ((None, 16), (4, 8)):
        with torch.device(device):
            config = PretrainedConfig(**(SIZES | {"head_dim": 8, "rope_parameters": rope | {"size": nested}}))
            dense = Decoder(config)
            dense.rotary = Slowed(config)
        found = trace(dense, (IDS,), name="decoder", input_shape=(40,))
        plan = make_plan(found.table, TransformSpec(member="wide", sparsity="0.75"))
        new = apply_surgery(dense, surgery_for(plan, found.structure, dense))
        assert (new.config.hidden_size, new.config.head_dim, len(new.rotary.inv_freq)) == (96, head_dim, head_dim // 2)
        if device == "cpu":
            assert torch.equal(new.rotary.inv_freq, Slowed(new.config).inv_freq)


class ScaledEmbedding(nn.Embedding):
    """Multiplies its rows by a number that its code makes of the width, as Gemma's does."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.embed_scale = width**0.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Scaled(Decoder):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = ScaledEmbedding(50, config.hidden_size)


def test_what_a_configuration_cannot_say_is_said() -> None:
    options = Options(start="preserve", preserve_slack=0)
    with pytest.warns(UserWarning, match="save_pretrained"):
        new, _ = sparseift.transform(Scaled(PretrainedConfig(**SIZES)), IDS, sparsity=0.75, options=options)
    (note,) = (n for n in transformation_of(new).notes if n.startswith("save_pretrained"))
    assert "outputs change by up to" in note and f"embed.embed_scale as {96**0.5:g} from its configuration" in note


@pytest.mark.parametrize("sparsity", ["0.5", "0.75"])
def test_a_saved_llama(tmp_path: Any, sparsity: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    dense = transformers.LlamaForCausalLM(config).eval()
    new, _ = sparseift.transform(
        dense, {"input_ids": IDS}, sparsity=sparsity, options=Options(start="preserve", preserve_slack=0)
    )
    new.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, dense(IDS).logits, atol=1e-5)


def test_a_size_that_a_configuration_lacks_can_be_set() -> None:
    """A head_dim of its own, where hidden_size / heads is no longer the size of a head."""
    model = nn.Module()
    model.config = PretrainedConfig(hidden_size=8, num_attention_heads=2)
    set_attribute(model, SetAttribute("config", "head_dim", 4))
    assert model.config.head_dim == 4
