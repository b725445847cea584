"""The sparse training algorithms by name."""

from __future__ import annotations

from ..errors import one_of
from .algorithm import MaskAlgorithm
from .dense import Dense
from .gmp import GMP
from .granet import GraNet
from .rigl import RigL
from .set import SET
from .static import Static

ALGORITHMS: dict[str, MaskAlgorithm] = {a.name: a for a in (Dense(), Static(), SET(), RigL(), GMP(), GraNet())}


def algorithm_named(name: str) -> MaskAlgorithm:
    """`rigl`, `set`, ... as an algorithm.

    Raises:
        UsageError: no such algorithm. (SNFS is a row of the cost model only: it needs a dense gradient every step.)
    """
    one_of("algorithm", name, list(ALGORITHMS))
    return ALGORITHMS[name]
