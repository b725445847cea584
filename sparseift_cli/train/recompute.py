"""Activation checkpointing: a block keeps its inputs alone, and computes the rest again when the backward pass needs it.

Blocks are the outermost numbered modules (`Layer.block`: layer1.0, transformer.h.3), the very ones whose second forward the
audit counts. What is outside of them (stem, head, last norm, embeddings) keeps its activations and is computed once. A
block is recomputed to its end, although PyTorch could stop at the last tensor that is needed: so what is executed is what is
audited. Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.

The numbers stay those without it, to the bit where kernels are deterministic: dropout draws the same masks again, and running
statistics of batch norms learn from the first forward alone. Other buffers that a forward changes (the vectors of a spectral
norm) would change twice; no model of ours has any.

`forward` is wrapped on the instance, so modules, parameters, masks and state dict keep their names. torch.compile takes it
in: the compiler then recomputes by itself and leaves out what no gradient needs, so there the audit is an upper bound.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..base.text import some_of
from ..errors import UsageError
from ..table.table import LayerTable

_ONCE = "_sparseift_once"  # the attribute of a wrapped block that holds its own forward
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
COMPILES = torch.__version__ >= "2.11"
"""Older compilers write a batch norm's statistics once more when they recompute (seen with 2.6): there blocks stay eager."""


def recompute(model: nn.Module, table: LayerTable, example: Tensor) -> tuple[str, ...]:
    """Make every block of `model`, in place, compute its forward again in the backward pass; the names of the blocks.

    `table` is the dense model's, by which the audit counts. `example`, a batch of one on the model's device ([1, C, H, W]
    or [1, T]), goes through the model once, in eval mode, to see that every layer of a block runs inside the block's own forward.

    Raises:
        UsageError: the model has no blocks, or layers of one that run outside of it, so that the audit would be wrong.
    """
    names = dict.fromkeys(row.block for row in table.layers if row.block and row.macs.terms)
    if not names:
        raise UsageError(
            f"training.recompute has nothing to compute again: {table.model} has no numbered blocks with layers "
            "inside (layers.0, layers.1, ...)",
            hint="leave training.recompute out",
        )
    blocks = {name: model.get_submodule(name) for name in names if name}
    _require_inside(model, blocks, example)
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "use_cache", False):  # keys and values that a second forward would add a second time
            config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
    for block in blocks.values():
        if _ONCE not in block.__dict__:  # two names of one module
            setattr(block, _ONCE, block.forward)
            block.forward = MethodType(_forward, block)
    return tuple(blocks)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A wrapped block's forward; as it was where there will be no backward pass."""
    once = getattr(block, _ONCE)
    if not (block.training and torch.is_grad_enabled()):
        return once(*args, **kwargs)
    if not torch.compiler.is_compiling():
        return _checkpoint(block, *args, **kwargs)
    if not COMPILES:
        return torch.compiler.disable(_checkpoint)(block, *args, **kwargs)
    return checkpoint(once, *args, use_reentrant=False, **kwargs)  # functional there: statistics are written once


def _checkpoint(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(
            getattr(block, _ONCE), *args, use_reentrant=False, context_fn=partial(_contexts, block), **kwargs
        )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What the first and the second forward of a block run in."""
    return nullcontext(), _StatisticsAside(block)


class _StatisticsAside:
    """Inside, batch norms of a block write their statistics into copies that are thrown away."""

    def __init__(self, block: nn.Module) -> None:
        self._norms = [m for m in block.modules() if isinstance(m, _NormBase)]
        self._kept: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        held = ((m, name, m._buffers.get(name)) for m in self._norms for name in _STATISTICS)
        self._kept = [(m, name, buffer) for m, name, buffer in held if buffer is not None]
        for module, name, buffer in self._kept:
            module._buffers[name] = buffer.clone()

    def __exit__(self, *_: object) -> None:
        for module, name, buffer in self._kept:
            module._buffers[name] = buffer


def _require_inside(model: nn.Module, blocks: dict[str, nn.Module], example: Tensor) -> None:
    """Raise UsageError unless every module with parameters below a block runs while that block's forward does."""
    running: list[nn.Module] = []
    entered: set[nn.Module] = set()
    outside: list[str] = []

    def enter(block: nn.Module, _: Any) -> None:
        running.append(block)
        entered.add(block)

    def leave(*_: Any) -> None:
        running.pop()

    def within(name: str, block: nn.Module, *_: Any) -> None:
        if block not in running:
            outside.append(name)

    with ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.callback(block.register_forward_pre_hook(enter).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
            for path, module in block.named_modules():
                if path and module._parameters:
                    hook = partial(within, f"{name}.{path}", block)
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            model(example)
        model.train(was_training)
    wrong = [*outside, *(name for name, block in blocks.items() if block not in entered)]
    if wrong:
        raise UsageError(
            f"training.recompute cannot be: {some_of(wrong, 3)} of the model would not be computed "
            "again, as the model does not call the blocks around them as modules",
            hint="leave training.recompute out",
        )
