"""FLOPs of reference models against figures derived by hand from the layers' shapes, and against PyTorch's own counter."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparseift_cli.models import source
from sparseift_cli.models.source import TABLES, Request, build, load_table
from sparseift_cli.models.zoo import generate_tables, registry
from sparseift_cli.plan.audit import audit


def conv(positions: int, taps: int, inputs: int, outputs: int) -> int:
    return positions * taps * inputs * outputs


def resnet18(sides: int, stem: int, classes: int) -> int:
    """MACs of a ResNet-18 whose first stage has `sides` x `sides` positions."""
    total, inputs = stem, 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        p = (sides >> stage) ** 2
        total += conv(p, 9, inputs, outputs) + 3 * conv(p, 9, outputs, outputs)
        total += conv(p, 1, inputs, outputs) if inputs != outputs else 0
        inputs = outputs
    return total + 512 * classes


def resnet50() -> int:
    total, inputs = conv(112 * 112, 49, 3, 64), 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        p = (56 >> stage) ** 2
        before = p if stage == 0 else 4 * p  # the first 1x1 runs before the 3x3 takes its stride
        total += conv(before, 1, inputs, width) + conv(p, 9, width, width) + conv(p, 1, width, 4 * width)
        total += conv(p, 1, inputs, 4 * width)
        total += (blocks - 1) * (conv(p, 1, 4 * width, width) + conv(p, 9, width, width) + conv(p, 1, width, 4 * width))
        inputs = 4 * width
    return total + 2048 * 1000


def gpt(layers: int, d: int, tokens: int, vocabulary: int = 50257, pairs: int | None = None) -> int:
    """12 d^2 a token and layer in the projections, 2 d a query-key pair and layer in attention, d a token and word in the head."""
    return layers * (12 * tokens * d * d + 2 * d * (pairs or tokens * tokens)) + tokens * d * vocabulary


STEM = conv(112 * 112, 49, 3, 64)
CIFAR_STEM = conv(32 * 32, 9, 3, 64)
# model, MACs from first principles, the published figure of the reference file, training FLOPs: 6 per MAC, no dX of the stem
TRUTH = [
    ("resnet18", resnet18(56, STEM, 1000), 1_814_073_344, 10_648_412_160),
    ("resnet50", resnet50(), 4_089_184_256, 24_299_077_632),
    ("resnet18_cifar", resnet18(32, CIFAR_STEM, 100), 555_468_800, 3_329_273_856),
    ("gpt2", gpt(12, 768, 1024), 145_824_153_600, 874_944_921_600),
    ("gpt3_175b", gpt(96, 12288, 2048), 367_402_130_866_176, 2_204_412_785_197_056),
]


@pytest.mark.parametrize(("name", "derived", "figure", "training"), TRUTH)
def test_forward_and_training(name: str, derived: int, figure: int, training: int) -> None:
    result = audit(load_table(Request(name)))
    assert derived == figure == result.dense.forward_macs
    assert result.dense.forward_flops == 2 * figure
    stem = {"resnet18": STEM, "resnet50": STEM, "resnet18_cifar": CIFAR_STEM}.get(name, 0)
    assert training == 6 * figure - 2 * stem == result.dense.training_flops


@pytest.mark.parametrize(
    ("name", "exact", "half"),
    [
        ("gpt2", 136_169_914_368, 136_160_477_184),
        ("gpt3_175b", 362_456_744_460_288, None),
    ],
)
def test_causal_attention(name: str, exact: int, half: int | None) -> None:
    table = load_table(Request(name))
    layers, d, tokens = (12, 768, 1024) if name == "gpt2" else (96, 12288, 2048)
    assert exact == gpt(layers, d, tokens, pairs=tokens * (tokens + 1) // 2)
    assert audit(table, causal="exact").dense.forward_macs == exact
    if half is not None:
        assert audit(table, causal="half").dense.forward_macs == half


def test_reference_file(shared: Path) -> None:
    """The same figures, with every layer and part that the file names."""
    for row in json.loads((shared / "reference" / "ground_truth.json").read_text()):
        name = {"resnet18_cifar100": "resnet18_cifar"}.get(row["model"], row["model"])
        table = load_table(Request(name))
        macs = {layer.name: layer.macs.evaluate(table.sizes) for layer in table.layers}
        assert sum(macs.values()) == row["total_macs"]
        assert audit(table).dense.training_flops == row["train_flops_exact"]
        for layer, figure in row.get("per_layer_macs", {}).items():
            assert macs[layer] == figure
        if "params" in row:
            assert table.params == row["params"]
        if "causal_exact_total_macs" in row:
            assert audit(table, causal="exact").dense.forward_macs == row["causal_exact_total_macs"]
        for part, figure in row["parts_macs"].items():
            pattern = {
                "attn_qkv": ".c_attn",
                "attn_proj": ".attn.c_proj",
                "attn_qk": ".qk",
                "attn_av": ".av",
                "lm_head": "lm_head",
                "mlp": ".mlp.",
                "linear": "fc",
            }.get(part) or str(part)
            assert (
                sum(m for n, m in macs.items() if n.startswith(pattern) or (pattern in n and pattern[0] == "."))
                == figure
            )


def promised_shape(name: str) -> tuple[int | None, ...]:
    """[batch, classes], or of a text [batch, hidden] under BERT's pooler and [batch, tokens, words] under a decoder."""
    info = registry.lookup(name)
    config = import_module(f"sparseift_cli.models.zoo.{info.family}").CONFIGS[name]
    if info.kind == "image":
        return 1, info.num_classes
    return (1, config.hidden) if info.family == "bert" else (1, info.seq, config.vocab)


@pytest.mark.parametrize("name", registry.names())
def test_shipped_table_is_current_and_equals_pytorchs_counter(name: str) -> None:
    """The generated file, a fresh trace and FlopCounterMode agree; parameters are the model's own, its output as promised."""
    built = build(Request(name))
    assert (TABLES / f"{name}.json").read_text() == generate_tables.document(name, built), "run: make tables"
    model, inputs = built.model, built.args
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(*inputs)
    assert output.shape == promised_shape(name)
    table = load_table(Request(name))
    assert 2 * table.macs == counter.get_total_flops()
    assert table.params == sum(p.numel() for p in model.parameters())
    assert table.uncounted == () and table.untraceable is None


def test_another_input_is_traced_afresh() -> None:
    at_256 = source.load_table(Request("resnet18", image=(3, 256, 256), batch=2, num_classes=10))
    assert at_256.macs == 2 * resnet18(64, conv(128 * 128, 49, 3, 64), 10)
