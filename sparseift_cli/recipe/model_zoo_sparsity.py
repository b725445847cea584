"""The `sparsity` block of a Model Zoo configuration: a number, a mapping, a list of groups, or the legacy form.

Facts of the format (cerebras.pytorch.sparse): `algorithm` (legacy `type`) is static, set, rigl or gmp; without it static.
`schedule` is another name for `sparsity`; legacy `sparsity_schedule` is a list of [step, sparsity]. `param_filter` holds
globs over parameter names, legacy `param_name_patterns` regular expressions, or a mapping of them to options. `update` is
{freq, start, stop} or {steps}; without it a dynamic algorithm updates at every step. A hyper-parameter is a number, a list
to cycle through, or {type: constant|linear|exp|power|cosine, ...} of the step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..errors import UsageError
from .durations import part_of_run
from .foreign import Foreign

LAYERS = {  # of ours, and the parameters of the Model Zoo's decoder that it holds
    "*.attn.c_attn": ["self_attn.proj_q_dense_layer", "self_attn.proj_k_dense_layer", "self_attn.proj_v_dense_layer"],
    "*.attn.c_proj": ["self_attn.proj_output_dense_layer"],
    "*.mlp.c_fc": ["ffn.ffn.0.linear_layer"],
    "*.mlp.c_proj": ["ffn.ffn.1.linear_layer"],
}
ALGORITHMS = {"static": "static", "set": "set", "rigl": "rigl", "gmp": "gmp"}
MASKS = {"random": "random", "topk": "magnitude"}


@dataclass(frozen=True, slots=True)
class Mask:
    """The block, in our words: `algorithm` and `transform` are (parts of) sections of a recipe."""

    sparsity: float
    algorithm: dict[str, Any]
    transform: dict[str, Any]
    masks: str


def read(file: Foreign, at: str, steps: int) -> Mask | None:
    """What the block says, or None where there is none (or its sparsity is null or 0).

    Raises:
        UsageError: it has no sparsity that could be read.
    """
    whole = file.find(at)
    if whole is None or whole.data is None or whole.data == 0:
        file.take(at)
        return None
    if not isinstance(whole.data, dict | list):
        return _mask(file, at, at, steps)
    groups = f"{at}.groups" if file.find(f"{at}.groups") is not None else at
    held = file.find(groups)
    if held is None or not isinstance(held.data, list):
        return _mask(file, groups, at, steps)
    masks = [_mask(file, f"{groups}.{i}", at, steps) for i in range(len(held.data))]
    first = next((mask for mask in masks if mask is not None), None)
    if first is None:
        return None
    include: list[str] = []
    for i, mask in enumerate(masks):
        if mask is None:
            continue
        if (mask.sparsity, mask.algorithm, mask.masks) != (first.sparsity, first.algorithm, first.masks):
            file.note(f"{groups}.{i}", f"a recipe has one sparsity and one algorithm; those of the first group "
                      f"({first.sparsity:g}, {first.algorithm['name']}) are written, and this group is left dense")  # fmt: skip
        else:
            include += mask.transform.get("include", list(LAYERS))
    every = sorted(set(include)) == sorted(LAYERS)
    return Mask(first.sparsity, first.algorithm, {} if every else {"include": sorted(set(include))}, first.masks)


def _mask(file: Foreign, at: str, block: str, steps: int) -> Mask | None:
    """One group. Its options stand in it, or under its `params`; what it lacks may stand in the block."""
    group = file.find(at)
    if group is not None and not isinstance(group.data, dict):
        return Mask(_number(file, at, file.take(at)), {"name": "static"}, {}, "random")
    where = lambda key: [f"{at}.{key}", f"{at}.params.{key}", *([f"{block}.{key}"] if block != at else [])]  # noqa: E731
    path = lambda *keys: next((p for k in keys for p in where(k) if file.find(p) is not None), None)  # noqa: E731
    name = str(file.take(*where("algorithm"), *where("type")) or "static").lower()
    if name not in ALGORITHMS:
        file.note(path("algorithm", "type") or at, f"{name!r} is not there; static masks are written")
    algorithm: dict[str, Any] = {"name": ALGORITHMS.get(name, "static")}
    if algorithm["name"] != "static":
        algorithm |= _update(file, path("update"), steps)
        algorithm |= _drop(file, path("drop_fraction"), algorithm, steps) if algorithm["name"] != "gmp" else {}
    scheduled = path("sparsity_schedule")
    include = _filter(file, path("param_filter"), path("param_name_patterns"))
    inside = path("param_name_patterns")
    sparsity = path("sparsity", "schedule") or (inside and next((f"{inside}.{p}.sparsity" for p in _keys(file, inside)
                                                                 if file.find(f"{inside}.{p}.sparsity")), None))  # fmt: skip
    if scheduled:
        value, algorithm = _scheduled(file, scheduled, algorithm, steps)
    elif sparsity is None:
        raise UsageError(f"{file.path}: {at} has no sparsity")
    else:
        value = _final(file, sparsity, math.ceil(float(algorithm.get("stop", 1.0)) * steps))
    if value is None or value == 0:
        return None
    method = file.take(*where("init_method")) or "random"
    if method not in MASKS:
        file.note(path("init_method") or at, "masks start random or from the largest weights; random is written")
    return Mask(value, algorithm, {"include": include} if include else {}, MASKS.get(str(method), "random"))


def _keys(file: Foreign, at: str) -> list[str]:
    found = file.find(at)
    return list(found.data) if found is not None and isinstance(found.data, dict) else []


def _update(file: Foreign, at: str | None, steps: int) -> dict[str, Any]:
    if at is None:
        return {"delta_t": 1, "stop": 1.0}
    update = file.take(at)
    if isinstance(update, dict) and isinstance(update.get("steps"), list) and update["steps"]:
        listed = sorted(update["steps"])
        delta = listed[0] or (listed[1] if len(listed) > 1 else 1)
        regular = [t for t in listed if t] == list(range(delta, listed[-1] + 1, delta))
        if not regular:
            file.note(at, f"updates come at equal distances; every {delta} steps until {listed[-1]} is written")
        return {"delta_t": delta, "stop": part_of_run(listed[-1] + 1, steps)}
    update = update if isinstance(update, dict) else {}
    if update.get("start"):
        file.note(f"{at}.start", "mask updates start with the run")
    stop = update.get("stop")
    return {"delta_t": update.get("freq", 1), "stop": 1.0 if stop is None else part_of_run(min(stop, steps), steps)}


def _drop(file: Foreign, at: str | None, algorithm: dict[str, Any], steps: int) -> dict[str, Any]:
    """Drop fraction at step 0, and how it falls; ours falls to 0 where mask updates stop."""
    value = file.take(at) if at else 0.3
    stop = math.ceil(algorithm["stop"] * steps)
    if isinstance(value, int | float):
        return {"drop_fraction": value, "decay": "constant"}
    if isinstance(value, dict) and isinstance(initial := value.get("init", value.get("value")), int | float):
        kind = str(value.get("type", "")).lower()
        falls = {"cosine": value.get("half_period") == stop and not value.get("minimum"),
                 "linear": abs(initial + value.get("slope", 0) * stop) < 1e-6, "constant": True}  # fmt: skip
        if not falls.get(kind, False):
            file.note(str(at), f"ours falls from {initial:g} to 0 at step {stop:,}, where mask updates stop")
        return {"drop_fraction": initial, "decay": kind if kind in falls else "cosine"}
    file.note(str(at), "the drop fraction falls on a curve; 0.3 and a cosine are written")
    return {"drop_fraction": 0.3, "decay": "cosine"}


def _final(file: Foreign, at: str, stop: int) -> float | None:
    """The sparsity at the last update: of a schedule, its value there, rounded as people write it."""
    value = file.take(at)
    if value is None or isinstance(value, int | float):
        return None if value is None else _number(file, at, value)
    if isinstance(value, list) and value:
        file.note(at, f"sparsity does not cycle; {value[-1]} is written")
        return _number(file, at, value[-1])
    if isinstance(value, dict) and (final := _curve(value, stop)) is not None:
        if value.get("type") != "constant":
            file.note(
                at, f"sparsity rises on the cubic of gmp, to what this {value['type']} schedule ends at: {final:g}"
            )
        return _number(file, at, final)
    raise UsageError(f"{file.path}: {at} is no sparsity: {value!r}")


def _curve(schedule: dict[str, Any], step: int) -> float | None:
    """Value of a hyper-parameter schedule at a step, to four digits; None for a kind or options that are not known."""
    get = schedule.get
    try:
        match str(get("type", "")).lower():
            case "constant":
                found = float(schedule["value"])
            case "linear":
                found = schedule["init"] + step * schedule["slope"]
            case "power":
                found = schedule["init"] * schedule["beta"] ** step
            case "exp":
                found = get("final", 1) + (schedule["init"] - get("final", 1)) * math.exp(step * schedule["gamma"])
            case "cosine":
                low, high = get("minimum", 0.0), schedule["init"]
                found = (low + high) / 2 + (high - low) / 2 * math.cos(math.pi * step / schedule["half_period"])
            case _:
                return None
        return round(float(found), 4)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None


def _scheduled(file: Foreign, at: str, algorithm: dict[str, Any], steps: int) -> tuple[float, dict[str, Any]]:
    """Legacy `sparsity_schedule`: the last pair counts."""
    pairs = file.take(at)
    if not isinstance(pairs, list) or not pairs or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise UsageError(f"{file.path}: {at} is no list of [step, sparsity]")
    file.note(
        at, f"sparsity rises on the cubic of gmp, not in these steps, to {pairs[-1][1]:g} at step {pairs[-1][0]:,}"
    )
    return _number(file, at, pairs[-1][1]), algorithm | {"stop": part_of_run(min(int(pairs[-1][0]), steps), steps)}


def _number(file: Foreign, at: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UsageError(f"{file.path}: {at}: {value!r} is no sparsity in [0, 1)")
    return float(value)


def _filter(file: Foreign, globs_at: str | None, patterns_at: str | None) -> list[str]:
    """Which of our layers are meant, as `transform.include`; empty for all of them."""
    at = globs_at or patterns_at
    if at is None:
        return []
    given = file.take(at)
    words = [str(w) for w in (given if isinstance(given, list | dict) else [given])]
    hit: Callable[[str, str], Any] = fnmatchcase if globs_at else lambda name, pattern: re.search(pattern, name)
    included: list[str] = []
    for ours, parts in LAYERS.items():
        names = [f"model.transformer_decoder.layers.0.{part}.weight" for part in parts]
        try:
            hits = sum(any(hit(name, word) for word in words) for name in names)
        except re.error:
            raise UsageError(f"{file.path}: {at} holds a broken regular expression") from None
        if hits:
            included.append(ours)
        if 0 < hits < len(names):
            file.note(at, "queries, keys and values are one layer here: all three are transformed")
    if not included:
        file.note(at, "it matches no layer of a GPT; all of them are transformed")
    return [] if len(included) in (0, len(LAYERS)) else included
