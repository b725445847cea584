"""`sparseift report` as a user types it: the same rows in every format, stdout for the result alone, exit codes, goldens.

After a change of a schema that is meant: `UPDATE_GOLDEN=1 pytest tests/cli/test_report_cli.py`, and read the difference.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_runs import make_run, seeds

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Dense, a wide one at equal FLOPs, one that costs more, one that is not finished, a damaged one, a foreign folder."""
    root = tmp_path / "runs"
    seeds(root, "net_dense", [70.0, 72.0, 74.0])
    seeds(root, "net_wide75_rigl", [71.0, 73.5, 75.5], member="wide", flops=10**15 + 10**11)
    seeds(root, "net_wide90_rigl", [73.0, 75.5, 77.5], member="wide", sparsity=0.9, flops=11 * 10**14)
    make_run(root, "net_wide75_rigl", 3, (50.0,), member="wide", finished=False, steps=780)
    (make_run(root, "net_dense", 9) / "summary.json").write_text("{")
    (root / "notes").mkdir()
    return root


def golden(name: str, payload: Any) -> None:
    """Compare with tests/golden/`name`."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(payload, indent=1) + "\n", "utf-8")
    assert payload == json.loads(path.read_text("utf-8"))


def blocks(text: str) -> list[list[dict[str, str]]]:
    """The tables of a CSV, which empty lines part."""
    return [list(csv.DictReader(io.StringIO(block))) for block in text.strip().split("\n\n")]


def test_golden_of_the_report(sparseift, runs: Path) -> None:
    code, out, _ = sparseift("report", "runs", "--baseline", "dense", "--reference", "paper", "--json")
    payload = json.loads(out)
    assert code == 1  # one comparison was refused
    assert payload["schema"] == "sparseift.report/1"
    golden("report.json", payload)


def test_golden_of_runs(sparseift, runs: Path) -> None:
    payload = json.loads(sparseift("report", "runs", "--group-by", "run", "--json")[1])
    golden("report_runs.json", payload)


def test_golden_of_the_difference(sparseift, runs: Path) -> None:
    a, b = sorted((runs / "net_dense").iterdir())[:2]
    code, out, _ = sparseift(
        "report", "diff", str(a.relative_to(runs.parent)), str(b.relative_to(runs.parent)), "--json", "--exact"
    )
    payload = json.loads(out)
    assert code == 1
    assert payload["schema"] == "sparseift.report-diff/1"
    golden("report_diff.json", payload)


def test_golden_of_figure4(sparseift) -> None:
    code, out, _ = sparseift("report", "figure4", "--json")
    payload = json.loads(out)
    assert (code, payload["schema"]) == (0, "sparseift.figure4/1")
    golden("report_figure4.json", payload)


def test_every_format_holds_the_same_rows(sparseift, runs: Path) -> None:
    asked = ("report", "runs", "--baseline", "dense", "--reference", "paper", "--allow-unequal-flops")
    data = json.loads(sparseift(*asked, "--json")[1])
    table, markdown = sparseift(*asked)[1], sparseift(*asked, "-f", "md")[1]
    groups, waiting, compared, reference = blocks(sparseift(*asked, "-f", "csv")[1])
    assert [r["group"] for r in groups] == [r["group"] for r in data["groups"]]
    assert [float(r["mean"]) for r in groups] == [r["mean"] for r in data["groups"]]
    assert [int(r["flops"]) for r in groups] == [r["flops"] for r in data["groups"]]
    assert [r["path"] for r in waiting] == [r["path"] for r in data["unfinished"]]
    assert [(r["candidate"], float(r["low"]), r["verdict"]) for r in compared] == [
        (r["candidate"], r["low"], r["verdict"]) for r in data["comparisons"]
    ]
    assert [(r["model"], r["our_value"]) for r in reference] == [
        (r["model"], str(r["our_value"] or "")) for r in data["reference"]
    ]
    for shown in (table, markdown):
        for row in data["groups"]:
            assert row["group"] in shown and f"{row['mean']:#.5g}" in shown
        for row in data["comparisons"]:
            assert row["verdict"] in shown
        for row in data["unfinished"]:
            assert row["path"] in shown
        for row in data["reference"]:
            assert row["model"] in shown and row["source"] in shown


def test_html_holds_the_same_rows(sparseift, runs: Path) -> None:
    pytest.importorskip("sparseift_cli.report.html.page")
    asked = ("report", "runs", "--baseline", "dense", "--allow-unequal-flops")
    data = json.loads(sparseift(*asked, "--json")[1])
    code, page, _ = sparseift(*asked, "-f", "html")
    assert code == 0
    assert page.lstrip().lower().startswith("<!doctype html")
    for row in data["groups"]:
        assert row["group"] in page


def test_output_is_written_whole_and_stdout_stays_empty(sparseift, runs: Path, tmp_path: Path) -> None:
    for fmt in ("table", "json", "csv", "md"):
        code, out, _ = sparseift("report", "runs", "-f", fmt, "-o", f"out.{fmt}")
        assert (code, out) == (0, "")
        assert (tmp_path / f"out.{fmt}").read_text("utf-8") == sparseift("report", "runs", "-f", fmt)[1].replace(
            f'"{fmt}"\n', f'"{fmt}",\n  "-o",\n  "out.{fmt}"\n'
        )
    code, _, err = sparseift("report", "runs", "-o", "no/such/folder.md")
    assert code == 2 and "cannot write" in err


def test_skips_go_to_stderr(sparseift, runs: Path) -> None:
    code, out, err = sparseift("report", "runs")
    assert code == 0
    assert "summary.json is not JSON" in err and "notes: foreign" in err
    assert "skipped" not in out
    assert "Not finished" in out and "stopped" in out


def test_refusal_prints_both_budgets_and_exits_1(sparseift, runs: Path) -> None:
    code, out, err = sparseift("report", "runs", "--baseline", "dense")
    assert code == 1
    for shown in (out, err):
        assert "1,100,000,000,000,000 against 1,000,000,000,000,000" in shown
    assert "+1.3 points [0.6, 2.1], n=3, at 1.0001x training FLOPs: better" in out
    assert sparseift("report", "runs", "--baseline", "dense", "--flops-tolerance", "20%")[0] == 0
    code, out, _ = sparseift("report", "runs", "--baseline", "dense", "--allow-unequal-flops")
    assert code == 0 and "1.1000x training FLOPs (unequal)" in out
    assert "Against dense (1 of 2 at unequal FLOPs)" in out
    page = sparseift("report", "runs", "--baseline", "dense", "--allow-unequal-flops", "-f", "html")[1]
    assert (
        "2 comparisons with the baseline: 1 better; at unequal FLOPs: 1 better." in page
        and "better at unequal FLOPs" in page
    )


def test_gates(sparseift, runs: Path) -> None:
    assert sparseift("report", "runs", "--fail-if", "top1 < 70")[0] == 0
    code, out, err = sparseift("report", "runs", "--fail-if", "top1 < 73")
    assert code == 1 and "top1 < 73: net_dense: top1 = 72" in err and "net_dense" in out
    assert "net_wide90" not in err
    code, _, err = sparseift("report", "runs", "--max-flops-ratio", "1.001")
    assert code == 1 and "net_wide90_rigl trains with 1.100000x the dense model's FLOPs" in err
    asked = ("report", "runs", "--baseline", "dense", "--allow-unequal-flops")
    assert sparseift(*asked, "--fail-if", "difference < 1 or outcome == worse")[0] == 0
    assert sparseift(*asked, "--fail-if", "difference < 1.4")[0] == 1
    assert sparseift(*asked, "--max-flops-ratio", "1.2")[0] == 0
    assert "1.100000x the baseline's FLOPs, above 1.0999999" in sparseift(*asked, "--max-flops-ratio", "1.0999999")[2]
    assert "difference = 1.33333\n" in sparseift(*asked, "--fail-if", "difference < 1.33333335")[2]
    assert "difference = 1.33333333\n" in sparseift(*asked, "--fail-if", "difference > 1.33333332")[2]


@pytest.fixture
def timed(tmp_path: Path) -> Path:
    """On one device, one run behind the other: dense, one of its time at twice its FLOPs, one of its FLOPs at 1.8 of its time."""
    root, gpu = tmp_path / "timed", {"device": "cuda:0", "device_name": "NVIDIA H200"}
    arms = (
        ("net_dense", [70.0, 72.0, 74.0], 100.0, {}),
        ("net_wide75_time", [71.0, 73.5, 75.5], 101.0, {"member": "wide", "flops": 2 * 10**15}),
        ("net_wide75_flops", [71.0, 73.5, 75.5], 180.0, {"member": "wide"}),
    )
    for at, (name, ends, seconds, how) in enumerate(arms):
        for seed, value in enumerate(ends):
            begins = 1000.0 * at + 200 * seed
            make_run(root, name, seed, (value - 10, value), seconds=seconds, begins=begins, session=gpu, **how)
    return root


def test_at_both_is_a_verdict_for_each_in_every_format(sparseift, timed: Path) -> None:
    asked = ("report", "timed", "--baseline", "dense", "--at", "both", "--peak-tflops", "100")
    code, out, _ = sparseift(*asked, "--json")
    data = json.loads(out)
    assert (code, data["at"]) == (0, ["flops", "seconds"])  # each group is equal in one of the two
    found = {(c["candidate"], c["at"]): c for c in data["comparisons"]}
    assert [c["outcome"] for c in found.values()] == ["better", "refused", "refused", "better"]
    assert found["net_wide75_flops", "seconds"]["curve_taken"] == 90
    assert [row["useful_mfu"] for row in data["groups"]] == pytest.approx([10, 1000 / 180, 2000 / 101])
    table, markdown = sparseift(*asked)[1], sparseift(*asked, "-f", "md")[1]
    groups, compared = blocks(sparseift(*asked, "-f", "csv")[1])
    assert [r["alone"] for r in groups] == ["True"] * 3
    assert [(r["candidate"], r["at"], r["verdict"]) for r in compared] == [(*k, c["verdict"]) for k, c in found.items()]
    for shown in (table, markdown):
        assert "Against dense at equal FLOPs and equal time" in shown and "useful MFU %" in shown
        assert (
            "net_wide75_time against net_dense at equal time: +1.3 points [0.6, 2.1], n=3, at 1.0100x wall time"
            in shown
        )
        for row in found.values():
            assert row["verdict"] in shown and all(note in shown for note in row["notes"])


def test_the_page_at_both(sparseift, timed: Path) -> None:
    pytest.importorskip("sparseift_cli.report.html.page")
    page = sparseift("report", "timed", "--baseline", "dense", "--at", "both", "-f", "html")[1]
    counts = "at equal FLOPs: 1 better, 1 refused; at equal time: 1 better, 1 refused."
    assert f"4 comparisons with the baseline: {counts}" in page
    assert "better at equal time</span>" in page and "refused at equal FLOPs</span>" in page
    assert "useful TF/s" in page and "time ratio" in page and "by wall time" in page
    plain = sparseift("report", "timed", "--baseline", "dense", "-f", "html")[1]
    assert "at equal time" not in plain and "useful TF/s" not in plain and "by wall time" not in plain


def test_new_columns_are_shown_where_they_are_asked_for_alone(sparseift, timed: Path) -> None:
    plain = json.loads(sparseift("report", "timed", "--json")[1])
    assert "alone" not in plain["groups"][0] and "useful_tflops" not in plain["groups"][0] and "at" not in plain
    out = sparseift("report", "timed", "--columns", "group,useful_tflops,alone", "-f", "csv")[1]
    assert blocks(out)[0][0] == {"group": "net_dense", "useful_tflops": "10.0", "alone": "True"}


def test_gates_at_equal_time(sparseift, timed: Path) -> None:
    asked = ("report", "timed", "--baseline", "dense")
    code, _, err = sparseift(*asked, "--at", "seconds")
    assert code == 1 and "180.0 against 100.0 s of wall time are 1.8000x" in err and "--time-tolerance" in err
    assert sparseift(*asked, "--at", "seconds", "--time-tolerance", "90%")[0] == 0
    assert (
        sparseift(*asked, "--at", "both", "--fail-if", "at == seconds and outcome == worse or alone == false")[0] == 0
    )
    code, _, err = sparseift(*asked, "--at", "both", "--fail-if", "outcome != better", "--fail-if", "top1 < 73")
    assert code == 1 and "net_wide75_flops at equal time: outcome = refused" in err
    assert "net_wide75_time at equal FLOPs: outcome = refused" in err
    assert err.count("top1 < 73: net_dense: top1 = 72") == 1
    assert "seconds_vs_baseline = 1.8" in sparseift(*asked, "--at", "both", "--fail-if", "seconds_vs_baseline > 1.5")[2]
    code, _, err = sparseift(*asked, "--at", "both", "--max-time-ratio", "1.5")
    assert code == 1 and "net_wide75_flops trains with 1.800000x the baseline's wall time, above 1.5" in err
    assert "net_wide75_time trains" not in err
    assert sparseift(*asked, "--at", "both", "--max-time-ratio", "1.9")[0] == 0
    code, _, err = sparseift("report", "timed", "--max-time-ratio", "1.5")
    assert code == 1 and "needs a baseline" in err


def test_a_gate_on_time_fails_where_devices_differ(sparseift, timed: Path) -> None:
    for path in timed.glob("net_wide75_flops/*/provenance.json"):
        path.write_text(path.read_text().replace("H200", "H100"))
    code, _, err = sparseift("report", "timed", "--baseline", "dense", "--at", "both", "--max-time-ratio", "1.9")
    assert code == 1
    assert "net_wide75_flops: device: NVIDIA H100 against NVIDIA H200, so --max-time-ratio cannot check it" in err


def test_gates_that_check_nothing_fail(sparseift, runs: Path) -> None:
    code, _, err = sparseift("report", "runs", "--fail-if", "perplexity_per_word > 20")
    assert code == 1 and "nothing was checked" in err
    make_run(runs.parent / "bad", "net_dense", 0, (math.nan,))
    code, out, err = sparseift("report", "bad", "--fail-if", "top1 < 10", "--json")
    assert code == 1 and "not a number" in err
    assert json.loads(out)["groups"][0]["mean"] == "nan"  # JSON knows no NaN


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nowhere",), 2, "nowhere is not there"),
        (("runs", "--columns", "grup"), 2, "did you mean 'group'?"),
        (("runs", "--sort", "nothing"), 2, "there is no column 'nothing'"),
        (("runs", "--filter", "spasity > 0"), 2, "did you mean 'sparsity'?"),
        (("runs", "--filter", "top1 <"), 2, "cannot be read at its end"),
        (("runs", "--fail-if", "subject == 1"), 2, "there is no column 'subject'"),
        (("runs", "--group-by", "algorithn"), 2, "did you mean 'algorithm'?"),
        (("runs", "--baseline", "wide57"), 2, "there is no such group"),
        (("runs", "--reference", "papers"), 2, "did you mean 'paper'?"),
        (("runs", "--flops-tolerance", "much"), 2, "is not a share"),
        (("runs", "--time-tolerance", "2"), 2, "--time-tolerance '2' is not a share"),
        (("runs", "--peak-tflops", "0"), 2, "--peak-tflops must be above 0"),
        (("runs", "--group-by", "run", "--baseline", "dense"), 2, "leave one of them out"),
        (("runs/notes",), 2, "holds no run"),
        (("diff", "runs", "runs"), 2, "holds 10 runs"),
        (("diff", "runs/notes", "runs"), 2, "holds no run"),
        (("runs/net_dense/20260101T120009Z-00000009",), 4, "summary.json"),
        (("diff", "runs/net_dense/20260101T120009Z-00000009", "runs"), 4, "summary.json"),
    ],
)
def test_errors_are_for_people(sparseift, runs: Path, words: tuple[str, ...], code: int, message: str) -> None:
    found, out, err = sparseift("report", *words)
    assert (found, out) == (code, "")
    assert message in err and "hint:" in err and "Traceback" not in err


def test_columns_sort_filter(sparseift, runs: Path) -> None:
    out = sparseift(
        "report", "runs", "--columns", "n,group,top1", "--sort=-top1", "--filter", "sparsity > 0", "-f", "csv"
    )[1]
    rows = blocks(out)[0]
    assert [list(row.values()) for row in rows] == [
        ["3", "net_wide90_rigl", str(226 / 3)],
        ["3", "net_wide75_rigl", str(220 / 3)],
    ]
    data = json.loads(sparseift("report", "runs", "--columns", "group,n", "--json")[1])
    assert data["groups"][0] == {"group": "net_dense", "n": 3}
    out = sparseift("report", "runs", "--group-by", "algorithm", "--columns", "group,n", "-f", "csv")[1]
    assert [tuple(row.values()) for row in blocks(out)[0]] == [("algorithm=dense", "3"), ("algorithm=rigl", "6")]
    out = sparseift("report", "runs", "--group-by", "run", "--filter", "state == stopped", "-f", "csv")[1]
    assert [row["step"] for row in blocks(out)[0]] == ["1"]


def test_a_folder_called_diff_can_be_reported(sparseift, runs: Path) -> None:
    runs.rename(runs.with_name("diff"))
    assert "net_dense" in sparseift("report", "./diff")[1]


def test_default_is_the_folder_that_train_writes(sparseift, runs: Path) -> None:
    assert sparseift("report", "-f", "csv")[1] == sparseift("report", "runs", "-f", "csv")[1]


def test_diff_in_words(sparseift, runs: Path) -> None:
    a = "runs/net_dense/20260101T120000Z-00000000"
    b = "runs/net_wide75_rigl/20260101T120001Z-00000001"
    code, out, _ = sparseift("report", "diff", a, b)
    assert code == 0
    assert "transform.sparsity" in out and "the environments are the same" in out and "+3.5" in out
    code, out, _ = sparseift("report", "diff", a, a, "--exact")
    assert code == 0 and "equal to the bit" in out and "no checkpoint was compared" in out
    code, out, err = sparseift("report", "diff", a, b, "--exact", "-f", "md")
    assert code == 1 and "NOT equal" in out and "not equal bit for bit" in err
    assert sparseift("report", "diff", a, b, "-f", "github")[0] == 2


@pytest.mark.parametrize("width", [60, 80, 160])
def test_tables_fit_a_terminal(sparseift, runs: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    sparseift("report", "runs", "--baseline", "dense", "--reference", "paper", "--allow-unequal-flops")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert "…" not in shown and "72.000" in shown and "1.1000x" in shown
    long = [line for line in shown.splitlines() if len(line.rstrip()) > width and "/" not in line]
    assert not long or width == 60, long
    assert (" _# " in shown) is (
        width == 160
    )  # a learning curve, where there is room for it; this stream has no encoding


def test_help_shows_examples_and_its_own_name(sparseift) -> None:
    code, out, _ = sparseift("report", "--help")
    assert code == 0
    assert re.search(r"Usage: .* report \[OPTIONS\] \[?PATH", out)
    assert "sparseift report diff A B" in out and "--fail-if" in out
    assert "--exact" in sparseift("report", "diff", "--help")[1]


def test_no_torch(runs: Path, root: Path) -> None:
    """Neither the report nor --exact loads torch, nor the whole of scipy.stats."""
    code = (
        "import sys\n"
        "from sparseift_cli.cli.app import main\n"
        "sys.argv = ['sparseift', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "finally:\n    print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    a = min((runs / "net_dense").iterdir())
    env = {**os.environ, "PYTHONPATH": str(root)}
    for words in (
        ["report", str(runs), "--baseline", "dense", "--allow-unequal-flops"],
        ["report", "diff", str(a), str(a), "--exact"],
    ):
        made = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, check=True)
        assert not {"torch", "scipy.stats", "matplotlib"} & set(made.stderr.split())


@pytest.mark.parametrize("option", ["--baseline", "--filter"])
def test_an_empty_variable_of_a_ci_script_is_no_option_left_out(sparseift, runs: Path, option: str) -> None:
    assert sparseift("report", "runs", option, "")[0] == 2


@pytest.mark.parametrize("option", ["--sort", "--columns", "--group-by"])
def test_internal_columns_cannot_be_asked_for(sparseift, runs: Path, option: str) -> None:
    assert "there is no column 'comparison_key'" in sparseift("report", "runs", option, "comparison_key")[2]


def test_a_crashed_candidate_passes_no_gate(sparseift, runs: Path) -> None:
    make_run(runs, "net_crashed", finished=False)
    code, _, err = sparseift("report", "runs", "--fail-if", "top1 < 50")
    assert code == 1 and "top1 < 50: net_crashed: no run has finished, so nothing was checked" in err
    assert sparseift("report", "runs", "--fail-if", "top1 < 50", "--filter", "state == finished")[0] == 0


def test_a_gate_names_the_groups_to_which_it_does_not_apply(sparseift, runs: Path) -> None:
    asked = ("report", "runs", "--baseline", "dense", "--allow-unequal-flops", "--fail-if", "difference < 1")
    code, _, err = sparseift(*asked)
    assert code == 0 and "--fail-if 'difference < 1' does not apply to net_dense" in err


def piped(runs: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The exit code where the reader is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "from sparseift_cli.cli.app import main; main()", "report", str(runs), *words]
    try:
        return subprocess.run(
            command, stdout=writer, stderr=subprocess.PIPE, env={**os.environ, **environment}, check=False
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("fmt", ["table", "csv"])
def test_a_reader_that_goes_early_is_no_error_and_hides_no_gate(runs: Path, fmt: str) -> None:
    fine = piped(runs, "-f", fmt)
    assert (fine.returncode, b"Traceback" in fine.stderr) == (0, False)
    assert piped(runs, "-f", fmt, "--fail-if", "top1 > 0").returncode == 1


def test_letters_that_a_terminal_lacks_are_shown_escaped(runs: Path, tmp_path: Path) -> None:
    seeds(runs, "größer", [70.0, 71.0])
    code = (
        f"from sparseift_cli.cli.app import main; import sys; sys.argv = ['sparseift', 'report', {str(runs)!r}]; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert b"gr\\xf6\\xdfer" in run.stdout


def test_both_ends_of_an_interval_stay_in_80_columns(sparseift, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    sparseift("report", str(root / "recipes" / "quickstart" / "results"), "--baseline", "dense")
    against = terminal.getvalue().split("Against dense")[1]
    (head,) = (line for line in against.splitlines() if line.startswith(" group"))
    assert " low " in head and " high " in head and "e-15" not in against
