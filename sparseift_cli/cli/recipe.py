"""`sparseift recipe`: list, show, copy, check, describe and import recipes; the work is in sparseift_cli/recipe/."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .options import Format, without_github

if TYPE_CHECKING:
    from ..recipe.load import Recipe

HELP = """\
Examples:

  sparseift recipe ls

  sparseift recipe show resnet18_cifar100/wide90_rigl --set optimizer.lr=0.05

  sparseift recipe cp quickstart/digits_mlp_wide75_rigl my.yaml

  sparseift recipe validate my.yaml

  sparseift recipe import modelzoo.yaml -o my.yaml
"""

app = typer.Typer(
    help=options.help_of("recipe", HELP), no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
)
command = partial(app.command, cls=options.Command)

Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A file, or the name of a shipped recipe.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set optimizer.lr=1e-3. Repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def opened(name: str, sets: list[str] | None = None) -> Recipe:
    """The recipe called `name`, or in the file `name`."""
    from ..recipe.load import load

    return load(_path(name), sets or [])


def _path(name: str) -> Path:
    from ..errors import UsageError
    from ..recipe.load import find

    path = find(name)
    if path is None:
        raise UsageError(f"{name} is no recipe", hint="give a .yaml file, or a name of: sparseift recipe ls")
    return path


@command(help="List the shipped recipes.\n\nExample:\n\n  sparseift recipe ls --format json")
def ls(fmt: options.FormatOption = Format.table, json: options.Json = False) -> None:
    from ..base.durations import in_words
    from ..base.sheets import Column, Sheet, integer
    from ..plan.members import MEMBERS, written_name
    from ..recipe.catalog import shipped
    from ..recipe.load import load
    from .output import render

    def steps(value: int | str) -> str:
        return value if isinstance(value, str) else integer(value)

    rows: list[dict[str, Any]] = []
    for entry in shipped():
        recipe = load(entry.path)
        spec = recipe.spec
        rows.append(
            {
                "name": entry.name,
                "model": spec.model.name,
                "data": spec.data.name if spec.data else None,
                "transform": written_name(recipe.transform["member"]) if recipe.transform else None,
                "sparsity": spec.transform.sparsity if spec.transform else None,
                "algorithm": spec.algorithm.name,
                "steps": recipe.training.get("steps"),
                "epochs": spec.training.epochs,
                "about": entry.headline,
            }
        )
    columns = [
        Column("name", "recipe"),
        Column("model", "model", priority=3),
        Column("data", "data", priority=2),
        Column("transform", "transform", MEMBERS.canonical, priority=3),
        Column("sparsity", "sparsity", right=True, priority=3),
        Column("algorithm", "algorithm", priority=3),
        Column("steps", "steps", steps, right=True, priority=2),
        Column("about", "what it shows", priority=1),
    ]
    notes = ["See all of one: sparseift recipe show NAME. Its FLOPs: sparseift flops NAME."]
    payload = {"schema": "sparseift.recipes/1", "recipes": rows}
    # how many steps an epoch of text has, only the text itself says: neither it nor the model is opened for a list
    shown = [r if r["steps"] is not None else r | {"steps": in_words(r["epochs"], "epoch")} for r in rows]
    render([Sheet("Shipped recipes", columns, shown, notes)], payload, without_github(fmt, json, "recipe ls"))


@command(
    help="Print a recipe with every value, where it comes from, and what it means.\n\nThe output is a recipe.\n\n"
    "Examples:\n\n  sparseift recipe show quickstart/digits_mlp_dense\n\n"
    "  sparseift recipe show my.yaml --set training.epochs=1 --format json"
)
def show(
    recipe: Name,
    sets: Set = None,
    fmt: Annotated[
        Format | None, typer.Option("--format", "-f", help="A table of the values instead.", show_default="YAML")
    ] = None,
    json: options.Json = False,
) -> None:
    from ..base.sheets import Column, Sheet
    from ..recipe.strict_yaml import flow
    from ..recipe.write import annotated_yaml, entries
    from .output import render, write_result

    found = opened(recipe, sets)
    if fmt is None and not json:
        write_result(annotated_yaml(found))
        return
    fmt = without_github(fmt or Format.table, json, "recipe show")
    columns = [
        Column("key", "key"),
        Column("value", "value", flow),
        Column("origin", "origin", priority=1),
        Column("about", "meaning", priority=2),
    ]
    rows = entries(found)
    payload = {"schema": "sparseift.recipe/1", "path": str(found.path), "values": rows}
    render([Sheet(str(found.path), columns, rows)], payload, fmt)


@command(help="Copy a recipe to start from.\n\nExample:\n\n  sparseift recipe cp resnet18/wide90_rigl my.yaml")
def cp(
    recipe: Name,
    to: Annotated[Path, typer.Argument(help="A file that ends in .yaml, or a folder.", show_default=False)] = Path(),
    force: Force = False,
) -> None:
    from ..recipe.catalog import copy
    from .output import write_result

    write_result(f"{copy(recipe, to, force=force)}\n")


@command(
    help="Check recipes: every key and value, and that the transform can be planned. Exit 2 if one is wrong.\n\n"
    "Example:\n\n  sparseift recipe validate my.yaml other.yaml"
)
def validate(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Files or shipped names.", show_default=False)
    ],
    sets: Set = None,
    plan: Annotated[bool, typer.Option(help="Also plan and audit the transform.")] = True,
) -> None:
    from ..errors import SparseiftError
    from .output import write_result

    worst = 0
    for name in recipes:
        try:
            said = _checked(name, sets, plan)
        except SparseiftError as error:
            worst = max(worst, error.exit_code)
            hint = f"\n  hint: {error.hint}" if error.hint else ""
            typer.echo(f"sparseift: {name}: {error.message}{hint}", err=True)
        else:
            write_result(f"{name}: {said}\n")
    if worst:
        raise typer.Exit(worst)


def _checked(name: str, sets: list[str] | None, plan: bool) -> str:
    from ..errors import SparseiftError
    from ..recipe.sweep import make_sweep

    sweep = make_sweep(_path(name), (), sets or [])
    if sweep is None:
        ratio = _planned(opened(name, sets)) if plan else None
        return "fine" if ratio is None else f"fine, {ratio:.5f}x the dense model's forward FLOPs"
    for recipe in sweep.recipes(sets or []):
        try:
            if plan:
                _planned(recipe)
        except SparseiftError as error:
            error.message = f"{recipe.name}: {error.message}"
            raise
    return f"fine, a sweep of {len(sweep.points)} points"


def _planned(recipe: Recipe) -> float | None:
    """Plan and audit a recipe: forward FLOPs over the dense model's."""
    from ..models.request import Request, parse_input
    from ..models.source import load_table
    from ..plan.audit import audit
    from ..plan.plan import make_plan
    from ..plan.spec import TrainingSpec, TransformSpec

    take = recipe.options.get
    request = Request(recipe.model, take("num_classes"), parse_input(take("input")), take("seq"))
    spec = TransformSpec.of(recipe.transform) if recipe.transform else None
    table, training = load_table(request), TrainingSpec(**recipe.training)
    ratio = audit(make_plan(table, spec, training) if spec else table, training).forward_ratio
    return None if ratio is None else float(ratio)


@command("schema", help="Print what a recipe can say: the JSON schema that editors use, or a page to read.")
def schema_(
    fmt: Annotated[
        str,
        options.choice("--format", "-f", names=("json", "md"), help="How the result is printed.", panel=options.OUTPUT),
    ] = "json",
) -> None:
    from ..errors import one_of
    from ..recipe.schema import json_schema_text, markdown
    from .output import write_result

    one_of("format", fmt, ("json", "md"))
    write_result(json_schema_text() if fmt == "json" else markdown())


@command(
    "import",
    help="Make a recipe of a Cerebras Model Zoo configuration, or of one of the Sparse-IFT authors.\n\n"
    "What cannot be carried over is named on stderr and in the recipe.\n\nExamples:\n\n"
    "  sparseift recipe import params_gpt3_125m.yaml -o my.yaml\n\n"
    "  sparseift recipe import base.yaml sparsewide_rigl.yaml --pick maskopt_sparsity=0.9\n\n"
    "  sparseift recipe import base.yaml sparsewide_rigl.yaml -o folder      # every run of its grid",
)
def import_(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="A file; or a base file, then its experiment.", show_default=False),
    ],
    output: options.Output = None,
    model: Annotated[
        str | None, typer.Option(help="The dense model of a Model Zoo file, where it is not found.")
    ] = None,
    pick: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A run of the experiment's grid. Repeatable.")
    ] = None,
    force: Force = False,
) -> None:
    from ..errors import UsageError
    from ..recipe.catalog import write_new
    from ..recipe.importers import as_recipe, read_foreign
    from .output import write_result

    picks = dict(p.split("=", 1) for p in pick or [] if "=" in p)
    if len(picks) != len(pick or []):
        raise UsageError("--pick takes KEY=VALUE, each key once", hint="--pick maskopt_sparsity=0.9")
    found = read_foreign(files, model=model, picks=picks)
    folder = output is not None and output.is_dir()
    if len(found) > 1 and not folder:
        keys = ", ".join(sorted({i.name for i in found}))
        raise UsageError(
            f"these files describe {len(found)} runs: {keys}",
            hint="give an existing folder with -o, or choose: --pick maskopt_sparsity=0.9",
        )
    for imported in found:
        for note in imported.notes:
            typer.echo(f"not carried over: {note}", err=True)
        if output is None:
            write_result(as_recipe(imported))
        else:
            path = output / f"{imported.name}.yaml" if folder else output
            write_new(path, as_recipe(imported), force=force)
            write_result(f"{path}\n")
