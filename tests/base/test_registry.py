"""Registries: names, spellings, entry points of installed packages, objects by `package.module:Name`, and what is refused."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from sparseift_cli.base import registry
from sparseift_cli.base.registry import Registry
from sparseift_cli.errors import UsageError


def a_word(entry: object) -> str | None:
    return None if isinstance(entry, str) else f"{type(entry).__name__} is no str"


@pytest.fixture
def colours() -> Registry[str]:
    return Registry("colour", "colours", {"light_red": "#f88"}, aliases={"pink": "light_red"}, check=a_word)


def test_spellings_of_a_name(colours: Registry[str]) -> None:
    for name in ("light_red", "light-red", "Light_Red", "pink"):
        assert colours.get(name) == "#f88" and colours.canonical(name) == "light_red" and name in colours


def test_register_adds_a_name_once(colours: Registry[str]) -> None:
    colours.register("green", "#0f0")
    colours.register("green", "#0f0")
    assert list(colours) == ["light_red", "green"]
    with pytest.raises(UsageError, match="already a colour 'green'"):
        colours.register("green", "#080")


def test_an_unknown_name_says_what_there_is(colours: Registry[str]) -> None:
    with pytest.raises(UsageError, match="unknown colour 'blue'") as caught:
        colours.get("blue")
    assert caught.value.hint == "known: light_red; or package.module:Name"
    with pytest.raises(UsageError) as caught:
        colours.get("light_rad")
    assert caught.value.hint == "did you mean 'light_red'?"


def test_what_is_of_another_kind_is_refused(colours: Registry[str]) -> None:
    with pytest.raises(UsageError, match="blue is not a colour: int is no str"):
        colours.register("blue", 3)
    with pytest.raises(UsageError, match="math:pi is not a colour"):
        colours.get("math:pi")


def test_an_object_by_module_and_name(colours: Registry[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_colours.py").write_text("class Dark:\n    blue = '#008'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert colours.get("own_colours:Dark.blue") == "#008"
    with pytest.raises(UsageError, match=r"has no 'Dark\.red'"):
        colours.get("own_colours:Dark.red")
    with pytest.raises(UsageError, match="cannot import 'no_such_module'"):
        colours.get("no_such_module:x")


def test_entry_points_of_installed_packages(colours: Registry[str], monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("sep", "os:sep", "sparseift.colours")
    other = metadata.EntryPoint("cli", "os:sep", "console_scripts")
    monkeypatch.setattr(registry, "_entry_points", lambda: metadata.EntryPoints([other, point]))
    assert colours.names == ("light_red", "sep")
    assert colours.get("sep") == "/"
