"""Comparisons: pairs, budgets, what may be claimed, which baseline; published numbers; two runs bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.stats import ttest_ind

from sparseift_cli.base.metrics import metric_names
from sparseift_cli.errors import ArtifactError, UsageError
from sparseift_cli.report.compare import ComparisonRules
from sparseift_cli.report.diff import diff
from sparseift_cli.report.make import ReportOptions, make
from sparseift_cli.report.published import published
from sparseift_cli.report.report import Comparison, Report
from sparseift_cli.runs.checkpoint import sha256
from tests.helpers.report_runs import make_run, seeds, write


def report(root: Path, baseline: str | None = "dense", **how: object) -> Report:
    return make([root], ReportOptions(baseline, **how), ["sparseift", "report"])


def compared(root: Path, baseline: str = "dense", **how: object) -> Comparison:
    (found,) = report(root, baseline, **how).comparisons
    return found


def test_paired_by_seed(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, 73.5, 75.5], member="wide")
    found = compared(tmp_path)
    # differences 1, 1.5, 1.5: mean 4/3, deviation sqrt(1/12), t(0.975, 2) = 4.3027
    half = 4.302652729 * math.sqrt(1 / 12 / 3)
    assert (found.n, found.paired, found.degrees_of_freedom, found.outcome) == (3, True, 2, "better")
    assert (found.difference, found.low, found.high) == pytest.approx((4 / 3, 4 / 3 - half, 4 / 3 + half))
    assert found.verdict == "+1.3 points [0.6, 2.1], n=3, at 1.0000x training FLOPs: better"
    assert found.candidate_costs.optimizer_bytes == 2**20
    assert found.pairing == " (paired by seed)"


def test_seeds_that_do_not_match_are_two_samples(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    for seed, value in ((7, 80.0), (8, 81.0), (9, 82.0), (10, 83.0)):
        make_run(tmp_path, "net_wide75_rigl", seed, (value,), member="wide")
    found = compared(tmp_path)
    assert (found.paired, found.n, found.outcome) == (False, 3, "better")
    assert "n=3 and 4" in found.verdict
    assert any("Welch" in note for note in found.notes)


def test_too_few_shared_seeds_are_two_samples(tmp_path: Path) -> None:
    """Seeds 0, 1, 2 against 0, 1, 9: two pairs claim nothing, and six runs do. scipy's Welch test is the other opinion."""
    before, after = [70.0, 72.0, 74.0], [80.0, 81.5, 85.0]
    seeds(tmp_path, "net_dense", before)
    for seed, value in zip((0, 1, 9), after, strict=True):
        make_run(tmp_path, "net_wide75_rigl", seed, (value,), member="wide")
    found = compared(tmp_path)
    want = ttest_ind(after, before, equal_var=False)
    low, high = want.confidence_interval(0.95)
    assert (found.paired, found.n, found.outcome) == (False, 3, "better")
    assert (found.low, found.high, found.degrees_of_freedom) == pytest.approx((low, high, want.df))
    assert "n=3 and 3" in found.verdict
    assert "the groups share 2 seeds only: Welch's interval of two independent samples" in found.notes


def test_seeds_on_other_data_are_neither_pooled_nor_compared(tmp_path: Path) -> None:
    for text, digest, stamp in (("A.txt", "a1b2c3d4e5", 0), ("B.txt", "b7c8d9e0f1", 1)):
        for run in seeds(tmp_path, "net_dense", [70.0, 72.0], data_hash=digest, stamp=stamp):
            recipe = run / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace("  root: null", f"  root: /data/{text}"))
    seeds(tmp_path, "net_wide75_rigl", [71.0, 73.0, 75.0], member="wide", data_hash="b7c8d9e0f1")
    seeds(tmp_path, "net_wide90_rigl", [71.0, 73.0, 75.0], member="wide", sparsity=0.9, data_hash="c3")
    found = report(tmp_path)
    labels = ["net_dense [data content=a1b2c3d4 (A.txt)]", "net_dense [data content=b7c8d9e0 (B.txt)]"]
    groups = found.groups[["group", "n"]].to_numpy().tolist()
    assert groups == [*([label, 2] for label in labels), ["net_wide75_rigl", 3], ["net_wide90_rigl", 3]]
    assert [(c.baseline, c.candidate) for c in found.comparisons] == [(labels[1], "net_wide75_rigl")]
    differ = "net_dense: 2 groups, because runs differ in data content (a1b2c3d4 (A.txt) against b7c8d9e0 (B.txt))"
    assert differ in found.notes
    assert any("with the same content: c3 against a1b2c3d4 of net_dense" in note for note in found.notes)
    by_transform = report(tmp_path, None, by=("transform",)).groups
    assert sorted(by_transform["n"]) == [2, 2, 3, 3]  # no group of the two contents together


def test_a_run_that_was_resumed_on_other_data_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path, "net_dense", 0) / "provenance.json"
    (session,) = json.loads(path.read_text())["sessions"]
    sessions = [session, session | {"data": {"cifar100": "d1"}}]
    path.write_text(json.dumps({"schema": "sparseift.provenance/1", "sessions": sessions}))
    (note,) = report(tmp_path, None).notes
    assert note.endswith("it was resumed on other data than it began with (cifar100): no result of either")


def test_copies_of_one_text_are_one_group(tmp_path: Path) -> None:
    for seed in range(3):
        recipe = make_run(tmp_path, "net_dense", seed) / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("  root: null", f"  root: /data/copy{seed}.txt"))
    (make_run(tmp_path, "net_dense", 3) / "provenance.json").unlink()  # of an older version: it counts with the others
    assert report(tmp_path, None).groups[["group", "n"]].to_numpy().tolist() == [["net_dense", 4]]


def test_partly_matching_seeds_say_so(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, 73.5, 75.5, 99.0], member="wide")
    found = compared(tmp_path)
    assert (found.n, found.candidate_n) == (3, 4)
    assert any("1 run of other seeds" in note for note in found.notes)
    assert found.pairing == " (paired by seed, over seeds 0, 1 and 2)"


@pytest.mark.parametrize(("n", "why"), [(1, "one seed has no interval"), (2, "2 seeds are too few")])
def test_too_few_seeds_claim_nothing(tmp_path: Path, n: int, why: str) -> None:
    seeds(tmp_path, "net_dense", [70.0, 70.1][:n])
    seeds(tmp_path, "net_wide75_rigl", [90.0, 90.2][:n], member="wide")
    found = compared(tmp_path)
    assert found.outcome == "no claim"
    assert why in found.verdict
    assert f"n={n}" in found.verdict
    assert (found.low is None) is (n == 1)


def test_an_interval_that_holds_zero_shows_nothing(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [72.0, 71.0, 75.0], member="wide")
    assert compared(tmp_path).outcome == "no difference shown"


@pytest.mark.parametrize(("values", "outcome"), [([70.5] * 3, "no claim"), ([70.0] * 3, "no difference shown")])
def test_seeds_without_a_spread_claim_nothing(tmp_path: Path, values: list[float], outcome: str) -> None:
    seeds(tmp_path, "net_dense", [70.0] * 3)
    seeds(tmp_path, "net_wide75_rigl", values, member="wide")
    found = compared(tmp_path)
    assert (found.low, found.high, found.outcome) == (values[0] - 70, values[0] - 70, outcome)
    assert ("no spread" in found.verdict) is (outcome == "no claim")


def test_one_seed_against_three_is_not_called_welch(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, 72.0, 73.0], member="wide")
    assert not any("Welch" in note for note in compared(tmp_path).notes)


def test_a_baseline_in_another_metric_is_named_so(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 71.0, 72.0])
    seeds(tmp_path, "net_wide75_rigl", [0.7, 0.8, 0.9], member="wide", metric="loss")
    assert "no dense baseline of resnet18_cifar on cifar100 by loss" in report(tmp_path).notes[0]


def test_less_loss_is_better(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [3.0, 3.1, 3.2], metric="perplexity_per_word")
    seeds(tmp_path, "net_wide75_rigl", [2.5, 2.61, 2.7], member="wide", metric="perplexity_per_word")
    found = compared(tmp_path)
    assert found.outcome == "better"
    assert found.verdict.startswith("-0.497 perplexity per word [-0.511, -0.482]")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.99, 2.02, 1.987], "-0.001 loss [-0.046, 0.044]"),  # it was +0.00: the sign of a small difference got lost
        ([2 + 1e-11, 2 - 1e-11, 2 - 1e-11], "-3e-12 loss [-3e-11, 3e-11]"),
        ([1.935, 1.925, 1.915], "-0.075 loss [-0.100, -0.050]"),  # it was -0.07 here, and -0.075 in the table
        ([1e7, 2e7, 3e7], "+2.000e+07 loss [-4.841e+06, 4.484e+07]"),
    ],
)
def test_differences_keep_their_sign_and_the_digits_that_count(tmp_path: Path, values: list[float], shown: str) -> None:
    seeds(tmp_path, "net_dense", [2.0, 2.0, 2.0], metric="loss")
    seeds(tmp_path, "net_wide75_rigl", values, member="wide", metric="loss")
    assert compared(tmp_path).verdict.startswith(f"{shown}, n=3")


def test_no_claim_of_a_run_that_ended_with_nan(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, math.nan, 75.5], member="wide")
    found = compared(tmp_path)
    assert found.outcome == "no claim"
    assert "not a number" in found.verdict


def test_unequal_budgets_are_refused_and_both_printed(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, 73.5, 75.5], member="wide", flops=10**15 + 2 * 10**12)
    found = compared(tmp_path)
    assert (found.allowed, found.outcome, found.difference, found.low) == (False, "refused", None, None)
    assert "1,002,000,000,000,000 against 1,000,000,000,000,000" in found.verdict
    allowed = compared(tmp_path, rules=ComparisonRules(allow_unequal=True))
    assert allowed.outcome == "better"
    assert "1.0020x training FLOPs (unequal)" in allowed.verdict
    assert compared(tmp_path, rules=ComparisonRules(tolerance=0.003)).allowed


def test_the_tolerance_itself_is_equal_enough(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, 73.5, 75.5], member="wide", flops=10**15 + 10**12 - 1)
    assert compared(tmp_path).allowed


def test_unknown_budgets_are_refused(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, 73.5, 75.5], member="wide", flops=None)
    assert "unknown" in compared(tmp_path).verdict


def test_each_model_and_data_has_its_own_baseline(tmp_path: Path) -> None:
    for data in ("cifar100", "digits"):
        seeds(tmp_path, f"{data}_dense", [70.0, 71.0, 72.0], data=data)
        seeds(tmp_path, f"{data}_wide75_rigl", [75.0, 76.0, 77.5], data=data, member="wide")
    seeds(tmp_path, "mnist_wide75_rigl", [75.0], data="mnist", member="wide")
    found = report(tmp_path)
    assert [(c.candidate, c.baseline) for c in found.comparisons] == [
        ("cifar100_wide75_rigl", "cifar100_dense"),
        ("digits_wide75_rigl", "digits_dense"),
    ]
    assert any("mnist_wide75_rigl: not compared" in note for note in found.notes)


def test_a_baseline_of_the_same_length_is_nearest(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 71.0])
    for seed in range(2):
        make_run(tmp_path, "net_dense", seed, (80.0 + seed,), epochs=8, flops=4 * 10**15, stamp=1)
        make_run(tmp_path, "net_wide75_rigl", seed, (90.0 + seed,), epochs=8, flops=4 * 10**15, member="wide")
    found = [c for c in report(tmp_path).comparisons if c.candidate == "net_wide75_rigl"]
    assert found[0].baseline == "net_dense [training.epochs=8]"


@pytest.mark.parametrize("name", ["net_dense", "dense", "net/dense"])
def test_names_of_a_baseline(tmp_path: Path, name: str) -> None:
    seeds(tmp_path, "net_dense", [70.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0], member="wide")
    assert compared(tmp_path, name).baseline == "net_dense"


def test_a_baseline_by_algorithm_and_one_that_is_not_there(tmp_path: Path) -> None:
    seeds(tmp_path, "plain", [70.0])
    seeds(tmp_path, "other", [71.0], member="wide")
    assert compared(tmp_path, "dense").baseline == "plain"
    assert compared(tmp_path, "rigl").baseline == "other"
    with pytest.raises(UsageError) as error:
        report(tmp_path, "denes")
    assert error.value.hint == "did you mean 'dense'?"


def test_runs_that_are_not_finished_are_in_no_mean(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 71.0])
    make_run(tmp_path, "net_dense", 2, (0.0,), finished=False)
    make_run(tmp_path, "net_wide75_rigl", 0, (99.0,), member="wide", finished=False)
    found = report(tmp_path)
    assert found.groups["mean"].iloc[0] == 70.5
    assert found.comparisons == []
    assert any("no finished run of net_wide75_rigl" in note for note in found.notes)


def test_other_machines_and_exceeded_budgets_are_noted(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 72.0, 74.0])
    seeds(tmp_path, "net_wide75_rigl", [71.0, 73.5, 75.5], member="wide", device="cuda:0", spent=2 * 10**15, at_once=3)
    notes = compared(tmp_path).notes
    assert any(note.startswith("device: cuda:0 against cpu") for note in notes)
    assert "runs at once (--parallel): 3 against 1; wall time differs by it" in notes
    assert any("used 2.0000x" in note for note in notes)


def test_published_rows_are_those_of_the_article() -> None:
    rows = {
        (p.model, p.data, p.transform): (p.dense, p.value, p.difference, p.sparsity, p.evidence) for p in published()
    }
    assert rows == {
        ("resnet18", "imagenet", "wide"): (70.9, 74.4, 3.5, 0.9, "a"),
        ("resnet18", "imagenet", "parallel"): (70.9, 74.0, 3.1, 0.9, "n"),
        ("resnet34", "imagenet", "wide"): (74.2, 76.8, 2.6, 0.9, "n"),
        ("botnet50", "imagenet", "wide"): (77.5, 78.5, 1.0, None, "r"),
        ("resnet18_cifar", "cifar100", "wide"): (77.0, 80.1, 3.1, 0.9, "n"),
        ("mobilenet_v2", "cifar100", "wide"): (72.4, 73.7, 1.3, 0.75, "n"),
        ("mobilevit_s", "cifar100", "wide"): (73.5, 74.8, 1.3, 0.75, "n"),
        ("botnet50", "cifar100", "wide"): (79.8, 80.9, 1.1, 0.75, "n"),
        ("gpt3_small", "wikitext103", "wide"): (None, None, -0.4, 0.5, "a"),
        ("gpt3_small", "open_llm", "wide"): (33.8, 34.7, 0.9, 0.75, "a"),
    }
    for p in published():
        assert "2303.11525" in p.source
        assert p.dense is None or p.value is None or p.value - p.dense == pytest.approx(p.difference)


def test_our_group_is_shown_with_the_published_row(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 71.0])
    seeds(tmp_path, "net_wide90_rigl", [72.0, 74.0], member="wide", sparsity=0.9)
    seeds(tmp_path, "net_wide75_rigl", [79.0], member="wide", sparsity=0.75)  # the paper has no such row
    found = [b for b in report(tmp_path, None, reference="paper").reference if b.value is not None]
    assert [(b.published.value, b.value, b.dense, b.difference, b.n) for b in found] == [(80.1, 73.0, 70.5, 2.5, 2)]
    assert found[0].note == "ours trained 2 epochs, the published row 200"
    with pytest.raises(UsageError, match="unknown reference 'papr'"):
        published("papr")


def test_dense_runs_alone_stand_beside_the_dense_number(tmp_path: Path) -> None:
    seeds(tmp_path, "net_dense", [70.0, 71.0])
    found = [b for b in report(tmp_path, None, reference="paper").reference if b.dense is not None]
    assert [(b.published.dense, b.dense, b.value, b.group) for b in found] == [(77.0, 70.5, None, None)]


def test_sorting_and_filtering(tmp_path: Path) -> None:
    from sparseift_cli.report.filters import parse

    seeds(tmp_path, "a", [70.0, 71.0])
    seeds(tmp_path, "b", [80.0], member="wide")
    make_run(tmp_path, "c", finished=False)
    assert list(report(tmp_path, None, sort=("-mean",)).groups["group"]) == ["b", "a", "c"]
    assert list(report(tmp_path, None, filter=parse("n >= 2")).groups["group"]) == ["a"]
    assert len(report(tmp_path, None, filter=parse("seed == 0")).runs) == 3
    with pytest.raises(UsageError, match="leaves no run of 4"):
        report(tmp_path, None, filter=parse("seed == 99"))
    with pytest.raises(UsageError) as caught:
        report(tmp_path, None, filter=parse("model ~ resnet"))
    assert caught.value.hint == "~ matches a whole text: model ~ '*resnet*' finds it anywhere"
    with pytest.raises(UsageError, match="there is no column 'maen'"):
        report(tmp_path, None, sort=("-maen",))


def test_every_run_damaged_is_an_artifact_error(tmp_path: Path) -> None:
    (make_run(tmp_path) / "summary.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"summary\.json is not JSON"):
        report(tmp_path)


def checkpoint(run: Path, step: int, tensors: dict[str, np.ndarray], state: dict[str, object]) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "tensors.safetensors")
    write(folder / "state.json", state)
    files = {name: {"sha256": sha256(folder / name)} for name in ("tensors.safetensors", "state.json")}
    write(folder / "manifest.json", {"schema": "sparseift.checkpoint/1", "step": step, "files": files})
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that are equal to the bit, but for the clock."""
    runs = make_run(tmp_path / "a", more={"seconds": 1.0}), make_run(tmp_path / "b", more={"seconds": 2.0})
    for i, run in enumerate(runs):
        tensors = {"w": np.array([1.0, math.nan, -0.0], np.float32), "h": np.ones(2, np.float16)}
        checkpoint(run, 780, tensors, {"step": 780, "seconds": float(i), "last": {"top1": 70.0, "peak_bytes": i}})
    return runs


def test_equal_to_the_bit(two: tuple[Path, Path]) -> None:
    found = diff(*two, bit_for_bit=True)
    assert found.exact.equal
    assert (found.exact.evaluations, found.exact.tensors, found.exact.checkpoint_step) == (2, 2, 780)
    assert found.recipe == found.environment == []


def test_one_bit_is_a_difference(two: tuple[Path, Path]) -> None:
    folder = two[1] / "checkpoints" / "step-00000780"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    tensors = {"w": np.array([1.0, math.nan, 0.0], np.float32), "h": np.ones(2, np.float16), "x": np.ones(1)}
    checkpoint(two[1], 780, tensors, {"step": 781})
    exact = diff(*two, bit_for_bit=True).exact
    assert not exact.equal
    assert {t.name: (t.elements, t.largest) for t in exact.differing} == {"w": (1, 0.0), "x": (None, None)}
    assert exact.state == ["step", "last.top1"]


def test_evaluations_that_differ(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", values=(1.0, 2.0)), make_run(tmp_path / "b", values=(1.0, 2.0 + 2**-40))
    exact = diff(a, b, bit_for_bit=True).exact
    assert exact.first_difference == f"step 780: top1 is 2.0 and {2.0 + 2**-40!r}"
    assert any("no checkpoint was compared" in note for note in exact.notes)


def test_a_damaged_checkpoint_is_no_difference(two: tuple[Path, Path]) -> None:
    with (two[0] / "checkpoints" / "step-00000780" / "tensors.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        diff(*two, bit_for_bit=True)


def test_recipes_and_environments_differ(tmp_path: Path) -> None:
    found = diff(make_run(tmp_path / "a", lr=0.1), make_run(tmp_path / "b", lr=0.2, device="cuda:0"))
    assert [(c.key, c.a, c.b) for c in found.recipe] == [("optimizer.lr", 0.1, 0.2)]
    assert [(c.key, c.a, c.b) for c in found.environment] == [("device", "cpu", "cuda:0")]
    assert json.dumps([c.difference for c in found.metrics if c.key == "lr"]) == "[0.1]"


def test_a_difference_of_runs_on_other_data_says_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "net_dense", seed, data_hash=digest) for seed, digest in enumerate(("d0", "d0", "d1"))]
    assert diff(runs[0], runs[1]).notes == []
    assert diff(runs[0], runs[2]).notes == [
        "they read other data (d0 against d1): metrics of different data are not to be compared"
    ]


def test_diff_wants_one_run_each(tmp_path: Path) -> None:
    seeds(tmp_path / "two", "net_dense", [1.0, 2.0])
    one = make_run(tmp_path / "one")
    with pytest.raises(UsageError, match="holds 2 runs"):
        diff(tmp_path / "two", one)
    assert diff(tmp_path / "one", one).a.path == one
    (one / "summary.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"summary\.json"):
        diff(one, one)


def test_published_metrics_are_those_of_runs() -> None:
    """A metric that got another name would be compared with nothing."""
    known = {*metric_names(), "open_llm"}  # which is not measured here
    assert {row.metric for row in published()} <= known


@pytest.mark.parametrize("data", ["wikitext-103", "tokens"])
def test_gpt3_small_is_compared_with_what_is_published(data: str, tmp_path: Path) -> None:
    options = {"model": "gpt3_small", "data": data, "metric": "perplexity_per_token"}
    seeds(tmp_path, "net_dense", [20.0, 20.1], **options)
    seeds(tmp_path, "net_wide50", [19.5, 19.6], member="wide", sparsity=0.5, algorithm="static", **options)
    (row,) = (b for b in report(tmp_path, None, reference="paper").reference if b.group)
    assert (row.published.difference, row.group, row.difference) == (-0.4, "net_wide50", pytest.approx(-0.5))
