"""The arguments of `data.open_data` that a recipe means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.registry import CATALOG
from ..models.zoo import registry
from .schema import Spec

_DOWNLOADS = ("cifar10", "cifar100", "mnist")
_TEXT = ("text", "wikitext-2", "wikitext-103")


def opening(spec: Spec) -> tuple[str, Path | None, dict[str, Any]]:
    """Name, root and options: `open_data(name, root, **options)` opens the data of a recipe, which has some."""
    data = spec.data
    assert data is not None
    name = "image-folder" if data.name == "imagenet" else data.name
    options: dict[str, Any] = {}
    if name in _DOWNLOADS:
        options["download"] = data.download
    if name in _TEXT:
        options |= {"level": data.level, "max_vocab": data.max_vocab}
    if name == "text" and data.validation is not None:
        options["valid_percent"] = round(100 * data.validation)
    if CATALOG[name].kind == "image" and name in ("image-folder", "synthetic-images"):
        channels, height, classes = _wanted(spec)
        options |= {"size": height} if height else {}
        if name == "synthetic-images":
            options |= {k: v for k, v in (("channels", channels), ("classes", classes), ("train", data.limit)) if v}
    return name, None if data.root is None else Path(data.root), options


def _wanted(spec: Spec) -> tuple[int | None, int | None, int | None]:
    """Channels, height and classes that the model takes, as far as the recipe or the zoo knows them."""
    info = None if ":" in spec.model.name else registry.lookup(spec.model.name)
    image = tuple(map(int, spec.model.input.split("x"))) if spec.model.input else info.image if info else None
    classes = spec.model.num_classes or (info.num_classes if info else None)
    return (image[0], image[1], classes) if image and len(image) == 3 else (None, None, classes)
