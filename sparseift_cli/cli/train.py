"""`sparseift train`: the signature and the order of work; the loop itself is train/loop.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .formats import Format

if TYPE_CHECKING:
    from ..recipe.load import Recipe

HELP = """Train by a recipe: dense, or transformed with static or moving masks.

Examples:

  sparseift train quickstart/digits_cnn_wide75_rigl              # a minute on a laptop

  sparseift train recipe.yaml --set optimizer.lr=0.05 --seeds 0..2

  sparseift train recipe.yaml --resume latest                    # goes on where it stopped, to the bit

  sparseift train recipe.yaml --dry-run                          # steps, FLOPs, parameters; trains nothing

  torchrun --nproc-per-node 2 -m sparseift_cli train recipe.yaml
"""


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.", show_default=False)],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe. Repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="One run for each: 0..4, or 0,3,7.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="latest|RUN", help="Go on with the newest run of this recipe, or this one.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of run directories.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would be, and train nothing.")] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the whole recipe with the origin of each value, and stop.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write metrics for TensorBoard.")] = False,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
) -> None:
    from ..recipe import load as recipes
    from ..recipe.write import annotated_yaml
    from .train_view import show_plan, show_runs

    fmt = Format.json if json else fmt
    loaded = _load(recipe, sets or [])
    if print_recipe:
        sys.stdout.write(annotated_yaml(loaded))
        return
    recipes.require_data(loaded)
    chosen = _seeds(seeds) or list(loaded.spec.training.seeds) or [loaded.spec.training.seed]
    if dry_run:
        show_plan(loaded, fmt)
        return
    from ..train.run import run_seeds

    lines = _Progress()
    results = run_seeds(loaded, chosen, runs, resume, lines.row, lines.note, tensorboard=tensorboard)
    show_runs(results, fmt)


def _load(source: str, sets: list[str]) -> Recipe:
    from ..errors import UsageError
    from ..recipe import load as recipes

    path = recipes.find(source)
    if path is None:
        raise UsageError(f"{source} is no recipe", hint="give a .yaml file or a name of `sparseift recipe ls`")
    return recipes.load(path, sets)


def _seeds(text: str | None) -> list[int]:
    """`0..4` -> [0, 1, 2, 3, 4]; `0,3,7`."""
    from ..errors import UsageError

    if text is None:
        return []
    try:
        seeds = [n for part in text.split(",") for n in _span(part)]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds {text!r} names no seeds", hint="0..4 is 0, 1, 2, 3, 4; or a list: 0,3,7")
    return seeds


def _span(part: str) -> range:
    first, dots, last = part.partition("..")
    return range(int(first), int(last if dots else first) + 1)


class _Progress:
    """One line on stderr for every line of metrics, with the time that is left."""

    def __init__(self) -> None:
        self.steps = 0
        self.name = ""

    def note(self, text: str, steps: int = 0) -> None:
        self.steps = steps or self.steps
        print(text, file=sys.stderr, flush=True)

    def row(self, row: Mapping[str, Any]) -> None:
        step, seconds = row["step"], row["seconds"]
        left = seconds / step * (self.steps - step) if step else 0.0
        told = [
            f"{k} {row[k]:.4g}"
            for k in ("train_loss", "loss", "top1", "top5", "perplexity", "bits_per_byte")
            if k in row
        ]
        if "itop_rate" in row:
            told.append(f"density {row['density']:.4f}, ever active {row['itop_rate']:.4f}")
        print(f"  step {step:,}/{self.steps:,}  {'  '.join(told)}  {row['flops']:.4g} FLOPs  {_clock(left)} left",
              file=sys.stderr, flush=True)  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
