"""`exchange` for a GPU: the same mask in a few passes, without waiting for the device once.

It relies on a sample of the scores to guess a threshold. Beside the mask it gives a number on the device that is zero
where all went well; where it is not, the caller asks `exchange`. So a whole network's masks cost one wait, for all of
these numbers together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .exchange import GROWS, Regrow
from .selection import lots

_SAMPLE = 14  # log2 of the places that are looked at to guess a threshold
_SMALL = 1 << 17  # places that are ranked whole


def quick_exchange(mask: Tensor, active: int, drop_scores: Tensor, grow_scores: Tensor, n: int | Tensor, key: int | Tensor,
                   regrow: Regrow = "allow", *, most: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mask of `exchange` for these arguments, and its doubt: an int64 scalar, 0 where the mask is the right one.

    In a CUDA graph `n` and `key` are int64 scalars on the device, read anew at every replay; `most` is the largest n.
    """
    held, drop, grow = (_flat(t, mask) for t in (mask, drop_scores, grow_scores))
    most = int(n) if most is None else most
    if regrow == "forbid":
        spare = mask.numel() - active
        most, n = min(most, spare), n.clamp(max=spare) if isinstance(n, Tensor) else min(n, spare)
    if most == 0:
        return mask.clone(), torch.zeros((), dtype=torch.int64, device=mask.device)
    n = torch.as_tensor(n, device=mask.device)
    places = torch.nonzero_static(held, size=active).view(-1)
    lost, doubt = _first(_ranks(drop[places], key, _number(places, mask)), n, most, largest=False)
    kept = held.scatter(0, places, ~lost)
    free = torch.logical_not(held if regrow == "forbid" else kept)
    places, more = _near(grow.masked_fill(~free, -torch.inf), most)
    exists = places >= 0
    somewhere = places.clamp(min=0)
    ranks = _ranks(grow[somewhere], key ^ GROWS, _number(somewhere, mask))
    grown, again = _first(ranks.masked_fill_(~exists, torch.iinfo(torch.int64).min), n, most, largest=True)
    new = torch.zeros(
        mask.numel() + 1, dtype=torch.bool, device=mask.device
    )  # the last one is for places that do not exist
    new = new.scatter_(0, torch.where(exists, places, mask.numel()), grown)[:-1].logical_or_(kept)
    return _as(new, mask), doubt + more + again + (exists.count_nonzero() < n)


def _near(keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Places of `keys` [N] among which the n highest are, -1 where there is none, and whether one may be missing.

    Keys of -inf stand for places that may not be taken. The pivot almost surely lies a little below the n-th highest.
    """
    size = keys.numel()
    sample = keys[:: size >> _SAMPLE | 1]
    count, share = sample.numel(), n / size
    rank = int(share * count + 5 * (count * share * (1 - share)) ** 0.5) + 2
    if size <= _SMALL or rank >= count // 2:
        near, room = keys > -torch.inf, size
    else:
        near = keys >= sample.topk(rank).values[-1]
        room = min(size, int(1.1 * (rank + 5 * rank**0.5 + 2) / count * size))  # a tenth for ties with the pivot
        near &= keys > -torch.inf
    return torch.nonzero_static(near, size=room, fill_value=-1).view(-1), near.count_nonzero() > room


def _ranks(scores: Tensor, key: int | Tensor, numbers: Tensor) -> Tensor:
    """int64 [*] in the order of the scores [*], and of their `lots` where those are equal."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0: there are two zeros, which are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats compare as their bits do, negative ones backwards
    return (ordered << 32) + lots(key, numbers)


def _first(ranks: Tensor, n: Tensor, most: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """Which of `ranks` [N] are the n largest (or smallest), [N], and by how many the equals of the last are too many."""
    order = ranks.topk(most, largest=largest).values
    last = order.gather(0, (n - 1).clamp(min=0).view(1))
    found = ((ranks >= last) if largest else (ranks <= last)) & (n > 0)
    return found, found.count_nonzero() - n


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
