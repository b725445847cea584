"""Values that a recipe need not give: the published settings for its data set, else sensible ones for its kind.

CIFAR: the paper's settings for CIFAR-100; ImageNet: its settings for ResNets; text: those of its GPT-3 Small, at a length
that one sees the end of (arXiv 2303.11525, appendix; Model Zoo configuration for AdamW).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base.text import shape_text
from ..data import DATASETS, DataSource
from ..errors import SparseiftError, UsageError
from ..models.zoo import registry

Values = dict[str, dict[str, Any]]

_SGD: dict[str, Any] = {"momentum": 0.9, "nesterov": True}
_NO_DECAY = ["norm", "bias"]
_OPTIMIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "image": {
        "sgd": {"lr": 0.05, "weight_decay": 1e-4, **_SGD},
        "adamw": {"lr": 1e-3, "weight_decay": 0.05, "no_decay_on": _NO_DECAY},
    },
    "cifar": {
        "sgd": {"lr": 0.1, "weight_decay": 5e-4, **_SGD},
        "adamw": {"lr": 1e-3, "weight_decay": 0.05, "no_decay_on": _NO_DECAY},
    },
    "imagenet": {
        "sgd": {"lr": 0.256, "momentum": 0.875, "weight_decay": 3.0517578125e-5, "no_decay_on": _NO_DECAY},
        "adamw": {"lr": 1e-3, "weight_decay": 0.05, "no_decay_on": _NO_DECAY},
    },
    "text": {"adamw": {"lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "no_decay_on": _NO_DECAY}, "sgd": _SGD},
}
_SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("cosine", {}),
    "cifar": ("multistep", {"milestones": ["30%", "60%", "80%"], "gamma": 0.2}),
    "imagenet": ("cosine", {}),
    "text": ("cosine", {"warmup": "10%", "final_lr": 6e-5}),
}
_TRAINING: dict[str, dict[str, Any]] = {
    "image": {"epochs": 20, "batch_size": 64},
    "cifar": {"epochs": 200, "batch_size": 128},
    "imagenet": {"epochs": 90, "batch_size": 256, "label_smoothing": 0.1},
    "text": {"steps": 1000, "batch_size": 32, "clip": 1.0},
}


def facts_of(data: Mapping[str, Any]) -> DataSource | None:
    """The data set that a data section names; None where it names none that there is."""
    try:
        return DATASETS.get(str(data.get("name")))
    except UsageError:
        return None


def defaults(given: Mapping[str, Any]) -> tuple[Values, str]:
    """What fills the gaps of a recipe whose sections are `given`, and for what these defaults are made."""
    facts = facts_of(given.get("data") or {})
    label = facts.label if facts else "text" if _reads_tokens(given) else "image"
    schedule, options = _SCHEDULES[label]
    optimizer = (given.get("optimizer") or {}).get("name", "adamw" if label == "text" else "sgd")
    chosen = (given.get("schedule") or {}).get("name", schedule)
    text = label == "text"
    values: Values = {
        "model": _model(given.get("model") or {}, facts),
        "algorithm": {"name": "static" if given.get("transform") else "dense"},
        "optimizer": {"name": optimizer, **_OPTIMIZERS[label].get(str(optimizer), {})},
        "schedule": {"name": chosen, **(options if chosen == schedule else {})},
        "training": _length(given.get("training") or {}, _TRAINING[label]),
        "evaluation": {
            "every": "10%" if text else "1 epoch",
            "metrics": _text_metrics(given.get("data") or {}, facts) if text else ["loss", "top1", "top5"],
        },
        "checkpoint": {"best": "loss" if text else "top1"},
    }
    if facts and facts.data_defaults:
        values["data"] = dict(facts.data_defaults)
    return values, f"for {label}"


def _text_metrics(data: Mapping[str, Any], facts: DataSource | None) -> list[str]:
    """Perplexity per token, and per word where it is published so; not of a model of bytes, of which it has a dozen digits."""
    usual = facts.data_defaults.get("level", "bytes" if "level" in facts.options else None) if facts else None
    level = data.get("level") or usual
    if level == "bytes":
        return ["loss", "perplexity_per_token", "bits_per_byte"]
    if level == "words":
        return ["loss", "perplexity_per_word", "bits_per_byte"]
    return ["loss", "perplexity_per_token", "perplexity_per_word", "bits_per_byte"]


def _length(given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("epochs") is not None or given.get("steps") is not None:
        return {k: v for k, v in default.items() if k not in ("epochs", "steps")}
    return dict(default)


def _reads_tokens(given: Mapping[str, Any]) -> bool:
    model = given.get("model") or {}
    try:
        return registry.lookup(str(model.get("name"))).kind == "tokens"
    except SparseiftError:
        return model.get("seq") is not None


def _model(given: Mapping[str, Any], facts: DataSource | None) -> dict[str, Any]:
    """Classes and input of the data set, for a zoo model that would take others by itself."""
    try:
        info = registry.lookup(str(given.get("name")))
    except SparseiftError:
        return {}  # not a zoo model: what it takes is not known here
    if facts is None or facts.kind != "image" or info.image is None:
        return {}
    found: dict[str, Any] = {}
    if facts.classes not in (None, info.num_classes):
        found["num_classes"] = facts.classes
    if facts.image not in (None, info.image):
        found["input"] = shape_text(facts.image)
    return found
