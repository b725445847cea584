"""Numbers derived outside this code (closed forms, the paper's tables) that the plan must reproduce."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import pytest

from sparseift_cli.errors import CheckFailed, UsageError
from sparseift_cli.models.source import Request, load_table
from sparseift_cli.plan.audit import Audit, audit
from sparseift_cli.plan.distributions import BudgetedLayer, ErdosRenyi
from sparseift_cli.plan.plan import make_plan
from sparseift_cli.plan.spec import TrainingSpec, TransformSpec
from sparseift_cli.sparsity.algorithms import make_algorithm
from sparseift_cli.sparsity.schedule import StepCost, UpdateSchedule
from sparseift_cli.table.table import LayerTable


@cache
def table(name: str) -> LayerTable:
    return load_table(Request(name))


def planned(name: str, training: TrainingSpec | None = None, **options: Any) -> Audit:
    return audit(make_plan(table(name), TransformSpec(**options), training))


def body_density(result: Audit) -> float:
    """Density weighted by FLOPs, as the whole-model match has it."""
    assert result.plan is not None
    rows = [r for r in result.plan.layers if r.status == "transformed"]
    return sum(r.macs for r in rows) / sum(r.full_macs for r in rows)


@pytest.mark.parametrize(
    ("name", "base", "sparsity", "expected"),
    [
        ("resnet18_cifar", 90, "0.5", 0.49500),
        ("resnet18_cifar", 128, "0.75", 0.75082),
        ("resnet18_cifar", 202, "0.9", 0.90033),
        ("resnet18", 90, "0.5", 0.50868),
        ("resnet18", 128, "0.75", 0.76748),
        ("resnet18", 202, "0.9", 0.91475),
        ("resnet34", 90, "0.5", 0.50119),
        ("resnet34", 128, "0.75", 0.75836),
        ("resnet34", 202, "0.9", 0.90685),
        ("resnet18_cifar", None, "0.5", 0.50220),
        ("resnet18_cifar", None, "0.75", 0.75082),
        ("resnet18_cifar", None, "0.9", 0.90065),
        ("resnet18", None, "0.5", 0.51620),
        ("resnet18", None, "0.75", 0.76748),
        ("resnet18", None, "0.9", 0.91502),
    ],
)
def test_matched_sparsity(name: str, base: int | None, sparsity: str, expected: float) -> None:
    result = planned(name, sparsity=sparsity, base_width=base, match="model")
    assert round(1 - body_density(result), 5) == pytest.approx(expected, abs=1.1e-5)


@pytest.mark.parametrize(
    ("base", "sparsity", "expected"), [(90, "0.5", 1.0160), (128, "0.75", 1.0653), (202, "0.9", 1.1373)]
)
def test_unmatched_ratio(base: int, sparsity: str, expected: float) -> None:
    result = planned("resnet18", sparsity=sparsity, base_width=base, match="off")
    assert float(result.forward_ratio or 0) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", (0.4855, 0.2325, 0.0849)),
        ("resnet34", (0.4931, 0.2416, 0.0928)),
        ("resnet50", (0.4937, 0.2424, 0.0935)),
        ("mobilenet_v2", (0.4746, 0.2194, 0.0735)),
        ("vit_b_16", (0.4897, 0.2376, 0.0893)),
        ("gpt3_small", (0.3138, 0.0253, None)),
    ],
)
def test_ideal_body_density(name: str, expected: tuple[float | None, ...]) -> None:
    for sparsity, density in zip(("0.5", "0.75", "0.9"), expected, strict=True):
        ideal = planned(name, sparsity=sparsity).ideal_body_density
        assert ideal is not None
        assert ideal < 0 if density is None else ideal == pytest.approx(density, abs=5.1e-5)


@pytest.mark.parametrize(("name", "expected"), [("gpt3_small", 0.776), ("mobilenet_v2", 0.988)])
def test_s_max(name: str, expected: float) -> None:
    limit = planned(name, sparsity="0.5").s_max
    assert limit is not None
    assert round(limit, 3) == expected
    dense = table(name)
    alone = sum(
        r.layer.macs.evaluate(dense.sizes)
        for r in planned(name, sparsity="0.5").plan.layers
        if r.status != "transformed"
    )
    assert limit == pytest.approx(1 - (alone / dense.macs) ** 2, abs=1e-9)


def test_what_cannot_be_matched_is_refused_with_numbers() -> None:
    with pytest.raises(
        CheckFailed, match=r"988,031,799,296 FLOPs forward, 1\.496x the dense model's 660,606,025,728 .*s_max 0\.776"
    ):
        planned("gpt3_small", sparsity="0.9", match="model")


def test_gpt3_small_has_the_published_widths() -> None:
    sizes = {
        w.name: s
        for w, s in zip(
            table("gpt3_small").widths, planned("gpt3_small", sparsity="0.5", base_width=1092).plan.sizes, strict=True
        )
    }
    assert sizes["transformer.wte.weight[1]"] == 1092
    assert {s for n, s in sizes.items() if "mlp.c_fc" in n} == {4368}
    assert {s for n, s in sizes.items() if "num_heads" in n} == {12}
    wider = {
        w.name: s
        for w, s in zip(table("gpt3_small").widths, planned("gpt3_small", sparsity="0.75").plan.sizes, strict=True)
    }
    assert wider["transformer.wte.weight[1]"] == 1536
    assert {s for n, s in wider.items() if "mlp.c_fc" in n} == {6144}


@pytest.mark.parametrize(("match", "expected"), [("model", 0.028), ("layer", 0.024)])
def test_rigl_overhead_in_the_papers_form(match: str, expected: float) -> None:
    """(3 f_S dT + 2 f_S + f_D)/(dT + 1) over 3 f_S: +2.8 % and +2.4 % for ResNet-18 at .9; ours differs by what it approximates."""
    static = planned("resnet18", sparsity="0.9", match=match)
    assert static.plan is not None and static.transformed is not None
    f_s, f_d = static.transformed.forward_macs, sum(r.full_macs for r in static.plan.layers)
    paper = Fraction(3 * f_s * 100 + 2 * f_s + f_d, 101) / (3 * f_s) - 1
    assert round(float(paper), 3) == expected
    rigl = planned("resnet18", TrainingSpec(algorithm="rigl"), sparsity="0.9", match=match)
    exact = Fraction(f_d - f_s, 100)  # a dense dW in place of a sparse one every 100 steps; the rest as static
    assert rigl.training_while_updating == static.transformed.training_macs + exact
    assert rigl.transformed is not None
    assert rigl.transformed.training_macs == static.transformed.training_macs + Fraction(3, 4) * exact


@pytest.mark.parametrize(
    ("algorithm", "sparsity", "expected"),
    [
        ("gmp", "0.5", 1.1875),
        ("gmp", "0.75", 1.5625),
        ("gmp", "0.9", 2.6875),
        ("granet", "0.75", 1.1875),
        ("granet", "0.9", 1.75),
    ],
)
def test_gradual_pruning_costs_more_under_wide(algorithm: Any, sparsity: str, expected: float) -> None:
    density = 1 - Fraction(sparsity)
    weights = 1 / density
    start = weights / 2 if algorithm == "granet" else weights
    # GraNet's dense weight gradients vanish where updates are rare
    mean = make_algorithm(algorithm).mean_step(StepCost(1, 1, 1), start, 1, weights, UpdateSchedule(delta_t=10**9))
    assert float(mean / 3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["static", "set", "snfs", "rigl", "gmp", "granet"])
@pytest.mark.parametrize(
    ("steps", "delta_t", "stop"), [(1000, 100, "0.75"), (997, 10, "0.8"), (50, 100, "0.75"), (1, 1, "1")]
)
def test_schedules_against_a_loop_over_the_steps(algorithm: Any, steps: int, delta_t: int, stop: str) -> None:
    """Every step counted on its own: forward, dX, dW at that step's density; a dense dW at each mask update."""
    sparse = StepCost(10, 9, 8)  # of one non-zero; the weight has 10 places
    end = -((-steps * Fraction(stop)) // 1)  # ceil
    start = {"gmp": Fraction(1), "granet": Fraction(1, 2)}.get(algorithm)
    total = Fraction(0)
    for t in range(steps):
        cost = [Fraction(sparse.forward), Fraction(sparse.grad_input), Fraction(sparse.grad_weight)]
        if start is not None and t < end:
            remaining = (1 - Fraction(t // delta_t * delta_t, int(end))) ** 3
            for i, (s, d) in enumerate(((10, 100), (9, 90), (8, 80))):
                cost[i] = s + remaining * (start * d - s)
        update = 0 < t < end and t % delta_t == 0
        if update and start is not None:  # the step of an update computes with what was pruned for it already
            total += 80 - cost[2] if algorithm == "granet" else 0
        elif update and algorithm == "rigl":
            total += 80 - 8
        if algorithm == "snfs":
            total += 80 - 8
        total += sum(cost)
    schedule = UpdateSchedule(delta_t, Fraction(stop), steps)
    assert (
        make_algorithm(algorithm).mean_step(sparse, 10 * (start or Fraction(1, 10)), 1, 10, schedule) * steps == total
    )


@pytest.mark.parametrize("algorithm", ["gmp", "granet"])
@pytest.mark.parametrize(
    "options",
    [{"sparsity": "0.75"}, {"sparsity": "0.75", "pattern": "4x4"}, {"sparsity": "0.9", "member": "sparse_doped"}],
    ids=str,
)
def test_gradual_pruning_of_a_known_length_is_counted_to_the_non_zero(algorithm: Any, options: dict[str, str]) -> None:
    """Every step with the whole number of non-zeros, or of blocks, that it has: not the mean of the cubic curve."""
    steps, delta_t, end = 97, 10, 73  # ceil(.75 * 97)
    training = TrainingSpec(algorithm=algorithm, steps=steps, delta_t=delta_t)
    result = planned("resnet18", training, **options)
    assert result.plan is not None and result.transformed is not None
    unit = 16 if "pattern" in options else 1
    total = 0
    for row in result.plan.layers:
        ways = 1 + row.layer.grad_inputs + row.layer.grad_weight
        if row.status != "transformed":
            total += steps * row.macs * ways
            continue
        for part in row.parts:
            final = part.nnz // unit
            first = final if part.dense else max(final, part.shape.weights // unit // (1 if algorithm == "gmp" else 2))
            for t in range(steps):
                left = max(0, end - t // delta_t * delta_t) if t < end else 0
                nnz = unit * (final + (first - final) * left**3 // end**3)
                total += row.positions * nnz * ways
                if algorithm == "granet" and 0 < t < end and t % delta_t == 0 and not part.dense:
                    total += row.positions * (part.shape.weights - nnz) * row.layer.grad_weight
    assert result.transformed.training_macs * steps == total
    assert result.training_while_updating == result.transformed.training_macs


@pytest.mark.parametrize(
    ("sparsity", "expected", "dense_layers"),
    [
        (
            "0.8",
            {
                "conv1": 0.142805,
                "layer1.0.conv2": 0.638095,
                "layer3.0.conv2": 0.912562,
                "layer4.0.conv2": 0.956534,
                "fc": 0.851824,
            },
            8,
        ),
        (
            "0.9",
            {
                "conv1": 0.579962,
                "layer1.0.conv2": 0.822662,
                "layer3.0.conv2": 0.957154,
                "layer4.0.conv2": 0.978701,
                "fc": 0.927392,
            },
            1,
        ),
    ],
)
def test_erk_of_resnet50(sparsity: str, expected: dict[str, float], dense_layers: int) -> None:
    """RigL's published ERK sparsities: a given density of all weights, each weight counted once."""
    t = table("resnet50")
    shapes = {r.name: (r.shape(t.sizes), r.kernel) for r in t.layers if r.weighted}
    layers = [BudgetedLayer(name, s, kernel, s.weights, s.weights) for name, (s, kernel) in shapes.items()]
    densities = ErdosRenyi(kernel=True).densities(layers, (1 - Fraction(sparsity)) * sum(s.macs for s in layers))
    by_name = dict(zip(shapes, densities, strict=True))
    for name, figure in expected.items():
        assert float(1 - by_name[name]) == pytest.approx(figure, abs=1e-5)  # RigL floors the zeros of every layer
    assert sum(d == 1 for d in densities) == dense_layers


MEMBERS = [
    {"member": "sparse_wide"},
    {"member": "sparse_wide", "scope": "inner"},
    {"member": "sparse_parallel"},
    {"member": "sparse_factorized"},
    {"member": "sparse_doped"},
]
REFUSED = {("gpt3_small", "0.9")}  # what is left alone already costs more than the dense model


@pytest.mark.parametrize("name", ["resnet18", "resnet18_cifar", "mobilenet_v2", "vit_b_16", "gpt3_small"])
@pytest.mark.parametrize("sparsity", ["0.3", "0.5", "0.75", "0.9"])
@pytest.mark.parametrize("options", MEMBERS, ids=lambda o: "-".join(o.values()))
def test_every_transformed_row_is_iso_flop(name: str, sparsity: str, options: dict[str, Any]) -> None:
    result = planned(name, sparsity=sparsity, **options)
    assert result.plan is not None
    rows = [r for r in result.plan.layers if r.status == "transformed"]
    assert rows
    for row in rows:
        assert row.dense_macs - row.positions < row.macs <= row.dense_macs
        assert sum(p.nnz for p in row.parts) * row.positions == row.macs
        assert all(0 < p.nnz <= p.shape.weights for p in row.parts)
    assert result.transformed is not None
    assert sum(result.owners().values()) == result.transformed.forward_macs - result.dense.forward_macs
    whole = {"sparsity": sparsity, "match": "model", **options}
    if (name, sparsity) in REFUSED and options == {"member": "sparse_wide"}:
        with pytest.raises(CheckFailed):
            planned(name, **whole)
        return
    ratio = planned(name, **whole).forward_ratio
    assert ratio is not None
    assert 1 - Fraction(1, 10_000) < ratio <= 1


@pytest.mark.parametrize("algorithm", ["static", "set", "snfs", "rigl", "gmp", "granet"])
def test_training_match(algorithm: Any) -> None:
    training = TrainingSpec(algorithm=algorithm, steps=10_000)
    result = planned("resnet18", training, sparsity="0.5", match="train")
    assert result.training_ratio is not None
    assert 1 - Fraction(1, 10_000) < result.training_ratio <= 1
    if algorithm == "snfs":  # a dense dW of a network 4 times as large, every step, is more than the whole dense step
        with pytest.raises(CheckFailed, match="training FLOPs with snfs"):
            planned("resnet18", training, sparsity="0.75", match="train")


def test_a_width_multiple_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"64 -> 90\.5 -> 64"):
        planned("resnet18", sparsity="0.5", width_multiple=64)
    result = planned("resnet18", sparsity="0.9", width_multiple=8)
    assert result.plan is not None
    assert all(g.size % 8 == 0 for g in result.plan.widening.widened)


def test_excluded_layers_keep_their_shape() -> None:
    result = planned("resnet18", sparsity="0.75", exclude=("layer4.*",))
    assert result.plan is not None
    kept = [r for r in result.plan.layers if r.layer.name.startswith("layer4.") and r.layer.weighted]
    assert all(r.macs == r.dense_macs and r.status == "untouched" for r in kept if "downsample" not in r.layer.name)


@pytest.mark.parametrize("pattern", ["4x4", "16x16"])
def test_blocks_are_whole(pattern: str) -> None:
    unit = 16 if pattern == "4x4" else 256
    for match in ("layer", "model"):
        result = planned("resnet18", sparsity="0.75", pattern=pattern, match=match)
        assert result.plan is not None
        for row in result.plan.layers:
            if row.status == "transformed":
                assert all(p.nnz % unit == 0 for p in row.parts)
                assert match == "model" or row.macs <= row.dense_macs
        assert match == "layer" or (result.forward_ratio or 2) <= 1


def test_n_of_m_fixes_the_density_and_floors_the_widths() -> None:
    result = planned("resnet18", sparsity="0.5", pattern="2:4")
    assert result.plan is not None
    assert all(g.size % 4 == 0 and g.size <= g.ideal for g in result.plan.widening.widened)
    for row in result.plan.layers:
        if row.status == "transformed":
            assert row.density == Fraction(1, 2)
            assert row.macs <= row.dense_macs
    with pytest.raises(UsageError, match="fixes every density"):
        planned("resnet18", sparsity="0.5", pattern="2:4", match="model")


def test_erk_with_model_match_stays_within_the_budget() -> None:
    result = planned("resnet18", sparsity="0.75", distribution="erk", match="model")
    assert result.plan is not None
    assert 1 - Fraction(1, 10_000) < (result.forward_ratio or 0) <= 1
    densities = {r.density for r in result.plan.layers if r.status == "transformed"}
    assert max(densities) <= 1 and len(densities) > 5


def test_sparse_depthwise_and_scaled_head_counts() -> None:
    sparse = planned("mobilenet_v2", sparsity="0.75", depthwise="sparse")
    assert sparse.plan is not None
    assert all(r.status == "transformed" for r in sparse.plan.layers if r.layer.kind == "depthwise")
    heads = planned("gpt2", sparsity="0.75", heads="scale_count")
    assert heads.plan is not None
    by_kind = {w.kind: {(w.size, s)} for w, s in zip(table("gpt2").widths, heads.plan.sizes, strict=True)}
    assert by_kind["heads"] == {(12, 24)} and by_kind["head_dim"] == {(64, 64)}
