"""The local members that start as the dense layer: its weights dealt out over branches, or taken apart into factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...mask import generator_for, make_mask
from ...mask.attached import is_transposed
from ...plan.plan import Plan
from ..edits import Masked, Replace, Surgery
from ..layers import bias_of, groups_of, weight_of
from ..members.base import Member
from .coordinates import HINT
from .factors import factorizations, matrices, singular

_TITLES = {
    "sparse_parallel": "Sparse Parallel",
    "sparse_doped": "Sparse Doped",
    "sparse_factorized": "Sparse Factorized",
}


def fill_members(
    new: nn.Module, dense: nn.Module, plan: Plan, surgery: Surgery, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights and masks of every member of `new`; what they leave out of the dense layers, as notes.

    Raises:
        UsageError: a member whose inner norm or activation makes it another function than the layer's, or a pattern
            that dealt-out weights do not follow.
    """
    masks: dict[str, Tensor] = {}
    lost: dict[str, tuple[float, str]] = {}
    for edit in surgery.members:
        _require_linear(edit, plan)
        member = new.get_submodule(edit.path)
        assert isinstance(member, Member)
        weight, bias, groups = _dense_layer(dense, edit.path)
        parts = {m.part: m for m in surgery.masked if m.layer == edit.path}
        make = _MAKERS[edit.member]
        filled = make(weight, groups, edit.size, parts, plan.spec.pattern, generator_for(seed, "preserve", edit.path))
        lost[edit.path] = (filled.lost, filled.way)
        for name, layer in member.parts().items():
            target = weight_of(layer)
            target.copy_(filled.values[name].reshape(target.shape))
            own = bias_of(layer)
            if own is not None:
                own.copy_(bias) if bias is not None and name == filled.biased else own.zero_()
            if name in parts:
                masks[parts[name].key] = filled.masks[name].reshape(target.shape).to(target.device)
    return masks, list(_told(plan, lost))


@dataclass(frozen=True)
class _Filled:
    """Values and masks of a member's parts, by the plan's names; the part that has the bias; what is missing of the weight.

    `lost` is the norm of what the parts do not add up to, over the weight's norm; `way` how they were found.
    """

    values: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    biased: str
    lost: float
    way: str


def _require_linear(edit: Replace, plan: Plan) -> None:
    if edit.norm or edit.activation:
        option = "--branch-activation sum" if edit.member == "sparse_parallel" else "--inner linear"
        raise UsageError(
            f"{edit.path}: {_TITLES[edit.member]} with a norm or activation inside cannot start as the dense layer",
            hint=f"use {option}, or --init fresh",
        )
    if edit.member == "sparse_parallel" and plan.spec.pattern != "unstructured":
        raise UsageError(f"weights dealt out over branches are no {plan.spec.pattern} pattern", hint=HINT)


def _dense_layer(dense: nn.Module, path: str) -> tuple[Tensor, Tensor | None, int]:
    """Weight [out, in / groups, *kernel], bias and groups of the layer at `path`, or of a projection inside attention."""
    parent, _, name = path.rpartition(".")
    host = dense.get_submodule(parent)
    if isinstance(host, nn.MultiheadAttention) and name == "in_proj":
        assert host.in_proj_weight is not None
        return host.in_proj_weight.detach(), host.in_proj_bias, 1
    layer = dense.get_submodule(path)
    weight = weight_of(layer).detach()
    return weight.t() if is_transposed(layer) else weight, bias_of(layer), groups_of(layer)


def _parallel(
    weight: Tensor, groups: int, size: int, parts: Mapping[str, Masked], pattern: str, generator: torch.Generator
) -> _Filled:
    shared, masks = deal(weight, [m.nnz for m in parts.values()], generator)
    weight = weight.cpu()
    values = {name: weight * mine for name, mine in zip(parts, shared, strict=True)}
    lost = weight - sum(values.values(), torch.zeros_like(weight))
    return _Filled(values, dict(zip(parts, masks, strict=True)), "branch 0", _share_of(lost, weight), "dealt out")


def deal(weight: Tensor, counts: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Disjoint sets of places that share out the weights, and masks with these counts around them.

    Every row's weights go to the branches in turn; where they do not all fit, the largest stay. Where the counts are
    more than the weights, the rest of a mask holds zeros, on places that another branch has.
    """
    size = weight.abs().flatten().float().cpu()
    keep = min(len(size), sum(counts))
    kept = size.argsort(descending=True, stable=True)[:keep]
    kept = kept[torch.randperm(keep, generator=generator)]
    kept = kept[(kept // weight[0].numel()).argsort(stable=True)]
    turns = torch.cat([(torch.arange(n) + 0.5) / n for n in counts])
    branch = torch.cat([torch.full((n,), i) for i, n in enumerate(counts)])[turns.argsort(stable=True)][:keep]
    shared, masks = [], []
    for i, n in enumerate(counts):
        mine = torch.zeros(len(size), dtype=torch.bool)
        mine[kept[branch == i]] = True
        mask = mine.clone()
        empty = (~mine).nonzero().flatten()
        mask[empty[torch.randperm(len(empty), generator=generator)[: n - int(mine.sum())]]] = True
        shared.append(mine.view(weight.shape))
        masks.append(mask.view(weight.shape))
    return shared, masks


def _doped(
    weight: Tensor, groups: int, size: int, parts: Mapping[str, Masked], pattern: str, generator: torch.Generator
) -> _Filled:
    matrix = matrices(weight, groups)
    f = singular(matrix, size)
    rest = (matrix - f.v @ f.u).reshape(weight.shape)
    mask = _largest(rest.abs(), parts["sparse"], weight.shape, pattern, generator)
    values = {"U": f.u, "V": f.v, "sparse": rest * mask}
    return _Filled(values, {"sparse": mask}, "sparse", _share_of(rest * ~mask, weight), "singular vectors")


def _factorized(
    weight: Tensor, groups: int, size: int, parts: Mapping[str, Masked], pattern: str, generator: torch.Generator
) -> _Filled:
    """The factorization that loses least once both factors have their planned counts."""
    matrix = matrices(weight, groups)
    u_shape, v_shape = (groups * size, *weight.shape[1:]), (weight.shape[0], size)
    tried = []
    for f in factorizations(matrix, size):
        u_mask = _largest(f.u_score, parts["U"], u_shape, pattern, generator)
        v_mask = _largest(f.v_score, parts["V"], v_shape, pattern, generator)
        u, v = f.u * u_mask.reshape(f.u.shape), f.v * v_mask.reshape(f.v.shape)
        lost = _share_of(matrix - v @ u, matrix)
        tried.append(_Filled({"U": u, "V": v}, {"U": u_mask, "V": v_mask}, "V", lost, f.way))
    return min(tried, key=lambda filled: filled.lost)


_MAKERS = {"sparse_parallel": _parallel, "sparse_doped": _doped, "sparse_factorized": _factorized}


def _largest(scores: Tensor, part: Masked, shape: Sequence[int], pattern: str, generator: torch.Generator) -> Tensor:
    return make_mask(
        shape,
        part.nnz,
        generator=generator,
        pattern=pattern,
        scores=scores.reshape(tuple(shape)),
        connect=False,
        groups=part.groups,
    )


def _share_of(lost: Tensor, weight: Tensor) -> float:
    norm = float(weight.double().norm())
    return float(lost.double().norm()) / norm if norm else 0.0


def _told(plan: Plan, lost: Mapping[str, tuple[float, str]]) -> Iterator[str]:
    """What the members approximate, in a sentence for each way they were made."""
    title = _TITLES[plan.spec.member]
    by_way: dict[str, dict[str, float]] = {}
    for path, (share, way) in lost.items():
        by_way.setdefault(way, {})[path] = share
    for way, shares in by_way.items():
        worst = max(shares, key=lambda p: shares[p])
        if not shares[worst]:
            yield f"{title}: the weights of {len(shares)} layers are {way}, none is missing"
            continue
        kept = {
            "dealt out": "the largest weights are dealt out over the branches",
            "singular vectors": "U V is a truncated singular value decomposition",
        }.get(way, f"the factors have {way}")
        also = ", with the largest residuals beside it" if plan.spec.member == "sparse_doped" else ""
        yield (
            f"not exact: {title} in {len(shares)} layers: {kept}{also}; what the planned non-zeros leave out is "
            f"{min(shares.values()):.1%} to {shares[worst]:.1%} of a layer's norm (most in {worst})"
        )
