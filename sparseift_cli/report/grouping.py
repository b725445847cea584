"""Which runs belong together: the same recipe but for the seed and for settings that cannot change a result, and the same model.

A recipe may name a model of the user's own, whose code changes between runs: then the audits show that models differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..base.metrics import MetricFacts, is_shipped, metrics_in
from ..runs.provenance import HOW_IT_RUNS
from .read import Run

IRRELEVANT_SETTINGS = frozenset(
    {
        "training.seed",
        "training.seeds",
        *(f"training.{name}" for name in HOW_IT_RUNS),
        "data.root",
        "data.tokenizer",  # a path: which vocabulary it was is in the content of the data
        "data.download",
        "data.workers",
        "checkpoint.every",
        "checkpoint.keep",
        "evaluation.test",
    }
)
"""Where a run takes place and how often it saves: runs that differ in these alone are samples of one group."""
CONTENT = "data content"
"""What groups are said to differ in that read other data under one name."""
COUNTS = ("parameters", "non-zero parameters", "dense training FLOPs a sample", "training FLOPs a sample")
_DIFFERENT_MODELS = ": with the same settings these are different models (was the code edited in between?)"
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
    """Settings that may change the result, and unit and direction of each metric from outside the package.

    A setting that is off is left out: recipes of older versions do not have it. Of the metrics only that counts by which the
    recipe judges: what is measured beside it changes nothing.
    """
    found = {
        k: v for k, v in flat(run.recipe).items() if k not in IRRELEVANT_SETTINGS and v not in (None, False, [], {})
    }
    if "evaluation.metrics" in found:
        found["evaluation.metrics"] = primary(run)
    outside = [facts for facts in run.measured.values() if not is_shipped(facts.name)]
    return found | {f"metric {facts.name}": _scale(facts) for facts in outside}


def counts(run: Run) -> dict[str, int]:
    """Parameters and FLOPs of the model by its audit: they differ where settings are equal and the model's code was edited."""
    totals = (run.audit or {}).get("totals") or {}
    dense, made = totals.get("dense") or {}, totals.get("transformed") or totals.get("dense") or {}
    found = (made.get("params"), made.get("nonzero_params"), dense.get("training_flops"), made.get("training_flops"))
    return {name: value for name, value in zip(COUNTS, found, strict=True) if isinstance(value, int)}


def content(run: Run) -> str | None:
    """The SHA-256 of the data that a run read, by its newest session; None where it is not recorded."""
    sessions = (run.provenance or {}).get("sessions") or [{}]
    data = sessions[-1].get("data")
    return " ".join(str(digest) for _, digest in sorted(data.items())) or None if isinstance(data, Mapping) else None


def contents(runs: Sequence[Run]) -> list[str]:
    """The content of every run's data; of a run that does not record it that of the first with the same section `data`."""
    known: dict[str, str] = {}
    sections = [json.dumps(_data(run), sort_keys=True, default=str) for run in runs]
    for run, section in zip(runs, sections, strict=True):
        if found := content(run):
            known.setdefault(section, found)
    return [content(run) or known.get(section, "") for run, section in zip(runs, sections, strict=True)]


def described_content(run: Run) -> str:
    """The start of the SHA-256 of a run's data, and the last part of where it was: `3f2a91c0 (A.txt)`."""
    root = run.recipe["data"].get("root")
    return (content(run) or "unknown")[:8] + (f" ({PurePath(str(root)).name})" if root else "")


def primary(run: Run) -> str:
    """The metric by which the recipe judges: checkpoint.best, else the first of evaluation.metrics."""
    best = (run.recipe.get("checkpoint") or {}).get("best")
    metrics = [run.metric_key(str(m)) for m in (run.recipe.get("evaluation") or {}).get("metrics") or ["loss"]]
    chosen = run.metric_key(str(best)) if best else metrics[0]
    if run.metrics and chosen not in run.last:  # as bits_per_byte of text that is not bytes
        return next((m for m in [*metrics, *metrics_in(run.last)] if m in run.last), chosen)
    return chosen


def _data(run: Run) -> dict[str, Any]:
    """The section `data` without where it is and how it is read."""
    found = {k: v for k, v in run.recipe["data"].items() if f"data.{k}" not in IRRELEVANT_SETTINGS}
    return _without_unset(found)


def comparison_key(run: Run, metric: str, content: str) -> str:
    """Model, data (and what is in it) and metric as text that is equal exactly where results are comparable.

    Of a metric from outside the package, unit and direction belong to it: another package may have another of that name.
    """
    limit = (run.recipe.get("evaluation") or {}).get("limit")
    scale = [] if is_shipped(metric) else [_scale(run.facts_of(metric))]
    return json.dumps(
        [_without_unset(run.recipe["model"]), _data(run), content, limit, metric, *scale], sort_keys=True, default=str
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """The group of every run, in their order: the recipe's name, and in brackets what differs from groups of that name."""
    keys = _keys(runs)
    first = dict(zip(reversed(keys), reversed(runs), strict=True))
    by_name: dict[str, list[str]] = {}
    for key in dict.fromkeys(keys):
        by_name.setdefault(first[key].name, []).append(key)
    label_of: dict[str, str] = {}
    for name, same in by_name.items():
        if len(same) == 1:
            label_of[same[0]] = name
            continue
        every = {
            key: {**counts(first[key]), CONTENT: described_content(first[key]), **settings(first[key])} for key in same
        }
        differing = _distinguishing([first[key] for key in same])
        for key in same:
            shown = [f"{k}={_short(every[key].get(k))}" for k in differing[:_SHOWN]]
            more = [f"{len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
            label_of[key] = f"{name} [{', '.join(shown + more)}]"
    uses = Counter(label_of.values())
    numbered: Counter[str] = Counter()
    for key, label in label_of.items():
        if uses[label] > 1:  # they differ in what is not shown
            numbered[label] += 1
            label_of[key] = f"{label} #{numbered[label]}"
    return [label_of[key] for key in keys]


def _keys(runs: Sequence[Run]) -> list[str]:
    """One text for every run, equal where runs are of one group. What a run does not record is as in the first that does."""
    known: dict[str, list[dict[str, Any]]] = {}
    keys = []
    for run in runs:
        by_recipe = json.dumps([run.name, settings(run)], sort_keys=True, default=str)
        models, own = known.setdefault(by_recipe, []), dict[str, Any](counts(run))
        if digest := content(run):
            own[CONTENT] = digest
        model = next((m for m in models if all(m.get(name, n) == n for name, n in own.items())), None)
        if model is None:
            model = {}
            models.append(model)
        model.update(own)
        keys.append(f"{by_recipe} {next(i for i, m in enumerate(models) if m is model)}")
    return keys


def _distinguishing(firsts: Sequence[Run]) -> list[str]:
    """Keys in which groups of one name differ, by the first run of each.

    Settings, the content of data that goes by one name, and one count where these do not suffice.
    """
    every = [settings(run) for run in firsts]
    found = _differing(every)
    if _content_differs(firsts):
        found.insert(0, CONTENT)
        every = [{**one, CONTENT: content(run)} for one, run in zip(every, firsts, strict=True)]
    if len({json.dumps(one, sort_keys=True, default=str) for one in every}) == len(every):
        return found
    return [*_differing([counts(run) for run in firsts])[:1], *found]


def _content_differs(runs: Sequence[Run]) -> bool:
    """Whether two runs read different data that their recipes call the same."""
    found: dict[str, set[str]] = {}
    for run in runs:
        if digest := content(run):
            found.setdefault(json.dumps(_data(run), sort_keys=True, default=str), set()).add(digest)
    return any(len(digests) > 1 for digests in found.values())


def duplicate_names(runs: Sequence[Run], groups: Sequence[str]) -> list[str]:
    """A sentence for every recipe's name that several groups share, because their runs have different settings."""
    found: dict[str, dict[str, Run]] = {}
    for run, group in zip(runs, groups, strict=True):
        found.setdefault(run.name, {}).setdefault(group, run)
    notes = []
    for name, same in found.items():
        if len(same) > 1:
            keys = _distinguishing(list(same.values()))
            notes.append(
                f"{name}: {len(same)} groups, because runs differ in {', '.join(_explained(keys, list(same.values())))}"
                + (_DIFFERENT_MODELS if set(keys) & set(COUNTS) else "")
            )
    return notes


def _explained(keys: Sequence[str], firsts: Sequence[Run]) -> list[str]:
    """Keys in which groups differ, with which data each of them has."""
    found = " against ".join(dict.fromkeys(map(described_content, firsts)))
    return [f"{key} ({found})" if key == CONTENT else key for key in keys]


def pooled(runs: Sequence[Run], groups: Sequence[str]) -> list[str]:
    """A sentence for every group whose runs differ in more than the seed: its spread has that cause too."""
    found: dict[str, list[Run]] = {}
    for run, group in zip(runs, groups, strict=True):
        found.setdefault(group, []).append(run)
    differences = {
        group: _differing(list(map(settings, every))) or _differing(list(map(counts, every)))
        for group, every in found.items()
    }
    return [
        f"{group}: its {len(found[group])} runs differ in {_listed(keys)}, so they are not repetitions of one experiment"
        for group, keys in differences.items()
        if keys
    ]


def edited(runs: Sequence[Run], groups: Sequence[str]) -> list[str]:
    """A sentence for every group whose runs used one module of the user's with different source code."""
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


def changed_data(runs: Sequence[Run]) -> list[str]:
    """A sentence for every run that was resumed on other data than it began with."""
    found = []
    for run in runs:
        read = [session.get("data") or {} for session in (run.provenance or {}).get("sessions") or ()]
        if changed := sorted(
            {name for one in read for name in one if any(one[name] != o.get(name, one[name]) for o in read)}
        ):
            found.append(
                f"{run.path}: it was resumed on other data than it began with ({', '.join(changed)}): no result of either"
            )
    return found


def contradicting(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for every metric that rows of runs are judged by and of which their runs recorded different facts."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if not is_shipped(row["metric"]) and row["value"] is not None:
            found.setdefault(row["metric"], {}).setdefault(_scale(row["metric_facts"]), row["group"])
    return [
        f"{metric}: {' but '.join(f'{group} measures it in {scale}' for scale, group in scales.items())}, so these "
        "are different metrics and are not compared"
        for metric, scales in found.items()
        if len(scales) > 1
    ]


def _scale(facts: MetricFacts) -> str:
    """What two metrics of one name must have in common to be compared; the label may differ.

    >>> _scale(MetricFacts("sure", "sure predictions (%)", "points", lower_is_better=False))
    'points (higher is better)'
    """
    return f"{facts.unit} ({'lower' if facts.lower_is_better else 'higher'} is better)"


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _differing(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which mappings differ: the length of the run first, then in the order of the recipe."""
    keys = dict.fromkeys(k for one in every for k in one)
    found = [k for k in keys if len({json.dumps(one.get(k), default=str) for one in every}) > 1]
    return sorted(found, key=lambda k: k not in ("training.steps", "training.epochs"))


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:17]}..."


def _without_unset(section: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if v not in (None, False, [], {})}
