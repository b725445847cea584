"""Gradients and Hessian-gradient products of a model that is left exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UsageError, did_you_mean

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Probe:
    """Runs a model on batches with stand-ins for its parameters and copies of its buffers.

    Nothing of the model changes: not its weights, gradients, requires_grad or running statistics, nor the modes of its
    modules and the global random state, which are put back. Modules run in train mode, because running statistics mean
    nothing before training; dropout modules in eval mode, because their noise would be in the scores. `weights` are the
    parameters by the names asked for.

    Raises:
        UsageError: a name that is no parameter of the model, or two names of one.
    """

    def __init__(
        self, model: nn.Module, keys: Sequence[str], loss_fn: Callable[[Any, Any], Tensor], seed: int = 0
    ) -> None:
        self.model, self.loss_fn, self.seed = model, loss_fn, seed
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for key in keys:
            if key not in parameters:
                raise UsageError(f"the model has no parameter {key!r}", hint=did_you_mean(key, parameters))
        self.weights = {key: parameters[key].detach() for key in keys}
        first = {id(p): name for name, p in model.named_parameters()}  # tied ones once, by the name that stands for all
        self._names = {key: first[id(parameters[key])] for key in keys}
        if len(set(self._names.values())) < len(keys):
            raise UsageError(f"of {', '.join(keys)} two are one parameter", hint="name every parameter once")

    def gradients(
        self, pairs: Sequence[tuple[Any, Any]], masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """dL/d(w * mask) of every key, dense where the mask is zero too; the mean over `pairs`, which are (input, target)."""
        leaves = self._leaves(masks)
        total = {key: torch.zeros_like(leaf, dtype=torch.float32) for key, leaf in leaves.items()}
        unused = set(leaves)
        with self._running():
            for loss in self._losses(pairs, leaves):
                found = _gradients(loss, leaves)
                for key, gradient in zip(leaves, found, strict=True):
                    if gradient is not None:
                        unused.discard(key)
                        total[key] += gradient / len(pairs)
        if unused:
            raise UsageError(f"the loss does not depend on {', '.join(sorted(unused))}")
        return total

    def hessian_gradients(
        self, pairs: Sequence[tuple[Any, Any]], masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """H g of every key, with g the mean gradient over `pairs` and H the mean Hessian, both over all keys.

        Double backward: H g = d/dw (g(w) . g) with the second g held fixed. Attention takes its plain form, the fused
        kernels having no second derivative.
        """
        leaves = self._leaves(masks)
        total = {key: torch.zeros_like(leaf, dtype=torch.float32) for key, leaf in leaves.items()}
        with sdpa_kernel(SDPBackend.MATH):
            fixed = self.gradients(pairs, masks)
            with self._running():
                for loss in self._losses(pairs, leaves):
                    first = _gradients(loss, leaves, create_graph=True)
                    live = [(key, g) for key, g in zip(leaves, first, strict=True) if g is not None and g.requires_grad]
                    if not live:  # the loss is linear in every key
                        continue
                    flow = sum(((g.float() * fixed[key]).sum() for key, g in live), torch.zeros(()))
                    second = torch.autograd.grad(flow, list(leaves.values()), materialize_grads=True)
                    for key, product in zip(leaves, second, strict=True):
                        total[key] += product / len(pairs)
        return total

    def _leaves(self, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        leaves: dict[str, Tensor] = {}
        for key, weight in self.weights.items():
            mask = (masks or {}).get(key)
            leaf = weight if mask is None else weight * mask.to(weight)
            leaves[key] = leaf.detach().requires_grad_()
        return leaves

    def _losses(self, pairs: Sequence[tuple[Any, Any]], leaves: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The loss of each pair, its graph alive until the next is asked for."""
        if not pairs:
            raise UsageError("no batches to score the weights on")
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        parameters |= {self._names[key]: leaf for key, leaf in leaves.items()}
        for i, (given, target) in enumerate(pairs):
            state = parameters | {name: b.clone() for name, b in self.model.named_buffers()}
            args, kwargs = _arguments(given)
            loss = self.loss_fn(functional_call(self.model, state, args, kwargs), target)
            if loss.numel() != 1:
                raise UsageError(f"the loss is no number but a tensor of shape {tuple(loss.shape)}")
            if not loss.requires_grad:
                raise UsageError(f"the loss does not depend on any of {', '.join(leaves)}")
            if not bool(loss.detach().isfinite()):
                raise UsageError(f"the loss of batch {i} is {loss.item()}, so no weight can be scored")
            yield loss

    @contextmanager
    def _running(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        devices = sorted({p.device.index for p in self.model.parameters() if p.is_cuda})
        try:
            for module, _ in modes:
                module.training = not isinstance(module, _DROPOUT)
            with torch.random.fork_rng(devices), torch.enable_grad():
                torch.default_generator.manual_seed(self.seed)  # not torch.manual_seed: that reaches every device
                for device in devices:
                    torch.cuda.default_generators[device].manual_seed(self.seed)
                yield
        finally:
            for module, mode in modes:
                module.training = mode


def _gradients(loss: Tensor, leaves: Mapping[str, Tensor], *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
    """dL/dw of every leaf, None where the loss does not depend on it."""
    return torch.autograd.grad(loss, list(leaves.values()), create_graph=create_graph, allow_unused=True)


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}
