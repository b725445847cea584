"""A transformed network that starts as the dense one: the same function, with the planned non-zeros (`--init preserve`).

What "the same function" means depends on the member:

- Sparse Wide (`wide`): the dense weights are placed inside the wide ones, and their positions are the mask. Exact with
  BatchNorm, in train and eval mode; with RMSNorm (gain * sqrt(a), eps * a, a = D / D'); with LayerNorm where every
  layer that writes its input can be centred, as in pre-LN transformers (`norms`). Attention scores are kept by scaled
  queries and rotary frequencies (`attention`). Where the dense channels are along each width: `coordinates`.
- Sparse Parallel, Doped, Factorized (`members`, `factors`): the dense weights are split over the branches, or factorized
  by a truncated SVD. Exact for Parallel without norms in its branches; otherwise as near as the planned non-zeros
  allow.
- Scope none, the sparse control of dense size: the largest weights of each layer stay.

A wide network made this way is at a saddle point: added channels have exactly zero gradients, so training would stay in
the dense network. `--preserve-slack q` replaces the smallest share q of the weights by random ones that feed the added
channels (`slack`). The function then differs a little; `deviation` in `transforms.compare` measures by how much.

    preserve/
      coordinates   where the dense channels are in every wider width
      norms         which norms are exact, and which weights change for them
      attention     scales of queries (rotary frequencies: `transforms/rotary`)
      slack         the mask of one wide weight
      wide          Sparse Wide, all of the above together; scope none
      factors       a matrix as a product of two
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...plan.plan import Plan
from ...trace.structure import Structure
from ..edits import SetAttribute, Surgery


@dataclass(frozen=True)
class DenseStart:
    """A transformed module, and the dense one whose function it should start with.

    Args:
        new: made from `dense` by `surgery`, and initialised; its weights are overwritten.
        structure: of the trace of `dense`.
        seed: of random choices.
        slack: share of each wide layer's non-zeros, in [0, 1), that goes to added channels.
    """

    new: nn.Module
    dense: nn.Module
    plan: Plan
    surgery: Surgery
    structure: Structure
    seed: int
    slack: float


@dataclass(frozen=True)
class Preserved:
    """The masks of a module that starts as the dense one, notes for the user, and module state that had to change.

    Args:
        masks: bool, same shape as the weight, by the weight's key.
        notes: what the user should know, a sentence each: where the function is not exact, and what the slack costs.
        attributes: numbers of modules (eps, theta, scales) that differ from what the surgery sets. They are set already;
            they are needed to make the module again from its surgery and its state dict.
        buffers: the same for resized buffers that a state dict leaves out, by key.
        positions: modules whose outputs are the dense ones, where the whole is exact, by path: index of each dense channel
            among the new ones, int64 [channels].
    """

    masks: dict[str, Tensor]
    notes: tuple[str, ...]
    attributes: tuple[SetAttribute, ...] = ()
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Mapping[str, Tensor] = field(default_factory=dict)
