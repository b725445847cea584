"""Models of other libraries for the survey, from `models.jsonl`: what makes each, with which options, on which inputs.

One line a model: `make` names a class or a function, `config` the configuration that a Hugging Face class takes, small.
`inputs` are positional (a list) or named (a mapping): `2x3x32x32` are floats, `ids 2x16` are integers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseift_cli.models.libraries import optional

from .subject import Subject

MODELS = Path(__file__).with_name("models.jsonl")


def listed(which: str) -> Iterator[Subject]:
    """The models of one set of the list: timm (one a module), Hugging Face families, everybody else's."""
    for line in MODELS.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["set"] == which:
            yield _subject(row)


def _subject(row: dict[str, Any]) -> Subject:
    inputs = row["inputs"]
    optional(row["make"].partition(":")[0].partition(".")[0], row["name"])  # imported once, before the forks
    if isinstance(inputs, dict):
        named = lambda device: {k: _tensor(text, device) for k, text in inputs.items()}  # noqa: E731
        return Subject(row["name"], lambda device: _build(row, device), kwargs=named)
    given = lambda device: tuple(_tensor(text, device) for text in inputs)  # noqa: E731
    return Subject(row["name"], lambda device: _build(row, device), given)


def _build(row: dict[str, Any], device: str) -> nn.Module:
    """The model on `device`; what reads values while it is built is built on CPU and moved."""
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in row["options"].items()}
    try:
        with torch.device(device):
            return _call(row, options).eval()
    except RuntimeError:  # also what PyTorch calls not implemented on meta
        return _call(row, options).to(device).eval()


def _call(row: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    if "config" in row:
        return _named(row["make"])(_named(row["config"])(**options))
    return _named(row["make"])(**options)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _tensor(text: str, device: str) -> Tensor:
    shape = tuple(map(int, text.removeprefix("ids ").split("x")))
    if not text.startswith("ids "):
        return torch.zeros(shape, device=device)
    if device == "meta" or shape == (1,):  # one number is a time step
        return torch.ones(shape, dtype=torch.int64, device=device)
    return torch.randint(3, 50, shape)


def x_decoder(**options: Any) -> nn.Module:
    """A language model of x-transformers."""
    library = optional("x_transformers", "x_decoder")
    layers = library.Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
    return library.TransformerWrapper(num_tokens=101, max_seq_len=32, attn_layers=layers)


def x_encoder() -> nn.Module:
    """An image classifier of x-transformers."""
    library = optional("x_transformers", "x_encoder")
    layers = library.Encoder(dim=64, depth=2, heads=4, attn_dim_head=16)
    return library.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=layers)


def x_autoregressive() -> nn.Module:
    """A wrapper whose forward returns the loss alone."""
    return optional("x_transformers", "x_autoregressive").AutoregressiveWrapper(x_decoder())
