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
channels (`slack`). The function then differs a little; `deviation` in `transforms.check` measures by how much.

    preserve/
      coordinates   where the dense channels are in every wider width
      norms         which norms are exact, and which weights change for them
      attention     scales of queries, rotary frequencies
      slack         the mask of one wide weight
      wide          Sparse Wide, all of the above together; scope none
      factors       a matrix as a product of two
"""

from __future__ import annotations

import torch
from torch import nn

from ...errors import UsageError
from ...plan.plan import Plan
from ...trace.structure import Structure
from ..edits import Surgery
from ..members import torch_half
from ..members.base import Preserved

__all__ = ["Preserved", "preserve"]


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
    """Overwrite the weights of `new` so that it computes what `dense` computes, as nearly as its layers allow.

    The hidden layer of 2 x 2 weights becomes 4 x 4; the mask has the dense positions, and the outputs are the same:

    >>> from sparseift_cli import Options, masks, transform
    >>> dense = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 5))
    >>> x = torch.ones(1, 3)
    >>> wide, plan = transform(dense, x, sparsity=0.75, options=Options(start="preserve", preserve_slack=0))
    >>> masks(wide)["2.weight"].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    >>> torch.allclose(dense(x), wide(x))
    True

    Args:
        new: made from `dense` by the surgery, and initialised.
        seed: decides which random weights the slack adds.
        slack: Sparse Wide: the share of each layer's non-zeros, in [0, 1), that is taken from its smallest weights and
            given to added channels. Without it they have no gradient. Scope none ignores it.

    Returns:
        The masks and, as sentences in `notes`, where the function is not exact.

    Raises:
        UsageError: a slack outside [0, 1); a pattern, an order of channels or a member that dense weights do not fit.
    """
    if not 0 <= slack < 1:
        raise UsageError(f"preserve slack {slack:g} is not in [0, 1)", hint="0.1 replaces a tenth of the weights")
    with torch.no_grad():
        return torch_half(plan.member).preserve(new, dense, plan, surgery, structure, seed=seed, slack=slack)
