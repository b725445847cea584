"""`exchange` for a GPU: the same mask in a few passes, without waiting for the device once.

To find the n-th of many scores it sorts a sample, which gives two pivots that almost surely enclose the answer; what lies
above them is taken, what lies below is not, and only what lies between is sorted, ties and all. Beside the mask it
gives a number on the device that is zero where all went well; where it is not, the caller asks `exchange`. So a whole
network's masks cost one wait, for all of these numbers together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .exchange import GROWS, Regrow
from .selection import lots

_SAMPLE = 14  # log2 of the places that are looked at to guess a threshold
_SMALL = 1 << 16  # places that are sorted whole
_SIGMAS = 5  # from the expected place in the sample to each pivot
_TIES = (
    1 / 32
)  # of all places: what may lie between the pivots because many scores are equal (bfloat16 has 128 an octave)
_LOWEST = torch.iinfo(torch.int64).min
_LEAST = torch.finfo(torch.float32).min  # of scores that are not -inf


def quick_exchange(mask: Tensor, active: int, drop_scores: Tensor, grow_scores: Tensor, n: int | Tensor, key: int | Tensor,
                   regrow: Regrow = "allow") -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mask of `exchange` for these arguments, and its doubt: an int64 scalar, 0 where the mask is the right one.

    In a CUDA graph `n` and `key` are int64 scalars on the device, read anew at every replay.
    """
    held, drop, grow = (_flat(t, mask) for t in (mask, drop_scores, grow_scores))
    if isinstance(n, int):  # filled in on the device: a copy from the host would be waited for
        n = torch.full((), n, dtype=torch.int64, device=mask.device)
    if regrow == "forbid":
        n = n.clamp(max=mask.numel() - active)
    if not active:
        return mask.clone(), n.clamp(min=0)
    places = torch.nonzero_static(held, size=active).view(-1)
    lost, doubt = _first(-drop[places], n, key, places, mask, low_lots=True)
    kept = held.scatter(0, places, ~lost)
    taken = held if regrow == "forbid" else kept
    grown, more = _first(grow.masked_fill(taken, -torch.inf), n, key ^ GROWS, None, mask)
    return _as(grown.logical_or_(kept), mask), doubt + more


def _first(scores: Tensor, n: Tensor, key: int | Tensor, places: Tensor | None, like: Tensor, *,
           low_lots: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mask [N] of the n highest of `scores` [N], and a doubt. Scores of -inf stand for what may not be taken.

    Between equal scores the higher lots come first, or the lower ones; `places` [N] says whose lots they are, if not 0..N-1.
    """
    size = scores.numel()
    high, low, room = _pivots(scores, n)
    chosen = torch.empty(size + 1, dtype=torch.bool, device=scores.device)  # the last one is for what does not exist
    above = torch.gt(scores, high, out=chosen[:-1])
    between = (scores >= low.clamp(min=_LEAST)) > above
    found = torch.nonzero_static(between, size=room, fill_value=-1).view(-1)
    exists = found >= 0
    somewhere = found.clamp(min=0)
    whose = somewhere if places is None else places[somewhere]
    ranks = _ranks(scores[somewhere], key, _number(whose, like), low_lots=low_lots).masked_fill_(~exists, _LOWEST)
    sure = above.count_nonzero()
    missing = n - sure
    last = ranks.sort(descending=True).values.gather(0, (missing - 1).clamp(0, room - 1).view(1))
    taken = (ranks >= last) & exists & (missing > 0)
    overflow = between.count_nonzero() > room
    doubt = (sure + taken.count_nonzero() - n).abs() + overflow
    return chosen.scatter_(0, torch.where(exists, found, size), taken)[:-1], doubt


def _pivots(scores: Tensor, n: Tensor) -> tuple[Tensor, Tensor, int]:
    """Two scalars between which the n-th highest of `scores` [N] almost surely lies, and how many may lie there."""
    size = scores.numel()
    infinite = torch.full((1,), torch.inf, device=scores.device)
    if size <= _SMALL:
        return infinite, -infinite, size
    sample = scores[:: size >> _SAMPLE | 1].sort(descending=True).values
    count = sample.numel()
    share = (n / size).clamp(0, 1)
    margin = _SIGMAS * (count * share * (1 - share)).sqrt() + 2
    first, last = (share * count - margin).floor().long(), (share * count + margin).ceil().long()
    # gathered, as an index that is a scalar on the device would be waited for
    high = torch.where(first < 0, infinite, sample.gather(0, first.clamp(0, count - 1).view(1)))
    low = torch.where(last >= count, -infinite, sample.gather(0, last.clamp(0, count - 1).view(1)))
    widest = 2 * (_SIGMAS * (count / 4) ** 0.5 + 2) + _SIGMAS * count**0.25  # half of the places is the widest guess
    return high, low, min(size, int((widest / count + _TIES) * size))


def _ranks(scores: Tensor, key: int | Tensor, numbers: Tensor, *, low_lots: bool = False) -> Tensor:
    """int64 [*] in the order of the scores [*], and of their `lots` (or against it) where those are equal."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0: there are two zeros, which are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats compare as their bits do, negative ones backwards
    lot = lots(key, numbers)
    return (ordered << 32) + (0xFFFFFFFF - lot if low_lots else lot)


def _number(places: Tensor, like: Tensor) -> Tensor:
    """What `exchange` calls these places of `_flat`: their numbers row by row, however `like` lies in memory."""
    if not _channels_last(like):
        return places
    _, channels, height, width = like.shape
    pixel, channel = places // channels, places % channels
    row, within = pixel // (height * width), pixel % (height * width)
    return (row * channels + channel) * (height * width) + within


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Every place [N], in the order in which `like` lies in memory: a view wherever `tensor` lies so too."""
    return tensor.permute(0, 2, 3, 1).reshape(-1) if _channels_last(like) else tensor.reshape(-1)


def _as(flat: Tensor, like: Tensor) -> Tensor:
    """`_flat` undone."""
    if not _channels_last(like):
        return flat.view(like.shape)
    rows, channels, height, width = like.shape
    return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
