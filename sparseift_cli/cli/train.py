"""`sparseift train`: the signature and the order of work; the loop itself is train/loop.py."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InterruptedRun, SparseiftError, UsageError
from . import options
from .options import Format, without_github

if TYPE_CHECKING:
    from ..recipe.load import Recipe
    from ..recipe.sweep import Sweep

    Jobs = Sequence[tuple[Recipe, int]]

HELP = """\
Examples:

  sparseift train quickstart/digits_cnn_wide75_rigl              # a minute on a laptop

  sparseift train recipe.yaml --set optimizer.lr=0.05 --seeds 0..2

  sparseift train a.yaml b.yaml --seeds 0..2 --parallel 3        # six runs, three at a time

  sparseift train recipe.yaml --sweep sparsity=0.5,0.75 --sweep algorithm=set,rigl --seeds 0..2 --with-dense

  sparseift train recipe.yaml --resume latest                    # goes on where it stopped, to the bit

  sparseift train recipe.yaml --dry-run                          # steps, FLOPs, memory; trains nothing

  torchrun --nproc-per-node 2 -m sparseift_cli train recipe.yaml

  sparseift train --evaluate-only RUN --set data.root=photos2    # measures a checkpoint of a run; trains nothing
"""
PARALLEL = (
    "Train so many runs at once, each a process of its own; several GPUs get them in turn. They share the CPU's threads, "
    "and on a CPU bits depend on their number: with --set training.threads=1 they are those of runs in turn."
)
RUNS = Path("runs")
NO_COMPILE = ("training.compile=false", "training.cuda_graph=false")
"""What --no-compile sets: no torch.compile, and no step that is replayed as a CUDA graph."""


app = typer.Typer(add_completion=False, rich_markup_mode="rich")


_RUNS_PANEL = "Runs"
_CHECKS = "Look before training"
_MEASURE = "Measure a run"
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe. Repeatable."),
]
Seeds = Annotated[str | None, typer.Option(help="One run for each: 0..4, or 0,3,7.", rich_help_panel=_RUNS_PANEL)]
SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE,VALUE",
        help="Train every combination of these values, each as --set would. Repeatable: an axis each. The same command goes "
        "on with what is not finished.",
        rich_help_panel=_RUNS_PANEL,
    ),
]
WithDense = Annotated[
    bool,
    typer.Option(
        "--with-dense",
        help="--sweep: train the dense model too, as long as the sparse ones.",
        rich_help_panel=_RUNS_PANEL,
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="latest|RUN",
        help="Continue with the newest run of this recipe and seed, or this one.",
        rich_help_panel=_RUNS_PANEL,
    ),
]
Tflops = Annotated[
    float | None,
    typer.Option(
        help="--dry-run: print how long it takes on a device that sustains so many TFLOP/s in dense kernels.",
        rich_help_panel=_CHECKS,
    ),
]
NoCompile = Annotated[
    bool,
    typer.Option(
        "--no-compile", help="Operation after operation, as a check on the fast path.", rich_help_panel=_RUNS_PANEL
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print steps, FLOPs and memory of the run, and train nothing.", rich_help_panel=_CHECKS
    ),
]
PrintRecipe = Annotated[
    bool,
    typer.Option(
        "--print-recipe", help="Print the whole recipe with the origin of each value.", rich_help_panel=_CHECKS
    ),
]
EvaluateOnly = Annotated[
    bool,
    typer.Option(
        "--evaluate-only",
        help="Measure the checkpoint of runs, given in place of recipes, on their data or that of --set data.root=...; nothing "
        "is trained or written.",
        rich_help_panel=_MEASURE,
    ),
]


@app.command(cls=options.Command, help=options.help_of("train", HELP))
def train(
    recipes: Annotated[
        list[str],
        typer.Argument(
            help="A recipe file, or the name of a shipped one; several train in turn. With --evaluate-only runs.",
            metavar="RECIPE",
            show_default=False,
        ),
    ],
    sets: Set = None,
    seeds: Seeds = None,
    sweep: SweepOption = None,
    with_dense: WithDense = False,
    parallel: Annotated[int, typer.Option(metavar="N", help=PARALLEL, rich_help_panel=_RUNS_PANEL)] = 1,
    resume: Resume = None,
    runs: Annotated[Path, typer.Option(help="Folder of run directories.", rich_help_panel=_RUNS_PANEL)] = RUNS,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write metrics for TensorBoard.", rich_help_panel=_RUNS_PANEL)
    ] = False,
    no_compile: NoCompile = False,
    dry_run: DryRun = False,
    tflops: Tflops = None,
    print_recipe: PrintRecipe = False,
    evaluate_only: EvaluateOnly = False,
    checkpoint: Annotated[str | None, options.checkpoint_of_a_run(_MEASURE)] = None,
    trust: Annotated[bool, options.trust_of_a_folder(_MEASURE)] = False,
    events: Annotated[bool, typer.Option("--events", hidden=True)] = False,
    at_once: Annotated[int, typer.Option("--at-once", hidden=True, min=1)] = 1,
    slot: Annotated[int, typer.Option("--slot", hidden=True, min=0)] = 0,
    point: Annotated[str | None, typer.Option("--point", hidden=True)] = None,
    fmt: options.FormatOption = Format.table,
    json: options.Json = False,
) -> None:
    fmt = without_github(fmt, json, "train")
    if evaluate_only:
        of_training = {"--seeds": seeds, "--resume": resume, "--dry-run": dry_run, "--print-recipe": print_recipe}
        of_training |= {"--sweep": sweep, "--with-dense": with_dense}
        _measure(recipes, sets or [], checkpoint, fmt, of_training, trust=trust)
        return
    if checkpoint is not None or trust:
        raise UsageError("--checkpoint and --trust are for --evaluate-only", hint="a recipe is trained from its start")
    where = (seeds, parallel, runs, resume, fmt, tensorboard, no_compile)
    asked = TrainArguments(recipes, sets or [], *where, tuple(sweep or ()), with_dense)
    swept = _sweep(asked)
    loaded = _load(asked, swept, point)
    if print_recipe:
        from ..recipe.write import annotated_yaml
        from .output import write_result

        write_result("---\n".join(map(annotated_yaml, loaded)))
        return
    jobs = _jobs(loaded, _seeds(seeds))
    if dry_run:
        _show_budget(loaded, jobs, swept, fmt, _speed(tflops))
    elif tflops is not None:
        raise UsageError("--tflops is only for --dry-run", hint="add --dry-run")
    else:
        _train(jobs, asked, swept, (slot, at_once) if events else None)


@dataclass(frozen=True, slots=True)
class TrainArguments:
    """What the command line asks for, apart from looking only. The same words begin a run and continue with it."""

    recipes: list[str]
    sets: list[str]
    seeds: str | None
    parallel: int
    runs: Path
    resume: str | None
    fmt: Format
    tensorboard: bool
    no_compile: bool
    sweep: tuple[str, ...] = ()
    with_dense: bool = False

    @property
    def all_sets(self) -> list[str]:
        """The `--set` options, and those that another option means."""
        return [*self.sets, *(NO_COMPILE if self.no_compile else ())]

    def words_to_resume(self) -> list[str]:
        """The command that continues with what this one began: finished runs are read, others resumed or begun."""
        program = ["sparseift"]
        if "TORCHELASTIC_RUN_ID" in os.environ:
            program = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "sparseift_cli"]
        words = [*program, "train", *self.recipes, *(word for pair in self.sets for word in ("--set", pair))]
        words += self.sweep_words()
        words += ["--seeds", self.seeds] if self.seeds is not None else []
        words += ["--parallel", str(self.parallel)] if self.parallel > 1 else []
        words += ["--runs", str(self.runs)] if self.runs != RUNS else []
        words += ["--tensorboard"] if self.tensorboard else []
        words += ["--no-compile"] if self.no_compile else []
        words += ["--json"] if self.fmt is Format.json else []
        return [*words, "--resume", self.resume or "latest"]

    def root(self, sweep: Sweep | None) -> Path:
        """Where the folders of runs are."""
        return self.runs / sweep.folder if sweep else self.runs

    def resuming(self, sweep: Sweep | None) -> str | None:
        """`--resume`; a sweep goes on without being asked."""
        return self.resume or ("latest" if sweep else None)

    def sweep_words(self) -> list[str]:
        """The options that make a sweep."""
        words = [word for axis in self.sweep for word in ("--sweep", axis)]
        return [*words, "--with-dense"] if self.with_dense else words


def _sweep(asked: TrainArguments) -> Sweep | None:
    """The sweep that `--sweep` options, or the recipe's section `sweep`, ask for."""
    from ..recipe.sweep import make_sweep

    made = [
        make_sweep(_find(recipe), asked.sweep, asked.all_sets, with_dense=asked.with_dense) for recipe in asked.recipes
    ]
    if not any(made):
        if asked.with_dense:
            raise UsageError("--with-dense is for a sweep", hint="--sweep sparsity=0.5,0.75 --with-dense")
        return None
    if len(made) > 1:
        raise UsageError(
            "a sweep is of one recipe", hint="train them one after the other, or sweep over models: --sweep model=a,b"
        )
    return made[0]


def _load(asked: TrainArguments, sweep: Sweep | None, point: str | None) -> list[Recipe]:
    from ..recipe.load import load

    if sweep is not None:
        return sweep.recipes(asked.all_sets, point)
    return [load(_find(recipe), asked.all_sets) for recipe in asked.recipes]


def _measure(
    runs: list[str],
    sets: list[str],
    checkpoint: str | None,
    fmt: Format,
    of_training: Mapping[str, object],
    *,
    trust: bool,
) -> None:
    """Measure a checkpoint of each run and show what was found beside what the run found.

    Raises:
        UsageError: an option of training is given; a run cannot be measured.
    """
    if given := [name for name, value in of_training.items() if value]:
        raise UsageError(
            f"--evaluate-only trains nothing, and {given[0]} is for training", hint="leave out one of the two"
        )
    from ..train.measure import measure_run
    from .train_view import show_measured

    show_measured([measure_run(run, checkpoint or "best", sets, trust=trust) for run in runs], fmt)


def _jobs(recipes: Sequence[Recipe], seeds: list[int]) -> Jobs:
    """Every recipe with every seed, its own seeds where none are given."""
    from ..recipe.load import require_data

    for recipe in recipes:
        require_data(recipe)
    _require_names(recipes)
    return [(r, seed) for r in recipes for seed in seeds or r.spec.training.seeds or (r.spec.training.seed,)]


def _show_budget(recipes: Sequence[Recipe], jobs: Jobs, sweep: Sweep | None, fmt: Format, tflops: float | None) -> None:
    times = [sum(recipe is r for recipe, _ in jobs) for r in recipes]
    if sweep is None:
        from .train_view import show_plans

        show_plans(recipes, times, fmt, tflops=tflops)
    else:
        from .sweep_view import show_budget

        show_budget(sweep, recipes, times, fmt, tflops=tflops)


def _train(jobs: Jobs, asked: TrainArguments, sweep: Sweep | None, slot: tuple[int, int] | None) -> None:
    """Train the jobs here or in processes of their own; with `slot`, as such a process.

    Raises:
        InterruptedRun: a signal stopped it; the hint is the command that goes on.
        FailedRuns: of several runs that do not stop each other, some failed; what the others gave is shown.
    """
    from ..train.parallel import FailedRuns, require_one_run, require_parallel
    from .sweep_view import refused_points, show_sweep
    from .train_view import show_runs

    require_parallel(asked.parallel)
    require_one_run(asked.resume, len(jobs))
    if slot is not None:
        _run_child(jobs, asked, sweep, slot)
        return
    refused = refused_points([recipe for recipe, _ in jobs]) if sweep else {}
    for failure in refused.values():
        typer.echo(f"{failure.label} is refused: {failure.message}", err=True)
    left = [(recipe, seed) for recipe, seed in jobs if recipe.name not in refused]
    failures = list(refused.values())
    try:
        results = (_run_parallel if asked.parallel > 1 and len(left) > 1 else _run)(left, asked, sweep)
    except InterruptedRun as stopped:
        stopped.hint = f"continue with: {shlex.join(asked.words_to_resume())}"
        raise
    except FailedRuns as failed:
        results, failures = list(failed.finished), [*failures, *failed.failures]
    if sweep is not None:
        show_sweep(sweep, results, failures, asked.root(sweep), asked.fmt)
    else:
        show_runs(results, asked.fmt)
    if failures:
        order = [recipe.name for recipe, _ in jobs]
        failures.sort(key=lambda failure: order.index(failure.recipe))
        failed = FailedRuns(failures, results, len(jobs))
        if sweep is not None and asked.fmt is Format.table:
            failed.message = f"{failed.message.splitlines()[0]}; the table says why"
        raise failed


def _run(jobs: Jobs, asked: TrainArguments, sweep: Sweep | None) -> list[dict[str, Any]]:
    from .progress import Bars, progress

    with progress() as shown:
        from ..train.run import run_jobs

        return run_jobs(
            jobs,
            asked.root(sweep),
            asked.resuming(sweep),
            shown.row,
            shown.note,
            tick=shown.tick if isinstance(shown, Bars) else None,
            tensorboard=asked.tensorboard,
            keep_going=sweep is not None,
        )


def _run_child(jobs: Jobs, asked: TrainArguments, sweep: Sweep | None, slot: tuple[int, int]) -> None:
    """One of the processes of --parallel: progress goes to the parent as events."""
    from ..train.parallel import Events
    from ..train.processes import Slot
    from ..train.run import run_jobs
    from .train_view import show_runs

    events = Events()
    try:
        results = run_jobs(
            jobs,
            asked.root(sweep),
            asked.resuming(sweep),
            events.row,
            events.note,
            tick=events.tick,
            tensorboard=asked.tensorboard,
            slot=Slot(*slot),
        )
    except SparseiftError as error:
        events.error(error)
        raise typer.Exit(error.exit_code) from None
    show_runs(results, asked.fmt)


def _run_parallel(jobs: Jobs, asked: TrainArguments, sweep: Sweep | None) -> list[dict[str, Any]]:
    from ..train.parallel import Child, run_parallel
    from .progress import progress

    several = len({recipe.name for recipe, _ in jobs}) > 1
    children = [
        Child(
            r.path,
            asked.all_sets,
            seed,
            f"{r.name} seed {seed}" if several else f"seed {seed}",
            r.spec.training.threads,
            r.name,
            [*asked.sweep_words(), "--point", r.name] if sweep else (),
        )
        for r, seed in jobs
    ]
    with progress(several=True) as shown:
        return run_parallel(
            children, asked.parallel, asked.runs, asked.resuming(sweep), shown, tensorboard=asked.tensorboard
        )


def _find(source: str) -> Path:
    from ..recipe.load import find

    path = find(source)
    if path is None:
        raise UsageError(f"{source} is no recipe", hint="give a .yaml file or a name of `sparseift recipe ls`")
    return path


def _require_names(recipes: Sequence[Recipe]) -> None:
    """Two recipes of one name would share a folder of runs."""
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
