"""Finds the state dict in what a training script saved, and lists what else the file holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeGuard, cast

from ..errors import did_you_mean
from .facts import OtherEntry
from .inert_pickle import Global, Opaque
from .torch_rules import PickledTensor
from .untrusted import Malformed, printable

# Keys under which training scripts save weights, the likeliest first. A moving average is a second choice: it is a
# copy.
USUAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
    "student",
    "generator",
    "",
    "teacher",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
    "params_ema",
    "ema",
)
_NOT_WEIGHTS = ("optim", "scheduler", "scaler", "rng", "callbacks", "loops")
_DEPTH = 3
_MAX_DICTS = 10_000
_MAX_OTHERS = 1_000
_COUNTED = 10_000

# Prefixes that wrappers, or the attribute that holds the model, put in front of every name.
WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_forward_module.",
    "model.",
    "net.",
    "network.",
    "transformer.",
    "backbone.",
    "student.",
)


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of the state dict by name, the keys that lead to it, and everything else."""

    tensors: dict[str, PickledTensor]
    nested_under: str | None
    other: tuple[OtherEntry, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    keys: tuple[str, ...]
    mapping: dict[object, object]
    tensors: int

    @property
    def path(self) -> str:
        return ".".join(self.keys)


def find_state_dict(root: object, key: str | None = None) -> Found:
    """The state dict in `root`, or the one at the dotted path `key`.

    Raises:
        Malformed: there is none, or none at `key`.
    """
    if isinstance(root, PickledTensor):
        return Found({"tensor": root}, None, ())
    if isinstance(root, list | tuple):
        root = {str(i): value for i, value in enumerate(root)}
    found = _items(root)
    if found is None:
        raise (
            _pickled(root) if isinstance(root, Opaque) else Malformed(f"holds {describe(root).type}, not a state dict")
        )
    root = found
    candidates = list(_candidates(root))
    if not candidates:
        raise _without_tensors(root)
    chosen = _chosen(candidates, key)
    tensors: dict[str, PickledTensor] = {}
    for name, value in chosen.mapping.items():
        if isinstance(value, PickledTensor):
            if str(name) in tensors:
                raise Malformed(f"two tensors are named {printable(str(name))!r}")
            tensors[str(name)] = value
    return Found(tensors, chosen.path or None, tuple(_others(root, chosen)))


def _items(value: object) -> dict[object, object] | None:
    """The items of a dict, or of an object that is a subclass of dict (EasyDict); None of anything else."""
    if isinstance(value, dict):
        return cast("dict[object, object]", value)
    return value.items if isinstance(value, Opaque) and value.items else None


def _pickled(value: Opaque) -> Malformed:
    return Malformed(
        f"holds an object of {value.kind}, not a state dict",
        hint="it may be a pickled model; where you trust the file, load it yourself and save model.state_dict()",
    )


def strip_prefix(names: Sequence[str]) -> str:
    """The wrapper prefix that every name has: `module.`, or several (`module._orig_mod.`); else an empty string."""
    prefix = ""
    while names:
        new = next((w for w in WRAPPERS if all(n.startswith(prefix + w) and n != prefix + w for n in names)), None)
        if new is None:
            break
        prefix += new
    return prefix


def describe(value: object, path: str = "") -> OtherEntry:
    """The type of an entry of a checkpoint in a few words, and its value where that is one short thing."""
    match value:
        case PickledTensor():
            return OtherEntry(path, f"{value.dtype} tensor {list(value.shape)}")
        case dict():
            tensors = sum(isinstance(v, PickledTensor) for v in islice(value.values(), _COUNTED))
            return OtherEntry(path, f"dict of {len(value)}" + (f", {tensors} tensors" if tensors else ""))
        case list() | tuple():
            return OtherEntry(path, f"{type(value).__name__} of {len(value)}")
        case Opaque():
            return OtherEntry(path, value.kind + (f" of {len(value.items)}" if value.items else ""))
        case Global():
            return OtherEntry(path, str(value))
        case str():
            return OtherEntry(path, "str", printable(value, 80))
        case bytes() | bytearray():
            return OtherEntry(path, f"{len(value):,} bytes")
        case float() if not math.isfinite(value):
            return OtherEntry(path, "float", str(value))
        case int() if value.bit_length() > 64:
            return OtherEntry(path, "int", f"of {value.bit_length():,} bits")
        case None | bool() | int() | float():
            return OtherEntry(path, "None" if value is None else type(value).__name__, value)
        case _:
            return OtherEntry(path, "a storage without a tensor")


def _candidates(root: dict[object, object]) -> Iterator[_Candidate]:
    """Every dict with tensors in it, reached by string keys, up to _DEPTH levels deep; each dict once."""
    waiting: list[tuple[tuple[str, ...], dict[object, object]]] = [((), root)]
    seen = {id(root)}
    while waiting and len(seen) < _MAX_DICTS:
        keys, mapping = waiting.pop(0)
        tensors = sum(isinstance(value, PickledTensor) for value in mapping.values())
        if tensors:
            yield _Candidate(keys, mapping, tensors)
        for name, entry in mapping.items():
            value = _items(entry)
            if value is None or not isinstance(name, str) or id(value) in seen or len(keys) == _DEPTH:
                continue
            if not any(word in name.lower() for word in _NOT_WEIGHTS):
                seen.add(id(value))
                waiting.append(((*keys, name), value))


def _without_tensors(root: dict[object, object]) -> Malformed:
    kinds = sorted({v.kind.rpartition("_rebuild_")[2] for v in root.values() if _is_odd_tensor(v)})
    if kinds:
        return Malformed(
            f"holds no tensors but of a layout that is not read: {', '.join(kinds)}", hint="save them with .to_dense()"
        )
    if objects := [value for value in root.values() if isinstance(value, Opaque) and not value.items]:
        return _pickled(objects[0])
    return Malformed("holds no tensors in any dict", hint="a state dict maps names to tensors")


def _is_odd_tensor(value: object) -> TypeGuard[Opaque]:
    return isinstance(value, Opaque) and value.kind.startswith("torch._utils._rebuild_")


def _chosen(candidates: Sequence[_Candidate], key: str | None) -> _Candidate:
    if key is not None:
        named = {candidate.path: candidate for candidate in candidates}
        if key not in named:
            paths = ", ".join(printable(path or "(the top)", 40) for path in list(named)[:6])
            raise Malformed(f"no state dict at {key!r}; there is {paths}", hint=did_you_mean(key, named))
        return named[key]
    most = max(candidate.tensors for candidate in candidates)
    return min((c for c in candidates if 2 * c.tensors >= most), key=_preference)


def _preference(candidate: _Candidate) -> tuple[int, int]:
    last = candidate.keys[-1] if candidate.keys else ""
    rank = USUAL_KEYS.index(last) if last in USUAL_KEYS else USUAL_KEYS.index("")
    return rank, -candidate.tensors


def _others(root: dict[object, object], chosen: _Candidate) -> Iterator[OtherEntry]:
    """Everything else: entries next to the path to the state dict, level by level, and in it what is no tensor."""
    level: object = root
    listed = 0
    for depth in range(len(chosen.keys) + 1):
        items = _items(level)
        assert items is not None
        onward = chosen.keys[depth] if depth < len(chosen.keys) else None
        for name, value in items.items():
            if name == onward or (onward is None and isinstance(value, PickledTensor)):
                continue
            listed += 1
            if listed > _MAX_OTHERS:
                yield OtherEntry("…", "more than is listed here")
                return
            yield describe(value, printable(".".join((*chosen.keys[:depth], str(name)))))
        level = items.get(onward)
