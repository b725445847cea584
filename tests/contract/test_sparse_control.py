"""Scope none: the control of Sparse Wide, sparse at the dense widths. Counts by hand, masks as planned, and it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparseift_cli
from sparseift_cli.errors import SparseiftError, UsageError
from sparseift_cli.models.source import Request, load_table
from sparseift_cli.plan.audit import Audit, audit, to_json
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TrainingSpec, TransformSpec
from sparseift_cli.recipe.load import load
from sparseift_cli.runs.directory import RunDirectory
from sparseift_cli.train.run import run_seeds
from sparseift_cli.transforms.transformation import Options, transformation_of
from tests.contract.test_ground_truth import CIFAR_STEM, conv, resnet18
from tests.helpers.nets import residual

CONTROL: dict[str, Any] = {"member": "sparse_wide", "match": "off", "scope": "none"}
HEAD = 512 * 100


def spec(**changes: Any) -> TransformSpec:
    return TransformSpec.of(CONTROL | {"sparsity": "0.75"} | changes)


def counted(model: str, training: TrainingSpec | None = None, **changes: Any) -> Audit:
    return audit(make_plan(load_table(Request(model)), spec(**changes), training))


def resnet18_nonzeros(density: Fraction) -> int:
    """Of every convolution behind the stem, floored layer by layer."""
    total, inputs = 0, 64
    for outputs in (64, 128, 256, 512):
        shapes = [9 * inputs * outputs] + 3 * [9 * outputs * outputs]
        shapes += [inputs * outputs] if inputs != outputs else []
        total += sum(int(density * weights) for weights in shapes)
        inputs = outputs
    return total


@pytest.mark.parametrize("sparsity", ["0.5", "0.75", "0.9", "0.999"])
def test_resnet18_by_hand(sparsity: str) -> None:
    """Weights that are left times the positions that use them; stem and head as they are, all widths the dense ones."""
    density, total, inputs = 1 - Fraction(sparsity), CIFAR_STEM + HEAD, 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        p = (32 >> stage) ** 2
        total += p * (int(density * 9 * inputs * outputs) + 3 * int(density * 9 * outputs**2))
        total += p * int(density * inputs * outputs) if inputs != outputs else 0
        inputs = outputs
    result = counted("resnet18_cifar", sparsity=sparsity)
    assert result.transformed is not None and result.plan is not None
    assert result.dense.forward_macs == resnet18(32, CIFAR_STEM, 100)
    assert result.transformed.forward_macs == total
    assert result.transformed.params == result.dense.params and result.activation_factor == 1
    weights = sum(row.weights for row in result.plan.layers if row.status == "transformed")
    assert result.transformed.nonzero_params == result.dense.params - weights + resnet18_nonzeros(density)
    assert result.transformed.training_flops == 6 * total - 2 * CIFAR_STEM
    assert result.owners() == {"sparsity": total - result.dense.forward_macs}


def test_at_three_quarters_exactly_a_quarter_of_the_body_is_left() -> None:
    result = counted("resnet18_cifar")
    assert result.transformed is not None
    body = resnet18(32, 0, 0)
    assert result.transformed.forward_macs == CIFAR_STEM + HEAD + body // 4 == 140_232_704


MODELS = [
    "resnet18_cifar",
    "wrn28_10",
    "mobilenet_v2",
    "mobilevit_s",
    "vit_s_16",
    "botnet50",
    "bert_base",
    "gpt2",
    "llama_tiny",
]


@pytest.mark.parametrize("depthwise", ["dense", "sparse"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_layers_that_wide_widens(model: str, depthwise: str) -> None:
    """The same layers as Sparse Wide with scope all, each at floor(density * weights)."""
    wide = {
        p.layer.name
        for p in make_plan(load_table(Request(model)), TransformSpec(sparsity="0.75", depthwise=depthwise)).layers
        if p.status == "transformed"
    }
    result = counted(model, depthwise=depthwise)
    assert result.plan is not None and result.plan.sizes == result.table.sizes
    assert {p.layer.name for p in result.plan.layers if p.status == "transformed"} == wide
    for row in result.plan.layers:
        if row.status == "transformed":
            assert row.nnz == max(1, row.weights // 4) and row.macs == row.positions * row.nnz
            assert row.weights == row.layer.shape(result.table.sizes).weights
        else:
            assert row.macs == row.dense_macs and row.status == "untouched"


def erdos_renyi(shapes: list[tuple[int, ...]], density: Fraction, *, kernel: bool) -> list[float]:
    """Densities of layers (inputs a group, outputs, sides of the kernel if there is one), in floats, as RigL's code finds them.

    eps * score for each, where a layer above 1 is dense and eps is solved again.
    """
    sizes = [prod(shape) for shape in shapes]
    scores = [sum(used) / prod(used) for used in (shape if kernel else shape[:2] for shape in shapes)]
    dense: set[int] = set()
    while True:
        rest = [n for n in range(len(shapes)) if n not in dense]
        left = float(density) * sum(sizes) - sum(sizes[n] for n in dense)
        eps = left / sum(scores[n] * sizes[n] for n in rest)
        over = {n for n in rest if eps * scores[n] > 1}
        if not over:
            return [1.0 if n in dense else eps * scores[n] for n in range(len(shapes))]
        dense.add(max(over, key=lambda n: scores[n]))


@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v2", "vit_s_16"])
@pytest.mark.parametrize("distribution", ["er", "erk"])
@pytest.mark.parametrize("sparsity", ["0.8", "0.9", "0.98"])
def test_erdos_renyi_at_the_dense_widths(model: str, distribution: str, sparsity: str) -> None:
    """The baseline of RigL and ITOP: all non-zeros that the sparsity leaves, to the last one, by the published formula."""
    result = counted(model, sparsity=sparsity, distribution=distribution, depthwise="sparse")
    assert result.plan is not None and result.transformed is not None
    rows = [row for row in result.plan.layers if row.status == "transformed"]
    assert sum(row.nnz for row in rows) == int((1 - Fraction(sparsity)) * sum(row.weights for row in rows))
    shapes = [row.layer.shape(result.table.sizes) for row in rows]
    plain = [(s.inputs // s.groups, s.outputs, *row.layer.kernel) for s, row in zip(shapes, rows, strict=True)]
    want = erdos_renyi(plain, 1 - Fraction(sparsity), kernel=distribution == "erk")
    for row, density in zip(rows, want, strict=True):
        assert abs(row.nnz - density * row.weights) <= 1
        assert row.macs == row.positions * row.nnz
    assert result.transformed.forward_macs == sum(row.macs for row in result.plan.layers)


def test_other_distributions_at_the_dense_widths() -> None:
    """Sparsities by layer are kept, blocks are whole, and a pattern that fixes densities leaves nothing to distribute."""
    by_layer = counted("resnet20", distribution={"layer3.*": 0.9}).plan
    assert by_layer is not None
    for row in by_layer.layers:
        if row.status == "transformed":
            assert row.nnz == row.weights // (10 if row.layer.name.startswith("layer3.") else 4)
    blocks = counted("resnet20", distribution="erk", pattern="4x4").plan
    assert blocks is not None
    rows = [row for row in blocks.layers if row.status == "transformed"]
    assert all(row.nnz % 16 == 0 for row in rows)
    assert 0 <= sum(row.weights for row in rows) // 4 - sum(row.nnz for row in rows) < 16
    with pytest.raises(UsageError, match="pattern 2:4 fixes every density, so no other can be given"):
        counted("resnet20", sparsity="0.5", distribution="erk", pattern="2:4")


def test_wide_with_a_layer_left_out_and_its_control_agree() -> None:
    left = {"exclude": ("layer2.0.conv1",)}
    wide = make_plan(load_table(Request("resnet18_cifar")), TransformSpec(sparsity="0.75", **left))
    control = counted("resnet18_cifar", **left).plan
    assert control is not None
    assert [p.status == "transformed" for p in control.layers] == [p.status == "transformed" for p in wide.layers]


def test_one_non_zero_is_always_left() -> None:
    result = counted("resnet20", sparsity="0.9999999")
    assert result.plan is not None
    assert {row.nnz for row in result.plan.layers if row.status == "transformed"} == {1}
    assert counted("resnet20", sparsity="0").forward_ratio == 1


@pytest.mark.parametrize(("pattern", "density"), [("1:4", Fraction(1, 4)), ("4x4", Fraction(1, 4))])
def test_patterns(pattern: str, density: Fraction) -> None:
    result = counted("resnet18_cifar", pattern=pattern)
    assert result.plan is not None
    assert {row.density for row in result.plan.layers if row.status == "transformed"} == {density}


def test_updates_of_rigl_are_counted_as_always() -> None:
    """Of a step in delta_t the dense weight gradients, until `stop`."""
    still = counted("resnet18_cifar", TrainingSpec(algorithm="static"))
    moving = counted("resnet18_cifar", TrainingSpec(algorithm="rigl", delta_t=100, stop="0.75"))
    assert still.transformed and moving.transformed
    dense_body = resnet18(32, 0, 0)
    assert moving.transformed.training_macs - still.transformed.training_macs == Fraction(3, 4) * Fraction(
        dense_body - dense_body // 4, 100
    )


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"match": "layer"}, "so match layer cannot be held", "use it with match off"),
        ({"match": "model"}, "so match model cannot be held", "use it with match off"),
        ({"member": "sparse_doped"}, "a control of wide, not doped", "use member wide, or leave scope out"),
        ({"base_width": 128}, "base width 128 contradicts it", "leave one of them out"),
        ({"scope": "nothing"}, "scope", None),
    ],
)
def test_what_contradicts_it(changes: dict[str, Any], said: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=said) as error:
        spec(**changes)
    assert hint is None or error.value.hint == hint


def test_a_model_that_wide_cannot_widen_has_no_control() -> None:
    with pytest.raises(SparseiftError, match="no width that Sparse Wide can grow: --include and --exclude leave none"):
        counted("resnet18_cifar", exclude=("*",))


def transformed(start: str = "fresh", **changes: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense, x = residual()
    options = Options(start=start, seed=1)
    new, _ = sparseift_cli.transform(dense, x, sparsity=0.75, match="off", scope="none", options=options, **changes)
    return dense, new


def test_surgery_is_masks_alone_and_is_counted_again() -> None:
    dense, new = transformed()
    done = transformation_of(new)
    assert done is not None and (done.surgery.resizes, done.surgery.attributes, done.surgery.members) == ((), (), ())
    assert done.measured.forward_macs == sum(row.macs for row in done.plan.layers)
    assert [(n, p.shape) for n, p in new.named_parameters()] == [(n, p.shape) for n, p in dense.named_parameters()]
    masks = sparseift_cli.masks(new)
    assert set(masks) == {f"blocks.{i}.conv{j}.weight" for i in range(3) for j in (1, 2)}
    for key, mask in masks.items():
        assert int(mask.count_nonzero()) == mask.numel() // 4
        assert not new.get_parameter(key).detach()[~mask].any()
    dense_macs = sum(row.dense_macs for row in done.plan.layers)
    assert sparseift_cli.audit(new, torch.zeros(1, 3, 8, 8)).forward_ratio == Fraction(
        done.measured.forward_macs, dense_macs
    )


def test_fresh_weights_are_drawn_like_the_dense_ones() -> None:
    """Sparse weights anew, by the rule and the seed; the others are the dense model's own."""
    dense, new = transformed()
    _, again = transformed()
    for key, mask in sparseift_cli.masks(new).items():
        old, fresh = dense.get_parameter(key).detach(), new.get_parameter(key).detach()
        assert not torch.equal(old * mask, fresh)
        assert float(fresh[mask].std()) == pytest.approx(float(old.std()), rel=0.2)
        assert torch.equal(again.get_parameter(key), fresh)
    assert torch.equal(new.get_parameter("stem.weight"), dense.get_parameter("stem.weight"))


@pytest.mark.parametrize("pattern", ["unstructured", "1:4"])
def test_preserve_keeps_the_largest_weights(pattern: str) -> None:
    with pytest.warns(UserWarning, match="not exact: scope none has fewer non-zeros"):
        dense, new = transformed("preserve", pattern=pattern)
    for key, mask in sparseift_cli.masks(new).items():
        old = dense.get_parameter(key).detach()
        assert torch.equal(new.get_parameter(key).detach(), old * mask)
        if pattern == "unstructured":
            assert float(old[mask].abs().min()) >= float(old[~mask].abs().max())
    others = {n: p for n, p in dense.named_parameters() if n not in sparseift_cli.masks(new)}
    assert all(torch.equal(new.get_parameter(name), p) for name, p in others.items())
    done = transformation_of(new)
    assert done is not None and done.deviation
    (note,) = done.notes
    assert note.startswith(
        "not exact: scope none has fewer non-zeros than dense weights, so each layer keeps its largest: 864 of 3,456"
    )


def test_a_saved_control_comes_back(tmp_path: Path) -> None:
    with torch.no_grad():
        x = torch.zeros(1, 3, 8, 8)
        dense, new = transformed()
        folder = sparseift_cli.save(new, tmp_path / "control")
        again = sparseift_cli.load(folder, into=dense)
        assert torch.equal(again(x), new.eval()(x))
    assert json.loads((folder / "audit.json").read_text())["transform"]["scope"] == "none"


RECIPE = """
model: {name: "tests.helpers.nets:residual", input: 3x8x8}
data: synthetic-images
transform: {member: wide, match: off, scope: none}
sparsity: 0.75
algorithm: {name: rigl, delta_t: 2, stop: 0.75}
training: {steps: 12, batch_size: 16, device: cpu}
evaluation: {every: 6, metrics: [top1, loss], limit: 32}
"""


def test_it_trains(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)  # `tests.helpers.nets` is found from here
    path = tmp_path / "control.yaml"
    path.write_text(RECIPE)
    rows: list[int] = []
    (summary,) = run_seeds(
        load(path), [0], tmp_path / "runs", None, lambda row: rows.append(row["step"]), lambda *_: None
    )
    assert summary["flops"]["spent"] == summary["flops"]["audited"] < 0.6 * summary["flops"]["dense"]
    assert rows == [6, 12]
    newest = RunDirectory.open(Path(summary["path"])).checkpoints.newest()
    assert newest is not None
    masks = {k: v for k, v in newest.tensors.items() if k.startswith("masks/")}
    assert masks and all(int(m.count_nonzero()) == m.numel() // 4 for m in masks.values())


def test_the_baseline_of_rigl_trains(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a recipe: RigL over masks of ERK, whose total stays what the sparsity leaves of all masked weights."""
    monkeypatch.chdir(root)
    path = tmp_path / "erk.yaml"
    path.write_text(RECIPE.replace("match: off, ", "match: off, distribution: erk, "))
    (summary,) = run_seeds(load(path), [0], tmp_path / "runs", None, lambda *_: None, lambda *_: None)
    newest = RunDirectory.open(Path(summary["path"])).checkpoints.newest()
    assert newest is not None
    masks = [m for k, m in newest.tensors.items() if k.startswith("masks/")]
    assert sum(int(m.count_nonzero()) for m in masks) == sum(m.numel() for m in masks) // 4


def test_recipes_are_told_what_contradicts(tmp_path: Path) -> None:
    path = tmp_path / "control.yaml"
    path.write_text(RECIPE.replace("match: off, ", ""))
    with pytest.raises(UsageError, match=r"control.yaml:4:12: transform: scope none .* \(use it with match off\)"):
        load(path)


def test_the_shipped_one_is_a_quarter_of_the_flops(sparseift: Callable[..., str]) -> None:
    shown = sparseift("flops", "resnet18_cifar100/sparse75_rigl", "--summary")
    assert "match off, scope none, a control (" in shown
    assert "A control, no iso-FLOP transform." in shown and "140,232,704   0.25246" in shown
    assert "s_max" not in shown and "0.25353x over the run" in shown
    several = sparseift("flops", "resnet20", "--scope", "none", "--match", "off", "-s", "0.5,0.75")
    assert "A control, no iso-FLOP transform." in several
    folded = sparseift("flops", "mobilenet_v2", "--scope", "none", "--match", "off", "-s", "0.5", "--depth", "1")
    assert "mixed" in folded  # a folded row of sparse and dense layers
    data = json.loads(sparseift("flops", "resnet20", "--scope", "none", "--match", "off", "-s", "0.5", "--json"))
    assert data["transform"]["scope"] == "none" and data["matching"]["s_max"] is None
    assert data["difference"] == {"sparsity": to_json(counted("resnet20", sparsity="0.5"))["difference"]["sparsity"]}


@pytest.fixture
def sparseift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    from sparseift_cli.cli.app import main

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["sparseift", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    return run


def test_every_layer_of_the_stem_by_hand() -> None:
    """The first block's convolution: 64 x 64 x 9 weights, of which 9,216 stay, each used at 32 x 32 positions."""
    result = counted("resnet18_cifar")
    assert result.plan is not None
    row = next(p for p in result.plan.layers if p.layer.name == "layer1.0.conv1")
    assert (row.weights, row.nnz, row.positions, row.macs) == (36_864, 9_216, 1_024, conv(32 * 32, 9, 64, 64) // 4)
