"""Comparisons at equal wall time: what counts as equal, which times compare, who was alone, what a curve is read for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.report.compare import ComparisonRules
from sparseift_cli.report.frame import records
from sparseift_cli.report.keep import keep
from sparseift_cli.report.make import ReportOptions, make
from sparseift_cli.report.rates import RATES
from sparseift_cli.report.report import Comparison, Report
from tests.helpers.report_runs import START, make_run, write

H200 = {"device": "cuda:0", "device_name": "NVIDIA H200"}
BOTH = ("flops", "seconds")


def group(
    root: Path,
    name: str,
    ends: Sequence[float],
    seconds: float,
    *,
    at: float,
    session: Mapping[str, Any] = H200,
    **how: Any,
) -> list[Path]:
    """Seeds 0, 1, ... one after the other, the first `at` so many seconds; each was 10 points lower half way."""
    apart = how.pop("apart", seconds + 5)
    return [
        make_run(root, name, i, (v - 10, v), seconds=seconds, begins=at + apart * i, session=session, **how)
        for i, v in enumerate(ends)
    ]


def dense(root: Path, seconds: float = 100, **how: Any) -> list[Path]:
    return group(root, "net_dense", [70.0, 72.0, 74.0], seconds, at=0, **how)


def wide(root: Path, seconds: float = 100, **how: Any) -> list[Path]:
    how = {"at": 5000, "member": "wide", "flops": 2 * 10**15, **how}
    return group(root, "net_wide75_rigl", [71.0, 73.5, 75.5], seconds, **how)


def report(root: Path, at: Sequence[Any] = ("seconds",), **rules: Any) -> Report:
    return make([root], ReportOptions("dense", ComparisonRules(at=at, **rules)), ["sparseift", "report"])


def compared(root: Path, **rules: Any) -> Comparison:
    (found,) = report(root, **rules).comparisons
    return found


def test_equal_time_at_unequal_flops(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path, 101)
    found = compared(tmp_path)
    assert (found.at, found.outcome, found.paired, found.n) == ("seconds", "better", True, 3)
    assert found.verdict == "+1.3 points [0.6, 2.1], n=3, at 1.0100x wall time: better"
    assert (found.flops_ratio, found.equal_flops, found.equal_seconds, found.equal) == (2.0, False, True, True)
    assert found.curve is None
    assert found.notes == ("every run was alone on its device, by provenance and the other runs of this report",)
    assert compared(tmp_path, time_tolerance=0.005).outcome == "refused"


def test_both_are_two_verdicts(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path)
    wide(tmp_path, 200, at=9000, sparsity=0.9, flops=10**15)
    found = report(tmp_path, BOTH).comparisons
    assert [(c.at, c.flops_ratio, c.seconds_ratio, c.outcome) for c in found] == [
        ("flops", 2.0, 1.0, "refused"),
        ("seconds", 2.0, 1.0, "better"),
        ("flops", 1.0, 2.0, "better"),
        ("seconds", 1.0, 2.0, "refused"),
    ]


def test_unequal_times_are_refused_and_the_curve_is_read_without_a_verdict(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path, 180)
    found = compared(tmp_path)
    assert (found.allowed, found.outcome, found.difference) == (False, "refused", None)
    assert found.verdict == "refused: 180.0 against 100.0 s of wall time are 1.8000x, further from 1 than 2 %"
    assert found.curve is not None
    assert (found.curve.limit, found.curve.taken, found.curve.progress) == (100, 90, 0.5)
    assert found.curve.mean == pytest.approx((61 + 63.5 + 65.5) / 3)
    assert found.curve.difference == pytest.approx(found.curve.mean - 72)
    assert (
        "on its curve, no verdict: when net_dense ended, at 100.0 s, net_wide75_rigl was at 63.333 (its last evaluation "
        "not later: 90.0 s, 50 % of the way, its schedule not at the end), -8.7 points [-9.4, -7.9], n=3"
    ) in found.notes


def test_a_curve_is_not_interpolated_and_may_have_no_point_by_then(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path, 201)  # its first evaluation is after 100.5 s
    found = compared(tmp_path)
    assert found.curve is None
    assert any("has no evaluation by the wall time at which net_dense ended" in note for note in found.notes)


def test_a_faster_group_is_read_at_its_end(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path, 60)
    found = compared(tmp_path)
    assert found.outcome == "refused" and found.curve is not None
    assert (found.curve.taken, found.curve.progress) == (60, 1)
    assert any("60.0 s, its end)" in note for note in found.notes)


def test_the_curve_at_equal_flops_too(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path)
    for path in tmp_path.glob("net_wide75_rigl/*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**line, "flops": 10**15 * i}) + "\n" for i, line in enumerate(lines, 1)))
    found = compared(tmp_path, at=("flops",))
    assert found.curve is not None
    assert (found.curve.limit, found.curve.taken, found.curve.progress) == (10**15, 10**15, 0.5)
    assert compared(tmp_path, at=()).curve is None  # not without --at


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"device_name": "NVIDIA H100 80GB HBM3"}, "device: NVIDIA H100 80GB HBM3 against NVIDIA H200"),
        ({"versions": {"torch": "2.11.0"}}, "torch: 2.11.0 against 2.13.0"),
        ({"processes": 2}, "processes: 2 against unknown"),
    ],
)
def test_other_devices_and_versions_are_not_compared(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    dense(tmp_path)
    wide(tmp_path, session=H200 | changed)
    found = compared(tmp_path)
    assert (found.outcome, found.allowed, found.curve) == ("refused", False, None)
    assert found.verdict == f"refused: wall times of different conditions do not compare ({why})"
    assert not found.equal_seconds


def test_threads_matter_on_a_cpu_alone(tmp_path: Path) -> None:
    dense(tmp_path / "gpu")
    wide(tmp_path / "gpu", session=H200 | {"threads": 7})
    assert compared(tmp_path / "gpu").outcome == "better"
    dense(tmp_path / "cpu", session={})
    wide(tmp_path / "cpu", session={"threads": 7})
    assert "(threads: 7 against 2)" in compared(tmp_path / "cpu").verdict


def test_a_group_of_two_devices_has_no_time(tmp_path: Path) -> None:
    dense(tmp_path)
    first, *_ = wide(tmp_path)
    provenance(first, device_name="NVIDIA H100 80GB HBM3")
    assert "device: NVIDIA H100 80GB HBM3 and NVIDIA H200 against NVIDIA H200" in compared(tmp_path).verdict


def test_without_provenance_nothing_is_known(tmp_path: Path) -> None:
    dense(tmp_path)
    for path in wide(tmp_path):
        (path / "provenance.json").unlink()
    assert "device: unknown against NVIDIA H200" in compared(tmp_path).verdict


def test_without_seconds_nothing_is_compared(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path, more={"seconds": None})
    found = compared(tmp_path)
    assert found.verdict == (
        "refused: unknown against 100.0 s of wall time, so it is unknown whether the budgets are equal"
    )
    assert found.curve is None


def provenance(run: Path, *more: Mapping[str, Any], **changed: Any) -> None:
    """Change the first session of a run, and add others to it."""
    path = run / "provenance.json"
    (session,) = json.loads(path.read_text())["sessions"]
    session |= changed
    write(path, {"schema": "sparseift.provenance/1", "sessions": [session, *({**session, **one} for one in more)]})


def alone_of(found: Report) -> list[Any]:
    return [row["alone"] for row in records(found.frame)]


def test_runs_at_once_make_no_claim(tmp_path: Path) -> None:
    dense(tmp_path, at_once=2)
    wide(tmp_path)
    found = report(tmp_path)
    (c,) = found.comparisons
    assert alone_of(found) == [False] * 3 + [True] * 3
    assert c.verdict == (
        "+1.3 points [0.6, 2.1], n=3, at 1.0000x wall time: no claim, net_dense shared its device, so wall times are not of "
        "runs alone"
    )
    assert "net_dense: not shown to be alone on its device: 2 runs at once (--parallel)" in c.notes


def test_sessions_that_overlap_on_one_device(tmp_path: Path) -> None:
    dense(tmp_path)
    wide(tmp_path, at=40, apart=1000)  # its seed 0 runs beside seeds 0 and 1 of dense
    found = report(tmp_path)
    assert alone_of(found) == [False, False, True, False, True, True]
    (c,) = found.comparisons
    assert c.outcome == "no claim" and "net_wide75_rigl and net_dense shared their device" in c.verdict
    assert any("beside net_dense seed 0 and 1 more for 60 s, by when they started" in note for note in c.notes)


@pytest.mark.parametrize(
    "other",
    [
        {"device": "cuda:1"},
        {"device_name": "NVIDIA H100 80GB HBM3"},
        {"environment": {"CUDA_VISIBLE_DEVICES": "3"}},
        {"device_id": "0c0ffee0"},
    ],
)
def test_overlapping_sessions_on_two_devices_are_alone(tmp_path: Path, other: dict[str, Any]) -> None:
    dense(tmp_path)
    wide(tmp_path, at=40, session=H200 | other)
    assert alone_of(report(tmp_path)) == [True] * 6


def test_one_device_by_its_identity_whatever_its_number(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES numbers the devices of a process anew."""
    dense(tmp_path, session=H200 | {"device_id": "0c0ffee0"})
    wide(tmp_path, at=40, session=H200 | {"device_id": "0c0ffee0", "device": "cuda:1"})
    assert alone_of(report(tmp_path)) == [False] * 6


def test_one_run_right_behind_the_other_is_alone(tmp_path: Path) -> None:
    """`started` has whole seconds."""
    dense(tmp_path, 100.7, apart=100)
    wide(tmp_path, 100.7)
    assert alone_of(report(tmp_path)) == [True] * 6


def test_not_knowing_is_said(tmp_path: Path) -> None:
    dense(tmp_path)
    for path in wide(tmp_path):
        provenance(path, at_once=None)
    found = compared(tmp_path)
    assert found.outcome == "better"
    assert "at 1.0000x wall time, not known whether alone on the device: better" in found.verdict
    assert any("provenance does not say how many runs shared the device" in note for note in found.notes)


def test_a_run_and_what_is_kept_of_it_do_not_overlap(tmp_path: Path) -> None:
    dense(tmp_path / "runs")
    keep([tmp_path / "runs"], tmp_path / "kept")
    found = make([tmp_path / "runs", tmp_path / "kept"], ReportOptions(), [])
    assert alone_of(found) == [True] * 6


def test_a_resumed_run_adds_up_its_sessions(tmp_path: Path) -> None:
    """Its second session begins 300 s after the first, and runs beside the next seed."""
    dense(tmp_path)
    first, *_ = wide(tmp_path, apart=300)
    later = START.timestamp() + 5000 + 310
    steps = json.loads((first / "summary.json").read_text())["steps"]
    provenance(first, {"started": datetime.fromtimestamp(later, UTC).isoformat(), "from_step": steps // 2})
    found = report(tmp_path)
    (c,) = found.comparisons
    assert c.seconds_ratio == 1.0
    assert "net_wide75_rigl: 1 run was resumed; wall time is the sum of the sessions" in c.notes
    assert alone_of(found) == [True] * 3 + [False, False, True]
    provenance_of_other = {"started": datetime.fromtimestamp(later - 150, UTC).isoformat(), "from_step": steps // 2}
    path = first / "provenance.json"
    content = json.loads(path.read_text())
    write(path, content | {"sessions": [content["sessions"][0], content["sessions"][1] | provenance_of_other]})
    assert alone_of(report(tmp_path)) == [True] * 6  # 50 s from 0, 50 s from 160: free between


def test_a_run_that_went_on_elsewhere_is_of_two_devices(tmp_path: Path) -> None:
    dense(tmp_path)
    first, *_ = wide(tmp_path)
    provenance(first, {"device_name": "NVIDIA H100 80GB HBM3"})
    assert "NVIDIA H100 80GB HBM3 and NVIDIA H200 against NVIDIA H200" in compared(tmp_path).verdict


def test_the_nearest_baseline_in_time_on_the_same_device(tmp_path: Path) -> None:
    dense(tmp_path, 50)
    group(tmp_path, "net_long_dense", [71.0, 72.0, 75.0], 100, at=1000, epochs=4)
    group(tmp_path, "net_h100_dense", [71.0, 72.0, 75.0], 101, at=2000, session={"device_name": "H100"}, lr=0.2)
    wide(tmp_path, 101)
    found = [c for c in report(tmp_path).comparisons if c.candidate == "net_wide75_rigl"]
    assert [c.baseline for c in found] == ["net_long_dense"]


def test_seeds_whose_times_differ_make_no_claim(tmp_path: Path) -> None:
    """Their mean is dense's by chance: on a machine that is busy with other things one run took 7 s and another 41 s."""
    dense(tmp_path)
    for i, value in enumerate((71.0, 73.5, 75.5)):
        make_run(
            tmp_path, "net_w", i, (value,), member="wide", seconds=90 + 10 * i, begins=5000 + 200 * i, session=H200
        )
    found = compared(tmp_path)
    assert found.equal_seconds and found.difference is not None
    assert found.verdict.endswith(": no claim, wall times of the runs of net_w vary by more than 2 %")
    assert "net_w: wall times of its runs are 90.0 to 110.0 s" in found.notes
    assert compared(tmp_path, time_tolerance=0.11).outcome == "better"


def test_rates(tmp_path: Path) -> None:
    """2e15 FLOPs in 100 s are 20 TFLOP/s; the data sheet of an H200 says 989.4 in bf16, and nothing is known of fp32."""
    for path in wide(tmp_path, more={"executed_flops": 4 * 10**15}):
        recipe = path / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("  batch_size: 128", "  batch_size: 128\n  precision: bf16"))
    (row,) = records(make([tmp_path], ReportOptions(), []).groups)
    assert [row[rate.name] for rate in RATES] == pytest.approx([20, 40, 100 * 20 / 989.4, 100 * 40 / 989.4])
    (row,) = records(make([tmp_path], ReportOptions(peak_tflops=80.0), []).groups)
    assert [row[rate.name] for rate in RATES] == pytest.approx([20, 40, 25, 50])


def test_rates_that_are_not_known(tmp_path: Path) -> None:
    wide(tmp_path)
    (row,) = records(make([tmp_path], ReportOptions(), []).groups)
    assert (row["useful_tflops"], row["executed_tflops"], row["useful_mfu"]) == (20, None, None)
    for path in tmp_path.glob("*/*/provenance.json"):
        path.unlink()
    (row,) = records(make([tmp_path], ReportOptions(peak_tflops=80.0), []).groups)
    assert row["useful_mfu"] == 25
