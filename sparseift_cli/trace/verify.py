"""The second opinion: fvcore counts the dense model on real tensors, and we say whether the two agree to the MAC.

fvcore's unit is the MAC under the name "flop". It also counts norms and other elementwise work, which is left out here, and
it has no rule for fused attention, so what it misses is listed and then counted with a rule given to it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..table.table import LayerTable

MAX_PARAMETERS = 2_000_000_000  # 8 GB of float32: real tensors need real memory
_MACS = ("conv", "linear", "addmm", "matmul", "bmm", "mm", "einsum", "baddbmm")


@dataclass(frozen=True)
class Crosscheck:
    """Both counts in MACs, part by part."""

    rows: list[dict[str, Any]]
    unseen: dict[str, int]  # ops fvcore has no rule for, and how often they occur
    agree: bool

    @property
    def verdict(self) -> str:
        seen = "fvcore and sparseift agree to the MAC." if self.agree else "fvcore and sparseift DISAGREE."
        if not self.unseen:
            return seen
        return f"{seen} Without help fvcore does not see: {', '.join(f'{op} x{n}' for op, n in sorted(self.unseen.items()))}."

    def to_json(self) -> dict[str, Any]:
        return {"agree": self.agree, "rows": self.rows, "unseen_by_fvcore": self.unseen}


def crosscheck(build: Callable[[], tuple[Any, tuple[Any, ...]]], table: LayerTable) -> Crosscheck:
    """Build the model on real tensors and count it with fvcore.

    Raises:
        UsageError: the model is too large for real tensors.
    """
    if table.params > MAX_PARAMETERS:
        raise UsageError(
            f"--verify runs {table.model} on real tensors, and its {table.params:,} parameters are too many",
            hint="verify a smaller model of the same family",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses torch.jit, which is deprecated, and is what fvcore has
        from fvcore.nn import FlopCountAnalysis

    model, inputs = build()
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = FlopCountAnalysis(model, inputs)
        plain.tracer_warnings("none")
        by_operator = {k: int(v) for k, v in plain.by_operator().items()}
        unseen = {
            k: v
            for k, v in plain.unsupported_ops().items()
            if "attention" in k or "lstm" in k or "conv" in k or "mm" in k
        }
        helped = FlopCountAnalysis(model, inputs).set_op_handle("aten::scaled_dot_product_attention", _attention)
        helped.tracer_warnings("none")
        attention = int(helped.by_operator().get("scaled_dot_product_attention", 0))
    counted = {k: v for k, v in by_operator.items() if k in _MACS}
    weighted = sum(row.macs.evaluate(table.sizes) for row in table.layers if row.weighted and row.role != "attention")
    products = sum(row.macs.evaluate(table.sizes) for row in table.layers) - weighted
    theirs = sum(counted.values())
    unaided = ", ".join(f"{k} {v:,}" for k, v in sorted(counted.items()))
    whole = {
        "what": "whole model, fvcore given a rule for attention",
        "ours": weighted + products,
        "fvcore": theirs + attention,
    }
    rows: list[dict[str, Any]] = [
        {"what": "whole model, fvcore as it is", "ours": weighted + products, "fvcore": theirs, "note": unaided}
    ]
    if attention:
        rows.append(
            {
                "what": "fused attention products",
                "ours": None,
                "fvcore": attention,
                "note": "counted by the rule given to it",
            }
        )
        rows.append(whole | {"note": None})
    return Crosscheck(rows, unseen, theirs + attention == weighted + products)


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """MACs of fused attention from its traced shapes: queries x keys x (d + d_v) for every head of every sample."""
    from fvcore.nn.jit_handles import get_shape

    q, k, v = (get_shape(x) or [] for x in inputs[:3])
    pairs = k[-2]
    for dim in q[:-1]:
        pairs *= dim
    return pairs * (q[-1] + v[-1])
