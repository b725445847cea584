"""Models of the zoo by name: find one, build it, and make an input that it takes.

Nothing here imports torch until `build` or `example_input` is called.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from ...errors import UsageError, did_you_mean
from .catalog import MODELS, Image, ModelInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def names() -> list[str]:
    """Every model: image models by family, then language models by family, each from small to large; then the others."""
    return list(MODELS)


def lookup(name: str) -> ModelInfo:
    """The model called `name`: `resnet18`, `ResNet-18`, `gpt3-2.7b` or an alias. Raises UsageError for any other."""
    if name in MODELS:
        return MODELS.get(name)
    near = did_you_mean(name.replace("-", "_"), MODELS)
    known = f"the zoo has {', '.join(MODELS)}"
    if name.lower().endswith((".safetensors", ".pt", ".pth", ".th", ".bin", ".ckpt")):
        near, known = None, f"a checkpoint? sparseift inspect {name} says what model it is of"
    raise UsageError(f"no model is called '{name}'", hint=f"{near} {known}" if near else known)


def build(
    model: str | ModelInfo, *, num_classes: int | None = None, seq: int | None = None, image: Image | None = None
) -> nn.Module:
    """The model, by name or entry, freshly initialised, in train mode, on torch's current default device.

    Under `torch.device("meta")` it has shapes and no memory. `seq` builds nothing: it is checked against the learned
    positions. `image` gives the channels of the first conv, and the positions of models that learn them.
    Raises UsageError for an unknown name and for what `ModelInfo.with_input` refuses.
    """
    info = lookup(model) if isinstance(model, str) else model
    info = info.with_input(num_classes=num_classes, seq=seq, image=image)
    if info.make is not None:
        return info.make(**({"num_classes": info.num_classes, "image": info.image} if info.image else {}))
    family = import_module(f"{__package__}.{info.family}")
    config = family.CONFIGS[info.name]
    if info.kind == "image":
        config = replace(config, num_classes=info.num_classes, image=info.image)
    return family.MODEL(config)


def example_input(
    info: ModelInfo,
    *,
    batch: int = 1,
    seq: int | None = None,
    image: Image | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A batch that the model takes: float32 images [batch, C, H, W] or int64 token ids [batch, tokens], all zero.

    Raises UsageError for what `ModelInfo.with_input` and `ModelInfo.input_shape` refuse.
    """
    import torch

    info = info.with_input(seq=seq, image=image)
    dtype = torch.float32 if info.kind == "image" else torch.int64
    return torch.zeros(info.input_shape(batch), dtype=dtype, device=device)
