"""Tables on narrow terminals, wide ones and pipes: columns give way, numbers are never cut."""

from __future__ import annotations

import io
import json
import math
import re

import pytest

from sparseift_cli.base.sheets import Column, Sheet, integer, measured
from sparseift_cli.cli import output
from sparseift_cli.cli.options import Format
from sparseift_cli.cli.report_view import decimals
from sparseift_cli.cli.train_view import show_runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


SHEET = Sheet(
    "A title that is rather long for a narrow terminal",
    [
        Column("name", "layer"),
        Column("kind", "kind", priority=1),
        Column("macs", "dense MACs", integer, right=True),
        Column("more", "transformed MACs", integer, right=True),
    ],
    [{"name": "layer1.0.conv1", "kind": "grouped conv", "macs": 10**12, "more": 2 * 10**12}],
)


@pytest.mark.parametrize("width", [20, 40, 56, 60, 70, 72, 100, 300])
def test_numbers_survive_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    output.render([SHEET], {}, Format.table)
    shown = terminal.getvalue()
    assert "1,000,000,000,000" in shown
    assert "2,000,000,000,000" in shown
    assert "…" not in shown
    assert ("left out on this narrow terminal: kind" in " ".join(shown.split())) is (width < 71)


@pytest.mark.parametrize("term", ["dumb", "unknown", "xterm"])
def test_every_terminal_has_the_width_that_it_says(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    """rich takes a dumb terminal for 80 columns wide unless a console has a height too, and cuts what is wider."""
    cells = [Column(f"key{i}", f"a header of column {i}", integer, right=True) for i in range(8)]
    wide = Sheet("Wider than 80 columns", cells, [{c.key: 10**15 + i for i, c in enumerate(cells)}], ["n" * 90])
    monkeypatch.setenv("TERM", term)
    for width in (40, 100, 300):  # columns that must stay stay, whether they fit or not
        monkeypatch.setenv("COLUMNS", str(width))
        terminal = Terminal()
        monkeypatch.setattr("sys.stdout", terminal)
        output.render([wide], {}, Format.table)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
        (row,) = (line for line in lines if "1,000,000,000,000,000" in line)
        assert all(integer(10**15 + i) in row for i in range(8))
        assert ("n" * 90 in lines) is (width > 90)
    assert output.make_console(terminal).width == 300


def test_a_title_after_notes_stands_apart(capsys: pytest.CaptureFixture[str]) -> None:
    one = Sheet("First", [Column("a", "a")], [{"a": "1"}], ["a note"])
    output.render([one, Sheet("Second", [Column("a", "a")], [{"a": "2"}])], {}, Format.table)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("a note") :][:3] == ["a note", "", "Second"]


def test_a_pipe_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.render([SHEET], {}, Format.table)
    assert "grouped conv" in capsys.readouterr().out


def test_short_columns_stay_where_only_a_long_one_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [
        Column("name", "recipe"),
        Column("steps", "steps", right=True, priority=2),
        Column("model", "model", priority=3),
        Column("about", "what it shows", priority=1),
    ]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    row = {"name": "a/b", "steps": 250, "model": "a_model", "about": "long " * 20}
    output.render([Sheet("Recipes", columns, [row])], {}, Format.table)
    shown = terminal.getvalue()
    assert "250" in shown and "a_model" in shown
    assert "left out on this narrow terminal: what it shows (" in shown
    assert shown.index("steps") < shown.index("model")


def shown_at(monkeypatch: pytest.MonkeyPatch, width: int, sheet: Sheet) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    output.render([sheet], {}, Format.table)
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()]


def test_words_go_on_below_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [
        Column("name", "layer"),
        Column("macs", "MACs", integer, right=True, priority=1),
        *(Column(name, name, wraps=11) for name in ("wide", "doped")),
    ]
    words = "no: it follows the wider stream"
    sheet = Sheet("Why", columns, [{"name": "conv1", "macs": 10**6, "wide": words, "doped": words}])
    for width, lines in ((87, 1), (86, 2), (60, 3), (36, 4)):
        printed = shown_at(monkeypatch, width, sheet)
        assert max(map(len, printed)) <= width
        assert printed.index("", 4) - 4 <= lines and "wide" in printed[2] and "doped" in printed[2]
        assert ("1,000,000" in "".join(printed)) is (width > 36)


def test_an_empty_column_gives_way_first_and_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [Column("a", "a" * 20), Column("note", "note", priority=1), Column("b", "b" * 20, priority=2)]
    sheet = Sheet("T", columns, [{"a": 1, "b": 2}])
    assert "note" in "".join(shown_at(monkeypatch, 80, sheet))
    printed = "".join(shown_at(monkeypatch, 46, sheet))
    assert "b" * 20 in printed and "note" not in printed and "left out" not in printed


@pytest.mark.parametrize(
    ("words", "width", "heads"),
    [
        (("flops", "resnet18", "-s", "0.5,0.75,0.9", "--summary"), 60, ("ratio", "training ratio")),
        (("inspect", "resnet18", "--why"), 80, ("wide", "parallel", "factorized", "doped")),
        (("train", "quickstart/digits_cnn_wide75_rigl", "--dry-run"), 80, ("what it is",)),
    ],
)
def test_commands_on_narrow_terminals(
    sparseift, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], width: int, heads: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert sparseift(*words)[0] == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    first = re.split(r" {2,}", next(line for line in printed.splitlines() if all(h in line for h in heads)).strip())
    assert set(heads) <= set(first) and "note" not in first and len(first) == len(set(first))
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width


def test_what_is_huge_is_written_by_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    """A diverging model's perplexity was printed in 28 digits."""
    assert [measured(v) for v in (1.5, 652.51234, 3.0888193496e27)] == ["1.5000", "652.5123", "3.0888e+27"]
    assert [decimals(v) for v in (652.51234, 123456.789, 3.0888193496e7)] == ["652.51", "123456.789", "3.0888e+07"]
    run = {"recipe": "r", "seed": 0, "steps": 2, "flops": {"spent": 1, "dense": 1}, "nonzero_params": 1, "seconds": 1.0}
    show_runs([{**run, "metrics": {"perplexity_per_word": 3.0888193496e27}}], Format.table)
    assert "3.0888e+27" in capsys.readouterr().out


def test_json_has_no_word_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    payload = {"runs": [{"loss": math.nan, "best": (math.inf, 1.5), "steps": 2, "name": "NaN"}]}
    output.render([SHEET], payload, Format.json)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert printed == {"runs": [{"loss": None, "best": [None, 1.5], "steps": 2, "name": "NaN"}]}


@pytest.mark.parametrize("fmt", [Format.table, Format.json, Format.csv, Format.md])
@pytest.mark.parametrize("lost", [math.nan, math.inf, None])  # None: of a child's JSON, with --parallel
def test_runs_that_end_without_a_number_are_shown(
    capsys: pytest.CaptureFixture[str], fmt: Format, lost: float | None
) -> None:
    """`statistics.stdev` of a NaN is an AttributeError, and the runs were over."""
    run = {
        "recipe": "r",
        "steps": 2,
        "flops": {"spent": 1, "dense": 1},
        "nonzero_params": 1,
        "seconds": 1.0,
        "path": "p",
    }
    results = [
        {**run, "seed": seed, "metrics": {"loss": loss, "top1": 10.0 + seed}} for seed, loss in enumerate((1.0, lost))
    ]
    show_runs(results, fmt)
    shown = capsys.readouterr().out
    if fmt is Format.table:
        assert "loss: no number in 1 of 2 runs" in shown and "top1: 10.5000 +- 0.7071" in shown
