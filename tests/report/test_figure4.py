"""Figure 4 again: FLOPs against a derivation by hand, the published values as published, and the two claims answered."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparseift_cli.report import figure4
from sparseift_cli.report.plots.figure4 import described, figure
from sparseift_cli.report.plots.style import to_svg

IMAGES = 90 * 1_281_167


def resnet_training_flops(blocks: list[int]) -> int:
    """One 224x224 sample through a ResNet of basic blocks: three passes a layer, without the stem's input gradient."""
    size, width, stem = 56, 64, 112 * 112 * 49 * 3 * 64
    macs = 0
    for stage, count in enumerate(blocks):
        inputs = width if stage == 0 else width // 2
        for block in range(count):
            first = inputs if block == 0 else width
            macs += size * size * 9 * width * (first + width)
            macs += size * size * first * width if first != width else 0  # the projection beside a stage's first block
        size, width = size // 2, width * 2
    macs += 512 * 1000
    return 2 * (3 * macs + 2 * stem)


def gpt_training_flops(layers: int, width: int, tokens: int = 2048, vocabulary: int = 50_257) -> int:
    """One sequence: 12 d^2 weights a block, two attention products of T^2 d, the head; three passes each."""
    return 2 * 3 * tokens * (layers * (12 * width * width + 2 * tokens * width) + vocabulary * width)


def row(model: str, sparsity: str | None = None, match: str | None = None) -> figure4.FigureRow:
    (found,) = (r for r in figure4.rows() if (r["model"], r["sparsity"], r["match"]) == (model, sparsity, match))
    return figure4.FigureRow(**found)


def test_dense_resnets_by_hand() -> None:
    assert resnet_training_flops([2, 2, 2, 2]) == 10_648_412_160  # 2 x 5,324,206,080 MACs
    assert row("resnet18").training_flops == IMAGES * 10_648_412_160
    assert row("resnet34").training_flops == IMAGES * resnet_training_flops([3, 4, 6, 3])


def test_dense_gpts_by_hand() -> None:
    assert row("gpt3_small").training_flops == gpt_training_flops(12, 768)
    assert row("gpt3_medium").training_flops == gpt_training_flops(24, 1024)


def test_wide_gpt_by_hand() -> None:
    """At 75 % widths double: the body costs what it did, what stays dense doubles with the stream."""
    dense = gpt_training_flops(12, 768)
    left_alone = 2 * 3 * 2048 * (12 * 2 * 2048 * 768 + 50_257 * 768)
    assert row("gpt3_small", "0.75", "layer").training_flops == dense + left_alone


def test_wide_resnet_costs_more_by_its_stem_head_and_updates() -> None:
    layer, model = row("resnet18", "0.9", "layer"), row("resnet18", "0.9", "model")
    stem, head = 2 * 112 * 112 * 49 * 3 * 64, 3 * 512 * 1000  # MACs of a training step
    grown = 1 + 2 * (202 / 64 - 1) * (stem + head) / 10_648_412_160
    assert grown < layer.ratio < 1.03 * grown  # and some per cent of mask updates
    assert model.ratio < 1  # matched in the forward pass: the stem, which grew, has no input gradient


def test_published_values_are_the_published_ones() -> None:
    found = {(r["model"], r["sparsity"]): (r["value"], r["evidence"]) for r in figure4.rows() if r["match"] != "model"}
    assert found == {
        ("resnet18", None): (70.9, "a"),
        ("resnet18", "0.9"): (74.4, "a"),
        ("resnet34", None): (74.2, "n"),
        ("resnet34", "0.9"): (76.8, "n"),
        ("gpt3_small", None): (33.8, "a"),
        ("gpt3_small", "0.5"): (None, None),
        ("gpt3_small", "0.75"): (34.7, "a"),
        ("gpt3_medium", None): (None, None),
    }
    assert {r["value"] for r in figure4.rows() if r["match"] == "model"} == {None}


def test_the_two_claims() -> None:
    resnet, gpt = figure4.claims()
    assert resnet.holds and resnet.counted == pytest.approx(2.0422, abs=1e-4)
    assert not gpt.holds and gpt.counted == pytest.approx(2.8157, abs=1e-4)
    assert resnet.counted == resnet_training_flops([3, 4, 6, 3]) / resnet_training_flops([2, 2, 2, 2])
    assert gpt.counted == gpt_training_flops(24, 1024) / gpt_training_flops(12, 768)
    assert "2.351x" in gpt.answer and "2.835x" in gpt.answer and "1.827x" in resnet.answer


def test_the_figure_draws_the_rows() -> None:
    above, below = figure().axes
    dense, wide = (line for line in above.lines if line.get_marker() in ("o", "s"))
    assert [float(x) * 1e18 for x in list(dense.get_xdata())] == pytest.approx(
        [row("resnet18").training_flops, row("resnet34").training_flops]
    )
    assert list(dense.get_ydata()) == [70.9, 74.2]
    assert list(wide.get_ydata()) == [74.4, 76.8]
    assert "EFLOPs" in above.get_xlabel() and "published" in above.get_ylabel()
    names = {text.get_text() for text in below.texts}
    assert names == {"GPT-3 Small", "GPT-3 Small Wide 50 %", "GPT-3 Small Wide 75 %", "GPT-3 Medium"}
    assert "ResNet-18 Wide 90 %: 74.4 % published" in described()
    assert to_svg(figure(), "Figure 4") == to_svg(figure(), "Figure 4")


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from sparseift_cli.report import figure4; figure4.claims(); assert 'matplotlib' not in sys.modules\n"
        "from sparseift_cli.report.html import page; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
