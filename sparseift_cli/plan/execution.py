"""What a device executes of a plan: kernels compute the blocks that are stored, masked dense layers multiply by their zeros.

A plan knows no device, so it says what a GPU with block kernels can do. Whether they are faster there is measured when training
begins (`kernels/measure`). Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..kernels.registry import AUTO, MASKED, LayerChoice, in_words, square_block, why_nowhere
from ..mask.patterns import UNSTRUCTURED
from ..sparsity.algorithms import why_masked
from .layer_plan import LayerPlan, Part
from .spec import TrainingSpec
from .training_cost import executed_macs

Place = tuple[str, str]
"""A weight of a plan: the names of its layer and of its part."""


@dataclass(frozen=True, slots=True)
class Execution:
    """MACs that are executed, at the table's input shape; those of a step are the mean over a run."""

    forward_macs: int
    training_macs: Fraction

    @property
    def forward_flops(self) -> int:
        """FLOPs of a forward pass: 2 a MAC."""
        return 2 * self.forward_macs

    @property
    def training_flops(self) -> int:
        """FLOPs of the mean training step, to the nearest whole one."""
        return round(2 * self.training_macs)

    def to_json(self, dense_forward: int, dense_training: Fraction) -> dict[str, Any]:
        """FLOPs, and their ratio to the MACs of the dense model."""
        return {
            "forward_flops": self.forward_flops,
            "training_flops": self.training_flops,
            "forward_ratio": self.forward_macs / dense_forward if dense_forward else None,
            "training_ratio": float(self.training_macs / dense_training) if dense_training else None,
        }


def execution(layers: Sequence[LayerPlan], training: TrainingSpec, compact: Collection[Place] = ()) -> Execution:
    """What is executed where kernels compute the weights in `compact`, and masked dense layers all others."""
    forward = 0
    for row in layers:
        if row.status != "transformed":
            forward += row.macs
            continue
        full = (p.dense or (row.layer.name, p.name) not in compact for p in row.parts)
        counts = (p.shape.weights if every else p.nnz for p, every in zip(row.parts, full, strict=True))
        forward += int(row.positions * sum(counts))
    return Execution(forward, executed_macs(layers, training, compact))


def choices_on_gpu(
    layers: Sequence[LayerPlan], training: TrainingSpec, kernels: str = AUTO, dtype: str = "bfloat16"
) -> dict[Place, LayerChoice]:
    """Every masked weight of a plan, and whether some GPU computes it by its blocks.

    Args:
        layers: rows of a plan.
        training: the mask algorithm, which may need weights without blocks.
        kernels: as `kernels.select` takes it.
        dtype: in which layers compute, as in `LayerRequest`.
    """
    return {(row.layer.name, part.name): _choice(row, part, training, kernels, dtype) for row, part in _masked(layers)}


def stored_in_blocks(choices: Mapping[Place, LayerChoice]) -> list[Place]:
    """The weights that a kernel computes."""
    return [place for place, choice in choices.items() if choice.backend != MASKED]


def has_structure(layers: Sequence[LayerPlan]) -> bool:
    """Whether any weight has another pattern than the one for which no kernel can exist: unstructured."""
    return any(row.pattern != UNSTRUCTURED.name for row, _ in _masked(layers))


def executed_in_words(masked: tuple[float, float], kernels: tuple[float, float], choices: Sequence[LayerChoice]) -> str:
    """One sentence: forward and training step over the dense model's, with masked dense layers and with kernels, and why.

    >>> executed_in_words((4.0, 4.0), (1.0, 1.1), [LayerChoice("a", "blocks", 128)])
    'Executed on a GPU with block kernels: 1.00x dense (training 1.10x): 1 layer in blocks of 128. Masked-dense: 4.00x (4.00x).'
    """
    if all(choice.backend == MASKED for choice in choices):
        return f"Executed: {masked[0]:.2f}x dense (training {masked[1]:.2f}x): {in_words(choices)}."
    return (
        f"Executed on a GPU with block kernels: {kernels[0]:.2f}x dense (training {kernels[1]:.2f}x): {in_words(choices)}. "
        f"Masked-dense: {masked[0]:.2f}x ({masked[1]:.2f}x)."
    )


def _masked(layers: Sequence[LayerPlan]) -> Iterator[tuple[LayerPlan, Part]]:
    """The weights with a mask."""
    for row in layers:
        if row.status == "transformed":
            yield from ((row, part) for part in row.parts if not part.dense)


def _choice(row: LayerPlan, part: Part, training: TrainingSpec, kernels: str, dtype: str) -> LayerChoice:
    name = row.layer.weight if part.role == "weight" and row.layer.weight else f"{row.layer.name} {part.name}"
    shape = part.shape
    block, reason = square_block(row.pattern, shape.outputs, shape.inputs, shape.taps, shape.groups)
    if kernels == MASKED:
        reason = "masked layers were asked for"
    elif because := why_masked(training.algorithm):
        reason = because
    elif block is not None:
        reason = _why_not_this(row) or why_nowhere(_kind(row, part), block, dtype, kernels) or ""
    backend = MASKED if reason else "blocks" if kernels == AUTO else kernels
    return LayerChoice(name, backend, block, reason)


def _why_not_this(row: LayerPlan) -> str:
    """Why no layer of blocks can replace this one, whatever its pattern; empty where one can."""
    layer = row.layer
    if layer.kind not in ("linear", "conv"):
        return f"{layer.kind} layers have no kernel"
    if layer.host:
        return f"{layer.host} reads its weight itself"
    if layer.computed:
        return "its weight is computed from another parameter"
    return "its weight is shared with another layer" if layer.tied_to else ""


def _kind(row: LayerPlan, part: Part) -> str:
    """The kind of a part in a `LayerRequest`: a kernel of one tap is a linear layer."""
    return "linear" if part.shape.taps == 1 else f"conv{len(row.layer.kernel)}d"
