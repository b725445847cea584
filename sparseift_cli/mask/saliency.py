"""Which weights matter before training: SNIP, GraSP, FORCE and iterative SNIP, on a few batches at initialisation.

A score is large where a weight should be kept, for every method. The papers rank the weights of all layers together, which also
decides each layer's density; an iso-FLOP plan has fixed every layer's non-zeros already, so the ranking is within each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..base.randomness import generator_for
from ..errors import UsageError, did_you_mean
from .layout import Layout
from .mask import make_mask
from .patterns import UNSTRUCTURED, parse_pattern

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Probe:
    """Gradients and Hessian-gradient products of a model, computed on copies of its parameters and buffers.

    Nothing of the model changes: not its weights, gradients, requires_grad or running statistics; the modes of its modules and
    the global random state are restored. Modules run in train mode, because running statistics mean nothing before training;
    dropout modules in eval mode, because their noise would be in the scores. `weights` are the parameters by name.

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
        first = {id(p): name for name, p in model.named_parameters()}  # tied parameters once, by their first name
        self._names = {key: first[id(parameters[key])] for key in keys}
        if len(set(self._names.values())) < len(keys):
            raise UsageError(f"of {', '.join(keys)} two are the same parameter", hint="name every parameter once")

    def gradients(
        self, pairs: Sequence[tuple[Any, Any]], masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """dL/d(w * mask) [*shape] by key, at masked places too; the mean over `pairs` of (input, target)."""
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
        """H g [*shape] by key, with g the mean gradient over `pairs` and H the mean Hessian, both over all keys.

        Double backward: H g = d/dw (g(w) . g) with the second g held fixed. Attention runs without its fused kernels,
        which have no second derivative.
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
        """The loss of each pair, a scalar; its graph is freed when the next one is computed."""
        if not pairs:
            raise UsageError("no batches to score the weights on")
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        parameters |= {self._names[key]: leaf for key, leaf in leaves.items()}
        for i, (given, target) in enumerate(pairs):
            state = parameters | {name: b.clone() for name, b in self.model.named_buffers()}
            args, kwargs = _arguments(given)
            loss = self.loss_fn(functional_call(self.model, state, args, kwargs), target)
            if loss.numel() != 1:
                raise UsageError(f"the loss is not a scalar but a tensor of shape {tuple(loss.shape)}")
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


LossFn = Callable[[Any, Any], Tensor]


class MaskLayout(TypedDict, total=False):
    """How the mask of one weight is laid out: the arguments of `make_mask` of the same names."""

    pattern: str
    connect: bool
    groups: int
    transposed: bool
    row_balance: int | None
    column_balance: int | None


def scores(
    model: nn.Module,
    keys: Sequence[str],
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFn,
    *,
    method: Literal["snip", "grasp"] = "snip",
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of the parameters named `keys`, float32 on the CPU and in their shapes; the larger, the rather to be kept.

    * snip: |w * dL/dw| (Lee, Ajanthan, Torr, "SNIP: Single-shot network pruning", ICLR 2019, arXiv 1810.02340,
      without its normalisation, which changes no order).
    * grasp: w * Hg, with g = dL/dw and H the Hessian over `keys` (Wang, Zhang, Grosse, "Picking winning tickets before
      training by preserving gradient flow", ICLR 2020, arXiv 2002.07376). The paper's S(-w) = -w * Hg is what removing w
      adds to the gradient's squared norm, to first order and halved, and it removes the largest S; this is -S.

    L is the mean of the loss over the batches, each counted once. The model runs in train mode, as at the first training
    step: batch statistics, but no dropout from modules. It is left exactly as it was (see `Probe`).

    Args:
        batches: (input, target) pairs on the model's device; an input that is a tuple or list is passed as positional
            arguments, a mapping as keyword arguments.
        loss_fn: (output, target) to a scalar.
        masks: zeros to score the network with; scores of masked weights are those of returning (FORCE).
        seed: of what randomness remains in the forward pass.

    Raises:
        UsageError: a name that is no parameter, or two of one; no batches; a loss that is no number, is not finite or
            does not depend on one of the parameters; scores that are not finite. It names the parameter.
    """
    if method not in ("snip", "grasp"):
        raise UsageError(f"unknown saliency {method!r}", hint="use snip or grasp; FORCE needs counts: force_masks")
    probe = Probe(model, keys, loss_fn, seed)
    pairs = list(batches)
    found = probe.gradients(pairs, masks) if method == "snip" else probe.hessian_gradients(pairs, masks)
    result: dict[str, Tensor] = {}
    for key in keys:
        score = probe.weights[key].float() * found[key].float()
        score = (score.abs() if method == "snip" else score).cpu()
        if not bool(score.isfinite().all()):
            bad = int((~score.isfinite()).count_nonzero())
            raise UsageError(
                f"{method}: {bad} of {score.numel()} scores of {key} are not finite",
                hint="is the model initialised, and is the input normalised?",
            )
        result[key] = score
    return result


def force_masks(
    model: nn.Module,
    nnz: Mapping[str, int],
    batches: Iterable[tuple[Any, Any]],
    loss_fn: LossFn,
    *,
    rounds: int = 10,
    regrow: bool = True,
    structure: Mapping[str, MaskLayout] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Masks with exactly nnz[key] non-zeros, pruned in `rounds` steps by the SNIP scores of the network masked so far.

    The number of non-zeros falls exponentially from all weights N to nnz: N ** (1 - t/T) * nnz ** (t/T) after round t of
    T. With `regrow` pruned weights are scored as if they came back, and may (FORCE); without, they stay pruned
    (iterative SNIP). Source: de Jorge, Sanyal, Behl, Torr, Rogez, Dokania, "Progressive skeletonization", ICLR 2021,
    arXiv 2006.09081. One round is SNIP.

    A pattern of fixed density (N:M) has one count, so the rounds before the last are unstructured; there a pruned weight
    returns in iterative SNIP too where a group has too few others.

    Args:
        structure: pattern and layout of each key's mask, where it is not that of a plain unstructured weight.
        Others as in `scores`; every round sees all batches.

    Raises:
        UsageError: as `scores` and `make_mask`; fewer than one round.
    """
    if rounds < 1:
        raise UsageError(f"{rounds} rounds of pruning: at least one is needed")
    pairs = list(batches)
    masks: dict[str, Tensor] = {}
    for t in range(1, rounds + 1):
        found = scores(model, list(nnz), pairs, loss_fn, masks=masks, seed=seed)
        previous, masks = masks, {}
        for key, score in found.items():
            form: MaskLayout = (structure or {}).get(key, {})
            if not regrow and key in previous:
                score = score.masked_fill(~previous[key], -1.0)  # below every |w g|
            count, form = _step(tuple(score.shape), nnz[key], t / rounds, form)
            generator = generator_for(seed, key, "force", str(t))
            try:
                masks[key] = make_mask(score.shape, count, generator=generator, scores=score, **form)
            except UsageError as error:
                raise UsageError(f"{key}: {error.message}", hint=error.hint) from None
    return masks


def _step(shape: tuple[int, ...], nnz: int, progress: float, form: MaskLayout) -> tuple[int, MaskLayout]:
    """Non-zeros of a weight at `progress` (1 at the end) of the pruning, and the structure that can have them."""
    if progress == 1 or nnz < 1:
        return nnz, form
    pattern = parse_pattern(form.get("pattern", "unstructured"))
    if pattern.density is not None:
        pattern, form = UNSTRUCTURED, form.copy()
        form["pattern"] = "unstructured"
    most = pattern.room(Layout(shape, form.get("groups", 1), form.get("transposed", False)))
    count = round(most ** (1 - progress) * nnz**progress)
    return max(nnz, count // pattern.unit * pattern.unit), form
