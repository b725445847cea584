"""What is known of a data set before any file is read. No torch here: recipes are checked and FLOPs counted without it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .dataset import DataSet, Kind

Settings = Literal["image", "cifar", "imagenet", "text"]
"""Which published training settings fill the gaps of a recipe; recipe/defaults.py holds them."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set by name: how to open it, and its facts.

    A data set is one file: an opener, and a DataSource that a registry lists or a recipe names as `package.module:Name`.

        SQUARES = DataSource(name="squares", kind="image", open=open_squares, image=(1, 8, 8), classes=2)

    Args:
        open: `open(root, **options)` gives a `DataSet`; `root` is a folder, a file or None.
        image: channels, height and width of one sample as a model gets it; None where the files decide, and for tokens.
        classes: labels of images, or the size of the vocabulary; None where the files decide.
        samples: the official number of training samples.
        splits: names of the splits; empty where the files decide.
        can_hold_out: `data.validation` may hold a part of the training split out.
        settings: see `Settings`; by default those of the kind.
        data_defaults: what a recipe's section `data` is by default for this set: {"level": "words"}.
        recipe_options: options of `open` that a recipe sets; by default those of `RECIPE_OPTIONS` that `open` takes.
    """

    name: str
    kind: Kind
    open: Callable[..., DataSet]
    summary: str = ""
    image: tuple[int, int, int] | None = None
    classes: int | None = None
    samples: int | None = None
    splits: tuple[str, ...] = ()
    can_hold_out: bool = False
    settings: Settings | None = None
    data_defaults: Mapping[str, Any] = field(default_factory=dict)
    recipe_options: tuple[str, ...] | None = None

    @property
    def label(self) -> Settings:
        """The training settings that are the defaults for this set."""
        return self.settings or ("text" if self.kind == "tokens" else "image")

    @property
    def has_separate_test(self) -> bool:
        """Whether a split `test` is left when another one is watched during training. True where only the files can say."""
        return not self.splits or {"valid", "test"} <= set(self.splits)

    @property
    def options(self) -> tuple[str, ...]:
        """What `open` takes beside the root."""
        return tuple(name for name in inspect.signature(self.open).parameters if name != "root")

    @property
    def options_of_recipes(self) -> tuple[str, ...]:
        """Options of `open` that are taken from a recipe."""
        known = self.recipe_options if self.recipe_options is not None else RECIPE_OPTIONS
        return tuple(name for name in known if name in self.options)

    def require_options(self, given: Mapping[str, Any]) -> None:
        """Raise UsageError where `open` does not take one of the options `given`."""
        for option in given:
            if option not in self.options:
                known = f"it takes {', '.join(self.options)}" if self.options else "it takes none"
                raise UsageError(
                    f"the data set {self.name} has no option {option!r}",
                    hint=did_you_mean(option, self.options) or known,
                )


RECIPE_OPTIONS = ("download", "level", "max_vocab", "tokenizer", "valid_percent", "size")
"""Options of an opener that a recipe knows: keys of its section `data`, its `validation` in per cent of the text, and
the height in pixels of the model's input."""


def require_integer(name: str, value: object, low: int, high: int) -> int:
    """`value` as an integer of low..high, or UsageError."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it is a whole number from {low:,} to {high:,}")
    return value
