"""The backends that compute block-sparse layers, and which of them takes a given layer.

A backend answers for one layer on one device: `why_not` returns the reason for which it does not take the layer, or None.
Its functions live in a module that is imported on first use, so that this one costs nothing where there is no triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from os import environ
from typing import TYPE_CHECKING, Protocol

from ..base.registry import Registry
from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from .index import BlockIndex


@dataclass(frozen=True)
class LayerRequest:
    """One layer on one device, as a backend is asked about it.

    Args:
        block: side of the square blocks of the weight [out_features, in_features].
        dtype: of input and weight in the product, as torch spells it without the prefix: "bfloat16".
        device: type of the device: "cuda", "cpu".
        capability: (major, minor) compute capability of a CUDA device, otherwise None.
        kind: the operation: "linear".
    """

    block: int
    dtype: str
    device: str
    capability: tuple[int, int] | None = None
    kind: str = "linear"


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
        """(y, z): y = activation(x W^T + bias) [T, R * B], or x W [T, C * B] when `transposed`, and z before the activation.

        z is [0] unless `keep`. x is [T, C * B] ([T, R * B] when `transposed`), contiguous; `values` [n, B, B].
        """
        ...

    def weight_gradient(self, grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
        """[n, B, B], the stored blocks of grad^T x, for contiguous grad [T, R * B] and x [T, C * B]."""
        ...


class Backend(Protocol):
    """One way to compute block-sparse layers."""

    summary: str

    def why_not(self, layer: LayerRequest) -> str | None:
        """The reason for which this backend does not take `layer`, or None where it does."""
        ...

    def functions(self) -> Functions:
        """The module, or any object, that has the two functions."""
        ...


class TritonBlocks:
    """Kernels in Triton for blocks of 128, 64 and 32."""

    summary = "Triton kernels, tensor descriptors (TMA) on Hopper and newer, pointers elsewhere"

    def why_not(self, layer: LayerRequest) -> str | None:
        """The first requirement that `layer` does not meet, or None."""
        interpreted = environ.get("TRITON_INTERPRET") == "1"
        if layer.kind != "linear":
            return f"it computes linear layers, not {layer.kind}"
        if layer.block not in (128, 64, 32):
            return f"its blocks are 128, 64 or 32 wide, not {layer.block}"
        if layer.dtype not in ("bfloat16", "float16", "float32"):
            return f"it computes in bfloat16, float16 or float32 (as tf32), not {layer.dtype}"
        if layer.device != "cuda" and not interpreted:
            return f"it needs a CUDA device, not {layer.device}"
        if layer.capability is not None and layer.capability < (8, 0):
            return f"it needs compute capability 8.0 or newer, not {'.'.join(map(str, layer.capability))}"
        if find_spec("triton") is None:
            return "triton is not installed"
        return None

    def functions(self) -> Functions:
        """The module with the kernels; imports triton."""
        return import_module(".blocks", __package__)  # pyright: ignore[reportReturnType]


class Reference:
    """Plain PyTorch, a matrix product for every block: slow, and right on every device."""

    summary = "plain PyTorch, one product a block: slow, for checks and for devices without kernels"

    def why_not(self, layer: LayerRequest) -> str | None:
        """Every linear layer is taken."""
        return None if layer.kind == "linear" else f"it computes linear layers, not {layer.kind}"

    def functions(self) -> Functions:
        """The module with the functions; imports torch."""
        return import_module(".reference", __package__)  # pyright: ignore[reportReturnType]


def _not_a_backend(entry: object) -> str | None:
    missing = [name for name in ("why_not", "functions") if not callable(getattr(entry, name, None))]
    return f"it has no {' and no '.join(missing)}" if missing else None


KERNELS = Registry[Backend](
    "kernel backend", "kernels", {"blocks": TritonBlocks(), "reference": Reference()}, check=_not_a_backend
)


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
