"""From a SOURCE or a checkpoint file to a transformed module: all that `sparseift transform` does before it writes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..models.request import Request
from ..models.source import Built, build
from ..models.weights import load_into, recognised
from ..plan.spec import TrainingSpec, TransformSpec
from .initialise import trained_norm
from .transformation import Options, Transformation, record, transform_module

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoint import Checkpoint
    from ..checkpoint.recognise import Match


def convert(
    request: Request,
    spec: TransformSpec,
    *,
    checkpoint: str | None = None,
    key: str | None = None,
    dense: nn.Module | None = None,
    training: TrainingSpec | None = None,
    options: Options | None = None,
    plan_only: bool = False,
) -> tuple[nn.Module, Transformation]:
    """Build the model of `request`, load the weights of `checkpoint` into it, transform it.

    Args:
        request: what to build. Without a source, the zoo model that fits the checkpoint is built.
        checkpoint: path of a file with weights; `key` names the state dict in it, where it has several.
        dense: the trained module of `request` itself, as a run has it, in place of a checkpoint.
        training: how training FLOPs are counted and, with match train, matched.
        plan_only: stay on the meta device: planned, resized and counted, without memory for weights.

    Returns:
        The transformed module, and the record of what was done, with the source in it.

    Raises:
        UsageError, CheckpointError: no such source, a checkpoint that does not fit it, or trained weights without a choice of
            what becomes of them (`Options.start`).
        CheckFailed: no density fits the budget, or the new module does not have the planned cost.
    """
    chosen = plan_only or (options is not None and options.start is not None)
    if checkpoint is not None and not chosen:
        raise _undecided(f"{checkpoint} has trained weights")
    built, request = build_trained(request, checkpoint, key, plan_only=plan_only)
    if dense is not None:
        built = replace(built, model=dense, trained=True)
    if not chosen and built.trained:
        raise _undecided(f"{request.source} has trained weights")
    if not chosen and (norm := trained_norm(built.model)):
        raise _undecided(f"{request.source} has trained weights ({norm} has unequal values)")
    new, done = transform_module(
        built.model,
        built.args,
        built.kwargs,
        spec,
        name=built.name,
        input_shape=built.input_shape,
        training=training,
        options=options,
    )
    done = replace(done, source=request.to_json())
    record(new, done)
    return new, done


def build_trained(
    request: Request, checkpoint: str | None = None, key: str | None = None, *, plan_only: bool = False
) -> tuple[Built, Request]:
    """The dense model with the weights of `checkpoint`, and the request that the checkpoint completes (name, classes).

    Raises:
        UsageError, CheckpointError: no such source, or a checkpoint that does not fit it.
    """
    opened: Checkpoint | None = None
    match: Match | None = None
    if checkpoint is not None:
        opened, match, request = _with_checkpoint(request, checkpoint, key)
    built = build(request, device="meta" if plan_only else "cpu")
    if opened is not None and not plan_only:
        load_into(built.model, opened, match)
    return built, request


def _undecided(what: str) -> UsageError:
    return UsageError(
        f"{what}, and nothing says what becomes of them",
        hint="--init preserve starts at the function that they compute, --init fresh draws new ones (in a recipe: "
        "init: preserve, or init: fresh)",
    )


def _with_checkpoint(request: Request, path: str, key: str | None) -> tuple[Checkpoint, Match | None, Request]:
    """Open the checkpoint; find the model that it fits, and complete the request from it (name, classes)."""
    from ..checkpoint import open_checkpoint
    from ..checkpoint.recognise import load_catalogue, recognise
    from ..models.zoo import registry

    if not request.source:
        fit = recognised(path, key)
        classes = request.num_classes or fit.match.resized_head()
        if fit.match.resized_vocabulary() and not fit.match.resized_head():
            raise UsageError(
                f"{path} is a {fit.match.model} with {fit.match.resized_vocabulary():,} tokens",
                hint="--model package.module:callable builds it with that vocabulary",
            )
        return fit.checkpoint, fit.match, replace(request, source=fit.match.model, num_classes=classes)
    opened = open_checkpoint(path, key=key)
    if ":" in request.source:
        return opened, None, request
    name = registry.lookup(request.source).name
    catalogue = {name: load_catalogue()[name]}
    match = next(iter(recognise({t.name: t.shape for t in opened.tensors}, catalogue)), None)
    if match is not None and request.num_classes is None:
        request = replace(request, num_classes=match.resized_head())
    return opened, match, request
