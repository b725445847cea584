"""Options declared on a dataclass field: what is read from the declaration, and how values are checked."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal

import pytest

from sparseift_cli.base.options import Option, check, markdown, options_of
from sparseift_cli.base.registry import Registry
from sparseift_cli.errors import UsageError

COLOURS = Registry[str]("colour", "colours_of_a_test", {"red": "#f00", "green": "#0f0"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Paint:
    """What the tests declare."""

    coats: Annotated[int, Option("Layers of paint.", panel="Work", minimum=1)] = 2
    finish: Annotated[Literal["matt", "gloss"], Option("How it shines.", only="oil", flags=("--finish", "-f"))] = "matt"
    colour: Annotated[str, Option("The colour.", names=COLOURS)] = "red"
    thinner: Annotated[str, Option("Part of thinner.", decimal=True, minimum=0, below=1)] = "0.1"
    primer: Annotated[int | None, Option("Layers below.", minimum=1)] = None
    price: int = 0  # no option

    def __post_init__(self) -> None:
        check(self)


def test_a_declaration_is_read_from_the_field() -> None:
    found = options_of(Paint)
    assert list(found) == ["coats", "finish", "colour", "thinner", "primer"]
    assert found["coats"].flags == ("--coats",) and found["finish"].flags == ("--finish", "-f")
    assert found["finish"].choices == ("matt", "gloss") and not found["finish"].takes_objects
    assert found["colour"].choices == ("red", "green") and found["colour"].takes_objects
    assert (found["primer"].type, found["primer"].optional, found["primer"].default) == (int, True, None)
    assert found["finish"].help == "oil: how it shines." and found["coats"].shown_default == "2"
    assert found["primer"].shown_default is None


def test_a_field_without_default_has_none() -> None:
    @dataclass
    class Needed:
        size: Annotated[int, Option("The size.")]

    Needed.__annotations__["size"] = Annotated[
        int, Option("The size.")
    ]  # a local class: its names are not the module's
    assert options_of(Needed)["size"].default is MISSING


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"coats": 0}, "coats 0 must be at least 1", None),
        ({"coats": 1.5}, "coats 1.5 is not a whole number", None),
        ({"coats": True}, "coats True is not a whole number", None),
        ({"finish": "glos"}, "unknown finish 'glos'", "did you mean 'gloss'?"),
        ({"colour": "blue"}, "unknown colour 'blue'", "known: red, green"),
        ({"thinner": "1"}, "thinner '1' must be below 1", None),
        ({"thinner": "-1"}, "thinner '-1' must be at least 0", None),
        ({"thinner": "nan"}, "thinner 'nan' is not a number", None),
        ({"primer": 0}, "primer 0 must be at least 1", None),
    ],
)
def test_a_wrong_value_is_refused(given: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        Paint(**given)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_an_object_by_its_path_is_left_to_the_registry() -> None:
    assert Paint(colour="some.module:BLUE").colour == "some.module:BLUE"


def test_the_documentation_has_a_row_for_every_option() -> None:
    rows = markdown(Paint).splitlines()
    assert len(rows) == 2 + len(options_of(Paint))
    assert "| `colour` | red, green, package.module:Name | red | The colour. |" in rows
    assert "| `thinner` | number, at least 0, below 1 | 0.1 | Part of thinner. |" in rows
