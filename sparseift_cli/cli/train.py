"""`sparseift train`: the signature and the order of work; the loop itself is train/loop.py."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InterruptedRun, SparseiftError, UsageError
from . import options
from .options import Format, without_github

if TYPE_CHECKING:
    from ..recipe.load import Recipe

    Jobs = Sequence[tuple[Recipe, int]]

HELP = """\
Examples:

  sparseift train quickstart/digits_cnn_wide75_rigl              # a minute on a laptop

  sparseift train recipe.yaml --set optimizer.lr=0.05 --seeds 0..2

  sparseift train a.yaml b.yaml --seeds 0..2 --parallel 3        # six runs, three at a time

  sparseift train recipe.yaml --resume latest                    # goes on where it stopped, to the bit

  sparseift train recipe.yaml --dry-run                          # steps, FLOPs, memory; trains nothing

  torchrun --nproc-per-node 2 -m sparseift_cli train recipe.yaml
"""
PARALLEL = (
    "Train so many runs at once, each a process of its own; several GPUs get them in turn. They share the CPU's threads, "
    "and on a CPU bits depend on their number: with --set training.threads=1 they are those of runs in turn."
)
RUNS = Path("runs")
NO_COMPILE = ("training.compile=false", "training.cuda_graph=false")
"""What --no-compile sets: no torch.compile, and no step that is replayed as a CUDA graph."""


app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(cls=options.Command, help=options.help_of("train", HELP))
def train(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="A recipe file, or the name of a shipped one; several train in turn.",
            metavar="RECIPE",
            show_default=False,
        ),
    ],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe. Repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="One run for each: 0..4, or 0,3,7.")] = None,
    parallel: Annotated[int, typer.Option(metavar="N", help=PARALLEL)] = 1,
    resume: Annotated[
        str | None,
        typer.Option(metavar="latest|RUN", help="Go on with the newest run of this recipe and seed, or this one."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of run directories.")] = RUNS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would be, and train nothing.")] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            help="--dry-run: say how long it takes on a device that sustains so many TFLOP/s in dense kernels."
        ),
    ] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the whole recipe with the origin of each value, and stop.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write metrics for TensorBoard.")] = False,
    no_compile: Annotated[
        bool, typer.Option("--no-compile", help="Operation after operation, as a check on the fast path.")
    ] = False,
    events: Annotated[bool, typer.Option("--events", hidden=True)] = False,
    at_once: Annotated[int, typer.Option("--at-once", hidden=True, min=1)] = 1,
    slot: Annotated[int, typer.Option("--slot", hidden=True, min=0)] = 0,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
) -> None:
    from ..recipe import load as loading
    from ..recipe.write import annotated_yaml
    from ..train.parallel import require_one_run, require_parallel

    fmt = without_github(fmt, json, "train")
    given = sets or []
    sets = [*(sets or []), *(NO_COMPILE if no_compile else ())]
    loaded = [_load(recipe, sets) for recipe in recipes]
    if print_recipe:
        sys.stdout.write("---\n".join(map(annotated_yaml, loaded)))
        return
    for recipe in loaded:
        loading.require_data(recipe)
    _require_names(loaded)
    chosen = _seeds(seeds)
    jobs = [(r, seed) for r in loaded for seed in chosen or r.spec.training.seeds or (r.spec.training.seed,)]
    if dry_run:
        from .train_plan import show_plans

        show_plans(loaded, [sum(job[0] is r for job in jobs) for r in loaded], fmt, tflops=_speed(tflops))
        return
    if tflops is not None:
        raise UsageError("--tflops tells how long a --dry-run would take", hint="add --dry-run")
    require_parallel(parallel)
    require_one_run(resume, len(jobs))
    try:
        if parallel > 1 and len(jobs) > 1:
            _run_parallel(jobs, sets, parallel, runs, resume, fmt, tensorboard)
        elif events:
            _run_child(jobs, runs, resume, fmt, tensorboard, (slot, at_once))
        else:
            _run(jobs, runs, resume, fmt, tensorboard)
    except InterruptedRun as stopped:
        import shlex

        flags = {"--tensorboard": tensorboard, "--no-compile": no_compile, "--json": fmt is Format.json}
        words = _again(recipes, given, seeds, parallel, runs, resume, [flag for flag, is_on in flags.items() if is_on])
        stopped.hint = f"go on with: {shlex.join(words)}"
        raise


def _again(
    recipes: list[str],
    sets: list[str],
    seeds: str | None,
    parallel: int,
    runs: Path,
    resume: str | None,
    flags: list[str],
) -> list[str]:
    """The words of the command that goes on with what this one began: runs that are done are read, others resumed or begun."""
    program = ["sparseift"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "sparseift_cli"]
    words = [*program, "train", *recipes, *(word for pair in sets for word in ("--set", pair))]
    words += ["--seeds", seeds] if seeds is not None else []
    words += ["--parallel", str(parallel)] if parallel > 1 else []
    words += ["--runs", str(runs)] if runs != RUNS else []
    return [*words, *flags, "--resume", resume or "latest"]


def _run(jobs: Jobs, runs: Path, resume: str | None, fmt: Format, tensorboard: bool) -> None:
    from .train_progress import Bars, progress
    from .train_view import show_runs

    with progress() as told:
        from ..train.run import run_jobs

        tick = told.tick if isinstance(told, Bars) else None
        results = run_jobs(jobs, runs, resume, told.row, told.note, tick=tick, tensorboard=tensorboard)
    show_runs(results, fmt)


def _run_child(
    jobs: Jobs, runs: Path, resume: str | None, fmt: Format, tensorboard: bool, slot: tuple[int, int]
) -> None:
    from ..train.parallel import Events
    from ..train.processes import Slot
    from ..train.run import run_jobs
    from .train_view import show_runs

    told = Events()
    try:
        results = run_jobs(
            jobs, runs, resume, told.row, told.note, tick=told.tick, tensorboard=tensorboard, slot=Slot(*slot)
        )
    except SparseiftError as error:
        told.error(error)
        raise typer.Exit(error.exit_code) from None
    show_runs(results, fmt)


def _run_parallel(
    jobs: Jobs, sets: list[str], parallel: int, runs: Path, resume: str | None, fmt: Format, tensorboard: bool
) -> None:
    from ..train.parallel import Child, FailedRuns, run_parallel
    from .train_progress import progress
    from .train_view import show_runs

    several = len({recipe.name for recipe, _ in jobs}) > 1
    children = [
        Child(r.path, sets, seed, f"{r.name} seed {seed}" if several else f"seed {seed}", r.spec.training.threads)
        for r, seed in jobs
    ]
    try:
        with progress(several=True) as told:
            results = run_parallel(children, parallel, runs, resume, told, tensorboard=tensorboard)
    except FailedRuns as failed:
        show_runs(failed.finished, fmt)
        raise
    show_runs(results, fmt)


def _load(source: str, sets: list[str]) -> Recipe:
    from ..recipe import load as loading

    path = loading.find(source)
    if path is None:
        raise UsageError(f"{source} is no recipe", hint="give a .yaml file or a name of `sparseift recipe ls`")
    return loading.load(path, sets)


def _require_names(recipes: Sequence[Recipe]) -> None:
    """Runs lie in a folder with the name of their recipe."""
    seen: dict[str, Path] = {}
    for recipe in recipes:
        other = seen.setdefault(recipe.name, recipe.path)
        if other is not recipe.path:
            raise UsageError(
                f"{other} and {recipe.path} are both called {recipe.name}",
                hint="train them one after the other, or rename one",
            )


def _speed(tflops: float | None) -> float | None:
    if tflops is not None and not 0 < tflops < math.inf:
        raise UsageError(f"--tflops {tflops:g} is no speed", hint="a device that sustains 150 TFLOP/s: --tflops 150")
    return tflops


def _seeds(text: str | None) -> list[int]:
    """`0..4` -> [0, 1, 2, 3, 4]; `0,3,7`."""
    if text is None:
        return []
    try:
        seeds = [n for part in text.split(",") for n in _span(part)]
    except ValueError:
        seeds = []
    if len(set(seeds)) != len(seeds):
        raise UsageError(f"--seeds {text!r} names a seed twice", hint="each seed is one run")
    if not seeds or min(seeds) < 0:
        raise UsageError(f"--seeds {text!r} names no seeds", hint="0..4 is 0, 1, 2, 3, 4; or a list: 0,3,7")
    return seeds


def _span(part: str) -> range:
    first, dots, last = part.partition("..")
    return range(int(first), int(last if dots else first) + 1)
