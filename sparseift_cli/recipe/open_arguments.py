"""The arguments of `data.open_data` that a recipe means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import DATASETS
from ..models.zoo import registry
from .schema import Spec


def open_arguments(spec: Spec) -> tuple[str, Path | None, dict[str, Any]]:
    """Name, root and options: `open_data(name, root, **options)` opens the data of a recipe, which has some."""
    data = spec.data
    assert data is not None
    channels, height, classes = _model_input(spec)
    known: dict[str, Any] = {"download": data.download, "level": data.level, "max_vocab": data.max_vocab}
    optional = {
        "tokenizer": data.tokenizer,
        "valid_percent": None if data.validation is None else round(100 * data.validation),
        "size": height,
        "channels": channels,
        "classes": classes,
        "train": data.limit,
    }
    known |= {name: value for name, value in optional.items() if value}
    options = {name: known[name] for name in DATASETS.get(data.name).options_of_recipes if name in known}
    return data.name, None if data.root is None else Path(data.root), options


def _model_input(spec: Spec) -> tuple[int | None, int | None, int | None]:
    """Channels, height and classes that the model takes, as far as the recipe or the zoo knows them."""
    info = None if ":" in spec.model.name else registry.lookup(spec.model.name)
    image = tuple(map(int, spec.model.input.split("x"))) if spec.model.input else info.image if info else None
    classes = spec.model.num_classes or (info.num_classes if info else None)
    return (image[0], image[1], classes) if image and len(image) == 3 else (None, None, classes)
