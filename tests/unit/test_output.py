"""Tables on narrow terminals, wide ones and pipes: columns give way, numbers are never cut."""

from __future__ import annotations

import io

import pytest

from sparseift_cli.cli import output
from sparseift_cli.cli.formats import Format
from sparseift_cli.cli.output import Column, Sheet, integer


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


def test_a_pipe_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.render([SHEET], {}, Format.table)
    assert "grouped conv" in capsys.readouterr().out
