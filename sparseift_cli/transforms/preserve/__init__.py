"""A transformed network that starts as the dense one: same function, planned non-zeros (`--init preserve`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...plan.plan import Plan
from ...trace.structure import Structure
from ..edits import SetAttribute, Surgery
from .deviation import deviation
from .local import fill_members
from .magnitude import keep_largest
from .wide import Widening

__all__ = ["Preserved", "deviation", "preserve"]


@dataclass(frozen=True)
class Preserved:
    """What came of it: a mask for every sparse weight, what is to be said, and numbers of modules that had to change.

    `attributes` and `buffers` are set already; they belong to whoever makes the module again from its surgery and its
    state dict: numbers that differ from what the surgery sets, and buffers that a state dict leaves out.
    """

    masks: dict[str, Tensor]
    notes: tuple[str, ...]
    attributes: tuple[SetAttribute, ...] = ()
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


def preserve(
    new: nn.Module,
    dense: nn.Module,
    plan: Plan,
    surgery: Surgery,
    structure: Structure,
    *,
    seed: int = 0,
    slack: float = 0.1,
) -> Preserved:
    """Overwrite the weights of `new`, which `operate` made of `dense` and `initialise` filled, so that it computes what
    `dense` does, as nearly as its layers allow; the notes say where they do not. Source: section 5 of the design.

    `slack` (Sparse Wide): the share of each layer's non-zeros that is taken from its smallest weights and spent on added
    channels. Without it they have no gradient.

    With scope none there are no added channels and fewer non-zeros than weights: the largest of every sparse layer stay,
    and `slack` says nothing.

    Raises:
        UsageError: a slack outside [0, 1); a pattern, an order of channels or a member that no dense weights fit.
    """
    if not 0 <= slack < 1:
        raise UsageError(f"preserve slack {slack:g} is not in [0, 1)", hint="0.1 sets a tenth of the weights free")
    with torch.no_grad():
        if plan.spec.scope == "none":
            masks, notes = keep_largest(new, dense, plan, surgery, seed)
            return Preserved(masks, tuple(notes))
        if plan.spec.member == "sparse_wide":
            masks, notes, attributes = Widening(new, dense, plan, surgery, structure, seed, slack).run()
            state, buffers = new.state_dict(), dict(new.named_buffers())
            passing = {r.key: buffers[r.key] for r in surgery.resizes if r.key in buffers and r.key not in state}
            return Preserved(masks, tuple(notes), tuple(attributes), passing)
        masks, notes = fill_members(new, dense, plan, surgery, seed)
        return Preserved(masks, tuple(notes))
