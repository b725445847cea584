"""How far the outputs of two modules lie apart on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


def deviation(new: nn.Module, dense: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The largest absolute difference of the outputs in eval mode, over the largest absolute output of `dense`.

    Both run on real tensors of the shapes and dtypes of `inputs` and `kwargs`; where one is on meta or all zeros, normal
    numbers or random token ids take its place. Of a mapping the logits are compared where it has some, and only outputs of
    the same shape: hidden states and caches may be wider. Infinite where `new` gives something that is no number.
    """
    args, named = _real(dense, inputs, kwargs)
    with torch.no_grad(), _in_eval(new, dense):
        pairs = zip(_outputs(dense(*args, **named)), _outputs(new(*args, **named)), strict=True)
        both = [(a.double(), b.double()) for a, b in pairs if a.shape == b.shape and a.numel()]
    largest = max((float(a.abs().max()) for a, _ in both), default=0.0)
    apart = max((float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in both), default=0.0)
    return apart / largest if largest else apart


def _outputs(output: Any) -> list[Tensor]:
    """The tensors of real numbers in an output, its logits alone where it names some."""
    if isinstance(output, Mapping):
        output = {k: v for k, v in output.items() if "logits" in str(k)} or dict(output)
    elif not isinstance(output, (Tensor, tuple, list)) and hasattr(output, "__dict__"):
        output = vars(output)
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _real(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    given: tuple[Any, dict[str, Any]] = (inputs, dict(kwargs))
    blank = tree_map_only(
        Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device) if t.is_meta else t, given
    )
    rows = _rows_looked_up(model, *blank)
    fewest = min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)

    def drawn(t: Tensor) -> Tensor:
        if t.any():
            return t.to(device)
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator).to(device, t.dtype)
        if t.dtype == torch.bool:
            return t.to(device)
        high = rows.get(t.untyped_storage().data_ptr(), fewest)
        return torch.randint(high, t.shape, generator=generator).to(device, t.dtype)

    return tree_map_only(Tensor, drawn, blank)


def _rows_looked_up(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, int]:
    """Storage of an input -> the fewest rows of the embeddings that look it up."""
    whole = {t.untyped_storage().data_ptr() for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)}
    rows: dict[int, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor):
            at = args[0].untyped_storage().data_ptr()
            if at in whole:
                rows[at] = min(rows.get(at, module.num_embeddings), module.num_embeddings)

    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if embeddings:
        with ExitStack() as stack, torch.no_grad(), _in_eval(model):
            for module in embeddings:
                stack.callback(module.register_forward_pre_hook(note).remove)
            model(*inputs, **kwargs)
    return rows


@contextmanager
def _in_eval(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside, the training flags as they were afterwards."""
    training = [m for model in models for m in model.modules() if m.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
