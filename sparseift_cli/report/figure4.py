"""The article's Figure 4 as numbers: published results and the training FLOPs that our audit counts.

The FLOPs are ours, exact, of a whole training run, mask updates included, from the layer tables shipped with the package (no
torch). The results are the article's (`published.py`) and labelled so; nothing here was trained by us. ResNets: ImageNet, 90
epochs of 1,281,167 images at 224x224. GPT-3: 2,048 tokens a sequence, causal attention counted in full; the article does
not say here how long each was trained, so their rows are for one sequence, the same number of tokens for all.
`plots.figure4` draws the picture.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ..models.request import Request
from ..models.source import load_table
from ..plan.audit import Audit, audit
from ..plan.plan import make_plan
from ..plan.spec import TrainingSpec, TransformSpec
from .published import published

IMAGES, EPOCHS, BATCH = 1_281_167, 90, 256
STEPS = IMAGES // BATCH * EPOCHS
"""450,360, as the recipes train: what mask updates are spread over. FLOPs are of all the images of all epochs."""


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One model of the figure."""

    model: str
    transform: str
    """dense or wide."""
    sparsity: str | None
    match: str | None
    algorithm: str
    samples: int
    """Images of the whole run; 1 for GPT-3: one sequence of 2,048 tokens."""
    training_flops: int
    """Audited, of all samples, to the nearest whole FLOP: forward, backward and mask updates."""
    ratio: float
    """Over the same model's dense training FLOPs."""
    metric: str | None
    value: float | None
    """The published result; None where none is known to us."""
    evidence: str | None
    """How good the evidence for `value` is: the letters of `published.evidence`."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of the article about training FLOPs, and our count."""

    claim: str
    claimed: float
    counted: float
    holds: bool
    """Whether our count, rounded to the digits of the claimed number, is that number."""
    answer: str


def rows() -> list[dict[str, Any]]:
    """The models of the figure as plain dicts, fields of `FigureRow`: for a table, CSV or JSON."""
    return [asdict(row) for row in models()]


@cache
def claims() -> tuple[Claim, ...]:
    """The two sentences about larger dense models, checked by the audit."""
    dense = {row.model: row.training_flops for row in models() if row.transform == "dense"}
    wide = {(row.model, row.sparsity): row for row in models() if row.match == "layer"}
    resnet, medium = dense["resnet34"] / dense["resnet18"], dense["gpt3_medium"] / dense["gpt3_small"]
    wide18, small50 = wide["resnet18", "0.9"], wide["gpt3_small", "0.5"]
    exact = {
        m: audit(load_table(Request(m)), TrainingSpec(algorithm="dense"), causal="exact")
        for m in ("gpt3_small", "gpt3_medium")
    }
    medium_exact = exact["gpt3_medium"].dense.training_macs / exact["gpt3_small"].dense.training_macs
    return (
        Claim(
            "ResNet-34 has 2x the training FLOPs of ResNet-18",
            2,
            resnet,
            round(resnet) == 2,
            f"Yes: {resnet:.3f}x. Of ResNet-18 under Sparse Wide at 90 % with RigL, which costs {wide18.ratio:.3f}x the dense "
            f"ResNet-18, it is {dense['resnet34'] / wide18.training_flops:.3f}x.",
        ),
        Claim(
            "GPT-3 Medium has 2.4x the training FLOPs of GPT-3 Small",
            2.4,
            medium,
            round(medium, 1) == 2.4,
            f"No: {medium:.3f}x at equal tokens, {float(medium_exact):.3f}x with causal attention counted exactly. Of GPT-3 "
            f"Small under Sparse Wide at 50 %, which costs {small50.ratio:.3f}x the dense Small, it is "
            f"{dense['gpt3_medium'] / small50.training_flops:.3f}x.",
        ),
    )


@cache
def models() -> tuple[FigureRow, ...]:
    """The models of the figure: dense ones and their transforms, matched by layer as in the article and as whole models."""
    made = [_row(model, *how) for model in ("resnet18", "resnet34") for how in ((), ("0.9", "layer"), ("0.9", "model"))]
    made += [_row("gpt3_small", *how) for how in ((), ("0.5", "layer"), ("0.75", "layer"))]
    return (*made, _row("gpt3_medium"))


def _row(model: str, sparsity: str | None = None, match: str | None = None) -> FigureRow:
    image = model.startswith("resnet")
    # RigL as the recipes have it; the article's GPT-3 is counted with static masks, whose cost needs no number of steps
    algorithm = "dense" if sparsity is None else "rigl" if image else "static"
    training = TrainingSpec.of({"algorithm": algorithm, "steps": STEPS} if image else {"algorithm": algorithm})
    spec = None if sparsity is None else TransformSpec.of({"member": "wide", "sparsity": sparsity, "match": match})
    table = load_table(Request(model))
    counted: Audit = audit(make_plan(table, spec, training) if spec else table, training)
    samples = IMAGES * EPOCHS if image else 1
    macs = (counted.transformed or counted.dense).training_macs
    # the article matches layer by layer, so it has no result of a model matched as a whole
    metric, value, evidence = _result(model, sparsity) if match != "model" else (None, None, None)
    return FigureRow(
        model,
        "wide" if spec else "dense",
        sparsity,
        match,
        algorithm,
        samples,
        round(2 * macs * samples),
        float(macs / counted.dense.training_macs),
        metric,
        value,
        evidence,
    )


def _result(model: str, sparsity: str | None) -> tuple[str | None, float | None, str | None]:
    """The article's number for a model: a dense one is the baseline of any row, a wide one has its own."""
    data = "imagenet" if model.startswith("resnet") else "open_llm"
    found = [row for row in published() if row.model == model and row.data == data and row.transform == "wide"]
    if sparsity is None:
        return next(((r.metric, r.dense, r.evidence) for r in found if r.dense is not None), (None, None, None))
    return next(((r.metric, r.value, r.evidence) for r in found if r.sparsity == float(sparsity)), (None, None, None))
