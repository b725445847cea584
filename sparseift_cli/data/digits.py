"""scikit-learn's digits: 1,797 images of 8 x 8 in 17 greys, real handwriting (UCI's optical digits, test part)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .places import data_home, read_file
from .source import DataSource

if TYPE_CHECKING:
    from torch import Tensor

    from .images import ImageSet

_SIDE = 8
_TEST = int(
    "8830410000081060c080e100040000d20103001118a514000837022a91009800002c6008281871014094188108330014"
    "08780050082100860080620800c70028088004a4200041590004000200010d090604800665d88c518000942800847068"
    "090820000090808e0010600d0310028651e2200c94002882100108051440808100ac0028001084841004208020230000"
    "0a0c500904a2908c408008a8020600000409582201db5301062900400001000840188820289808002000203008008800"
    "161c04210000808501910410543885200040601524002214424001000c2011",
    16,
)
"""The test split: bit i is set where image i belongs to it. A fifth of the images of each digit, drawn at random once. Stored, so
that no change of a random generator can ever move an image from the training split to the test split.
"""


def open_digits(root: str | Path | None = None) -> ImageSet:
    """1,442 training and 355 test images [1, 8, 8] of 10 digits; greys 0 to 16 are scaled to 0 to 255.

    The file, digits.csv.gz, is taken from `root`, else from the installed scikit-learn (which is not imported), else
    from the data folder.

    Raises:
        UsageError: it is nowhere, or damaged.
    """
    from .images import ImageSet

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


DIGITS = DataSource(
    name="digits",
    kind="image",
    open=open_digits,
    summary="1,797 handwritten digits of 8 x 8, from scikit-learn",
    image=(1, _SIDE, _SIDE),
    classes=10,
    samples=1_442,
    splits=("train", "test"),
    can_hold_out=True,
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
    """uint8 images [N, 1, 8, 8] and labels int64 [N] of both splits, from rows of 64 greys and the digit."""
    import torch

    try:
        rows = [[int(float(v)) for v in line.split(",")] for line in read_file(path, 16 << 20).decode("ascii").split()]
        table = torch.tensor(rows)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{path}: no table of numbers ({error})") from None
    if table.ndim != 2 or table.shape[1] != _SIDE * _SIDE + 1 or int(table.min()) < 0 or int(table[:, :-1].max()) > 16:
        raise UsageError(f"{path}: not rows of 64 greys from 0 to 16 and a digit")
    images = (table[:, :-1] * 255 // 16).to(torch.uint8).view(-1, 1, _SIDE, _SIDE)
    test = torch.tensor([bool(_TEST >> row & 1) for row in range(len(table))])
    return {name: (images[rows], table[rows, -1]) for name, rows in (("train", ~test), ("test", test))}
