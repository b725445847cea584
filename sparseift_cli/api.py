"""What `import sparseift_cli` offers: every command as one function that returns the dataclass it prints.

model, plan = transform(model, example_input, member="wide", sparsity=0.9)
print(flops(model).forward_ratio)
save(model, "out")
model = load("out")
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .base.registry import imports_nothing_for
from .base.text import shape_text, some_of
from .checkpoint import Checkpoint
from .errors import ArtifactError, CheckFailed, UsageError, one_of
from .models.request import Request
from .models.source import as_call, build, load_table, shape_of
from .plan.audit import Audit, to_json
from .plan.audit import audit as count
from .plan.plan import Plan, make_plan
from .plan.spec import TrainingSpec, TransformSpec
from .recipe.load import resolve_request
from .table.table import LayerTable
from .transforms.artifact import BUFFERS, MASKS, WEIGHTS, is_artifact, is_run, open_artifact, provenance, write

if TYPE_CHECKING:
    from torch import nn

    from .transforms.export import Exported
    from .transforms.transformation import Options, Transformation

M = TypeVar("M", bound="nn.Module")


def transform(
    model: M,
    example_input: Any,
    *,
    member: str = "wide",
    sparsity: float | str,
    training: TrainingSpec | None = None,
    options: Options | None = None,
    name: str | None = None,
    **spec: Any,
) -> tuple[M, Plan]:
    """A Sparse-IFT copy of `model`, and the plan it was made by; `model` itself is not changed.

    Args:
        model: any module that runs on `example_input`, on any device. On `meta` only shapes are made. Of what torch.compile
            or DataParallel wraps, the module inside: wrap the result again.
        example_input: a tensor, a tuple of positional or a mapping of keyword arguments. Only shapes and dtypes matter.
        member: wide, parallel, factorized or doped.
        sparsity: in [0, 1); 0.9 makes layers 10 times larger and 90 % sparse.
        training: how training FLOPs are counted and, with `match="train"`, matched.
        options: how weights and masks start; see `Options`. By default the sparse and the larger layers get new weights: of
            a trained model say `Options(start="preserve")`, which starts at its function, or `Options(start="fresh")`.
        spec: any other field of TransformSpec: match="model", scope="inner", exclude=("head",), pattern="2:4", ...

    The masks are boolean buffers beside the weights: `sparseift_cli.masks(model)`. After every optimiser step the weights
    that a mask leaves out must be zero again: multiply their gradients by the mask before the step.

    Raises:
        UsageError: nothing can be transformed as asked, or the model does not run on the input.
        CheckFailed: no density fits the budget, or what came out does not cost what was planned.
    """
    from torch import inference_mode

    from .mask.attached import unwrapped
    from .transforms.transformation import transform_module

    if isinstance(model, str | Path):
        raise UsageError(
            f"transform takes a module, not {str(model)!r}",
            hint="build it first, or: sparseift transform SOURCE -o FOLDER",
        )
    model = cast("M", unwrapped(model))
    args, kwargs = as_call(example_input)
    wanted = TransformSpec.of({"member": member, "sparsity": str(sparsity), **spec})
    if options is None or options.start is None:
        _warn_of_trained(model)
    with inference_mode(False):  # what is made there could never be trained
        facts: Any = {"name": name or type(model).__name__, "input_shape": shape_of(args, kwargs)}
        new, done = transform_module(model, args, kwargs, wanted, **facts, training=training, options=options)
    for text in _unexpected(done):
        warnings.warn(text, stacklevel=2)
    return new, done.plan


def _unexpected(done: Transformation) -> Iterator[str]:
    """What grows without being transformed, and what is not kept: the command prints it, Python shows it in no other way."""
    if growth := count(done.plan).growth():
        yield growth
    said = ("not exact", "the deviation cannot", "save_pretrained", "attention scores")
    yield from (note for note in done.notes if note.startswith(said))


def _warn_of_trained(model: nn.Module) -> None:
    """Warn that the weights of a model that shows its training are about to be left behind."""
    from .transforms.initialise import trained_norm

    if norm := trained_norm(model):
        warnings.warn(
            f"this {type(model).__name__} was trained ({norm} has unequal values), and the transformed copy starts with new "
            'weights: options=Options(start="preserve") keeps its function, start="fresh" says that this is meant',
            stacklevel=3,
        )


def flops(
    model: nn.Module | str | Path,
    example_input: Any = None,
    *,
    sparsity: float | str | None = None,
    member: str = "wide",
    training: TrainingSpec | None = None,
    causal: str = "full",
    **spec: Any,
) -> Audit:
    """The FLOP audit of a model: dense, what a transform would make of it, or (of a transformed model) what it was made.

    `model` is a module with an `example_input`, a module that `transform` made, or any SOURCE of the command line:
    "resnet18", "torchvision:resnet50", a recipe, a folder that `save` wrote.

    Raises:
        UsageError: no such source, or nothing can be transformed as asked.
        CheckFailed: no density fits the budget.
    """
    wanted = None
    if sparsity is not None:
        wanted = TransformSpec.of({"member": member, "sparsity": str(sparsity), **spec})
    elif spec or member != "wide":
        raise UsageError("a transform needs its sparsity", hint="flops(model, example_input, sparsity=0.9, ...)")
    if isinstance(model, str | Path):
        model = str(model)
        _require_no_input(model, example_input)
        if is_artifact(model):
            return open_artifact(model).audit(training, causal)
        request, recipe = resolve_request(Request(model))
        if wanted is None and recipe and recipe.transform:
            wanted, training = TransformSpec.of(recipe.transform), training or TrainingSpec(**recipe.training)
        return _count(load_table(request), wanted, training, causal)
    from .transforms.transformation import transformation_of

    done = transformation_of(model)
    if done is not None and wanted is not None:
        raise UsageError(f"this {type(model).__name__} was transformed already", hint="give the dense model")
    if done is not None:
        if example_input is not None:
            _require_planned_input(done, example_input)
        _warn_of_excess(model, done)
        return count(done.plan, training, causal=causal)
    return _count(_table(model, example_input), wanted, training, causal)


def _count(table: LayerTable, spec: TransformSpec | None, training: TrainingSpec | None, causal: str) -> Audit:
    """The audit of a dense model, or of the plan that `spec` makes for it."""
    if spec is None:
        return count(table, training, causal=causal)
    return count(make_plan(table, spec, training, causal=causal))


def audit(model: nn.Module, example_input: Any) -> Audit:
    """The audit of a transformed model, after counting the module itself again: masks, shapes and operations.

    Raises:
        UsageError: `model` was not made by `transform` or read by `load`, or was planned at another input.
        CheckFailed: it does not cost what its plan says (its masks or layers were changed).
    """
    from .transforms.check import measure, require_as_planned

    model, done = _transformed(model, "flops(model, example_input) counts any model")
    _require_planned_input(done, example_input)
    args, kwargs = as_call(example_input)
    masks = _checked_masks(model, done)
    measured, after = measure(_ordinary(model), args, kwargs, done.plan, done.surgery, masks)
    require_as_planned(measured, done.plan, after, after)
    return count(done.plan)


def inspect(source: nn.Module | str | Path, example_input: Any = None) -> LayerTable | Checkpoint:
    """What is in a model (its LayerTable) or in a checkpoint file (its Checkpoint: formats, tensors, sizes).

    Raises:
        UsageError, CheckpointError: no such source, or it cannot be read.
    """
    if not isinstance(source, str | Path):
        return _table(source, example_input)
    source = str(source)
    _require_no_input(source, example_input)
    if is_artifact(source):
        return open_artifact(source).table
    if Path(source).is_file() and not source.endswith((".yaml", ".yml")):
        from .checkpoint import open_checkpoint

        return open_checkpoint(source)
    request, _ = resolve_request(Request(source))
    return load_table(request)


def save(model: nn.Module, path: str | Path, *, force: bool = False, state_dict: bool = False) -> Path:
    """Write a transformed model as a folder of safetensors and JSON, in one step; see `artifact` for what is in it.

    Of layers that `use_kernels` made, the stored blocks are written, without zeros; `load` makes such layers again.

    With `state_dict` also a `state_dict.pt` as torch.save writes it, zeros stored, that any PyTorch code loads, and the
    `config.json` that a Hugging Face model of these sizes, rotary frequencies and eps is built from.

    Raises:
        UsageError: `model` was not made by `transform` or read by `load`.
        CheckFailed: a mask is gone, has lost its pattern or its planned number of non-zeros (GMP and GraNet before their
            last update), or a weight that its mask leaves out is not zero.
        ArtifactError: `path` exists (use `force` to replace a transformed model), or cannot be written.
    """
    from .kernels.convert import block_masks
    from .trace.symbolise import is_config
    from .transforms.export import dense_form
    from .transforms.restore import unsaved_buffers, untied

    model, done = _transformed(model, "torch.save writes any module's state_dict")
    tensors: dict[str, Mapping[str, Any]] = {}
    masks = _checked_masks(model, done)
    if masks is not None:
        in_blocks = block_masks(model)
        kept = {name: in_blocks[name] if name in in_blocks else masks[name] for name in masks}
        tensors = {WEIGHTS: untied(model), MASKS: kept}
        passing = unsaved_buffers(model, done)
        if passing:
            tensors[BUFFERS] = passing
    plain = dense_form(model).state_dict() if state_dict and tensors else None
    documents = _documents(done)
    config: Any = model.__dict__.get("config")
    if plain and is_config(config):
        documents["config"] = json.loads(config.to_json_string())
    return write(path, documents, tensors, state_dict=plain, force=force)


def load(
    path: str | Path,
    *,
    into: nn.Module | None = None,
    trust: bool = False,
    kernels: str = "auto",
    checkpoint: str = "best",
) -> nn.Module:
    """The module that `save` wrote, or the trained one of a run, with its weights and masks, in eval mode on the CPU.

    Args:
        path: a folder of `save` or `sparseift transform`, or a run directory of `sparseift train`.
        into: the dense model it was made from (any weights, or on meta): needed where no source names it.
        kernels: what computes layers that were saved in blocks: "auto", a name in `KERNELS`, or "masked" for dense weights
            with zeros and masks.
        trust: let the folder name code of yours to run: a source, member or pattern written as `package.module:Name`. Without it
            only modules that are imported already count.
        checkpoint: of a run: "best" by its metric (the newest, where none was measured), "last", or a step.

    Raises:
        ArtifactError: the folder is damaged or incomplete.
        UsageError: nothing says how to build the dense model, `into` is another one, or the folder names code to run.
    """
    from torch import inference_mode

    from .transforms.restore import restore

    with inference_mode(False), imports_nothing_for(None if trust else str(path)):  # inference mode: as `transform`
        if not is_run(path):
            return restore(open_artifact(path), into, kernels)
        from .runs.model import load_trained

        if into is not None:
            raise UsageError(f"{path} is a run, which says how its model is built", hint="leave out into=")
        return load_trained(path, str(checkpoint), kernels=kernels, trust=trust).model


def export(
    source: nn.Module | str | Path,
    path: str | Path,
    to: str,
    *,
    example_input: Any = None,
    checkpoint: str = "best",
    trust: bool = False,
    force: bool = False,
) -> Exported:
    """Write a model for other programs, its weights dense with their zeros; in one step, and tried where it can be.

    Args:
        source: a module, a run, or a folder that `save` wrote.
        path: the folder (hf) or file to write.
        to: "hf", "state_dict", "safetensors" or "onnx"; see `transforms.export.FORMATS`.
        example_input: of a module, for hf and onnx: as for `transform`. A run or folder knows its own.
        checkpoint, trust: as for `load`.
        force: replace what an export wrote before.

    Raises:
        UsageError: the form cannot say what the model is, or a package is missing.
        CheckFailed: what was written computes something else.
        ArtifactError: the source cannot be read, or `path` exists or cannot be written.
    """
    from torch import inference_mode

    from .transforms.export import FORMATS, export_model, require_free

    one_of("format", to, tuple(FORMATS))
    require_free(path, to, force=force)
    with inference_mode(False):
        if not isinstance(source, str | Path):
            example = None if example_input is None else as_call(example_input)
            return export_model(source, path, to, example=example, force=force)
        _require_no_input(str(source), example_input)
        with imports_nothing_for(None if trust else str(source)):
            model, request, step = _with_source(source, checkpoint, trust=trust)
            built = build(request) if request and to in ("hf", "onnx") else None
        library, _, folder = request.source.partition(":") if request else ("", "", "")
        done = export_model(
            model,
            path,
            to,
            example=(built.args, built.kwargs) if built else None,
            source=Path(folder) if library == "hf" else None,
            force=force,
        )
        return replace(done, step=step)


def _with_source(path: str | Path, checkpoint: str, *, trust: bool) -> tuple[nn.Module, Request | None, int | None]:
    """The module of a run or folder, with ordinary layers, the dense model that it was made from, and a run's step."""
    from .transforms.restore import restore

    if is_run(path):
        from .runs.model import load_trained

        trained = load_trained(path, str(checkpoint), kernels="masked", trust=trust)
        return trained.model, trained.request, trained.checkpoint.step
    if not is_artifact(path):
        raise ArtifactError(
            f"{path} is neither a run nor a folder of sparseift transform", hint="give a folder of runs/<recipe>/"
        )
    stored = open_artifact(path)
    if not stored.weights.is_file():
        raise UsageError(f"{path} holds a plan without weights", hint="transform again without --plan-only")
    source = stored.provenance.get("source")
    return restore(stored, None, "masked"), Request.from_json(source) if source else None, None


def masks(model: nn.Module) -> dict[str, Any]:
    """Weight name -> boolean mask, for every sparse weight of a transformed model; names as in the module inside wrappers."""
    from .mask.attached import masks_of, unwrapped

    return masks_of(unwrapped(model))


def copy_masks(source: nn.Module, target: nn.Module) -> None:
    """Lay the masks of `source`, as they are now, on a copy of it whose weights went their own way; what they leave out is zero.

    An average of the weights of a run whose masks move (`torch.optim.swa_utils.AveragedModel`: its `.module`) is not sparse:
    every weight that was active at one time or another is in it.

    Raises:
        UsageError: `target` is no copy of `source`: a weight is missing or has another shape.
    """
    from .mask.attached import copy_masks as copy_them

    copy_them(source, target)


def _transformed(model: nn.Module, otherwise: str) -> tuple[nn.Module, Transformation]:
    """The module inside torch.compile and DataParallel, and what was done to it."""
    from .mask.attached import unwrapped
    from .transforms.transformation import transformation_of

    model = unwrapped(model)
    done = transformation_of(model)
    if done is None:
        raise UsageError(f"this {type(model).__name__} was not transformed", hint=otherwise)
    return model, done


def _warn_of_excess(model: nn.Module, done: Transformation) -> None:
    """Say so where the module has more non-zeros than the plan that its audit is of: nothing kept its masks, or not yet."""
    from .mask.attached import unwrapped
    from .transforms.masking import excess_nonzeros

    model = unwrapped(model)
    more = {} if any(p.is_meta for p in model.parameters()) else excess_nonzeros(model, done.surgery.masked)
    if more:
        found, planned = (sum(counts) for counts in zip(*more.values(), strict=True))
        warnings.warn(
            f"this audit is that of the plan, and the module costs more: {found:,} non-zeros in {some_of(more, 3)} "
            f"where {planned:,} were planned. A Sparsifier keeps masks in training; "
            "sparseift.copy_masks(model, model) zeroes what they leave out",
            stacklevel=3,
        )


def _checked_masks(model: nn.Module, done: Transformation) -> Mapping[str, Any] | None:
    """The masks of a transformed model, which its weights obey; None on meta."""
    from .transforms.masking import MasksOf, follow_weights, require_masked

    if any(p.is_meta for p in model.parameters()):
        return None
    masks = MasksOf(model)
    follow_weights(model, masks, done.surgery.masked)
    require_masked(model, masks, done.surgery.masked)
    return masks


def _require_planned_input(done: Transformation, example_input: Any) -> None:
    """Its numbers are those of the input that it was planned at, batch and all."""
    planned, at = tuple(done.plan.table.input), tuple(shape_of(*as_call(example_input)))
    if at != planned:
        raise UsageError(
            f"this {done.plan.table.model} was planned at input {shape_text(planned)}, not {shape_text(at)}",
            hint="transform the dense model at that input",
        )


def _documents(done: Transformation) -> dict[str, dict[str, Any]]:
    plan = done.plan
    return {
        "table": plan.table.to_json(),
        "plan": plan.to_json(),
        "surgery": done.surgery.to_json(),
        "audit": to_json(count(plan)),
        "provenance": provenance(
            source=done.source,
            training=plan.training.to_json(),
            causal="full",
            options=done.options.to_json(),
            dead=list(done.unconnected),
            deviation=done.deviation,
            notes=list(done.notes),
        ),
    }


def _ordinary(model: nn.Module) -> nn.Module:
    """The model, or a copy of it with the ordinary layers that its layers of stored blocks stand for: what is counted."""
    from copy import deepcopy

    from .kernels.convert import block_masks, to_masked

    if block_masks(model):
        model = deepcopy(model)
        to_masked(model)
    return model


def _require_no_input(source: str, example_input: Any) -> None:
    """A source is counted at its own input; an input given beside it would be ignored."""
    if example_input is not None:
        raise UsageError(
            f"{source} brings its own input, and example_input is for a module",
            hint="give the module, or on the command line --input and --seq",
        )


def _table(model: nn.Module, example_input: Any) -> LayerTable:
    if example_input is None:
        raise UsageError("a module is counted at an input", hint="give example_input: a tensor, a tuple or a mapping")
    from .trace.build import trace

    args, kwargs = as_call(example_input)
    return trace(_ordinary(model), args, kwargs, name=type(model).__name__, input_shape=shape_of(args, kwargs)).table


__all__ = [
    "Audit",
    "CheckFailed",
    "Checkpoint",
    "LayerTable",
    "Plan",
    "TrainingSpec",
    "TransformSpec",
    "audit",
    "build",
    "copy_masks",
    "export",
    "flops",
    "inspect",
    "load",
    "masks",
    "save",
    "transform",
]
