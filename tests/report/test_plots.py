"""Pictures: what is drawn is what the runs say, the same bytes every time, and nothing global is touched."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer

from sparseift_cli.errors import UsageError
from sparseift_cli.report import terminal
from sparseift_cli.report.budgets import FLOPS, SECONDS
from sparseift_cli.report.make import ReportOptions, make
from sparseift_cli.report.plots import curves, layers, style, tradeoff
from sparseift_cli.report.plots.families import Family, as_trained, families, scaled
from sparseift_cli.report.plots.pictures import pictures, save_all
from sparseift_cli.report.read import Run
from sparseift_cli.report.report import Report
from tests.helpers.report_made import audit, layer, report, run

against_flops = partial(tradeoff.against_budget, budget=FLOPS)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def two() -> Report:
    return report(
        [run(name, seed, dense="dense" in name) for name in ("net_dense", "net_wide75") for seed in (0, 1, 2)]
    )


def family(r: Report) -> Family:
    (found,) = families(r)
    return found


def lines_of(axes: Any) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.lines}


def test_families_are_sorted_and_named(two: Report) -> None:
    found = family(two)
    assert (found.title, found.slug, found.axis) == ("net on toy", "net-on-toy", "top-1 accuracy\n(%)")
    assert [g.label for g in found.groups] == ["dense (n = 3)", "wide75 (n = 3)"]
    assert found.groups[0].line_style is style.BASELINE
    assert [g.name for g in found.transformed] == ["net_wide75"]


def test_line_styles_differ_without_colour() -> None:
    looks = [style.BASELINE, *map(style.line_style, range(12))]
    assert len({(one.marker, one.dashes) for one in looks}) == len(looks)
    assert len({(one.color, one.marker) for one in looks}) == len(looks)
    assert len({hatch for _, hatch in layers.STATUS.values()}) == len(layers.STATUS)


def test_learning_curves_show_mean_and_band(two: Report) -> None:
    above, below = curves.learning_curves(family(two)).axes
    wide = lines_of(above)["wide75 (n = 3)"]
    assert list(wide.get_xdata()) == [10, 20, 30]
    assert list(wide.get_ydata()) == [63.0, 73.0, 83.0]
    band = above.collections[1].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (62.0, 84.0)
    assert list(lines_of(below)["dense (n = 3)"].get_ydata()) == [3.0, 1.5, 1.0]
    assert below.get_xlabel() == "optimiser steps"


def test_masks_are_drawn_of_who_has_them(two: Report) -> None:
    above, below = curves.mask_movement(family(two)).axes
    assert list(lines_of(above)) == ["wide75 (n = 3)"]
    assert list(lines_of(above)["wide75 (n = 3)"].get_ydata()) == pytest.approx([30, 15, 10])
    assert list(lines_of(below)["wide75 (n = 3)"].get_ydata()) == pytest.approx([30, 40, 50])


def test_runs_without_masks_are_shown_as_they_trained(root: Path) -> None:
    """Their audit has the plan's layers: the picture said 75 % sparse and iso-FLOP."""
    runs = [run("net_wide75", 0, dense=False), run("net_wide75_unmasked", 0, dense=False, algorithm="dense")]
    found = family(report(runs))
    assert [found.plan_name(g) for g in found.transformed] == ["wide75", "wide75 unmasked"]
    masked, opened = found.transformed
    assert (masked.unmasked, opened.unmasked) == (False, True)
    assert [row["transformed_macs"] for row in layers.counted(opened)] == [2000, 12000, 1000]
    assert opened.audit and masked.audit
    assert opened.audit["totals"]["transformed"]["forward_flops"] == 10 + 2 * 9000
    assert opened.audit["totals"]["transformed"]["nonzero_params"] == 5 + 90
    assert opened.audit["totals"]["transformed"]["training_flops"] == 31  # counted without masks by the audit itself
    (axes,) = layers.sparsity_per_layer(found).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[0.0, 75.0], [0.0, 0.0]]
    assert "wide75 unmasked: all 2 dense" in layers.sparsity_described(found)
    assert curves.moving(found) == [masked]
    kept = make([root / "recipes/resnet18_cifar100/results/resnet18_cifar100_wide75_unmasked"], ReportOptions(), [])
    (group,) = family(kept).groups
    assert group.audit and group.audit["totals"]["transformed"]["nonzero_params"] == group.row["nonzero_params"]


def test_blocks_that_do_not_tile_a_layer_stay_closed_at_its_edge() -> None:
    part = {"name": "weight", "inputs": 10, "outputs": 10, "taps": 1, "groups": 1, "dense": False, "nnz": 32}
    row = layer("conv", "transformed", 32, 32, 32, 100) | {"parts": [part]}
    made = audit([row], algorithm="dense") | {"transform": {"pattern": "4x4"}}
    (opened,) = as_trained(made)["layers"]
    assert (opened["nnz"], opened["transformed_macs"], opened["density"], opened["ratio"]) == (64, 64, 0.64, 2)


def test_metric_against_flops(two: Report) -> None:
    ends, ways = against_flops(family(two)).axes
    mean = lines_of(ends)["wide75 (n = 3)"]
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([83.0], [1])  # the second line from above
    seeds = next(line for line in ends.lines if len(line.get_xdata()) == 3)
    assert list(seeds.get_xdata()) == [80.0, 81.0, 82.0]
    assert ends.collections[0].get_segments()[0][:, 0].tolist() == [80.0, 82.0]
    names = [tick.get_text() for tick in ends.get_yticklabels()]
    assert names == ["dense\n3.000 GFLOPs, n = 3", "wide75\n3.000 GFLOPs, n = 3"]
    assert ends.get_ylim() == (1.5, -0.5) and ends.get_xlabel() == "top-1 accuracy (%)"
    assert list(lines_of(ways)["dense budget"].get_xdata()) == [3.0, 3.0]
    assert ways.get_xlabel() == "training FLOPs so far (GFLOPs)"
    assert ways.get_xlim()[0] == 0
    assert "wide75 (n = 3): 83.00 at 3 GFLOPs" in tradeoff.described(family(two), FLOPS)


def with_seconds(made: Run, of_a_step: float) -> Run:
    return replace(made, metrics=[{**line, "seconds": of_a_step * line["step"]} for line in made.metrics])


def test_metric_against_wall_time(two: Report) -> None:
    dense = [with_seconds(run("net_dense", seed, dense=True), 2 + seed) for seed in range(3)]
    timed = report([*dense, with_seconds(run("net_wide75", 0, dense=False), 4)], at=("seconds",))
    found = family(timed)
    ends, ways = tradeoff.against_budget(found, SECONDS).axes
    names = [tick.get_text() for tick in ends.get_yticklabels()]
    assert names == ["dense\n90.00 s, n = 3", "wide75\n120.0 s, n = 1"]
    assert list(lines_of(ways)["dense time"].get_xdata()) == [90.0, 90.0]
    assert list(lines_of(ways)["dense (n = 3)"].get_xdata()) == [30.0, 60.0, 90.0]
    assert ways.get_xlabel() == "wall time so far (s)"
    words = tradeoff.described(found, SECONDS)
    assert "against wall time. dense (n = 3): 81.00 at 90 s; wide75 (n = 1): 82.00 at 120 s." in words
    assert words.endswith("Wall times are not of the same conditions, so they do not compare: device: unknown.")
    assert [p.name for _, made in pictures(timed) for p in made][:2] == ["net-on-toy-flops", "net-on-toy-seconds"]
    assert "net-on-toy-seconds" not in [p.name for _, made in pictures(two) for p in made]


def test_runs_without_seconds_have_no_place_on_the_axis_of_time(two: Report) -> None:
    (ways,) = tradeoff.against_budget(family(two), SECONDS).axes
    assert not ways.lines and "No run has finished" in tradeoff.described(family(two), SECONDS)


def test_units_of_time() -> None:
    assert [scaled(s, SECONDS) for s in (90, 900, 9000)] == [(1, "s"), (60, "min"), (3600, "h")]


def test_budgets_far_apart_stand_on_a_logarithmic_axis() -> None:
    """One run of four budgets squeezed all others into the left quarter."""
    dear = run("net_wide75", 0, dense=False)
    dear = replace(dear, metrics=[{**line, "flops": 4 * line["flops"]} for line in dear.metrics])
    _, ways = against_flops(family(report([run("net_dense", 0, dense=True), dear]))).axes
    assert ways.get_xscale() == "log" and [t.get_text() for t in ways.texts] == ["wide75"]
    iso = against_flops(family(report([run("net_dense", 0, dense=True)])))
    assert iso.axes[1].get_xscale() == "linear" and not iso.axes[1].texts


def test_steps_do_not_touch_on_their_axis() -> None:
    """80,000 and 100,000 ran into each other."""
    long = run("net_dense", 0, dense=True)
    long = replace(long, metrics=[{**line, "step": 5200 * line["step"]} for line in long.metrics])
    figure = curves.learning_curves(family(report([long])))
    style.to_png(figure)
    labels = [t for t in figure.axes[1].get_xticklabels() if t.get_text()]
    boxes = sorted((t.get_window_extent().x0, t.get_window_extent().x1) for t in labels)
    assert "100k" in [t.get_text() for t in labels]
    assert all(right[0] > left[1] + 5 for left, right in pairwise(boxes))


def test_two_seeds_have_no_interval_drawn() -> None:
    """It would be 12.7 deviations wide and leave nothing to be seen of the others."""
    few = report(
        [run("net_dense", seed, dense=True) for seed in range(3)]
        + [run("net_wide75", seed, dense=False) for seed in range(2)]
    )
    ends, _ = against_flops(family(few)).axes
    assert len(ends.collections) == 1 and ends.collections[0].get_color()[0].tolist()[:3] == list(to_rgb(style.INK))


def test_runs_that_go_on_are_named_below() -> None:
    going = [run("net_wide75", seed, dense=False, state="running") for seed in range(2)]
    whole = against_flops(family(report([run("net_dense", 0, dense=True), *going])))
    assert [t.get_text() for t in whole.legends[0].get_texts()] == ["wide75 (n = 0)"]
    assert [t.get_text() for t in whole.axes[0].get_yticklabels()] == ["dense\n3.000 GFLOPs, n = 1"]
    (ways,) = against_flops(family(report(going))).axes
    assert len(lines_of(ways)) >= 1 and ways.get_ylabel() == "top-1 accuracy\n(%)"


def test_the_dense_budget_is_that_of_most_runs() -> None:
    """One control that trains twice as long does not move the line."""
    runs = [run("net_dense", seed, dense=True) for seed in range(3)]
    long = replace(run("net_long", 0, dense=True), summary={"flops": {"dense": 6 * 10**9}})
    of_most = tradeoff.dense_budget(family(report(runs)), FLOPS)
    assert tradeoff.dense_budget(family(report([*runs, long])), FLOPS) == of_most


def test_flops_per_layer_are_the_audit(two: Report) -> None:
    found = family(two)
    (axes,) = layers.flops_per_layer(found, found.groups[1]).axes
    bars = [bar for container in axes.containers if isinstance(container, BarContainer) for bar in container]
    assert [bar.get_width() for bar in bars] == [2, 4, 8, 6, 1, 2]  # thousands of FLOPs: before, after, before, ...
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["stem", "body.conv", "body.qk"]
    after = bars[1::2]
    assert len({bar.get_facecolor() for bar in after}) == len({bar.get_hatch() for bar in after}) == 3
    assert axes.get_xlabel() == "forward FLOPs of one sample (kFLOPs)"


def test_sparsity_per_layer(two: Report) -> None:
    (axes,) = layers.sparsity_per_layer(family(two)).axes
    assert list(axes.lines[0].get_xdata()) == [0.0, 75.0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["stem", "body.conv"]


def test_deep_models_are_folded_and_nothing_is_lost() -> None:
    rows = [
        layer(f"h.{block}.conv{i}", "untouched" if i == 2 else "transformed", 10, 11, 5, 10)
        for block in range(30)
        for i in range(3)
    ]
    found = family(report([run("deep", 0, dense=False, rows=rows)]))
    folded = layers.counted(found.groups[0])
    assert [row["name"] for row in folded] == [f"h.{block}" for block in range(30)]
    assert {row["status"] for row in folded} == {"mixed"}
    assert sum(row["dense_macs"] for row in folded) == 900
    assert layers.weighted(found.groups[0])[0]["density"] == 0.5


def test_nothing_to_draw_is_no_crash() -> None:
    empty = Run(Path("runs/new/s0"), "new", "running", 0, {}, [])
    broken = run("wide", 0, dense=False, state="stopped")
    broken = Run(broken.path, "wide", "stopped", 0, {}, [{"step": 1, "top1": math.nan}], audit=audit([]))
    assert [(f.title, made) for f, made in pictures(report([empty, broken]))] == [("net on toy", [])]


def test_files_are_the_same_every_time(two: Report, tmp_path: Path) -> None:
    first, second = save_all(two, tmp_path / "a"), save_all(two, tmp_path / "deep" / "b")
    assert [p.name for p in first] == [p.name for p in second]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert {p.suffix for p in first} == {".svg", ".png"}
    assert len(first) == 2 * 5
    for path in first:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(PNG)
            continue
        assert b"<dc:date>" not in content
        root = ElementTree.fromstring(content)
        assert root.find("{http://www.w3.org/2000/svg}title").text


def test_pictures_that_cannot_be_written_are_an_error(two: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write pictures"):
        save_all(two, tmp_path / "file")


def test_drawing_leaves_nothing_behind(two: Report) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "red"}):
        (axes,) = layers.sparsity_per_layer(family(two)).axes
    assert axes.xaxis.label.get_fontsize() == 9.5
    assert dict(matplotlib.rcParams) == before


def test_names_are_no_formulas() -> None:
    odd = report([run("_$x^$_dense", 0, dense=True), run("_$x^$_wide", 0, dense=False)])
    for _, made in pictures(odd):
        for picture in made:
            assert ElementTree.fromstring(style.to_svg(picture.draw(), picture.title, text=True)) is not None
    alone = family(report([run("_$x^$", 0, dense=True)]))
    assert alone.groups[0].short == "$x^$"


@pytest.mark.parametrize(
    ("flops", "want"), [(0, (1, "FLOPs")), (999, (1, "FLOPs")), (1e3, (1e3, "kFLOPs")), (2.5e18, (1e18, "EFLOPs"))]
)
def test_units(flops: float, want: tuple[float, str]) -> None:
    assert scaled(flops) == want


# --- the terminal ---


def test_sparkline() -> None:
    assert terminal.sparkline([1, 2, 3, 2, None, 1]) == "▁▅█▅ ▁"
    assert terminal.sparkline([0, 1], ascii_only=True) == "_#"
    assert terminal.sparkline([]) == ""
    assert terminal.sparkline([5, 5]) == "▅▅"
    assert terminal.sparkline([math.nan, math.inf]) == "  "
    assert terminal.sparkline([-1.7e308, 1.7e308]) == "▁█"
    assert terminal.sparkline(list(range(100)), 8) == "▁▂▃▄▅▆▇█"
    assert len(terminal.sparkline(list(range(7)), 5)) == 5


def test_bar() -> None:
    assert terminal.bar(0.5, 8) == "████    "
    assert terminal.bar(1, 4) == "████"
    assert terminal.bar(1.2, 4) == "███▶"
    assert terminal.bar(1.2, 4, ascii_only=True) == "###>"
    assert terminal.bar(1e-9, 4) == "▏   "
    assert terminal.bar(0.99, 4, ascii_only=True) == "####"
    for share in (None, 0, -1, math.nan):
        assert terminal.bar(share, 3) == "   "


def test_which_encodings_show_blocks() -> None:
    assert terminal.can_show_blocks("utf-8")
    assert not any(map(terminal.can_show_blocks, ("ascii", "latin-1", None, "no such thing")))
