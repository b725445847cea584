"""Values that a recipe need not give: the published settings for its data set, else sensible ones for its kind.

CIFAR: the paper's settings for CIFAR-100; ImageNet: its settings for ResNets; text: those of its GPT-3 Small, at a length
that one sees the end of (arXiv 2303.11525, appendix; Model Zoo configuration for AdamW).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..data.registry import find
from ..errors import SparseiftError, UsageError
from ..models.zoo import registry

Kind = Literal["image", "tokens"]
Values = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What is known of a data set before it is read."""

    kind: Kind
    label: str
    image: str | None = None
    """One sample's shape as the model sees it."""
    classes: int | None = None
    samples: int | None = None
    """Official number of training samples."""


DATA = {
    "cifar10": DataFacts("image", "cifar", "3x32x32", 10, 50_000),
    "cifar100": DataFacts("image", "cifar", "3x32x32", 100, 50_000),
    "mnist": DataFacts("image", "image", "1x28x28", 10, 60_000),
    "digits": DataFacts("image", "image", "1x8x8", 10, 1_442),
    "imagenet": DataFacts("image", "imagenet", "3x224x224", 1000, 1_281_167),
    "image-folder": DataFacts("image", "imagenet"),
    "synthetic-images": DataFacts("image", "image"),
    "stdlib": DataFacts("tokens", "text"),
    "text": DataFacts("tokens", "text"),
    "wikitext-2": DataFacts("tokens", "text"),
    "wikitext-103": DataFacts("tokens", "text"),
    "tokens": DataFacts("tokens", "text"),
    "synthetic-text": DataFacts("tokens", "text"),
}

SPLITTABLE = ("text", "cifar10", "cifar100", "mnist", "digits")
"""Sets of which `data.validation` holds a part out."""
NO_TEST = ("cifar10", "cifar100", "mnist", "digits", "synthetic-images", "stdlib", "synthetic-text")
"""Sets whose test split is watched during training, where no part of the rest is held out, and sets without one."""

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


def facts_of(data: Mapping[str, Any]) -> DataFacts | None:
    """What is known of the set that a data section names; None for one that there is not."""
    name = str(data.get("name"))
    try:
        return DATA.get(name.lower()) or DATA[find(name)]
    except UsageError:
        return None


def defaults(given: Mapping[str, Any]) -> tuple[Values, str]:
    """What fills the gaps of a recipe whose sections are `given`, and for what these defaults are made."""
    data = given.get("data") or {}
    facts = facts_of(data)
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
            "metrics": ["loss", "perplexity", "bits_per_byte"] if text else ["loss", "top1", "top5"],
        },
        "checkpoint": {"best": "loss" if text else "top1"},
    }
    if label == "imagenet":
        values["data"] = {"workers": 8}
    elif "wikitext" in str(data.get("name")).lower():
        values["data"] = {"level": "words"}
    return values, f"for {label}"


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


def _model(given: Mapping[str, Any], facts: DataFacts | None) -> dict[str, Any]:
    """Classes and input of the data set, for a zoo model that would take others by itself."""
    try:
        info = registry.lookup(str(given.get("name")))
    except SparseiftError:
        return {}  # somebody else's model: only its owner knows what it takes
    if facts is None or facts.kind != "image" or info.image is None:
        return {}
    found: dict[str, Any] = {}
    if facts.classes not in (None, info.num_classes):
        found["num_classes"] = facts.classes
    if facts.image not in (None, "x".join(map(str, info.image))):
        found["input"] = facts.image
    return found
