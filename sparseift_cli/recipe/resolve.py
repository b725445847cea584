"""From the sections of a file to a whole recipe: gaps filled, values checked, the origin of each one remembered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..base.metrics import LOSS, METRICS
from ..base.options import not_read
from ..base.text import shape_text
from ..data import DATASETS
from ..errors import SparseiftError, UsageError, did_you_mean
from ..models.zoo import registry
from ..plan.spec import InitSpec, TransformSpec
from ..sparsity.algorithms import ALGORITHMS
from ..transforms.artifact import is_run
from . import schema
from .defaults import defaults
from .sections import Data
from .strict_yaml import Location, Problems, Value

MESSAGES = {
    "int_type": "expected a whole number, not {value}",
    "int_from_float": "expected a whole number, not {value}",
    "float_type": "expected a number, not {value}",
    "bool_type": "expected true or false, not {value}",
    "string_type": "expected text, not {value}; put it in quotes if it is meant",
    "tuple_type": "expected a list, not {value}",
    "finite_number": "expected a finite number, not {value}",
    "greater_than": "must be above {gt:g}, not {value}",
    "greater_than_equal": "must be at least {ge:g}, not {value}",
    "less_than": "must be below {lt:g}, not {value}",
    "less_than_equal": "must be at most {le:g}, not {value}",
    "too_short": "expected {min_length} values, not {actual_length}",
    "too_long": "expected {max_length} values, not {actual_length}",
}


def resolve(tree: Mapping[str, Value], start: Location, problems: Problems) -> tuple[schema.Spec, dict[str, str]]:
    """The whole recipe, and the origin of each of its values by dotted path.

    Raises:
        UsageError: everything that is wrong, found here or before.
    """
    if "model" not in tree and not any("model" in message for _, message in problems.found):
        problems.add(start, "the recipe names no model: add `model: resnet18`")
    given = {section: value.plain() for section, value in tree.items()}
    _take_checkpoint(given, tree, start, problems)
    filled, label = defaults(given)
    known = {s: {k: v for k, v in values.items() if k in schema.fields(s, values)} for s, values in given.items()}
    merged = {
        s: {**filled.get(s, {}), **known.get(s, {})} for s in (*known, *filled) if s in known or s not in ("model",)
    }
    _check_model(merged.get("model", {}), tree, start, problems)
    spec = _validate(merged, tree, start, problems)
    if spec is not None:
        _check(spec, tree, start, problems)
    problems.stop()
    assert spec is not None
    return spec, _origins(spec, tree, filled, label)


def _take_checkpoint(given: dict[str, Any], tree: Mapping[str, Value], start: Location, problems: Problems) -> None:
    """Of `model: CHECKPOINT`, a file or a run, make the model that it holds and `init.checkpoint`, in place."""
    model, init = given.get("model") or {}, given.get("init") or {}
    name = model.get("name")
    if not isinstance(name, str) or ":" in name or not _is_checkpoint(name):
        return
    where = _location(tree, ["model", "name"], start)
    if "start" not in init:
        problems.add(
            where, f"model: {name} has trained weights: add `init: preserve`, or `init: fresh` to draw new ones"
        )
    if init.get("checkpoint") is not None:
        problems.add(_location(tree, ["init", "checkpoint"], start), f"init.checkpoint: model: {name} is one already")
    try:
        facts = _facts_of_checkpoint(name, init.get("key"))
    except SparseiftError as error:
        problems.add(where, _message("model", error))
        problems.stop()
        return
    given["model"] = {**facts, **{key: value for key, value in model.items() if key != "name"}}
    if init.get("start") == "preserve":
        given["init"] = {**init, "checkpoint": name}


def _is_checkpoint(name: str) -> bool:
    path = Path(name)
    return path.is_file() or is_run(path)


def _facts_of_checkpoint(path: str, key: str | None) -> dict[str, Any]:
    """The section `model` of what a checkpoint file or a run holds.

    Raises:
        SparseiftError: it cannot be read, or fits no model of the zoo.
    """
    if is_run(path):
        from ..runs.directory import dense_request

        request = dense_request(Path(path))
        image = None if request.image is None else shape_text(request.image)
        facts = {"num_classes": request.num_classes, "input": image, "seq": request.seq}
        return {"name": request.source, **{name: value for name, value in facts.items() if value is not None}}
    from ..models.weights import recognised

    try:
        match = recognised(path, key).match
    except UsageError as error:
        hint = f"name its model, and say init: {{start: preserve, checkpoint: {path}}}"
        raise UsageError(error.message, hint=hint) from None
    classes = match.resized_head()
    return {"name": match.model, **({} if classes is None else {"num_classes": classes})}


def _validate(merged: Any, tree: Mapping[str, Value], start: Location, problems: Problems) -> schema.Spec | None:
    name = merged.get("algorithm", {}).get("name")
    try:
        whole = schema.spec_for(name) if isinstance(name, str) else schema.Spec
    except UsageError as error:
        problems.add(_location(tree, ["algorithm", "name"], start), _message("algorithm", error))
        return None
    try:
        return whole.model_validate_json(json.dumps(merged))
    except ValidationError as caught:
        for error in caught.errors(include_url=False):
            path = [part for part in error["loc"] if isinstance(part, int) or _exists(part, error["loc"])]
            if path == ["model"] and error["type"] == "missing":
                continue  # reported above
            problems.add(_location(tree, path, start), f"{_dotted(path)}: {_sentence(error, path)}")
        return None


def _exists(part: str, loc: tuple[int | str, ...]) -> bool:
    """Pydantic puts the chosen variant into the path (`optimizer.sgd.lr`); it is no key of the file."""
    return part == loc[0] or part in schema.fields(str(loc[0]))


def _sentence(error: Any, path: list[int | str]) -> str:
    """A sentence for people: the value, what was expected, what it is for."""
    kind, value, details = error["type"], error["input"], error.get("ctx", {})
    if kind in ("literal_error", "union_tag_invalid"):
        section = str(path[0])
        known = schema.names(section) if kind == "union_tag_invalid" else ()
        if not known and len(path) > 1:
            known = schema.choices(schema.fields(section)[str(path[1])].annotation)
        word = value.get("name") if isinstance(value, dict) else value
        near = did_you_mean(str(word), known)
        return f"{word!r} is not one of {', '.join(known)}" + (f", {near}" if near else "")
    if kind == "extra_forbidden":  # of the variant that a default chose
        tag = error["loc"][1]
        return f"no option of {tag}, known: {', '.join(schema.fields(str(path[0]), {'name': tag}))}"
    if kind == "missing":
        key = path[-1]
        if isinstance(key, int):
            return "expected more values than these"
        return f"needs a value. {schema.fields(str(path[0]))[key].description}"
    if kind == "string_pattern_mismatch":
        return f"{value!r} is not of the form it should have: {schema.fields(str(path[0]))[str(path[1])].description}"
    if kind == "value_error":
        return str(details["error"])
    if kind in MESSAGES:
        return MESSAGES[kind].format(value=json.dumps(value), **details)
    return str(error["msg"])


def _check(spec: schema.Spec, tree: Mapping[str, Value], start: Location, problems: Problems) -> None:
    """What no single field shows: the transform does not contradict itself, and sections agree."""
    if spec.transform is not None:
        try:
            TransformSpec.of(transform_options(spec))
        except SparseiftError as error:
            problems.add(_location(tree, ["transform"], start), _message("transform", error))
    if spec.transform is None and ALGORITHMS.get(spec.algorithm.name).masked:
        reason = "needs a transform and its sparsity; a dense model has no masks"
        problems.add(_location(tree, ["algorithm", "name"], start), f"algorithm: {spec.algorithm.name} {reason}")
    if spec.data is not None:
        _check_splits(spec.data, spec.evaluation.test, tree, start, problems)
    own_weights = ":" in spec.model.name and not spec.model.name.startswith(("torchvision:", "timm:"))
    if spec.init.start == "preserve" and spec.init.checkpoint is None and not own_weights:
        problems.add(
            _location(tree, ["init", "start"], start), "init: preserve needs the dense checkpoint: init.checkpoint"
        )
    for name, declared in not_read(InitSpec, spec.init.start).items():
        if getattr(spec.init, name) != declared.default:
            said = f"init.{name}: is for start {declared.option.only}; {spec.init.start} would ignore it"
            problems.add(_location(tree, ["init", name], start), said)
    _check_metrics(spec, tree, start, problems)
    if spec.checkpoint.best is not None and spec.checkpoint.best not in spec.evaluation.metrics:
        problems.add(
            _location(tree, ["checkpoint", "best"], start),
            f"checkpoint.best: {spec.checkpoint.best} is not among evaluation.metrics",
        )


def _check_metrics(spec: schema.Spec, tree: Mapping[str, Value], start: Location, problems: Problems) -> None:
    """Two metrics of one name would write to one key of metrics.jsonl."""
    by_key: dict[str, str] = {}
    for name in (LOSS.name, *spec.evaluation.metrics):
        metric = METRICS.get(name)
        other = by_key.setdefault(metric.name, name)
        if METRICS.get(other) is not metric:
            problems.add(
                _location(tree, ["evaluation", "metrics"], start),
                f"evaluation.metrics: {other} and {name} are both called {metric.name!r}, so one would hide the other",
            )


def _check_splits(data: Data, test: bool, tree: Mapping[str, Value], start: Location, problems: Problems) -> None:
    """What is held out, and what is left to be a test, as far as the name of the data tells."""
    share, where = data.validation, _location(tree, ["data", "validation"], start)
    source = DATASETS.get(data.name)
    if share is not None and not source.can_hold_out:
        known = ", ".join(name for name in DATASETS if DATASETS.get(name).can_hold_out)
        reason = f"{data.name} has a held-out part of its own; this is for {known}"
        problems.add(where, f"data.validation: {reason}")
    elif share is not None and data.name == "text" and round(100 * share) / 100 != share:
        problems.add(where, f"data.validation: text is cut at a whole per cent, not at {share:g}")
    if test and not source.has_separate_test and not (share and source.can_hold_out):
        held = "has no test split beside the one that is watched"
        more = "; data.validation holds a part of the training images out instead" if source.can_hold_out else ""
        problems.add(_location(tree, ["evaluation", "test"], start), f"evaluation.test: {data.name} {held}{more}")


def _check_model(given: Mapping[str, Any], tree: Mapping[str, Value], start: Location, problems: Problems) -> None:
    """A zoo model exists and takes this input. What pydantic refuses anyway is left to it."""
    name, sides = given.get("name"), str(given.get("input") or "").split("x")
    if not isinstance(name, str) or ":" in name:
        return
    try:
        info = registry.lookup(name)
        image: Any = tuple(map(int, sides)) if all(side.isdecimal() for side in sides) else None
        if info.kind == "image" and image is not None and len(image) != 3:
            raise UsageError(f"{info.name} takes channels x height x width", hint="input: 3x224x224")
        counts = {k: given.get(k) if isinstance(given.get(k), int) else None for k in ("num_classes", "seq")}
        info.with_input(num_classes=counts["num_classes"], seq=counts["seq"], image=image)
    except SparseiftError as error:
        problems.add(_location(tree, ["model", "name"], start), _message("model", error))


def transform_options(spec: schema.Spec) -> dict[str, Any]:
    """The fields of TransformSpec; empty for a dense recipe."""
    if spec.transform is None:
        return {}
    options = spec.transform.model_dump()
    return options | {"sparsity": str(spec.transform.sparsity)}


def _message(section: str, error: SparseiftError) -> str:
    near, question, _ = (error.hint or "").partition("? ")  # what follows a suggestion lists the whole zoo
    return f"{section}: {error.message}" + (f" ({near}{question.strip()})" if error.hint else "")


def _dotted(path: list[int | str]) -> str:
    return ".".join(map(str, path))


def _location(tree: Mapping[str, Value], path: list[int | str], start: Location) -> Location:
    """The location of the value at `path`, or of the nearest section or list around it that is in a file."""
    value = tree.get(str(path[0])) if path else None
    if value is None:
        return start
    for part in path[1:]:
        items: dict[int | str, Value] = value.data if isinstance(value.data, dict) else {}
        if isinstance(value.data, list):
            items = dict(enumerate(value.data))
        if part not in items:
            break
        value = items[part]
    return value.location


def _origins(
    spec: schema.Spec,
    tree: Mapping[str, Value],
    filled: Mapping[str, Mapping[str, Any]],
    label: str,
) -> dict[str, str]:
    found: dict[str, str] = {}
    for section in schema.SECTIONS:
        content = getattr(spec, section)
        for key in type(content).model_fields if content is not None else ():
            written = tree[section].data.get(key) if section in tree else None
            if written is not None:
                found[f"{section}.{key}"] = (
                    written.location.option or f"{written.location.path.name}:{written.location.line}"
                )
            else:
                found[f"{section}.{key}"] = f"default {label}" if key in filled.get(section, {}) else "default"
    return found
