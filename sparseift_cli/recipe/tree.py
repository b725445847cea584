"""A recipe file as a tree of sections whose values know where they stand: short forms written out, `--set` applied.

Here stands everything that is wrong with names; what is wrong with values is found in `resolve`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import UsageError, did_you_mean
from ..sparsity.algorithms import own_options
from . import schema
from .strict_yaml import Problems, Spot, Value, read_option

ONE_OF_TWO = {("training", "epochs"): "steps", ("training", "steps"): "epochs"}
MOVED = {
    ("algorithm", "steps"): "the length of the run is training.steps, or training.epochs",
    ("algorithm", "recompute"): "activation checkpointing is training.recompute",
    ("algorithm", "schedule"): "how the drop fraction falls is algorithm.decay",
    ("model", "batch"): "the samples of a step are training.batch_size",
    ("data", "seq"): "the tokens in a sample are model.seq",
    ("training", "lr"): "the learning rate is optimizer.lr",
    ("optimizer", "warmup"): "the warm-up is schedule.warmup",
}


def sections(document: Value, options: Sequence[str], problems: Problems) -> dict[str, Value]:
    """The sections of a recipe as mappings, unknown keys told and left out, `options` (`a.b=value`) put in."""
    if not isinstance(document.data, dict):
        problems.add(document.spot, "a recipe is a mapping of keys to values")
        problems.stop()
    tree: dict[str, Value] = {}
    for key, value, spot in document.items():
        if key in schema.SECTIONS:
            section = _expand(key, value, problems)
            if section is not None:
                tree[key] = section
        elif key != schema.SPARSITY:
            _unknown(spot, key, (*schema.SECTIONS, schema.SPARSITY), problems)
    if schema.SPARSITY in document.data:
        value, spot = document.data[schema.SPARSITY], document.key_spots[schema.SPARSITY]
        if schema.SPARSITY in (tree["transform"].data if "transform" in tree else {}):
            problems.add(spot, "sparsity is given twice: here and under transform")
        put(tree, "transform", schema.SPARSITY, value, spot)
    for option in options:
        _set(tree, option, problems)
    if "algorithm" in tree:
        tree["algorithm"] = _without_idle_options(tree["algorithm"])
    for section, value in tree.items():
        _check_keys(section, value, problems)
    return {section: _with_lists(section, value) for section, value in tree.items()}


def put(tree: dict[str, Value], section: str, key: str, value: Value, spot: Spot) -> None:
    """Set one value of a section, which is made where it is missing."""
    old = tree.get(section) or Value({}, spot, {})
    drop = ONE_OF_TWO.get((section, key)) if spot.option else None  # a length on the command line replaces the file's
    kept = {k: v for k, v in old.data.items() if k != drop}
    tree[section] = Value({**kept, key: value}, old.spot, {**old.key_spots, key: spot})


def _without_idle_options(value: Value) -> Value:
    """The algorithm's section without options that it does not have, where they say nothing about it.

    Every algorithm used to have the same five, so whole recipes written then have them all. And `--set algorithm=static`
    keeps the other lines of a section that was written for another algorithm.
    """
    given = value.plain()
    name, replaced = given.get("name"), value.key_spots.get("name")
    if not isinstance(name, str):
        return value
    try:
        kept = own_options(name, given, whatever_value=bool(replaced and replaced.option))
    except UsageError:  # no such algorithm; `resolve` says so
        return value
    set_now = {k for k, spot in value.key_spots.items() if spot.option}
    kept = {k: v for k, v in value.data.items() if k in kept or k in set_now}
    return Value(kept, value.spot, {k: spot for k, spot in value.key_spots.items() if k in kept})


def _expand(section: str, value: Value, problems: Problems) -> Value | None:
    """`optimizer: sgd` as `optimizer: {name: sgd}`; None where there is nothing in it."""
    if isinstance(value.data, dict):
        return value
    short = schema.short(section)
    if isinstance(value.data, str) and short:
        return Value({short: value}, value.spot, {short: value.spot})
    if value.data is not None:
        problems.add(value.spot, f"{section}: expected a {'name or a ' if short else ''}mapping, not {value.plain()!r}")
    return None


def _set(tree: dict[str, Value], option: str, problems: Problems) -> None:
    """Apply `--set section.key=value`, or `--set section=name` for its short form; null takes a value (a section) out."""
    path, equals, text = option.partition("=")
    spot = Spot(0, 0, f"--set {option}")
    section, _, key = path.strip().partition(".")
    if not equals:
        problems.add(spot, "expected KEY=VALUE, as in --set optimizer.lr=1e-3")
        return
    if (section, key) == (schema.SPARSITY, ""):
        section, key = "transform", schema.SPARSITY
    if section not in schema.SECTIONS:
        _unknown(spot, section, (*schema.SECTIONS, schema.SPARSITY), problems)
        return
    value = read_option(text, spot, problems)
    if not key and value.data is None:
        tree.pop(section, None)
        return
    key = key or schema.short(section) or ""
    if not key:
        problems.add(spot, f"which value of {section}? {_known(schema.fields(section))}")
    elif key in (known := schema.fields(section) | _fields_now(tree, section)):
        put(tree, section, key, _as_typed(value, text, known[key].annotation, problems), spot)
    else:
        _unknown(spot, key, known, problems, section)


def _fields_now(tree: Mapping[str, Value], section: str) -> dict[str, Any]:
    """The fields of the variant that the tree names now, which can be one from outside this package."""
    return schema.fields(section, tree[section].plain()) if section in tree else {}


def _as_typed(value: Value, text: str, annotation: Any, problems: Problems) -> Value:
    """`value`, or what `text` means here: a list may be written `a,b,c` or `0..4`; where text is meant, 12 is text."""
    spot = value.spot
    if _is_list(annotation) and (_is_scalar(value) or not text.strip()):
        first, dots, last = text.partition("..")
        if dots and first.isdigit() and last.isdigit() and int(last) - int(first) < 10_000:
            return Value([Value(n, spot, {}) for n in range(int(first), int(last) + 1)], spot, {})
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return Value([read_option(part, spot, problems) for part in parts], spot, {})
    if annotation is str or (str(annotation) == "str | None" and value.data is not None):
        return Value(text, spot, {})
    return value


def _with_lists(section: str, value: Value) -> Value:
    """One word where a list is meant is a list of one: `metrics: loss`."""
    known = schema.fields(section)
    data = {
        key: Value([item], item.spot, {})
        if key in known and _is_list(known[key].annotation) and _is_scalar(item)
        else item
        for key, item in value.data.items()
    }
    return Value(data, value.spot, value.key_spots)


def _is_list(annotation: Any) -> bool:
    return str(annotation).startswith("tuple")


def _is_scalar(value: Value) -> bool:
    return value.data is not None and not isinstance(value.data, list | dict)


def _check_keys(section: str, value: Value, problems: Problems) -> None:
    known = schema.fields(section, value.plain())
    every = schema.fields(section)
    for key, _, spot in value.items():
        if key in known:
            continue
        if key in every:
            problems.add(spot, f"{section}.{key}: no option of {value.data['name'].plain()}, {_known(known)}")
        else:
            _unknown(spot, key, known, problems, section)


def _unknown(spot: Spot, key: str, known: Iterable[str], problems: Problems, section: str = "") -> None:
    if not section and (others := [s for s in schema.SECTIONS if key in schema.fields(s)]):
        hint = f"{key} belongs under {' or '.join(others)}"
    else:
        hint = MOVED.get((section, key)) or did_you_mean(key, known) or _known(known)
    problems.add(spot, f"unknown key '{key}', {hint}")


def _known(known: Iterable[str]) -> str:
    return f"known: {', '.join(known)}"
