"""Distributions: how the FLOP budget of a model becomes the densities of its layers. Exact fractions; no torch.

A distribution is an object with a name in `DISTRIBUTIONS`. From outside, one is added by `DISTRIBUTIONS.register(name, it)`,
by an entry point of the group `sparseift.distributions`, or as `package.module:Name` (an object or a subclass of
`Distribution`) where a distribution is named:

    class Front(Distribution):
        # layers near the input are denser: layer i of n gets a density proportional to n - i
        def densities(self, layers, macs):
            return share_by_score([len(layers) - i for i in range(len(layers))], layers, macs)

A mapping from globs over layer names to sparsities is a distribution too: `PerLayer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, ClassVar

from ..base.registry import Registry
from ..errors import UsageError
from ..table.shape import Shape


@dataclass(frozen=True, slots=True)
class BudgetedLayer:
    """What a distribution sees of a transformed layer.

    Args:
        name: its module path.
        shape: its new dimensions; of a layer of several parts those of the last one.
        kernel: its kernel sizes, empty for a linear layer.
        macs: MACs of a forward pass with every weight.
        dense_macs: MACs of the layer of the dense model.
    """

    name: str
    shape: Shape
    kernel: tuple[int, ...]
    macs: int
    dense_macs: int


class Distribution(ABC):
    """How the MACs that the transformed layers of a model may cost are distributed over them."""

    matches: ClassVar[tuple[str, ...]] = ("off", "model", "train")
    """What it can be used with: values of `TransformSpec.match`. Under `layer` each layer has a budget of its own."""
    solved_when_off: ClassVar[bool] = True
    """Under match off: `densities` shares all non-zeros that the sparsity leaves. False: each layer has the sparsity itself."""

    @abstractmethod
    def densities(self, layers: Sequence[BudgetedLayer], macs: Fraction) -> list[Fraction]:
        """A density for each layer, so that together they cost `macs`; less only where every layer is dense.

        Called with every transformed layer for which `given` has no density. Under match off nothing bounds the cost, and what
        is shared is the number of non-zeros: read weights for MACs, here and in `layers`.

        Args:
            layers: in the order of the model.
            macs: what they may cost together in a forward pass. Never negative.
        """

    def given(self, name: str) -> Fraction | None:
        """The density that the layer `name` has whatever the budget is; None where it is solved for, or the spec's."""
        return None

    @property
    def globs(self) -> tuple[str, ...]:
        """Globs over layer names that it reads; one that matches no transformed layer is refused as a slip."""
        return ()

    @classmethod
    def summary(cls) -> str:
        """One line for help and tables."""
        return (cls.__doc__ or "").strip().partition("\n")[0]


class Uniform(Distribution):
    """Every layer costs the same part of what it costs in the dense model."""

    matches: ClassVar[tuple[str, ...]] = ("off", "layer", "model", "train")
    solved_when_off: ClassVar[bool] = False

    def densities(self, layers: Sequence[BudgetedLayer], macs: Fraction) -> list[Fraction]:
        """Not capped: what a layer cannot hold is left over."""
        scale = macs / sum(layer.dense_macs for layer in layers)
        return [scale * layer.dense_macs / layer.macs for layer in layers]


@dataclass(frozen=True)
class ErdosRenyi(Distribution):
    """Densities proportional to (inputs + outputs) / (inputs * outputs), so that small layers are denser.

    Source: Mocanu et al. 2018, arXiv 1707.04780. With `kernel` the variant of Evci et al. 2020, "Rigging the Lottery", arXiv
    1911.11134, section 3(1): (inputs + outputs + sum of kernel sizes) / (inputs * outputs * product of kernel sizes).

    >>> conv = Shape(inputs=64, outputs=64, taps=9)
    >>> layers = [BudgetedLayer("a", conv, (3, 3), conv.weights, conv.weights) for _ in range(2)]
    >>> ErdosRenyi(kernel=True).densities(layers, Fraction(conv.weights))
    [Fraction(1, 2), Fraction(1, 2)]
    """

    kernel: bool = False

    def densities(self, layers: Sequence[BudgetedLayer], macs: Fraction) -> list[Fraction]:
        return share_by_score([self._score(layer) for layer in layers], layers, macs)

    def _score(self, layer: BudgetedLayer) -> Fraction:
        inputs, outputs = layer.shape.inputs // layer.shape.groups, layer.shape.outputs
        extra, product = (sum(layer.kernel), layer.shape.taps) if self.kernel else (0, 1)
        return Fraction(inputs + outputs + extra, inputs * outputs * product)


@dataclass(frozen=True)
class PerLayer(Distribution):
    """Sparsities of single layers, by globs over layer names; the first glob that matches a layer decides.

    Under match model and train the layers that no glob matches share what is left of the budget, uniformly. Under match off
    they have the sparsity of the transform.

    >>> PerLayer.of({"layer4.*": 0.95, "layer[12].*": 0.5}).given("layer4.0.conv1")
    Fraction(1, 20)

    Args:
        sparsities: (glob, sparsity as it is written), in order.
    """

    solved_when_off: ClassVar[bool] = False

    sparsities: tuple[tuple[str, str], ...]

    @staticmethod
    def of(sparsities: Mapping[Any, Any]) -> PerLayer:
        """From a mapping: glob -> sparsity, a number or its text.

        Raises:
            UsageError: it is empty, a glob is no text, or a sparsity is not in [0, 1).
        """
        if not sparsities:
            raise UsageError("a distribution by layer names no layer", hint='{"layer4.*": 0.95}, or uniform')
        for glob, sparsity in sparsities.items():
            try:
                if not isinstance(glob, str) or isinstance(sparsity, bool):
                    raise ValueError
                density(sparsity)
            except (ValueError, ZeroDivisionError):
                raise UsageError(
                    f"the distribution gives {glob!r} the sparsity {sparsity!r}, which is not a number in [0, 1)",
                    hint='a mapping from globs over layer names to sparsities: {"layer4.*": 0.95}',
                ) from None
        return PerLayer(tuple((glob, str(sparsity)) for glob, sparsity in sparsities.items()))

    def given(self, name: str) -> Fraction | None:
        """1 - sparsity of the first glob that matches."""
        return next((density(s) for glob, s in self.sparsities if fnmatchcase(name, glob)), None)

    def densities(self, layers: Sequence[BudgetedLayer], macs: Fraction) -> list[Fraction]:
        """Uniform over the layers that no glob matches; what would exceed density 1 is dense, and the others share the rest."""
        return share_by_score([Fraction(layer.dense_macs, layer.macs) for layer in layers], layers, macs)

    @property
    def globs(self) -> tuple[str, ...]:
        return tuple(glob for glob, _ in self.sparsities)

    def to_json(self) -> dict[str, float]:
        """Glob -> sparsity, as recipes write it."""
        return {glob: float(Fraction(sparsity)) for glob, sparsity in self.sparsities}

    def __str__(self) -> str:
        return "by layer (" + ", ".join(f"{glob} {sparsity}" for glob, sparsity in self.sparsities) + ")"


def share_by_score(scores: Sequence[Fraction | int], layers: Sequence[BudgetedLayer], macs: Fraction) -> list[Fraction]:
    """Densities proportional to `scores`, scaled so that the layers together cost `macs`; none above 1.

    A layer that would exceed density 1 is dense, and the scale of the others is solved again.

    Args:
        scores: positive, one a layer.
        layers: what they cost.
        macs: what all of them together may cost.
    """
    dense: set[int] = set()
    while rest := [i for i in range(len(layers)) if i not in dense]:
        left = macs - sum(layers[i].macs for i in dense)
        scale = left / sum(scores[i] * layers[i].macs for i in rest)
        over = {i for i in rest if scale * scores[i] > 1}
        if not over:
            found = (Fraction(1) if i in dense else scale * scores[i] for i in range(len(layers)))
            return [max(Fraction(0), Fraction(d)) for d in found]
        dense |= over
    return [Fraction(1)] * len(layers)


def density(sparsity: float | str | Fraction) -> Fraction:
    """1 - s, with s read as it is written: 0.9 is nine tenths, not the nearest float.

    >>> density("0.9")
    Fraction(1, 10)

    Raises:
        ValueError: the sparsity is not in [0, 1).
    """
    if len(str(sparsity).lower().partition("e")[2]) > 5:  # 1e-99999 is read at once, 1e-400000000 takes for ever
        raise ValueError(f"sparsity {sparsity} has an exponent without meaning")
    s = Fraction(str(sparsity))
    if not 0 <= s < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    return 1 - s


# --- by name ---


def _why_not(entry: object) -> str | None:
    if isinstance(entry, Distribution) or (isinstance(entry, type) and issubclass(entry, Distribution)):
        return None
    return f"it is no Distribution of sparseift_cli.plan.distributions, but {type(entry).__name__}"


class _Distributions(Registry[Distribution]):
    def get(self, name: str) -> Distribution:
        """As any registry's; of a class that is named, an object."""
        found = super().get(name)
        return found() if isinstance(found, type) else found


DISTRIBUTIONS = _Distributions(
    "distribution",
    "distributions",
    {"uniform": Uniform(), "er": ErdosRenyi(), "erk": ErdosRenyi(kernel=True)},
    check=_why_not,
)
