"""Which model at which input: what every command is asked about. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError

_OLD_SPELLING = "sparseift_cli.quickstart:"


def proper_source(source: str) -> str:
    """A source as it is written today: recipes and runs of older versions say `sparseift_cli.quickstart:digits_mlp`."""
    return source.removeprefix(_OLD_SPELLING)


@dataclass(frozen=True, slots=True)
class Request:
    """A model at an input: None means the model's own default. `image` is channels, height, width (or any dims) of one sample."""

    source: str
    num_classes: int | None = None
    image: tuple[int, ...] | None = None
    seq: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", proper_source(self.source))

    def to_json(self) -> dict[str, Any]:
        """What another process needs to build the same model."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Request:
        known: dict[str, Any] = dict(data)
        known["image"] = tuple(known["image"]) if known.get("image") else None
        return Request(**known)

    @property
    def default(self) -> bool:
        return self.num_classes is None and self.image is None and self.seq is None and self.batch == 1


def parse_input(text: str | None) -> tuple[int, ...] | None:
    """`3x224x224` -> (3, 224, 224).

    Raises:
        UsageError: it is not positive numbers joined by x.
    """
    if text is None:
        return None
    try:
        dims = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        dims = ()
    if not dims or min(dims) < 1:
        raise UsageError(
            f"input {text!r} is not a shape", hint="write one sample's dims joined by x: --input 3x224x224"
        )
    return dims
