"""Optimiser and learning rate of a Model Zoo configuration, in either generation of the format."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any

from ...base.durations import part_of_run
from ...errors import UsageError
from ...sparsity.algorithms import ALGORITHMS
from .foreign import Foreign, Imported, checked_number

_ADAM = {"betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
_SGD = {"momentum": "momentum", "nesterov": "nesterov", "weight_decay": "weight_decay"}


def _no_negative(file: Foreign, at: str) -> Any:
    return file.number(at, least=0)


def _betas(file: Foreign, at: str) -> Any:
    value = file.take(at)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise UsageError(f"{file.where(at)}: {at} is {value!r}, not two numbers")
    return [checked_number(beta, f"{file.where(at)}: {at}", least=0, below=1) for beta in value]


def _yes_or_no(file: Foreign, at: str) -> Any:
    value = file.take(at)
    if not isinstance(value, bool | None):
        raise UsageError(f"{file.where(at)}: {at} is {value!r}, neither true nor false")
    return value


def _positive(file: Foreign, at: str) -> Any:
    return file.number(at, above=0)


_OPTIONS = {"betas": _betas, "eps": _positive, "nesterov": _yes_or_no}
"""How an option of an optimiser is read; the others are numbers."""


def read_schedule(file: Foreign, *, new: bool, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections `optimizer` and `schedule`."""
    if new:
        found = file.find("trainer.init.optimizer")
        kinds = list(found.data) if found and isinstance(found.data, dict) else []
        kind, at = (kinds[0], f"trainer.init.optimizer.{kinds[0]}") if kinds else ("AdamW", "trainer.init.optimizer")
        rates = "trainer.init.schedulers"
    else:
        kind, at, rates = file.take("optimizer.optimizer_type") or "AdamW", "optimizer", "optimizer.learning_rate"
    optimizer = _optimizer(file, str(kind), at)
    constant = file.number(f"{at}.learning_rate", above=0) if new else None
    schedule, peak = _schedule(file, rates, steps)
    peak = peak if peak is not None else constant
    if peak is None:
        raise UsageError(
            f"{file.where(rates)}: {rates} gives no learning rate", hint="a number, or a cosine, line or constant"
        )
    return {**optimizer, "lr": peak}, schedule


def _optimizer(file: Foreign, kind: str, at: str) -> dict[str, Any]:
    sgd = kind.lower() == "sgd"
    if not sgd and kind.lower() != "adamw":
        file.note(at if at != "optimizer" else "optimizer.optimizer_type", f"{kind} is not there; adamw is written")
    found: dict[str, Any] = {"name": "sgd" if sgd else "adamw"}
    for key, ours in (_SGD if sgd else _ADAM).items():
        value = _OPTIONS.get(key, _no_negative)(file, f"{at}.{key}")
        if value is not None:
            found[ours] = value
    file.expect(f"{at}.correct_bias", True, "AdamW always corrects its bias")
    return found


def _schedule(file: Foreign, at: str, steps: int) -> tuple[dict[str, Any], float | None]:
    """The section, and the peak learning rate."""
    found = file.find(at)
    if found is None:
        return {"name": "constant"}, None
    plain = file.take(at)
    if not isinstance(plain, list | dict):
        return {"name": "constant"}, float(checked_number(plain, f"{file.where(at)}: {at}", above=0))
    phases = _phases(plain)

    def number(options: Mapping[str, Any], *keys: str, above: float | None = None, whole: bool = False) -> Any:
        key = next((key for key in keys if options.get(key) is not None), None)
        said = f"{file.where(at)}: {key} in {at}"
        return None if key is None else checked_number(options[key], said, least=0, above=above, whole=whole)

    warmup: int | None = None
    if len(phases) > 1 and phases[0][0] == "linear" and not phases[0][1].get("initial_learning_rate"):
        warmup = number(phases[0][1], "total_iters", whole=True)
        phases = phases[1:]
    if len(phases) != 1 or phases[0][0] not in ("cosine", "linear", "constant"):
        file.note(at, "only a warm-up and then a cosine, a line or a constant can be said here; a cosine is written")
    kind, options = phases[0] if phases else ("cosine", {})
    kind = kind if kind in ("cosine", "linear", "constant") else "cosine"
    peak = number(options, "initial_learning_rate", "learning_rate", "val", above=0)
    length = number(options, "total_iters", whole=True)
    if kind != "constant" and length is not None and length + (warmup or 0) != steps:
        file.note(
            at,
            f"warm-up and decay take {length + (warmup or 0):,} steps, the run {steps:,}; here the decay ends with it",
        )
    section: dict[str, Any] = {"name": kind, **({"warmup": f"{warmup} steps"} if warmup else {})}
    if kind != "constant" and (final := number(options, "end_learning_rate")):
        section["final_lr"] = final
    return section, None if peak is None else float(peak)


def _phases(plain: Any) -> list[tuple[str, dict[str, Any]]]:
    """(kind, options) one after another: `SequentialLR` unfolded, `CosineDecayLR` and `scheduler: CosineDecay` alike."""
    if isinstance(plain, list):
        return [phase for item in plain for phase in _phases(item)]
    if not isinstance(plain, dict):
        return []
    if "scheduler" in plain:
        return [(_kind(str(plain["scheduler"])), plain)]
    phases: list[tuple[str, dict[str, Any]]] = []
    for name, options in plain.items():
        inner = options if isinstance(options, dict) else {}
        phases += (
            _phases(inner["schedulers"])
            if name.startswith("Sequential") and "schedulers" in inner
            else [(_kind(name), inner)]
        )
    return phases


def _kind(name: str) -> str:
    word = name.lower().removesuffix("lr")
    return {"cosinedecay": "cosine", "linear": "linear", "constant": "constant"}.get(word, word)


# The `sparsity` block of a Model Zoo configuration: a number, a mapping, a list of groups, or the legacy form.
# Facts of the format (cerebras.pytorch.sparse): `algorithm` (legacy `type`) is static, set, rigl or gmp; without it static.
# `schedule` is another name for `sparsity`; legacy `sparsity_schedule` is a list of [step, sparsity]. `param_filter` holds
# globs over parameter names, legacy `param_name_patterns` regular expressions, or a mapping of them to options. `update` is
# {freq, start, stop} or {steps}; without it a dynamic algorithm updates at every step. A hyper-parameter is a number, a list
# to cycle through, or {type: constant|linear|exp|power|cosine, ...} of the step.

LAYERS = {  # of ours, and the parameters of the Model Zoo's decoder that it holds
    "*.attn.c_attn": ["self_attn.proj_q_dense_layer", "self_attn.proj_k_dense_layer", "self_attn.proj_v_dense_layer"],
    "*.attn.c_proj": ["self_attn.proj_output_dense_layer"],
    "*.mlp.c_fc": ["ffn.ffn.0.linear_layer"],
    "*.mlp.c_proj": ["ffn.ffn.1.linear_layer"],
}
THEIR_ALGORITHMS = ("static", "set", "rigl", "gmp")
MASKS = {"random": "random", "topk": "magnitude"}


@dataclass(frozen=True, slots=True)
class Mask:
    """The block, in our words: `algorithm` and `transform` are (parts of) sections of a recipe."""

    sparsity: float
    algorithm: dict[str, Any]
    transform: dict[str, Any]
    masks: str


def read_sparsity(file: Foreign, at: str, steps: int) -> Mask | None:
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
            file.note(
                f"{groups}.{i}",
                f"a recipe has one sparsity and one algorithm; those of the first group "
                f"({first.sparsity:g}, {first.algorithm['name']}) are written, and this group is left dense",
            )
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
    if name not in THEIR_ALGORITHMS:
        file.note(path("algorithm", "type") or at, f"{name!r} is not there; static masks are written")
    algorithm: dict[str, Any] = {"name": name if name in THEIR_ALGORITHMS else "static"}
    takes = ALGORITHMS.get(algorithm["name"]).option_names()
    if "delta_t" in takes:
        algorithm |= _update(file, path("update"), steps)
    if "drop_fraction" in takes:
        algorithm |= _drop(file, path("drop_fraction"), algorithm, steps)
    scheduled = path("sparsity_schedule")
    include = _filter(file, path("param_filter"), path("param_name_patterns"))
    inside = path("param_name_patterns")
    sparsity = path("sparsity", "schedule") or (
        inside
        and next((f"{inside}.{p}.sparsity" for p in _keys(file, inside) if file.find(f"{inside}.{p}.sparsity")), None)
    )
    if scheduled:
        value, algorithm = _scheduled(file, scheduled, algorithm, steps)
        algorithm = {k: v for k, v in algorithm.items() if k == "name" or k in takes}
    elif sparsity is None:
        raise UsageError(f"{file.where(at)}: {at} has no sparsity")
    else:
        value = _final(file, sparsity, math.ceil(float(algorithm.get("stop", 1.0)) * steps))
    if value is None or value == 0:
        return None
    method = str(file.take(*where("init_method")) or "random")
    if method not in MASKS:
        file.note(path("init_method") or at, "masks start random or from the largest weights; random is written")
    return Mask(value, algorithm, {"include": include} if include else {}, MASKS.get(method, "random"))


def _keys(file: Foreign, at: str) -> list[str]:
    found = file.find(at)
    return list(found.data) if found is not None and isinstance(found.data, dict) else []


def _update(file: Foreign, at: str | None, steps: int) -> dict[str, Any]:
    if at is None:
        return {"delta_t": 1, "stop": 1.0}
    update = file.take(at)
    if not isinstance(update, dict):
        raise UsageError(f"{file.where(at)}: {at} is {update!r}, neither {{freq, stop}} nor {{steps}}")
    if isinstance(update.get("steps"), list) and update["steps"]:
        said = f"{file.where(at)}: a step in {at}"
        listed = sorted(checked_number(step, said, least=0, whole=True) for step in update["steps"])
        delta = listed[0] or (listed[1] if len(listed) > 1 else 1)
        regular = [t for t in listed if t] == list(range(delta, listed[-1] + 1, delta))
        if not regular:
            file.note(at, f"updates come at equal distances; every {delta} steps until {listed[-1]} is written")
        return {"delta_t": delta, "stop": part_of_run(listed[-1] + 1, steps)}
    if file.number(f"{at}.start", least=0, whole=True):
        file.note(f"{at}.start", "mask updates start with the run")
    every, stop = (file.number(f"{at}.{key}", least=1, whole=True) for key in ("freq", "stop"))
    return {"delta_t": every or 1, "stop": 1.0 if stop is None else part_of_run(min(stop, steps), steps)}


def _drop(file: Foreign, at: str | None, algorithm: dict[str, Any], steps: int) -> dict[str, Any]:
    """Drop fraction at step 0, and how it falls; ours falls to 0 where mask updates stop."""
    value = file.take(at) if at else 0.3
    stop = math.ceil(algorithm["stop"] * steps)
    said = f"{file.where(str(at))}: {at}"
    if not isinstance(value, dict | list):
        return {"drop_fraction": checked_number(value, said, above=0, below=1), "decay": "constant"}
    if isinstance(value, dict) and (initial := value.get("init", value.get("value"))) is not None:
        for key in ("init", "value", "slope", "half_period", "minimum"):
            if value.get(key) is not None:
                checked_number(value[key], said)
        checked_number(initial, said, above=0, below=1)
        kind = str(value.get("type", "")).lower()
        falls = {
            "cosine": value.get("half_period") == stop and not value.get("minimum"),
            "linear": abs(initial + (value.get("slope") or 0) * stop) < 1e-6,
            "constant": True,
        }
        if not falls.get(kind, False):
            file.note(str(at), f"ours falls from {initial:g} to 0 at step {stop:,}, where mask updates stop")
        return {"drop_fraction": initial, "decay": kind if kind in falls else "cosine"}
    file.note(str(at), "the drop fraction falls on a curve; 0.3 and a cosine are written")
    return {"drop_fraction": 0.3, "decay": "cosine"}


def _final(file: Foreign, at: str, stop: int) -> float | None:
    """The sparsity at the last update: of a schedule, its value there, rounded as people write it."""
    value = file.take(at)
    if not isinstance(value, list | dict):
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
    raise UsageError(f"{file.where(at)}: {at} is no sparsity: {value!r}")


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
        raise UsageError(f"{file.where(at)}: {at} is no list of [step, sparsity]")
    for step, sparsity in pairs:
        checked_number(step, f"{file.where(at)}: a step in {at}", least=0, whole=True)
        _number(file, at, sparsity)
    file.note(
        at, f"sparsity rises on the cubic of gmp, not in these steps, to {pairs[-1][1]:g} at step {pairs[-1][0]:,}"
    )
    return _number(file, at, pairs[-1][1]), algorithm | {"stop": part_of_run(min(int(pairs[-1][0]), steps), steps)}


def _number(file: Foreign, at: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UsageError(f"{file.where(at)}: {at}: {value!r} is no sparsity in [0, 1)")
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
            raise UsageError(f"{file.where(at)}: {at} holds a broken regular expression") from None
        if hits:
            included.append(ours)
        if 0 < hits < len(names):
            file.note(at, "queries, keys and values are one layer here: all three are transformed")
    if not included:
        file.note(at, "it matches no layer of a GPT; all of them are transformed")
    return [] if len(included) in (0, len(LAYERS)) else included


# Cerebras Model Zoo configurations of GPT models as recipes.
# Two generations are read. The new one has everything under `trainer.init` and `trainer.fit`; the old one has `model`,
# `optimizer`, `sparsity`, `runconfig` and `train_input` at the top. Both spell out the *widened* network (hidden 1092,
# feed-forward 4368); here the dense model is named and the transform widens it, so the dense one is looked up: the zoo's GPT
# with the same depth and heads whose hidden width, times sqrt(1/(1-s)), is the one in the file.

FAMILIES = ("gpt2", "gpt3")
CLOSE = 0.02  # widths are rounded to whole heads: 1092 for 1086.1
SAME = {  # what the zoo's GPT does anyway
    "position_embedding_type": "learned",
    "share_embedding_weights": True,
    "layer_norm_epsilon": 1e-5,
    "attention_type": "scaled_dot_product",
    "use_projection_bias_in_attention": True,
    "use_ffn_bias_in_attention": True,
    "use_ffn_bias": True,
    "nonlinearity": "gelu",
    "use_bias_in_output": False,
    "loss_scaling": "num_tokens",
    "loss_weight": 1.0,
    "attention_dropout_rate": 0.1,
    "dropout_rate": 0.1,
    "vocab_size": 50257,
    "embedding_dropout_rate": 0.1,
}
REASONS = {
    "initializer": "weights start as the model's own rule says",
    "embedding_initializer": "weights start as the model's own rule says",
    "output_layer_initializer": "weights start as the model's own rule says",
    "backend": "hardware is training.device here",
    "callbacks": "there are no callbacks in a recipe",
    "logging": "the log has every step that is evaluated",
    "loggers": "metrics.jsonl is always written",
    "loss_scaling_factor": "fp16 scales its loss dynamically",
    "loss_scale": "fp16 scales its loss dynamically",
    "precision_opt_level": "this is about Cerebras hardware",
    "data_processor": "data sets are read by their name here",
    "data_dir": "token files are of another format here; say where they are with data.root",
    "num_workers": "text is read from memory-mapped files",
    "shuffle": "training data is always shuffled, from training.seed",
    "val_dataloader": "evaluation reads the data set's own held-out part",
    "eval_input": "evaluation reads the data set's own held-out part",
    "validate": "evaluation reads the data set's own held-out part",
    "validate_all": "evaluation reads the data set's own held-out part",
    "eval_steps": "evaluation reads all of the held-out part",
}
OTHERWISE = "there is no such setting here"


def recognises(file: Foreign) -> bool:
    """Is this a Model Zoo configuration?"""
    return any(file.find(path) is not None for path in ("trainer.init.model", "model.hidden_size", "trainer.0.trainer"))


def convert(file: Foreign, model: str | None = None) -> Imported:
    """The recipe of a Model Zoo file; `model` names the dense model where the zoo has none that fits.

    Raises:
        UsageError: it has no length, or the zoo has no model for it.
    """
    if file.find("trainer.0") is not None:
        raise UsageError(
            f"{file.path} holds several trainers", hint="import them one at a time: put each into its file"
        )
    new = file.find("trainer.init") is not None
    network = "trainer.init.model" if new else "model"
    steps = _length(file)
    mask = read_sparsity(file, "trainer.init.sparsity" if new else "sparsity", steps)
    sections: dict[str, Any] = {"model": _model(file, network, mask, model)}
    sections["data"] = _data(file, "trainer.fit.train_dataloader" if new else "train_input")
    if mask is not None:
        widened = sections["model"].pop("base_width")
        size = {"base_width": widened} if widened else {"scope": "none", "match": "off"}  # sparse at the dense widths
        transform = {"member": "wide", **size, **mask.transform}
        sections |= {"transform": transform, "sparsity": mask.sparsity, "algorithm": mask.algorithm}
        if mask.masks != "random":
            sections["init"] = {"masks": mask.masks}
    else:
        sections["model"].pop("base_width")
    sections["optimizer"], sections["schedule"] = read_schedule(file, new=new, steps=steps)
    sections["training"] = {"steps": steps, **_training(file, network, new=new)}
    sections |= _intervals(file)
    file.note_rest(REASONS, OTHERWISE)
    size = f"{mask.sparsity:.0%} {mask.algorithm['name']}" if mask else "dense"
    name = f"{sections['model']['name']}_{size}".replace("%", "").replace(" ", "_")
    about = f"{sections['model']['name']}, {size}, from a Cerebras Model Zoo configuration."
    return Imported(name, sections, about, tuple(file.notes))


def _length(file: Foreign) -> int:
    steps = file.number("trainer.init.loop.max_steps", "runconfig.max_steps", least=1, whole=True)
    if steps is None:
        raise UsageError(
            f"{file.path} gives no number of steps",
            hint="loop.max_steps (or runconfig.max_steps) is needed: epochs have no known length",
        )
    return steps


def _model(file: Foreign, at: str, mask: Mask | None, named: str | None) -> dict[str, Any]:
    """Name, seq, and under `base_width` the widened width (None: the file's model has the dense model's own)."""
    from ...models.zoo.gpt import CONFIGS

    number = lambda key: file.number(f"{at}.{key}", least=1, whole=True)  # noqa: E731
    family, hidden, feed_forward = _family(file, f"{at}.name"), number("hidden_size"), number("filter_size")
    depth, heads, positions = number("num_hidden_layers"), number("num_heads"), number("max_position_embeddings")
    for key, value in SAME.items():
        file.expect(f"{at}.{key}", value, f"the zoo's GPT has {value!r}")
    if hidden is None:
        raise UsageError(f"{file.where(at)}: {at} has no hidden_size", hint="the width of the network is needed")
    if feed_forward not in (None, 4 * hidden):
        file.note(f"{at}.filter_size", f"the zoo's GPT has feed-forward layers of 4 x hidden = {4 * hidden}")
    if named:
        own = CONFIGS[named].hidden if named in CONFIGS else None
        return {"name": named, "seq": positions, "base_width": hidden if mask and own != hidden else None}
    name, dense = _dense_model(family, hidden, depth, heads, mask.sparsity if mask else 0.0, positions)
    if name is None:
        raise UsageError(
            f"{file.where(f'{at}.hidden_size')}: the zoo has no GPT of {depth} layers and {heads} heads that widens to "
            f"hidden {hidden}",
            hint="name the dense model it was made from: --model gpt3_small",
        )
    return {"name": name, "seq": positions, "base_width": hidden if mask and dense != hidden else None}


def _family(file: Foreign, at: str) -> str:
    """What the Model Zoo calls the network, where it is a GPT. Others have layers that no GPT has, under the same names of sizes.

    Raises:
        UsageError: it is another family, or the file does not say.
    """
    family = file.take(at)
    if family not in FAMILIES:
        what = f"the model is {family!r}" if family else "the model has no name"
        raise UsageError(
            f"{file.where(at if family else at.rpartition('.')[0])}: {what}; of the Model Zoo {' and '.join(FAMILIES)} are read",
            hint=None if family else "where it is a GPT, add `name: gpt3` to the model",
        )
    return str(family)


def _dense_model(
    family: str, hidden: int, depth: Any, heads: Any, sparsity: float, positions: Any
) -> tuple[str | None, int]:
    """The zoo's GPT that, widened for `sparsity`, is this one, and its hidden width; GPT-3 names before GPT-2 ones."""
    from ...models.zoo.gpt import CONFIGS

    factor = sqrt(1 / (1 - sparsity))
    fits = [
        (name, c.hidden, c.max_seq)
        for name, c in CONFIGS.items()
        if (c.depth, c.num_heads) == (depth, heads)
        and (c.hidden == hidden or abs(c.hidden * factor / hidden - 1) < CLOSE)
    ]
    fits = [f for f in fits if not isinstance(positions, int) or positions <= f[2]]
    fits.sort(key=lambda f: (f[0].startswith("gpt2") != ("2" in family and "3" not in family), f[1] == hidden))
    return (fits[0][0], fits[0][1]) if fits else (None, 0)


def _data(file: Foreign, at: str) -> dict[str, Any]:
    folder = file.find(f"{at}.data_dir")
    text = str(folder.plain()) if folder else ""
    if found := re.search(r"wikitext[-_]?(2|103)(?!\d)", text):
        return {"name": "tokens", "root": f"wikitext-{found[1]}-gpt2"}
    return {"name": "tokens"}


def _training(file: Foreign, network: str, *, new: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    paths = ("trainer.fit.train_dataloader.batch_size", "train_input.batch_size")
    if (batch := file.number(*paths, least=1, whole=True)) is None:
        raise UsageError(f"{file.path} gives no batch size", hint=f"{paths[0]} (or {paths[1]}) is needed")
    found["batch_size"] = batch
    clip = file.number("trainer.init.precision.max_gradient_norm", "optimizer.max_gradient_norm", least=0)
    seed = file.number("trainer.init.seed", "runconfig.seed", least=0, whole=True)
    found |= {key: value for key, value in (("clip", clip or None), ("seed", seed)) if value is not None}
    mixed = file.take("trainer.init.precision.enabled", f"{network}.mixed_precision")
    at = "trainer.init.precision.fp16_type" if new else f"{network}.fp16_type"
    kind = file.take(at)
    if mixed is not False and kind is not None:
        found["precision"] = {"float16": "fp16", "bfloat16": "bf16", "cbfloat16": "bf16"}.get(str(kind), "fp32")
        if kind not in ("float16", "bfloat16"):
            file.note(at, f"this format is Cerebras's own; {found['precision']} is written")
    return found


def _intervals(file: Foreign) -> dict[str, Any]:
    every = {
        "evaluation": file.number("trainer.init.loop.eval_frequency", "runconfig.eval_frequency", least=0, whole=True),
        "checkpoint": file.number("trainer.init.checkpoint.steps", "runconfig.checkpoint_steps", least=0, whole=True),
    }
    return {section: {"every": steps} for section, steps in every.items() if steps}
