"""--filter and --fail-if: what is understood, what is refused, and that nothing is ever run."""

from __future__ import annotations

import math

import pytest

from sparseift_cli.errors import UsageError
from sparseift_cli.report.filters import parse

ROW = {
    "sparsity": 0.75,
    "algorithm": "rigl",
    "recipe": "net_wide75_rigl",
    "top1": 76.5,
    "n": 3,
    "low": None,
    "ok": True,
    "torch": "2.13",
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("sparsity >= 0.75", True),
        ("sparsity > 7.5e-1", False),
        ("sparsity=0.75", True),
        ("algorithm == rigl", True),
        ("algorithm != 'set'", True),
        ("recipe ~ *wide*", True),
        ("recipe ~ wide", False),
        ("top1 < 76 or n == 3", True),
        ("top1 < 76 or n == 3 and sparsity == 0.5", False),  # `and` binds closer
        ("n == 3 and sparsity == 0.5 or top1 > 76", True),
        ("low < 5", False),  # no value: it does not hold
        ("low == none", True),
        ("top1 != none", True),
        ("ok == true", True),
        ("torch == 2.13", True),  # a version is a text, whatever it looks like
        ("n>=3", True),
    ],
)
def test_expressions(text: str, holds: bool) -> None:
    assert parse(text).on(ROW) is holds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "top1",
        "top1 <",
        "< 76",
        "top1 < 76 and",
        "top1 < 76 top5 < 90",
        "top1 < 76%",
        "top1 < high",
        "a == 'b",
        "and and and",
        "top1 < 76 or or n == 3",
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert error.value.hint


@pytest.mark.parametrize("text", ["algorithm < 3", "n == rigl", "n ~ 3*"])
def test_texts_and_numbers_do_not_mix(text: str) -> None:
    with pytest.raises(UsageError, match=r"is (text|a number)"):
        parse(text).on(ROW)


def test_code_is_only_ever_text() -> None:
    assert parse("recipe == __import__").on(ROW) is False
    with pytest.raises(UsageError):
        parse("__import__('os').getcwd() == 1")


def test_unknown_names_are_guessed() -> None:
    with pytest.raises(UsageError) as error:
        parse("sparsty > 0.5").require(list(ROW), "--filter")
    assert error.value.hint == "did you mean 'sparsity'?"


def test_nan_is_neither_less_nor_more() -> None:
    assert not parse("top1 < 76").on({"top1": math.nan})
    assert not parse("top1 >= 76").on({"top1": math.nan})
