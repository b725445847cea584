"""Which runs belong together: the same recipe but for the seed and for what cannot change a result, and the same model.

A recipe may name a model of the user's own, whose code changes between runs: then the audits tell models apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.metrics import metric_names
from .read import Run

NO_MATTER = frozenset(
    {
        "training.seed",
        "training.seeds",
        "training.device",
        "training.threads",
        "data.root",
        "data.download",
        "data.workers",
        "checkpoint.every",
        "checkpoint.keep",
        "evaluation.test",
    }
)
"""Where and how often, not what: runs that differ in these alone are samples of one group."""
COUNTS = ("parameters", "non-zero parameters", "dense training FLOPs a sample", "training FLOPs a sample")
_ANOTHER_MODEL = ": with the same settings these are not the same model (was its code edited in between?)"
_SHOWN = 3  # differences in a label


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as dotted keys: {"optimizer.lr": 0.1, ...}; lists stay values."""
    found: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for k, v in value.items():
                walk(v, f"{key}.{k}" if key else str(k))
        else:
            found[key] = value

    walk(recipe, "")
    return found


def settings(run: Run) -> dict[str, Any]:
    """What may change its result. A switch that is off is left out: recipes of older versions do not know of it."""
    return {k: v for k, v in flat(run.recipe).items() if k not in NO_MATTER and v not in (None, False, [], {})}


def counts(run: Run) -> dict[str, int]:
    """Parameters and FLOPs of its model by its audit: by settings alone a model whose code was edited is the same one."""
    totals = (run.audit or {}).get("totals") or {}
    dense, made = totals.get("dense") or {}, totals.get("transformed") or totals.get("dense") or {}
    found = (made.get("params"), made.get("nonzero_params"), dense.get("training_flops"), made.get("training_flops"))
    return {name: value for name, value in zip(COUNTS, found, strict=True) if isinstance(value, int)}


def primary(run: Run) -> str:
    """The metric that its recipe calls best: checkpoint.best, else the first of evaluation.metrics."""
    best = (run.recipe.get("checkpoint") or {}).get("best")
    metrics = (run.recipe.get("evaluation") or {}).get("metrics") or ["loss"]
    chosen = str(best or metrics[0])
    if run.metrics and chosen not in run.last:  # bits_per_byte of text that is not bytes is asked for and not there
        return next((m for m in [*map(str, metrics), *metric_names()] if m in run.last), chosen)
    return chosen


def subject(run: Run, metric: str) -> str:
    """What was learned from what, and how it was measured, as text that is equal exactly where results are comparable."""
    data = {k: v for k, v in run.recipe["data"].items() if f"data.{k}" not in NO_MATTER}
    limit = (run.recipe.get("evaluation") or {}).get("limit")
    return json.dumps([_set(run.recipe["model"]), _set(data), limit, metric], sort_keys=True, default=str)


def labels(runs: Sequence[Run]) -> list[str]:
    """The group of every run, in their order: its recipe's name, and in brackets what tells it from its namesakes."""
    keys = _keys(runs)
    first = dict(zip(reversed(keys), reversed(runs), strict=True))
    by_name: dict[str, list[str]] = {}
    for key in dict.fromkeys(keys):
        by_name.setdefault(first[key].name, []).append(key)
    named: dict[str, str] = {}
    for name, same in by_name.items():
        if len(same) == 1:
            named[same[0]] = name
            continue
        every = {key: {**counts(first[key]), **settings(first[key])} for key in same}
        differing = _telling([first[key] for key in same])
        for key in same:
            told = [f"{k}={_short(every[key].get(k))}" for k in differing[:_SHOWN]]
            more = [f"{len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
            named[key] = f"{name} [{', '.join(told + more)}]"
    taken = Counter(named.values())
    again: Counter[str] = Counter()
    for key, label in named.items():
        if taken[label] > 1:  # they differ in what is not shown
            again[label] += 1
            named[key] = f"{label} #{again[label]}"
    return [named[key] for key in keys]


def _keys(runs: Sequence[Run]) -> list[str]:
    """One text for every run, equal where runs are of one group. What a run does not tell of its model is as in the first."""
    known: dict[str, list[dict[str, int]]] = {}
    keys = []
    for run in runs:
        by_recipe = json.dumps([run.name, settings(run)], sort_keys=True, default=str)
        models, own = known.setdefault(by_recipe, []), counts(run)
        model = next((m for m in models if all(m.get(name, n) == n for name, n in own.items())), None)
        if model is None:
            model = {}
            models.append(model)
        model.update(own)
        keys.append(f"{by_recipe} {next(i for i, m in enumerate(models) if m is model)}")
    return keys


def _telling(firsts: Sequence[Run]) -> list[str]:
    """Keys that tell groups of one name apart, by the first run of each: settings, and of their models no more than is needed."""
    every = [settings(run) for run in firsts]
    found = _differing(every)
    if len({json.dumps(one, sort_keys=True, default=str) for one in every}) == len(every):
        return found
    return [*_differing([counts(run) for run in firsts])[:1], *found]


def namesakes(runs: Sequence[Run], groups: Sequence[str]) -> list[str]:
    """A sentence for every recipe's name that several groups share: runs of different settings are kept apart."""
    found: dict[str, dict[str, Run]] = {}
    for run, group in zip(runs, groups, strict=True):
        found.setdefault(run.name, {}).setdefault(group, run)
    said = []
    for name, same in found.items():
        if len(same) > 1:
            keys = _telling(list(same.values()))
            said.append(
                f"{name}: {len(same)} groups, because runs differ in {', '.join(keys)}"
                + (_ANOTHER_MODEL if set(keys) & set(COUNTS) else "")
            )
    return said


def pooled(runs: Sequence[Run], groups: Sequence[str]) -> list[str]:
    """A sentence for every group whose runs differ in more than the seed: its spread is of that too."""
    found: dict[str, list[Run]] = {}
    for run, group in zip(runs, groups, strict=True):
        found.setdefault(group, []).append(run)
    said = {
        group: _differing(list(map(settings, every))) or _differing(list(map(counts, every)))
        for group, every in found.items()
    }
    return [
        f"{group}: its {len(found[group])} runs differ in {_listed(keys)}, so they are not samples of one thing"
        for group, keys in said.items()
        if keys
    ]


def edited(runs: Sequence[Run], groups: Sequence[str]) -> list[str]:
    """A sentence for every group whose runs name one module of the user's, and found other code in its file."""
    found: dict[tuple[str, str], set[str]] = {}
    for run, group in zip(runs, groups, strict=True):
        for session in (run.provenance or {}).get("sessions") or ():
            for module, digest in (session.get("source") or {}).items():
                found.setdefault((group, module), set()).add(str(digest))
    return [
        f"{group}: the source of {module} was edited between its runs, or in one of them"
        for (group, module), digests in found.items()
        if len(digests) > 1
    ]


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _differing(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which settings differ: the length of the run first, then in the order of the recipe."""
    keys = dict.fromkeys(k for one in every for k in one)
    found = [k for k in keys if len({json.dumps(one.get(k), default=str) for one in every}) > 1]
    return sorted(found, key=lambda k: k not in ("training.steps", "training.epochs"))


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:17]}..."


def _set(section: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if v not in (None, False, [], {})}
