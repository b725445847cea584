"""Every model of the zoo: the shapes it promises, the keys of the library it names, its parameters, its MACs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.errors import UsageError
from sparseift_cli.models import zoo
from sparseift_cli.models.zoo.catalog import OF_NO_LIBRARY

GOLDEN = Path(__file__).parent.parent / "golden" / "state_dicts.json"
"""Names and shapes of the state_dicts of the reference libraries, as digests: see `digest`."""

NORM_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}

# Published totals, or spelled out: a GPT has 12 h^2 + 13 h in a block (biases and LayerNorms included), 2 h in ln_f and
# (vocab + positions) h in its tables.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet18_cifar": 11_220_132,
    "resnet20": 269_722,
    "resnet56": 853_018,
    "mobilenet_v2": 3_504_872,
    "vit_b_16": 86_567_656,
    "vit_s_16": 22_050_664,
    # ResNet-50 less three 3x3 convs of 512 channels, plus three qkv projections and three tables of positions.
    "botnet50": 25_557_032 - 3 * 9 * 512**2 + 3 * 3 * 512**2 + 2 * (27 + 13 + 13) * 128,
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "gpt2": 124_439_808,
    "gpt2_xl": 48 * (12 * 1600**2 + 13 * 1600) + 2 * 1600 + (50257 + 1024) * 1600,
    "gpt3_small": 124_439_808 + 1024 * 768,
    "gpt3_xl": 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048 + (50257 + 2048) * 2048,
    "gpt3_13b": 40 * (12 * 5120**2 + 13 * 5120) + 2 * 5120 + (50257 + 2048) * 5120,
    "gpt3_175b": 174_604_259_328,
    "llama_tiny": 4 * (256 * (2 * 256 + 2 * 64 + 3 * 688) + 2 * 256) + 256 + 32000 * 256,
    "llama3_8b": 8_030_261_248,
}

# Table 2.1 of arXiv 2005.14165 as read here: layers, d_model, heads, d_head.
GPT3 = {
    "gpt3_small": (12, 768, 12, 64),
    "gpt3_medium": (24, 1024, 16, 64),
    "gpt3_large": (24, 1536, 16, 96),
    "gpt3_xl": (24, 2048, 16, 128),  # printed: 24 heads
    "gpt3_2_7b": (32, 2560, 32, 80),
    "gpt3_6_7b": (32, 4096, 32, 128),
    "gpt3_13b": (40, 5120, 40, 128),  # printed: d_model 5140
    "gpt3_175b": (96, 12288, 96, 128),
}


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return zoo.build(name).eval()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def digest(model: nn.Module) -> str:
    """SHA-256 of the sorted lines `name AxBxC` of the state_dict."""
    lines = sorted(f"{key} {'x'.join(map(str, value.shape))}" for key, value in model.state_dict().items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def macs(model: nn.Module, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", zoo.names())
def test_all_on_meta_and_no_buffers_but_norm_statistics(name: str) -> None:
    model = on_meta(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {key.rpartition(".")[2] for key, _ in model.named_buffers()} <= NORM_BUFFERS


@pytest.mark.parametrize("name", [name for name in zoo.names() if zoo.lookup(name).source not in OF_NO_LIBRARY])
def test_state_dict_is_that_of_the_library(name: str) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))[name]
    model = on_meta(name)
    assert len(model.state_dict()) == golden["tensors"]
    assert parameters(model) == golden["parameters"]
    assert digest(model) == golden["sha256"], f"keys or shapes differ from {golden['library']} {golden['version']}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    assert parameters(on_meta(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_sizes_are_those_of_the_paper(name: str) -> None:
    depth, hidden, num_heads, head_dim = GPT3[name]
    blocks: Any = on_meta(name).get_submodule("transformer.h")
    assert len(blocks) == depth
    assert {(b.attn.c_attn.weight.shape[0], b.attn.num_heads, b.attn.head_dim) for b in blocks} == {
        (hidden, num_heads, head_dim)
    }
    assert num_heads * head_dim == hidden


def test_botnet_macs_at_1024_pixels_are_those_of_the_paper() -> None:
    """Table 1 of arXiv 2101.11605: 85.4 and 102.98 G multiply-adds, 25.5 and 20.8 M parameters at 1024x1024."""
    with torch.device("meta"):
        resnet, botnet = (zoo.build(name, image=(3, 1024, 1024)).eval() for name in ("resnet50", "botnet50"))
        x = torch.empty(1, 3, 1024, 1024)
    assert macs(resnet, x) / 1e9 == pytest.approx(85.4, abs=0.05)
    assert macs(botnet, x) / 1e9 == pytest.approx(102.98, abs=0.02)


def test_registry_and_configs_agree() -> None:
    families = {zoo.lookup(name).family for name in zoo.names()}
    configs = {name: c for f in families for name, c in import_module(f"sparseift_cli.models.zoo.{f}").CONFIGS.items()}
    assert configs.keys() == set(zoo.names())
    for name, config in configs.items():
        info = zoo.lookup(name)
        assert getattr(config, "max_seq", None) == info.max_seq
        assert getattr(config, "image", None) == info.image
        assert getattr(config, "num_classes", None) == info.num_classes


@pytest.mark.parametrize("name", ["gpt2", "gpt3_small", "llama_tiny"])
def test_tied_head_is_one_parameter(name: str) -> None:
    model: Any = on_meta(name)
    embedding = model.transformer.wte if name.startswith("gpt") else model.model.embed_tokens
    assert model.lm_head.weight is embedding.weight


def test_classes_and_image_channels_change_only_head_and_stem() -> None:
    with torch.device("meta"):
        model = zoo.build("resnet18", num_classes=10, image=(1, 28, 28))
    changed = {
        key for key, value in model.state_dict().items() if value.shape != on_meta("resnet18").state_dict()[key].shape
    }
    assert changed == {"conv1.weight", "fc.weight", "fc.bias"}
    assert model(torch.empty(2, 1, 28, 28, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("side", [192, 200, 224, 256])
@pytest.mark.parametrize("name", ["botnet50", "mobilevit_s"])
def test_other_image_sizes(name: str, side: int) -> None:
    with torch.device("meta"):
        model = zoo.build(name, image=(3, side, side + 32)).eval()
    assert model(torch.empty(1, 3, side, side + 32, device="meta")).shape == (1, 1000)


def test_vit_refuses_broken_patches() -> None:
    with torch.device("meta"), pytest.raises(UsageError, match="does not divide into patches"):
        zoo.build("vit_b_16", image=(3, 225, 224))


def test_botnet_refuses_an_image_it_has_no_positions_for() -> None:
    with pytest.raises(ValueError, match="another size than 16x16"):
        on_meta("botnet50")(torch.empty(1, 3, 256, 256, device="meta"))


def test_example_input() -> None:
    info = zoo.lookup("resnet18_cifar")
    assert zoo.example_input(info, batch=4).shape == (4, 3, 32, 32)
    tokens = zoo.example_input(replace(zoo.lookup("gpt2"), seq=7))
    assert (tokens.shape, tokens.dtype) == ((1, 7), torch.int64)
