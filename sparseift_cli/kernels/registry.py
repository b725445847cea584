"""The backends that compute block-sparse layers, and which of them, or none, computes a given layer.

A backend answers for one layer on one device: `why_not` returns the reason for which it does not take the layer, or None.
Its functions live in a module that is imported on first use, so that this one costs nothing where there is no triton.
`select` chooses between the backends and the masked dense layer, which multiplies by zeros; with "auto" by what `measure` finds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from os import environ
from typing import TYPE_CHECKING, Any, Protocol

from ..base.registry import Registry
from ..errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from .index import BlockIndex
    from .reference import ConvWindow


KINDS = ("linear", "conv2d")
"""The layers for which there are kernels; a convolution of 1 x 1 without padding is a linear layer."""


@dataclass(frozen=True)
class LayerRequest:
    """One layer on one device, as a backend is asked about it.

    Args:
        block: side of the square blocks of the weight [out_features, in_features].
        dtype: of input and weight in the product, as torch spells it without the prefix: "bfloat16".
        device: type of the device: "cuda", "cpu".
        capability: (major, minor) compute capability of a CUDA device, otherwise None.
        kind: the operation, one of `KINDS`.
    """

    block: int
    dtype: str
    device: str
    capability: tuple[int, int] | None = None
    kind: str = "linear"


@dataclass(frozen=True)
class LayerSize:
    """The sizes of one layer, as far as its speed depends on them.

    Args:
        rows: R, rows of blocks: output features over the side of a block.
        columns: C, columns of blocks.
        blocks: n, how many of the R x C blocks are stored.
        tokens: rows of the input in one forward pass.
        bias: whether a bias is added.
        activation: what is computed in the epilogue of the product, as in `reference.ACTIVATIONS`.
        window: of a convolution, whose tokens are output positions over the batch: size, stride and padding of the kernel, as
            `ConvWindow`.
    """

    rows: int
    columns: int
    blocks: int
    tokens: int
    bias: bool = True
    activation: str = "none"
    window: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LayerChoice:
    """Which way computes one weight.

    Args:
        name: of the weight: "h.0.mlp.c_fc.weight".
        backend: `MASKED`, or a name in `KERNELS`.
        block: side of its square blocks, None where its mask does not consist of them.
        reason: why nothing faster computes it; empty where a backend does.
        how: what the backend runs on this device: "Triton, tensor descriptors".
    """

    name: str
    backend: str
    block: int | None
    reason: str = ""
    how: str = ""


@dataclass(frozen=True)
class Selected:
    """What `select` answers: the fields of a `LayerChoice` that do not depend on the weight's name."""

    backend: str
    reason: str = ""
    how: str = ""

    def for_weight(self, name: str, block: int | None) -> LayerChoice:
        """The choice for the weight called `name`."""
        return LayerChoice(name, self.backend, block, self.reason, self.how)


class Functions(Protocol):
    """What the module of a backend provides. T tokens, n stored blocks of B x B, R x C the grid of blocks."""

    def multiply(
        self,
        x: Tensor,
        values: Tensor,
        index: BlockIndex,
        transposed: bool = False,
        bias: Tensor | None = None,
        activation: str = "none",
        keep: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(y, slope): y = activation(x W^T + bias) [T, R * B], or x W [T, C * B] when `transposed`; slope its derivative.

        slope, the derivative of the activation where it was applied, is [0] unless `keep`. x is [T, C * B] ([T, R * B]
        when `transposed`), contiguous; `values` [n, B, B].
        """
        ...

    def gradient_before(
        self, grad: Tensor, values: Tensor, index: BlockIndex, slope: Tensor, with_sum: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(dz [T, C * B], its sum over tokens [C * B]): dz = (grad W) times `slope`, the derivative that `multiply` kept.

        The sum is [0] unless `with_sum`. grad is [T, R * B], slope [T, C * B], both contiguous; `values` [n, B, B]. A backend
        without this function multiplies, and then scales and sums.
        """
        ...

    def weight_gradient(self, grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
        """[n, B, B], the stored blocks of grad^T x, for contiguous grad [T, R * B] and x [T, C * B]."""
        ...


class ConvFunctions(Protocol):
    """What the module of a backend provides for convolutions.

    Tensors are contiguous: x [N, H, W, C * B], output and its gradient [N, OH, OW, R * B], `values` [n, taps, B, B].
    """

    def conv2d(
        self, x: Tensor, values: Tensor, index: BlockIndex, window: ConvWindow, bias: Tensor | None = None
    ) -> Tensor:
        """The output [N, OH, OW, R * B] for x [N, H, W, C * B] and bias [R * B]."""
        ...

    def conv2d_input_gradient(
        self, grad: Tensor, values: Tensor, index: BlockIndex, window: ConvWindow, size: tuple[int, int]
    ) -> Tensor:
        """The gradient [N, H, W, C * B] at an input of `size` (H, W), for grad [N, OH, OW, R * B]."""
        ...

    def conv2d_weight_gradient(self, grad: Tensor, x: Tensor, index: BlockIndex, window: ConvWindow) -> Tensor:
        """The stored blocks [n, taps, B, B] of the gradient at the weight, for grad [N, OH, OW, R * B], x [N, H, W, C * B]."""
        ...


class Backend(Protocol):
    """One way to compute block-sparse layers.

    Optional: `fast` (default True) is False where it is not meant for speed, so that "auto" does not consider it, and
    `slow_here` is the reason where it is slow in this process alone; the method `how(layer)` says in a few words what it runs
    for a layer that it takes; `version` belongs to the key under which times are cached; `why_nowhere(layer)` is `why_not`
    without what depends on the device and on what is installed, for plans that are made elsewhere.
    """

    summary: str

    def why_not(self, layer: LayerRequest) -> str | None:
        """The reason for which this backend does not take `layer`, or None where it does."""
        ...

    def functions(self) -> Functions:
        """The module, or any object, that has the two functions of linear layers."""
        ...

    def conv_functions(self) -> ConvFunctions:
        """The same for convolutions; only called where `why_not` takes layers of kind conv2d."""
        ...


class TritonBlocks:
    """Kernels in Triton for blocks of 128, 64 and 32."""

    summary = "Triton kernels, tensor descriptors (TMA) on Hopper and newer, pointers elsewhere"

    @property
    def slow_here(self) -> str:
        """Triton's interpreter runs kernels for checks."""
        return "Triton's interpreter runs its kernels" if _interpreted() else ""

    def how(self, layer: LayerRequest) -> str:
        """Tensor descriptors on Hopper and newer, pointers elsewhere."""
        if _interpreted():
            return "Triton's interpreter"
        return "Triton, tensor descriptors" if (layer.capability or (0, 0)) >= (9, 0) else "Triton, pointers"

    def why_nowhere(self, layer: LayerRequest) -> str | None:
        """The first requirement of any device that `layer` does not meet, or None."""
        if layer.kind not in KINDS:
            return f"Triton kernels compute {' and '.join(KINDS)} layers, not {layer.kind}"
        if layer.block not in (128, 64, 32):
            return f"Triton kernels have blocks of 128, 64 or 32, not {layer.block}"
        if layer.dtype not in ("bfloat16", "float16", "float32"):
            return f"Triton kernels compute in bfloat16, float16 or float32 (as tf32), not {layer.dtype}"
        return None

    def why_not(self, layer: LayerRequest) -> str | None:
        """The first requirement that `layer` does not meet, or None."""
        if reason := self.why_nowhere(layer):
            return reason
        if layer.device != "cuda" and not _interpreted():
            return f"Triton kernels need a CUDA device, not {layer.device}"
        if layer.capability is not None and layer.capability < (8, 0):
            return f"Triton kernels need compute capability 8.0 or newer, not {'.'.join(map(str, layer.capability))}"
        if find_spec("triton") is None:
            return "triton is not installed"
        return None

    def functions(self) -> Functions:
        """The module with the kernels; imports triton."""
        return import_module(".blocks", __package__)  # pyright: ignore[reportReturnType]

    def conv_functions(self) -> ConvFunctions:
        """The module with the kernels of convolutions; imports triton."""
        return import_module(".conv_blocks", __package__)  # pyright: ignore[reportReturnType]


class Reference:
    """Plain PyTorch, a matrix product for every block: slow, and right on every device."""

    summary = "plain PyTorch, one product a block: slow, for checks and for devices without kernels"
    fast = False

    def how(self, layer: LayerRequest) -> str:
        """The same on every device."""
        return "plain PyTorch"

    def why_not(self, layer: LayerRequest) -> str | None:
        """Linear layers and convolutions are taken, whatever their blocks, dtype and device."""
        return None if layer.kind in KINDS else f"it computes {' and '.join(KINDS)} layers, not {layer.kind}"

    def functions(self) -> Functions:
        """The module with the functions; imports torch."""
        return import_module(".reference", __package__)  # pyright: ignore[reportReturnType]

    def conv_functions(self) -> ConvFunctions:
        """The same module."""
        return import_module(".reference", __package__)  # pyright: ignore[reportReturnType]


def _interpreted() -> bool:
    return environ.get("TRITON_INTERPRET") == "1"


def _not_a_backend(entry: object) -> str | None:
    if isinstance(entry, type):
        return "it is a class; name an object of it"
    missing = [name for name in ("why_not", "functions") if not callable(getattr(entry, name, None))]
    return f"it has no {' and no '.join(missing)}" if missing else None


KERNELS = Registry[Backend](
    "kernel backend", "kernels", {"blocks": TritonBlocks(), "reference": Reference()}, check=_not_a_backend
)


MASKED = "masked"
"""The way without kernels: the dense layer, whose weight has zeros."""
AUTO = "auto"
"""The fastest right way on this device."""


def canonical(kernels: str) -> str:
    """What `select` is asked for, as it is listed: "auto", "masked", a name in `KERNELS`, or `package.module:Name`.

    Raises:
        UsageError: it is none of these.
    """
    if kernels in (AUTO, MASKED):
        return kernels
    if ":" not in kernels and kernels not in KERNELS:
        names = (AUTO, MASKED, *KERNELS)
        listed = f"known: {', '.join(names)}; or package.module:Name"
        raise UsageError(f"unknown kernels {kernels!r}", hint=did_you_mean(kernels, names) or listed)
    KERNELS.get(kernels)
    return KERNELS.canonical(kernels)


def select(kernels: str, layer: LayerRequest, size: LayerSize | None = None) -> Selected:
    """The way that computes `layer`: a backend, or the masked dense layer and the reason why no backend does.

    Args:
        kernels: "auto", "masked", or a name in `KERNELS`.
        layer: the layer and its device. The device is the current one of its type.
        size: its sizes. With them "auto" measures, once per shape and device; the results are cached on disk. Where training is
            distributed, every process must make the same calls: process 0 measures for all of them.

    Raises:
        UsageError: `kernels` is none of these.
    """
    kernels = canonical(kernels)
    if kernels == MASKED:
        return Selected(MASKED, "masked layers were asked for")
    if kernels != AUTO:
        backend = KERNELS.get(kernels)
        skip = bool(getattr(backend, "slow_here", ""))  # an interpreter would take seconds
        wrong = backend.why_not(layer) or (None if skip else _measure().check(kernels, layer))
        return Selected(MASKED, wrong) if wrong else Selected(kernels, how=_how(kernels, layer))
    if size is None:
        return _fastest(layer, None)
    return _measure().from_first_process(lambda: _fastest(layer, size))


def _fastest(layer: LayerRequest, size: LayerSize | None) -> Selected:
    """The fastest of the masked dense layer and the backends that are meant for speed; without a size, the first of these."""
    backends = {name: KERNELS.get(name) for name in _fast()}
    reasons = {name: one.why_not(layer) or getattr(one, "slow_here", "") or None for name, one in backends.items()}
    reasons |= {name: _measure().check(name, layer) for name, reason in reasons.items() if reason is None}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        return Selected(MASKED, _listed(reasons))
    best, reason = (able[0], "") if size is None else _measured(able, layer, size)
    return Selected(best, reason, "" if best == MASKED else _how(best, layer))


def why_nowhere(kind: str, block: int, dtype: str = "bfloat16", kernels: str = AUTO) -> str | None:
    """Why `select` takes no kernel for layers of such blocks on any device; None where there is a device on which one runs.

    >>> why_nowhere("linear", 48)
    'Triton kernels have blocks of 128, 64 or 32, not 48'
    """
    layer = LayerRequest(block, dtype, "cuda", (9, 0), kind)
    names = _fast() if kernels == AUTO else [kernels]
    backends = {name: KERNELS.get(name) for name in names}
    reasons = {name: getattr(one, "why_nowhere", one.why_not)(layer) for name, one in backends.items()}
    return None if None in reasons.values() else _listed(reasons)


def _fast() -> list[str]:
    """The backends that are meant for speed."""
    return [name for name in KERNELS if getattr(KERNELS.get(name), "fast", True)]


def _measure() -> Any:
    """The module `measure`, which imports torch."""
    return import_module(".measure", __package__)


def _measured(names: list[str], layer: LayerRequest, size: LayerSize) -> tuple[str, str]:
    """The fastest of `names` and the masked dense layer, and the reason where that is the latter."""
    times: dict[str, float] = _measure().milliseconds(names, layer, size)
    best = min(times, key=times.__getitem__, default=names[0])
    if best != MASKED:
        return best, ""
    others = [times[name] for name in names if name in times]
    against = f"{times[MASKED]:.3g} ms against {min(others):.3g}" if others else "its kernels did not run at this size"
    return MASKED, f"masked-dense is faster here: {against}"


def _how(name: str, layer: LayerRequest) -> str:
    described = getattr(KERNELS.get(name), "how", None)
    return described(layer) if described else name


def _listed(reasons: dict[str, str | None]) -> str:
    """The reason of the one backend that there is, or of each by its name."""
    if len(reasons) == 1:
        return next(iter(reasons.values())) or ""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no backend is meant for speed"


def square_block(pattern: str, outputs: int, inputs: int, taps: int = 1, groups: int = 1) -> tuple[int | None, str]:
    """The side B of the square blocks that masks of a pattern consist of; None and the reason where a layer has none.

    A convolution of k x k taps has blocks of B outputs x B inputs with one mask for all taps: the pattern B x (B * taps).

    >>> square_block("64x64", outputs=256, inputs=128)
    (64, '')
    >>> square_block("64x576", outputs=256, inputs=128, taps=9)
    (64, '')
    >>> square_block("4x1", outputs=256, inputs=128)
    (None, 'blocks of 4x1 are not square')

    Args:
        pattern: as `TransformSpec.pattern` is written.
        outputs, inputs: features or channels over all groups.
        taps: weights of one output and one input: 9 of a 3 x 3 convolution.
        groups: of a grouped convolution, or matrices in a stack.
    """
    if groups > 1:
        return None, "grouped layers have no kernel"
    found = re.fullmatch(r"(\d+)x(\d+)", pattern)
    if not found or pattern == "1x1":
        return None, f"{pattern} masks have no kernel"
    block, columns = int(found[1]), int(found[2])
    if columns != block * taps:
        if columns == block:
            return None, f"blocks of {pattern} are not all {taps} taps of whole inputs, as {block}x{block * taps} are"
        return None, f"blocks of {pattern} are not square"
    if outputs % block or inputs % block:
        return None, f"inputs or outputs are no multiple of {block}"
    return block, ""


def in_words(choices: Iterable[LayerChoice]) -> str:
    """Which ways compute how many layers, in one line; empty for no layers.

    >>> in_words([LayerChoice("a", "blocks", 128, how="Triton"), LayerChoice("b", "masked", None, "2:4 masks have no kernel")])
    '1 layer in blocks of 128 (Triton); 1 masked-dense: 2:4 masks have no kernel'
    """
    counts = Counter((choice.backend, choice.block, choice.reason, choice.how) for choice in choices)
    said: list[str] = []
    for (backend, block, reason, how), count in sorted(
        counts.items(), key=lambda item: (item[0][0] == MASKED, -item[1])
    ):
        layers = f"{count} layer{'s' if count != 1 else ''}" if not said else str(count)
        if backend == MASKED:
            said.append(f"{layers} masked-dense: {reason}" if reason else f"{layers} masked-dense")
        else:
            said.append(f"{layers} in blocks of {block}{f' ({how})' if how else ''}")
    return "; ".join(said)


@lru_cache(maxsize=256)
def choose(name: str, layer: LayerRequest) -> Backend:
    """The backend called `name`, or with "auto" the first registered one that takes `layer`.

    >>> choose("auto", LayerRequest(block=48, dtype="float32", device="cpu")).summary.partition(",")[0]
    'plain PyTorch'

    Raises:
        UsageError: no such backend, or it does not take this layer; the message says why.
    """
    if name == "auto":
        reasons = {known: KERNELS.get(known).why_not(layer) for known in KERNELS}
        taken = [known for known, reason in reasons.items() if reason is None]
        if not taken:
            why = "; ".join(f"{known}: {reason}" for known, reason in reasons.items())
            raise UsageError(f"no kernel backend takes a {layer.kind} layer in blocks of {layer.block}", hint=why)
        return KERNELS.get(taken[0])
    backend = KERNELS.get(name)
    if reason := backend.why_not(layer):
        raise UsageError(f"the kernel backend {name!r} does not take this {layer.kind} layer: {reason}")
    return backend
