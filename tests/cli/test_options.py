"""An option is one field: declared once, found in the help, recipes, the JSON schema, checks and the documentation."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from sparseift_cli.base.options import Option, markdown, options_of
from sparseift_cli.cli import options
from sparseift_cli.cli.app import SUMMARIES, subcommand
from sparseift_cli.errors import UsageError
from sparseift_cli.plan.spec import InitSpec, TrainingSpec, TransformSpec
from sparseift_cli.recipe.load import load
from sparseift_cli.recipe.sections import section_of

SPECS = (TransformSpec, TrainingSpec, InitSpec)


@dataclass(frozen=True, kw_only=True)
class Tilted(TransformSpec):
    """A spec with one more option."""

    tilt: Annotated[Literal["left", "right"], Option("Which way a layer leans.", panel="Leaning", only="wide")] = "left"


def shown_help(width: int, spec: type) -> str:
    app = typer.Typer(add_completion=False)

    @app.command()
    @options.takes(spec=options.Declared(spec))
    def lean(*, spec: dict[str, Any]) -> None:
        typer.echo(repr(spec))

    return CliRunner().invoke(app, ["--help"], env={"COLUMNS": str(width)}, terminal_width=width).output


def test_a_new_field_is_an_option_everywhere() -> None:
    shown = shown_help(120, Tilted)
    assert "Leaning" in shown and "--tilt" in shown and "[left|right]" in shown
    assert "wide: which way a layer leans." in shown and "[default: (left)]" in shown
    section: Any = section_of(Tilted, required=("sparsity",))
    assert section(sparsity=0.5).tilt == "left" and section(sparsity=0.5, tilt="right").tilt == "right"
    with pytest.raises(ValidationError):
        section(sparsity=0.5, tilt="up")
    schema = section.model_json_schema()["properties"]["tilt"]
    assert (schema["enum"], schema["default"]) == (["left", "right"], "left")
    assert schema["description"] == "wide: which way a layer leans."
    assert "| `tilt` | left, right | left | wide: which way a layer leans. |" in markdown(Tilted)
    with pytest.raises(UsageError, match="unknown tilt 'lef'") as caught:
        Tilted(tilt="lef")
    assert caught.value.hint == "did you mean 'left'?"
    assert "tilt" not in shown_help(120, TransformSpec)


def test_a_command_gets_what_was_given() -> None:
    app = typer.Typer(add_completion=False)

    @app.command()
    @options.takes(spec=options.Declared(Tilted))
    def lean(name: str, *, spec: dict[str, Any], after: bool = False) -> None:
        typer.echo(repr((name, spec, after)))

    def said(*words: str) -> str:
        return CliRunner().invoke(app, list(words)).output.strip()

    assert said("x") == "('x', {}, False)"
    given = ("--tilt", "right", "-s", "0.9", "--include", "a*", "--include", "b", "--base-width", "8", "--after", "x")
    assert said(*given) == repr(
        ("x", {"sparsity": "0.9", "include": ("a*", "b"), "base_width": 8, "tilt": "right"}, True)
    )


def test_no_option_of_a_spec_is_declared_again(root: Path) -> None:
    """Neither by a command's own typer.Option nor as a section's own pydantic field."""
    declared = {name: d for spec in SPECS for name, d in options_of(spec).items()}
    flags = {flag for d in declared.values() for flag in d.flags}
    for path in sorted((root / "sparseift_cli" / "cli").glob("*.py")):
        for call in (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) in ("typer.Option", "options.choice"):
                given = {a.value for a in call.args if isinstance(a, ast.Constant)}
                assert not given & flags, f"{path.name}:{call.lineno}"
        for function in (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)):
            for argument in (*function.args.args, *function.args.kwonlyargs):
                if argument.annotation is not None and "typer.Option(help" in ast.unparse(argument.annotation):
                    assert f"--{argument.arg.replace('_', '-')}" not in flags, f"{path.name}: {argument.arg}"
    for name in SUMMARIES:
        for command in (subcommand(name), *getattr(subcommand(name), "commands", {}).values()):
            own = [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
            assert len(own) == len(set(own)), name
    tree = ast.parse((root / "sparseift_cli" / "recipe" / "sections.py").read_text("utf-8"))
    for section in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for field in (n for n in section.body if isinstance(n, ast.AnnAssign)):
            name, value = ast.unparse(field.target), ast.unparse(field.value) if field.value else ""
            if name in declared and name not in _OTHER_MEANINGS:
                assert value.startswith("option("), f"{section.name}.{name}"


_OTHER_MEANINGS = ("steps",)
"""training.steps is the length of a run; TrainingSpec.steps is what is counted, of a recipe that length."""


def test_no_name_is_an_option_of_two_specs() -> None:
    names = [name for spec in SPECS for name in options_of(spec)]
    assert len(names) == len(set(names))


_PANELS = {
    "flops": (
        "Model and input",
        "Transform",
        "Sparse Wide",
        "Parallel, Factorized, Doped",
        "Training FLOPs",
        "Gates",
        "Output",
    ),
    "transform": ("Model and input", "Transform", "Sparse Wide", "Weights and masks at the start", "Output"),
    "inspect": ("For a checkpoint", "For a model", "Model and input", "Output"),
    "train": ("Runs", "Look before training", "Output"),
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", sorted(_PANELS))
def test_help_fits_the_terminal_and_has_headings_and_choices(command: str, width: int, root: Path) -> None:
    call = [sys.executable, "-m", "sparseift_cli", command, "--help"]
    environment = os.environ | {"COLUMNS": str(width), "TERM": "dumb", "NO_COLOR": "1"}
    shown = subprocess.run(call, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    assert max(map(len, shown.splitlines())) <= width
    for panel in _PANELS[command]:
        assert f"─ {panel} ─" in shown
    if "Transform" in _PANELS[command]:
        assert ("[wide|parallel|factorized|doped]" if width == 120 else "[wide|parallel|") in shown
        assert "[all|inner|none]" in shown


def test_former_spellings_are_read_and_not_shown(sparseift: Any, tmp_path: Path) -> None:
    assert "--out" not in {flag for parameter in subcommand("transform").params for flag in parameter.opts}
    for number, spelling in enumerate(("--out", "--output", "-o")):
        out = tmp_path / str(number)
        words = ("transform", "digits_mlp", "-s", "0.5", "-t", "sparse-wide", "--plan-only", spelling, str(out))
        assert sparseift(*words)[0] == 0
        assert out.is_dir()
    assert sparseift("transform", "digits_mlp", "-s", "0.5", "--plan-only", f"--out={tmp_path / 'e'}")[0] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--branch-activation", "sum"), "branch activation 'sum' is an option of parallel; wide does not read it"),
        (("-t", "doped", "--inner", "norm"), "inner 'norm' is an option of factorized; doped does not read it"),
        (("-t", "parallel", "--base-width", "90"), "base width 90 is an option of wide; parallel does not read it"),
        (("-t", "factorized", "--scope", "inner"), "scope 'inner' is an option of wide; factorized does not read it"),
        (
            ("-t", "wide", "--projections", "transformed"),
            "an option of parallel, factorized, doped; wide does not read it",
        ),
    ],
)
@pytest.mark.parametrize("command", ["flops", "transform"])
def test_an_option_of_another_member_is_refused(
    sparseift: Any, tmp_path: Path, command: str, given: tuple[str, ...], said: str
) -> None:
    words = (
        command,
        "resnet20",
        "-s",
        "0.5",
        *given,
        *(("-o", str(tmp_path / "made")) if command == "transform" else ()),
    )
    code, out, err = sparseift(*words)
    assert (code, out) == (2, "") and said in err and "hint: leave it out, or use member" in err


@pytest.mark.parametrize("start", [("--preserve-slack", "0.2"), ("--init", "preserve", "--masks", "magnitude")])
def test_an_option_of_the_other_start_is_refused(sparseift: Any, tmp_path: Path, start: tuple[str, ...]) -> None:
    code, out, err = sparseift("transform", "resnet20", "-s", "0.5", "-o", str(tmp_path / "made"), *start)
    assert (code, out) == (2, "") and "does not read it" in err


def test_another_member_leaves_the_options_of_a_recipes_behind(sparseift: Any, tmp_path: Path) -> None:
    """What a recipe says of its own member means nothing to the one that the command line names."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "model: resnet20\nsparsity: 0.5\ntransform: {member: wide, base_width: 24, exclude: [layer3.*]}\n"
    )
    both = (("flops", str(recipe)), ("flops", "resnet20", "-s", "0.5", "--exclude", "layer3.*"))
    counted = [json.loads(sparseift(*words, "-t", "doped", "--json")[1])["totals"] for words in both]
    assert counted[0] == counted[1]


def test_a_plan_of_an_older_version_may_hold_them() -> None:
    kept = TransformSpec(sparsity="0.5").to_json() | {"inner": "norm"}
    assert TransformSpec.from_json(kept) == TransformSpec(sparsity="0.5")


def test_a_recipe_is_told_of_options_that_nothing_reads(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    for text, said in (
        ("transform: {member: wide, inner: norm}\n", ":3:12: transform: inner 'norm' is an option of factorized"),
        ("transform: wide\ninit: {slack: 0.3}\n", ":4:15: init.slack: is for start preserve; fresh would ignore it"),
        ("transform: wide\ninit: {checkpoint: a.pt}\n", "init.checkpoint: is for start preserve"),
    ):
        recipe.write_text("model: resnet20\nsparsity: 0.5\n" + text)
        with pytest.raises(UsageError) as caught:
            load(recipe)
        assert said in caught.value.message
