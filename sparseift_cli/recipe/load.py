"""A recipe: model, data, transform and training in YAML. All problems of a file are reported at once, each with its location.

    model: resnet18_cifar            # or {name: resnet18_cifar, num_classes: 100}
    data: cifar100
    transform: wide                  # or {member: wide, match: model, scope: all, ...}
    sparsity: 0.9
    algorithm: rigl                  # or {name: rigl, delta_t: 100, stop: 0.75}

These five lines are a whole recipe; everything else has a default. `sparseift recipe show` prints all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.locations import recipes_dir
from ..errors import UsageError, did_you_mean
from ..models.request import Request, parse_input

if TYPE_CHECKING:
    from .axes import Axis, Point
    from .schema import Spec

# Nothing of pydantic or YAML is imported before a recipe is read: every command imports this module.

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""In which type layers compute, by training.precision."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe file says. `spec` is all of it; the other fields are what counting FLOPs needs."""

    path: Path
    model: str
    options: dict[str, Any]  # num_classes, input, seq
    transform: dict[str, Any]  # fields of TransformSpec; empty for a dense run
    training: dict[str, Any]  # fields of TrainingSpec
    spec: Spec
    origins: Mapping[str, str]
    """Where each value comes from, by dotted path: `recipe.yaml:5`, `--set optimizer.lr=1`, `default for cifar`."""
    sweep: tuple[Axis, ...] = ()
    """The axes of its section `sweep`; the other fields are those without it."""
    point: Point | None = None
    """Where in a sweep it is."""

    @property
    def name(self) -> str:
        """`resnet18_wide90_rigl`, as run directories are called; of a point of a sweep the values that it has there."""
        return self.point.name if self.point else name_of(self.path)


def name_of(path: Path) -> str:
    """The name of the recipe in a file: `resnet18_wide90_rigl` of a shipped one, else the file's."""
    folder = path.resolve().parent
    own = folder.is_relative_to(recipes_dir().resolve())
    return f"{folder.name}_{path.stem}" if own else path.stem


def find(source: str) -> Path | None:
    """The recipe file a source names: a path, or the name of a shipped one with or without `.yaml`; None if it is none."""
    path = Path(source)
    named = path.suffix in (".yaml", ".yml")
    if named and path.is_file():
        return path
    for name in (source, f"{source}.yaml"):
        shipped = recipes_dir() / name
        if name.endswith(".yaml") and "/" in source and shipped.is_file():
            return shipped
    if not named:
        return None
    names = [p.relative_to(recipes_dir()).as_posix() for p in sorted(recipes_dir().glob("*/*.yaml"))]
    raise UsageError(f"no recipe {source}", hint=did_you_mean(source, names) or "see: sparseift recipe ls")


def for_others(given: str) -> str:
    """How another person names the recipe at the absolute path `given`, as `find` takes it; any other text as it is.

    A shipped recipe by its name, also one of another machine's installation; a file below the working directory by its
    path from there; any other file of this machine as it is.
    """
    path = Path(given)
    if path.suffix not in (".yaml", ".yml") or not path.is_absolute():
        return given
    top = recipes_dir()
    try:
        here = Path.cwd()
    except FileNotFoundError:  # the working directory was deleted
        here = path
    if path != here and path.is_relative_to(here) and not path.is_relative_to(top):
        return path.relative_to(here).as_posix()
    if path.suffix != ".yaml" or (path.exists() and not path.is_relative_to(top)):
        return given
    names = {p.relative_to(top).with_suffix("").as_posix() for p in top.glob("*/*.yaml")}
    name = "/".join(path.with_suffix("").parts[-2:])
    return name if path.parent.parent.name == "recipes" and name in names else given


def load(path: Path, sets: Sequence[str] = (), point: Point | None = None) -> Recipe:
    """Read and check a recipe; `sets` are `--set` options, `section.key=value`, which win over the file; `point` over both.

    Raises:
        UsageError: everything wrong with it, as `file:line:column: what`.
    """
    from .axes import take_axes
    from .parse import parse
    from .resolve import resolve, transform_options

    tree, start, problems = parse(path, sets, point.sets if point else ())
    axes = take_axes(tree, problems)
    spec, origins = resolve(tree, start, problems)
    options = {k: v for k, v in spec.model.model_dump().items() if k != "name" and v is not None}
    training = _training(spec, origins)
    return Recipe(path, spec.model.name, options, transform_options(spec), training, spec, origins, axes, point)


def _training(spec: Spec, origins: Mapping[str, str]) -> dict[str, Any]:
    """What TrainingSpec counts with. A dense recipe names no algorithm unless it says so: `--sparsity` may add a transform."""
    algorithm = spec.algorithm
    defaults = {name: field.default for name, field in type(algorithm).model_fields.items()}
    options = {k: str(v) if k == "stop" else v for k, v in algorithm.model_dump(exclude={"name"}).items()}
    counted = {k: options.pop(k, None) for k in ("delta_t", "stop")}
    counted |= {"recompute": spec.training.recompute, "steps": run_steps(spec)}
    given = {k: v for k, v in options.items() if v != defaults[k]}
    if given:
        counted["options"] = given
    if spec.transform is not None or not origins["algorithm.name"].startswith("default"):
        counted["algorithm"] = algorithm.name
    return {k: v for k, v in counted.items() if v is not None}


def resolve_request(request: Request) -> tuple[Request, Recipe | None]:
    """The model that a recipe means, if the source is one; options of the command line win over the recipe's."""
    path = find(request.source)
    if path is None:
        return request, None
    recipe = load(path)
    options = recipe.options
    image = request.image or parse_input(options.get("input"))
    return (
        Request(
            recipe.model,
            request.num_classes or options.get("num_classes"),
            image,
            request.seq or options.get("seq"),
            request.batch if request.batch != 1 else options.get("batch", 1),
        ),
        recipe,
    )


def run_steps(spec: Spec, samples: int | None = None) -> int | None:
    """Optimiser steps of the run over `samples` training samples; without them, of the official size of its data set.

    None where the length depends on the size of data that is not known before it is read.
    """
    from ..base.durations import held_out_images, in_steps, steps_per_epoch
    from ..data import DATASETS

    if spec.training.steps is not None:
        return spec.training.steps
    if samples is None and spec.data is not None and (official := DATASETS.get(spec.data.name).samples):
        samples = official - held_out_images(official, spec.data.validation)
        samples = min(samples, spec.data.limit or samples)
    if samples is None or spec.training.epochs is None:
        return None
    epoch = steps_per_epoch(samples, spec.training.batch_size)
    return max(1, in_steps(spec.training.epochs, run_steps=0, epoch_steps=epoch, unit="epochs"))


def why_masked(spec: Spec) -> str:
    """Why layers keep their zeros whatever the device and the masks; empty where kernels may compute the blocks alone."""
    from ..kernels.registry import AUTO
    from ..optim.optimizers import SHIPPED
    from ..sparsity.algorithms import why_masked

    if reason := why_masked(spec.algorithm.name):
        return reason
    if spec.training.kernels == AUTO and spec.optimizer.name not in SHIPPED:
        return f"the optimiser {spec.optimizer.name} may treat a weight as a matrix"
    return ""


def require_data(recipe: Recipe) -> None:
    """Training needs a data set.

    Raises:
        UsageError: the recipe names none.
    """
    if recipe.spec.data is None:
        raise UsageError(
            f"{recipe.path} names no data, so there is nothing to train on",
            hint="add `data: cifar100`, or --set data=cifar100",
        )
