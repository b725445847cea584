"""Does a model fit its data? Looked at before anything is written: a run would end at its first loss, with words of PyTorch's.

The model is called once, in eval mode, on two made-up samples. Training wants of it: of images [B, C] logits, of tokens
[B, T, C] (or [B * T, C]), and C outputs for all labels or ids that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..data import DataSet
from ..data.tokens import TokenSet
from ..errors import UsageError
from .evaluate import logits_of

FEW = 2  # samples: one alone could be taken for a dimension that is not there


def check_compatibility(
    model: nn.Module,
    name: str,
    dataset: DataSet,
    *,
    batch_size: int,
    seq: int | None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Raise UsageError unless `model`, called `name`, gives logits for what `dataset` holds. It is as before afterwards.

    `batch_size` is that of one forward in training: it is tried where two samples fail.
    """
    x = _samples(dataset, min(FEW, batch_size), seq)
    try:
        output, table = _called(model, x, autocast)
    except Exception:  # a model may be made for one batch size
        x = _samples(dataset, batch_size, seq)
        try:
            output, table = _called(model, x, autocast)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UsageError(
                f"{name} does not run on a batch of {dataset.name}, {list(x.shape)}: {type(error).__name__}: {reason}",
                hint="sparseift --debug shows where; model.input and model.seq say what it takes",
            ) from error
    require_logits(name, dataset.name, dataset.kind, tuple(x.shape), output)
    outputs = logits_of(output).shape[-1]
    if dataset.kind == "image":
        require_classes(name, dataset.name, outputs, dataset.classes)
    else:
        _require_vocabulary(name, dataset, outputs, table)


def require_logits(name: str, data: str, kind: str, given: tuple[int, ...], output: Any) -> None:
    """Raise UsageError unless `output`, which the model `name` gave for a batch of shape `given`, is logits that a loss takes."""
    wanted = "[B, classes]" if kind == "image" else "[B, T, vocabulary]"
    try:
        shape = tuple(logits_of(output).shape)
    except Exception:
        raise UsageError(
            f"{name} gives {_described(output)}; {data} needs logits {wanted}",
            hint="return a tensor, or a mapping or object with `logits`; of several outputs the first counts",
        ) from None
    if kind == "image":
        fits, needed, hint = shape[:-1] == given[:1], f"[{given[0]}, classes]", _ONE_LABEL
    else:
        fits = shape[:-1] in (given, (given[0] * given[1],))
        needed, hint = f"[{given[0]}, {given[1]}, vocabulary]", _NEXT_TOKEN
    if not fits:
        raise UsageError(
            f"{name} gives logits of shape {list(shape)} for a batch {list(given)}; {data} needs {needed}", hint=hint
        )


_ONE_LABEL = "every image has one label: pool what has height and width, or wrap the model in one that does"
_NEXT_TOKEN = "every position predicts the next token: without targets too, return the logits of all positions"


def require_classes(name: str, data: str, outputs: int, classes: int) -> None:
    """Raise UsageError where the model `name` has fewer outputs than its data has classes; more do no harm."""
    if outputs < classes:
        own = ":" in name
        raise UsageError(
            f"{name} has {outputs} outputs; {data} has {classes} classes",
            hint=f"build the model with {classes} outputs" if own else "leave out model.num_classes",
        )


def _require_vocabulary(name: str, dataset: DataSet, outputs: int, table: int | None) -> None:
    """Text of bytes that is all ASCII fits a model of 128 tokens: where the vocabulary is larger, the text itself is asked."""
    room = min(outputs, table if table is not None else outputs)
    if room >= dataset.classes or not isinstance(dataset, TokenSet) or (largest := dataset.largest) < room:
        return
    what = f"{room} outputs" if room == outputs else f"an embedding of {room} tokens"
    hint = f"build the model with a vocabulary of {dataset.vocab}"
    if dataset.vocabulary is not None:
        hint += f", or take the {room} most frequent words alone: data.max_vocab={room}"
    elif dataset.trained_vocabulary:
        hint += f", or let a smaller one be trained: data.max_vocab={room}"
    raise UsageError(f"{name} has {what}; the tokens of {dataset.name} go up to {largest:,}", hint=hint)


def _called(model: nn.Module, x: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> tuple[Any, int | None]:
    """What the model gives, and the size of the embedding that `x` went into, if it went into one."""
    device = next(model.parameters()).device
    x = x.to(device)
    found: list[int] = []

    def look(table: nn.Embedding, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor) and given[0].shape == x.shape and torch.equal(given[0], x):
            found.append(table.num_embeddings)

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.Embedding)]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), _as_evaluated(model), autocast():
            return model(x), min(found, default=None)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module is back in its own mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _samples(dataset: DataSet, n: int, seq: int | None) -> Tensor:
    """Samples of the data's shape. Tokens are 0 and 1, which every vocabulary has: on a GPU an id beyond it ends the process."""
    shape = (n, *dataset.shape) if seq is None else (n, seq)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) if seq is None else torch.randint(2, shape, generator=generator)


def _described(output: Any) -> str:
    named = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"{type(output).__name__}{named}"
