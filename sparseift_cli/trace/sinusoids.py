"""Tables of sines and cosines of positions: found by their numbers, and computed again for another width.

The tables of Vaswani et al. 2017 (arXiv 1706.03762, section 3.5), of vision transformers in two dimensions (He et al. 2021,
arXiv 2111.06377), and the cached angles of rotary embeddings (Su et al. 2021, arXiv 2104.09864) hold sin(c w) and cos(c w)
of a coordinate c, one a row, and frequencies w_i = base ** (-i / n). They differ in the order of the columns, the number of
axes, the base, and whether the last frequency is one step before 1 / base or 1 / base itself. `find_sinusoids` tries these
forms and accepts one only if it gives the whole table.

>>> angles = torch.arange(6)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
>>> found = find_sinusoids(torch.cat((angles.sin(), angles.cos()), 1))
>>> found.base, found.closed, found.form
(10000.0, False, 'sin cos')
>>> found.at(12).shape
torch.Size([6, 12])
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_FORMS = ("sin cos", "cos sin", "sin cos in turn", "cos sin in turn")
_ALONE = ("sin", "cos", "sin twice", "cos twice", "sin in pairs", "cos in pairs")
_AXES = (1, 2, 3)
_USUAL = 10000.0  # the base of nearly all tables


@dataclass(frozen=True)
class Sinusoids:
    """A table of sines and cosines, [rows, width].

    Args:
        form: the order of the columns of one axis: halves, in turn, `complex`, or one function alone, once, twice (in
            halves) or in pairs of neighbours.
        coordinates: of each row along each axis, [axes, rows]; float64.
        base: of the frequencies base ** (-i / n), i < n; with `closed` base ** (-i / (n - 1)).
        amplitude: what all entries are multiplied by.
        blank: rows that are zero, as for padding, bool [rows].
        shape: of the table, without its last dim.
    """

    form: str
    coordinates: Tensor
    base: float
    closed: bool
    amplitude: float
    blank: Tensor
    shape: tuple[int, ...]

    def at(self, width: int) -> Tensor:
        """The table with `width` columns, float64 or complex128; columns that fill no pair of every axis are zero at the end."""
        axes = len(self.coordinates)
        each = {"complex": 1, "sin": 1, "cos": 1}.get(self.form, 2)
        frequencies = _frequencies(width // (each * axes), self.base, self.closed)
        blocks = [_columns(self.form, c[:, None] * frequencies) for c in self.coordinates]
        table = self.amplitude * torch.cat(blocks, 1)
        table[self.blank] = 0
        padded = torch.nn.functional.pad(table, (0, width - table.shape[1]))
        return padded.reshape(*self.shape, width)


def find_sinusoids(table: Tensor) -> Sinusoids | None:
    """The form of a table [..., width] whose rows are positions; None where it is no table of sines and cosines."""
    shape, width = tuple(table.shape[:-1]), table.shape[-1]
    rows = table.detach().reshape(-1, width).cpu()
    rows = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
    if len(rows) < 2 or width < 2 or not rows.isfinite().all():
        return None
    tolerance = 2e-3 if torch.finfo(table.dtype).eps < 1e-5 else 4e-2
    for form, blocks, amplitude, blank in _candidates(rows, tolerance):
        found = _fit(form, blocks, tolerance)
        if found is not None:
            coordinates, base, closed = found
            return Sinusoids(form, coordinates, base, closed, amplitude, blank, shape)
    return None


def _candidates(rows: Tensor, tolerance: float) -> Iterator[tuple[str, list[Tensor], float, Tensor]]:
    """(form, cos + i sin of each axis [rows, pairs], amplitude, blank rows) of every order of columns that is possible.

    Sine or cosine alone are handled as the unit circle that they are a side of, for coordinates 0, 1, 2, ...
    """
    blank = ~rows.any(1)
    if rows.is_complex():
        yield "complex", [rows], 1.0, blank
        return
    padding = int((~rows.any(0)).flip(0).cumprod(0).sum())
    kept = rows[:, : rows.shape[1] - padding]
    for axes in _AXES:
        if kept.shape[1] % (2 * axes):
            continue
        for form in _FORMS:
            blocks = [_circle(form, block) for block in kept.chunk(axes, 1)]
            size = torch.cat(blocks, 1)[~blank].abs()
            amplitude = float(size.mean()) if size.numel() else 0.0
            if amplitude and float((size / amplitude - 1).abs().max()) < tolerance:
                exact = 1.0 if abs(amplitude - 1) < tolerance else amplitude
                yield form, [torch.where(blank[:, None], torch.ones_like(b), b / exact) for b in blocks], exact, blank
    no_rows = torch.zeros_like(blank)
    for form in _ALONE:
        alone = _alone(form, kept)
        if alone is not None:
            yield form, [alone.to(torch.complex128)], 1.0, no_rows


def _circle(form: str, block: Tensor) -> Tensor:
    """cos + i sin of [rows, 2 n] columns in the order of `form`."""
    first, second = (block[:, 0::2], block[:, 1::2]) if form.endswith("in turn") else block.chunk(2, 1)
    sin, cos = (first, second) if form.startswith("sin") else (second, first)
    return torch.complex(cos, sin)


def _alone(form: str, block: Tensor) -> Tensor | None:
    """The columns [rows, n] of one function, each once; None where they do not repeat as `form` says."""
    if form in ("sin", "cos"):
        return block
    if block.shape[1] % 2:
        return None
    first, second = (block[:, 0::2], block[:, 1::2]) if form.endswith("in pairs") else block.chunk(2, 1)
    return first if torch.equal(first, second) else None


def _columns(form: str, angles: Tensor) -> Tensor:
    """The columns of one axis, from the angles [rows, n] of its pairs."""
    if form == "complex":
        return torch.polar(torch.ones_like(angles), angles)
    sin, cos = angles.sin(), angles.cos()
    if form in _FORMS:
        first, second = (sin, cos) if form.startswith("sin") else (cos, sin)
    else:
        first = second = sin if form.startswith("sin") else cos
        if form in ("sin", "cos"):
            return first
    if form.endswith(("in turn", "in pairs")):
        return torch.stack((first, second), 2).flatten(1)
    return torch.cat((first, second), 1)


def _frequencies(n: int, base: float, closed: bool) -> Tensor:
    """base ** (-i / n), i < n; with `closed` the last one is 1 / base."""
    return base ** (-torch.arange(n, dtype=torch.float64) / max(1, n - closed))


def _fit(form: str, blocks: list[Tensor], tolerance: float) -> tuple[Tensor, float, bool] | None:
    """(coordinates [axes, rows], base, closed) that give all blocks of cos + i sin [rows, n]; None where none do."""
    n = blocks[0].shape[1]
    if n < 2:
        return None
    step = _step_alone(form, blocks[0].real) if form in _ALONE else _step(blocks[0])
    if step is None or not 1 < step < 1e8:
        return None
    for base, closed in ((_USUAL, False), (_USUAL, True), _base(step, n)):
        coordinates = [_matching(form, block, _frequencies(n, base, closed), tolerance) for block in blocks]
        if all(c is not None for c in coordinates):
            return torch.stack([c for c in coordinates if c is not None]), base, closed
    return None


def _matching(form: str, block: Tensor, frequencies: Tensor, tolerance: float) -> Tensor | None:
    """The coordinates [rows] with which these frequencies [n] give the block of cos + i sin [rows, n]; None without any."""
    alone = form in _ALONE
    c = torch.arange(len(block), dtype=torch.float64) if alone else _coordinates(block, frequencies)
    angles = c[:, None] * frequencies
    if alone:
        made = (angles.sin() if form.startswith("sin") else angles.cos()).to(torch.complex128)
    else:
        made = torch.polar(torch.ones_like(angles), angles)
    return c if float((made - block).abs().max()) < tolerance else None


def _step(block: Tensor) -> float | None:
    """w_i / w_(i + 1): the ratio of the two lowest angles, at the row where they are smallest, so that none has gone round."""
    low, next_low = block[:, -1].angle(), block[:, -2].angle()
    rows = (low.abs() > 1e-9).nonzero().flatten()
    if not len(rows):
        return None
    row = rows[low[rows].abs().argmin()]
    return float(next_low[row] / low[row])


def _step_alone(form: str, block: Tensor) -> float | None:
    """The same from the first two angles of row 1, whose coordinate is 1, by the inverse of one function."""
    inverse = torch.asin if form.startswith("sin") else torch.acos
    first, second = inverse(block[1, :2].clamp(-1, 1)).tolist()
    return 1 / second if second > 0 and abs(first - 1) < 1e-2 else None


def _base(step: float, n: int) -> tuple[float, bool]:
    """(base, closed) of n frequencies with this ratio: bases are round numbers, so the two forms differ."""
    options = [(step**n, False), (step ** (n - 1), True)]

    def rounded(value: float) -> float:
        return float(f"{value:.1e}")

    base, closed = min(options, key=lambda option: abs(rounded(option[0]) / option[0] - 1))
    if abs(rounded(base) / base - 1) < 1e-3:
        return rounded(base), closed
    return options[0]


def _coordinates(block: Tensor, frequencies: Tensor) -> Tensor:
    """The coordinate of every row [rows], from its angles at all frequencies: roughly from the lowest, better from each next."""
    c = block[:, -1].angle() / frequencies[-1]
    for i in range(len(frequencies) - 2, -1, -1):
        angle = block[:, i].angle()
        turns = ((c * frequencies[i] - angle) / (2 * math.pi)).round()
        c = (angle + 2 * math.pi * turns) / frequencies[i]
    whole = c.round()
    return whole if float((c - whole).abs().max()) < 1e-3 else c
