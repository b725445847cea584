"""scikit-learn's digits: 1,797 images of 8 x 8 in 17 greys, real handwriting (UCI's optical digits, test part)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ..base.randomness import key_of
from ..errors import UsageError
from .images import ImageSet
from .permutation import Permutation
from .places import data_home, read_file

_SIDE = 8
_TEST_SHARE = 5  # one in so many of each digit, drawn by a fixed permutation


def open_digits(root: str | Path | None = None) -> ImageSet:
    """1,442 training and 355 test images [1, 8, 8] of 10 digits; greys 0 to 16 become 0 to 255.

    The file, digits.csv.gz, is taken from `root`, else from the installed scikit-learn (which is not imported), else
    from the data folder.

    Raises:
        UsageError: it is nowhere, or damaged.
    """
    path = _file(root)
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def read(split: str) -> tuple[Tensor, Tensor]:
        if not held:
            held.update(_splits(path))
        return held[split]

    return ImageSet(
        "digits",
        read,
        split_names=("train", "test"),
        shape=(1, _SIDE, _SIDE),
        classes=10,
        source=str(path),
        mean=(0.3041,),
        std=(0.3760,),
    )


def _file(root: str | Path | None) -> Path:
    places: list[Path] = []
    if root is not None:
        places = [Path(root).expanduser(), Path(root).expanduser() / "digits.csv.gz"]
    else:
        spec = importlib.util.find_spec("sklearn")
        if spec is not None and spec.submodule_search_locations:
            places = [Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"]
        places.append(data_home() / "digits.csv.gz")
    for place in places:
        if place.is_file():
            return place
    tried = ", ".join(map(str, places))
    raise UsageError(
        f"the data set digits is not there; tried {tried}", hint="pip install scikit-learn, which ships it"
    )


def _splits(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of 64 greys and the digit."""
    try:
        rows = [[int(float(v)) for v in line.split(",")] for line in read_file(path, 16 << 20).decode("ascii").split()]
        table = torch.tensor(rows)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{path}: no table of numbers ({error})") from None
    if table.ndim != 2 or table.shape[1] != _SIDE * _SIDE + 1 or int(table.min()) < 0 or int(table[:, :-1].max()) > 16:
        raise UsageError(f"{path}: not rows of 64 greys from 0 to 16 and a digit")
    images = (table[:, :-1] * 255 // 16).to(torch.uint8).view(-1, 1, _SIDE, _SIDE)
    shuffled = Permutation(len(table), key_of(0, "digits"))(torch.arange(len(table)))
    test = torch.zeros(len(table), dtype=torch.bool)
    for digit in range(10):
        rows = shuffled[table[shuffled, -1] == digit]
        test[rows[: len(rows) // _TEST_SHARE]] = True
    return {name: (images[rows], table[rows, -1]) for name, rows in (("train", ~test), ("test", test))}
