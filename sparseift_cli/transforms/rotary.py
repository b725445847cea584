"""Rotary embeddings of longer heads: their frequencies in a fresh model, and those that keep a dense model's function.

A rotary embedding (Su et al. 2021, arXiv 2104.09864) rotates pair i of a head with n pairs by the frequency
theta ** (-i / n). With n' pairs and theta' = theta ** (n' / n) it is theta' ** (-i / n') = theta ** (-i / n): the dense pairs,
which come first, keep their frequencies. So one number says it, which a module or a Hugging Face configuration holds, and
whatever builds the model from that configuration computes the same. It holds too where the library scales the series
afterwards by wavelength (Llama 3, YaRN).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..table.poly import Poly
from ..trace.constants import computed_buffer, geometric
from ..trace.structure import Structure
from ..trace.symbolise import is_config
from .edits import Resize, SetAttribute, Surgery
from .layers import set_attribute

_BASES = ("theta", "base")  # parts of the names of a base: rope_theta, rotary_emb_base


# --- fresh: the series for more pairs ---


def set_frequencies(new: nn.Module, surgery: Surgery, fresh: dict[int, Tensor], old: dict[str, Tensor]) -> None:
    """Frequencies of resized rotary embeddings: as their class computes them, or the same geometric series for more pairs.

    Called after the attributes are set: a Hugging Face module computes its frequencies from the configuration.

    Args:
        old: buffers of the dense model by name, the frequencies of n pairs [n].
    """
    for edit in surgery.resizes:
        if edit.rotary and not old[edit.key].is_meta:
            made = _from_class(new, edit)
            fresh[id(old[edit.key])].copy_(made if made is not None else _geometric(old[edit.key], edit))


def _from_class(new: nn.Module, edit: Resize) -> Tensor | None:
    """The frequencies [new number of pairs] that a module's class computes from its configuration; None where it has none."""
    path, _, name = edit.key.rpartition(".")
    module = new.get_submodule(path)
    config = module.__dict__.get("config")
    if config is None or not is_config(config):
        return None
    made = computed_buffer(module, config, name)
    return made if made is not None and tuple(made.shape) == edit.shape else None


def _geometric(old: Tensor, edit: Resize) -> Tensor:
    """The series [edit.shape[0]] with the base of `old` [n].

    Raises:
        UsageError: the old frequencies are not of this form, which a plan from the values of `old` knows.
    """
    made = geometric(old, edit.shape[0])
    if made is None:
        raise UsageError(
            f"{edit.key} holds scaled rotary frequencies, which cannot be computed for another head_dim",
            hint="--heads scale_count keeps the head_dim",
        )
    return made


# --- preserve: the dense pairs keep theirs ---


def keep_frequencies(
    new: nn.Module,
    dense: nn.Module,
    surgery: Surgery,
    structure: Structure,
    new_size: Callable[[Poly], int],
    dense_size: Callable[[Poly], int],
) -> Iterator[SetAttribute]:
    """The edits of bases that keep the frequencies of the dense pairs; those of configurations are made in `new` already.

    The buffers of `new` that hold frequencies begin with the dense ones. Where a configuration has the base, the class computes
    them from the new base, to the last pair.
    """
    yield from _own_bases(dense, structure, new_size, dense_size)
    old = dict(dense.named_buffers(remove_duplicate=False))
    by_config: dict[str, list[Resize]] = {}
    for edit in surgery.resizes:
        holder = new.get_submodule(edit.key.rpartition(".")[0])
        if edit.rotary and is_config(holder.__dict__.get("config")):
            by_config.setdefault(_path_of(new, holder.__dict__["config"]), []).append(edit)
    for path, resizes in by_config.items():
        yield from _configured_bases(new, path, resizes, old)


def _own_bases(
    dense: nn.Module, structure: Structure, new_size: Callable[[Poly], int], dense_size: Callable[[Poly], int]
) -> Iterator[SetAttribute]:
    """Of modules whose forward computes the frequencies from their head_dim and base."""
    head_dims: dict[str, Poly] = {owner: dim for (owner, _, _), dim in structure.attributes.items()}
    for path, module in dense.named_modules():
        dim = head_dims.get(path)
        if dim is None or new_size(dim) == dense_size(dim):
            continue
        if any(k.endswith("inv_freq") for k in module._buffers) or module._parameters or module._modules:
            continue  # it stores its frequencies, or is not a rotary embedding
        for name, theta in _bases("", module.__dict__):
            if not name.rpartition(".")[0]:
                ratio = new_size(dim) / dense_size(dim)
                yield SetAttribute(path, name, theta**ratio)


def _configured_bases(
    new: nn.Module, path: str, resizes: list[Resize], old: Mapping[str, Tensor]
) -> Iterator[SetAttribute]:
    """Of one configuration of `new`, at `path`: all bases in it, if its class then computes the dense frequencies first."""
    before = [SetAttribute(*_split(name), value) for name, value in _bases(path, _at(new, path).__dict__)]
    for ratio in _ratios(new, resizes, old) if before else ():
        after = [SetAttribute(edit.owner, edit.name, edit.value**ratio) for edit in before]
        for edit in after:
            set_attribute(new, edit)
        made = {edit.key: _from_class(new, edit) for edit in resizes}
        if all(f is not None and torch.allclose(f[: len(old[k])], old[k].cpu(), rtol=1e-5) for k, f in made.items()):
            buffers = dict(new.named_buffers(remove_duplicate=False))
            for key, frequencies in made.items():
                assert frequencies is not None
                buffers[key].copy_(frequencies)
            yield from after
            return
        for edit in before:
            set_attribute(new, edit)


def _ratios(new: nn.Module, resizes: list[Resize], old: Mapping[str, Tensor]) -> Iterator[float]:
    """By how much the logarithm of the base may have to grow: n' / n, or what the second frequency says of an odd rotary size."""
    for edit in resizes:
        yield edit.shape[0] / old[edit.key].shape[0]
        made = _from_class(new, edit)
        if made is not None and len(old[edit.key]) > 1 and 0 < made[1] != 1:
            yield math.log(float(old[edit.key][1])) / math.log(float(made[1]))


def _bases(path: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(path, value) of every number above 1 that is named as a base, in a module, a configuration, or the dicts in it."""
    for name, value in values.items():
        at = f"{path}.{name}" if path else name
        if isinstance(value, dict):
            yield from _bases(at, value)
        elif type(value) in (int, float) and value > 1 and any(word in name for word in _BASES):
            yield at, float(value)


def _split(path: str) -> tuple[str, str]:
    owner, _, name = path.rpartition(".")
    return owner, name


def _path_of(root: nn.Module, config: object) -> str:
    """Where a configuration is: the first module that holds it, and the attribute."""
    for path, module in root.named_modules():
        for key, value in module.__dict__.items():
            if value is config:
                return f"{path}.{key}".removeprefix(".")
    raise LookupError("no module holds the configuration")


def _at(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found
