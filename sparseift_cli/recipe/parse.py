"""From the text of a recipe, and of those it extends, to sections whose values have locations.

Short forms are written out and `--set` options applied.

A recipe may say `extends: dense`: a file next to it, or the name of a shipped recipe (`resnet18/dense`). It then has the values
of that recipe, which may extend another one, and its own win: mappings are merged key by key, lists and words are replaced,
null removes. Names that are wrong are found here, values that are wrong in `resolve`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.locations import recipes_dir
from ..errors import UsageError, did_you_mean
from ..sparsity.algorithms import own_options
from . import schema
from .strict_yaml import Location, Problems, Value, read, read_option

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


def parse(
    path: Path, options: Sequence[str] = (), point: Sequence[str] = ()
) -> tuple[dict[str, Value], Location, Problems]:
    """The sections of a recipe as mappings, where its file begins, and what is wrong so far; unknown keys are reported.

    A section `sweep` is there as it is written: `axes.take_axes` reads it.

    Args:
        path: the file.
        options: `--set` options, `section.key=value`, which win over the files.
        point: the same of one point of a sweep, which win over the options.

    Raises:
        UsageError: a file cannot be read, is not YAML or not a mapping, or there is no file that it extends.
    """
    chain, problems = _read_chain(path)
    tree: dict[str, Value] = {}
    for document in reversed(chain):  # the recipe itself is the first of the chain, and wins
        tree = _merge(tree, _sections(document, problems))
    tree = {section: value for section, value in tree.items() if value.data is not None}
    for option in options:
        _set(tree, option, problems)
    for option in point:
        _set(tree, option, problems, "--sweep")
    if "algorithm" in tree:
        tree["algorithm"] = _without_idle_options(tree["algorithm"])
    sweep = tree.pop(schema.SWEEP, None)
    for section, value in tree.items():
        _check_keys(section, value, problems)
    tree = {section: _with_lists(section, value) for section, value in tree.items()}
    return tree | ({schema.SWEEP: sweep} if sweep else {}), chain[0].location, problems


def extends(path: Path) -> bool:
    """Whether a recipe has values of another file."""
    document, _ = read(path)
    return isinstance(document.data, dict) and schema.EXTENDS in document.data


def written_sections(path: Path) -> dict[str, Any]:
    """What a recipe and those it extends say, without defaults, as one recipe would: `sparsity` at the top level.

    Raises:
        UsageError: as `parse`, and a key that does not exist.
    """
    tree, _, problems = parse(path)
    problems.stop()
    found: dict[str, Any] = {}
    for section in (s for s in (*schema.SECTIONS, schema.SWEEP) if s in tree):
        values = tree[section].plain()
        sparsity = values.pop(schema.SPARSITY, None) if section == "transform" else None
        found |= {section: values} if values else {}
        found |= {} if sparsity is None else {schema.SPARSITY: sparsity}
    return found


def _read_chain(path: Path) -> tuple[list[Value], Problems]:
    """The document in `path`, the one that it extends, the one that this extends, and so on."""
    document, problems = read(path)
    chain, files = [document], [path]
    while True:
        if not isinstance(document.data, dict):
            problems.add(document.location, "a recipe is a mapping of keys to values")
            problems.stop()
        if schema.EXTENDS not in document.data:
            return chain, problems
        name, key = document.data[schema.EXTENDS].plain(), document.key_locations[schema.EXTENDS]
        found = _find_base(files[-1], name) if isinstance(name, str) else None
        if found is None:
            problems.add(key, f"extends: {_no_base(files[-1], name)}")
            problems.stop()
            return chain, problems
        if any(found.resolve() == file.resolve() for file in files):
            way = " extends ".join(str(file) for file in (*files, found))
            problems.add(key, f"extends: a recipe cannot extend itself: {way}")
            problems.stop()
        document, _ = read(found, problems=problems)
        chain.append(document)
        files.append(found)


def _find_base(path: Path, name: str) -> Path | None:
    """The file that `extends: name` means in the recipe `path`: one next to it, or a shipped recipe."""
    for folder in (path.parent, recipes_dir()) if "/" in name else (path.parent,):
        for file in (folder / name, folder / f"{name}.yaml", folder / f"{name}.yml"):
            if file.suffix in (".yaml", ".yml") and file.is_file():
                return file
    return None


def _no_base(path: Path, name: Any) -> str:
    if not isinstance(name, str):
        return f"expected the name of one recipe, not {name!r}"
    beside = [file.stem for file in path.parent.glob("*.y*ml") if file != path]
    shipped = [file.relative_to(recipes_dir()).with_suffix("").as_posix() for file in recipes_dir().glob("*/*.yaml")]
    hint = (
        did_you_mean(name, [*beside, *shipped]) or "name a file next to this one, or a recipe of `sparseift recipe ls`"
    )
    return f"there is no recipe {name!r}, {hint}"


def _sections(document: Value, problems: Problems) -> dict[str, Value]:
    """The sections of one document. A section that is null stays, to remove that of an extended recipe."""
    tree: dict[str, Value] = {}
    for key, value, location in document.items():
        if key in (*schema.SECTIONS, schema.SWEEP):
            section = _expand(key, value, problems)
            if section is not None:
                tree[key] = section
        elif key not in (schema.SPARSITY, schema.EXTENDS):
            _unknown(location, key, (schema.EXTENDS, *schema.SECTIONS, schema.SPARSITY, schema.SWEEP), problems)
    if schema.SPARSITY in document.data:
        value, location = document.data[schema.SPARSITY], document.key_locations[schema.SPARSITY]
        if "transform" in tree and schema.SPARSITY in (tree["transform"].data or {}):
            problems.add(location, "sparsity is given twice: here and under transform")
        put(tree, "transform", schema.SPARSITY, value, location)
    return tree


def _merge(base: Mapping[str, Value], own: Mapping[str, Value]) -> dict[str, Value]:
    """The sections of a recipe over those it extends."""
    merged = dict(base)
    for section, value in own.items():
        old = merged.pop(section, None)
        if value.data is None:  # `transform: null` takes the section out
            continue
        if old is None:
            merged[section] = value
            continue
        kept = {key: v for key, v in old.data.items() if ONE_OF_TWO.get((section, key)) not in value.data}
        data = {**kept, **value.data}
        chosen = None if section == schema.SWEEP else schema.variant(section, {k: v.plain() for k, v in data.items()})
        if (
            chosen is not None
        ):  # of another optimiser (or schedule), options that the chosen one does not have do not apply
            others = schema.fields(section).keys() - chosen.model_fields.keys()
            data = {key: v for key, v in data.items() if key in value.data or key not in others}
        locations = {**old.key_locations, **value.key_locations}
        merged[section] = Value(data, value.location, {key: locations[key] for key in data})
    return merged


def put(tree: dict[str, Value], section: str, key: str, value: Value, location: Location) -> None:
    """Set one value of a section, which is made where it is missing."""
    old = tree.get(section)
    if old is None or old.data is None:
        old = Value({}, location, {})
    drop = (
        ONE_OF_TWO.get((section, key)) if location.option else None
    )  # a length on the command line replaces the file's
    kept = {k: v for k, v in old.data.items() if k != drop}
    tree[section] = Value({**kept, key: value}, old.location, {**old.key_locations, key: location})


def _without_idle_options(value: Value) -> Value:
    """The algorithm's section without options that it does not have, where they say nothing about it.

    Every algorithm used to have the same five, so whole recipes written then have them all. And `--set algorithm=static`
    keeps the other lines of a section that was written for another algorithm.
    """
    given = value.plain()
    name, replaced = given.get("name"), value.key_locations.get("name")
    if not isinstance(name, str):
        return value
    try:
        kept = own_options(name, given, whatever_value=bool(replaced and replaced.option))
    except UsageError:  # no such algorithm; `resolve` says so
        return value
    set_now = {k for k, location in value.key_locations.items() if location.option}
    kept = {k: v for k, v in value.data.items() if k in kept or k in set_now}
    return Value(kept, value.location, {k: at for k, at in value.key_locations.items() if k in kept})


def _expand(section: str, value: Value, problems: Problems) -> Value | None:
    """`optimizer: sgd` as `optimizer: {name: sgd}`; None where it is neither a word nor a mapping."""
    if isinstance(value.data, dict) or value.data is None:
        return value
    short = None if section == schema.SWEEP else schema.short(section)
    if isinstance(value.data, str) and short:
        return Value({short: value}, value.location, {short: value.location})
    problems.add(value.location, f"{section}: expected a {'name or a ' if short else ''}mapping, not {value.plain()!r}")
    return None


def _set(tree: dict[str, Value], option: str, problems: Problems, word: str = "--set") -> None:
    """Apply `--set section.key=value`, or `--set section=name` for its short form; null takes a value (a section) out."""
    path, equals, text = option.partition("=")
    location = Location(problems.path, option=f"{word} {option}")
    if not equals:
        problems.add(location, "expected KEY=VALUE, as in --set optimizer.lr=1e-3")
        return
    value = read_option(text, location, problems)
    if path.strip() in schema.SECTIONS and value.data is None:
        tree.pop(path.strip(), None)
        return
    found = find_key(path, tree, location, problems)
    if found is None:
        return
    section, key = found
    known = schema.fields(section) | _fields_now(tree, section)
    put(tree, section, key, _as_typed(value, text, known[key].annotation, problems), location)


def find_key(path: str, tree: Mapping[str, Value], location: Location, problems: Problems) -> tuple[str, str] | None:
    """Section and key that a dotted path of an option means: `optimizer.lr`, `sparsity`, `optimizer` for its name.

    None, and a problem at `location`, where there is no such key in the sections of `tree`.
    """
    section, _, key = path.strip().partition(".")
    if (section, key) == (schema.SPARSITY, ""):
        section, key = "transform", schema.SPARSITY
    if section not in schema.SECTIONS:
        _unknown(location, section, (*schema.SECTIONS, schema.SPARSITY), problems)
        return None
    key = key or schema.short(section) or ""
    known = schema.fields(section) | _fields_now(tree, section)
    if not key:
        problems.add(location, f"which value of {section}? {_known(known)}")
    elif key in known:
        return section, key
    else:
        _unknown(location, key, known, problems, section)
    return None


def _fields_now(tree: Mapping[str, Value], section: str) -> dict[str, Any]:
    """The fields of the variant that the tree names now, which can be one from outside this package."""
    return schema.fields(section, tree[section].plain()) if section in tree else {}


def _as_typed(value: Value, text: str, annotation: Any, problems: Problems) -> Value:
    """`value`, or what `text` means here: a list may be written `a,b,c` or `0..4`; where text is meant, 12 is text."""
    location = value.location
    if _is_list(annotation) and (_is_scalar(value) or not text.strip()):
        first, dots, last = text.partition("..")
        if dots and first.isdigit() and last.isdigit() and int(last) - int(first) < 10_000:
            return Value([Value(n, location, {}) for n in range(int(first), int(last) + 1)], location, {})
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return Value([read_option(part, location, problems) for part in parts], location, {})
    if annotation is str or (str(annotation) == "str | None" and value.data is not None):
        return Value(text, location, {})
    return value


def _with_lists(section: str, value: Value) -> Value:
    """One word where a list is meant is a list of one: `metrics: loss`."""
    known = schema.fields(section)
    data = {
        key: Value([item], item.location, {})
        if key in known and _is_list(known[key].annotation) and _is_scalar(item)
        else item
        for key, item in value.data.items()
    }
    return Value(data, value.location, value.key_locations)


def _is_list(annotation: Any) -> bool:
    return str(annotation).startswith("tuple")


def _is_scalar(value: Value) -> bool:
    return value.data is not None and not isinstance(value.data, list | dict)


def _check_keys(section: str, value: Value, problems: Problems) -> None:
    known = schema.fields(section, value.plain())
    every = schema.fields(section)
    for key, _, location in value.items():
        if key in known:
            continue
        if key in every:
            problems.add(location, f"{section}.{key}: no option of {value.data['name'].plain()}, {_known(known)}")
        else:
            _unknown(location, key, known, problems, section)


def _unknown(location: Location, key: str, known: Iterable[str], problems: Problems, section: str = "") -> None:
    if not section and (others := [s for s in schema.SECTIONS if key in schema.fields(s)]):
        hint = f"{key} belongs under {' or '.join(others)}"
    else:
        hint = MOVED.get((section, key)) or did_you_mean(key, known) or _known(known)
    problems.add(location, f"unknown key '{key}', {hint}")


def _known(known: Iterable[str]) -> str:
    return f"known: {', '.join(known)}"
