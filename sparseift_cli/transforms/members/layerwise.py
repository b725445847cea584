"""How a member that replaces single layers is carried out: its edits, and how a dense layer's weights are put into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...base.randomness import generator_for
from ...errors import UsageError
from ...mask.attached import is_transposed
from ...plan.layer_plan import LayerPlan
from ...plan.members import Member, written_name
from ...plan.plan import Plan
from ...trace.structure import Structure
from ..edits import Masked, Replace, Surgery
from ..layers import bias_of, groups_of, weight_of
from ..preserve import DenseStart, Preserved
from .base import Decomposition, DenseWeight, MemberModule, TorchHalf


class Layerwise(TorchHalf):
    """The torch half of a member whose layers are each a `MemberModule`."""

    def __init__(self, member: Member, module: type[MemberModule]) -> None:
        self.member = member
        self.module = module

    def build(self, root: nn.Module, layer: nn.Module, edit: Replace) -> MemberModule:
        """The module that `edit` puts in the place of `layer`, a layer of `root`."""
        return self.module.build(root, layer, edit)

    def surgery(self, plan: Plan, structure: Structure, model: nn.Module) -> Surgery:
        norm = next((m for m in model.modules() if isinstance(m, _BatchNorm)), None)
        members: list[Replace] = []
        masked: list[Masked] = []
        for row in plan.layers:
            if row.status != "transformed":
                continue
            edit = _replace(row, plan, structure, norm)
            members.append(edit)
            for part, key in zip(row.parts, self._keys(edit), strict=True):
                if not part.dense:
                    masked.append(Masked(row.layer.name, part.name, key, part.nnz, part.shape.groups))
        return Surgery(members=tuple(members), masked=tuple(masked))

    def _keys(self, edit: Replace) -> list[str]:
        """The weights of the member that `edit` makes, by their keys in the transformed model."""
        return [f"{edit.path}.{path}.weight" for path in self.module.part_paths(edit.size)]

    def preserve(self, start: DenseStart) -> Preserved:
        """Weights and masks of every member of the new module; what they leave out of the dense layers, as notes.

        Raises:
            UsageError: a norm or activation inside makes the member another function than the layer's, or the pattern does
                not allow it.
        """
        masks: dict[str, Tensor] = {}
        found: dict[str, Decomposition] = {}
        by_key = {m.key: m for m in start.surgery.masked}
        for edit in start.surgery.members:
            self._require_linear(edit)
            weight, bias, groups = _dense_layer(start.dense, edit.path)
            keys = self._keys(edit)
            made = self.module.decompose(
                DenseWeight(
                    weight,
                    groups,
                    edit.size,
                    [by_key.get(key) for key in keys],
                    generator_for(start.seed, "preserve", edit.path),
                )
            )
            found[edit.path] = made
            member = start.new.get_submodule(edit.path)
            assert isinstance(member, MemberModule)
            for i, (layer, key) in enumerate(zip(member.parts(), keys, strict=True)):
                target, mask, own_bias = weight_of(layer), made.masks[i], bias_of(layer)
                target.copy_(made.values[i].reshape(target.shape))
                if own_bias is not None:
                    own_bias.copy_(bias) if bias is not None and i == made.bias_part else own_bias.zero_()
                if mask is not None:
                    masks[key] = mask.reshape(target.shape).to(target.device)
        return Preserved(masks, tuple(self._notes(found)))

    def _require_linear(self, edit: Replace) -> None:
        if edit.norm or edit.activation:
            raise UsageError(
                f"{edit.path}: {self.member.title} with a norm or activation inside cannot start as the dense layer",
                hint=f"use {self.module.linear_option()}, or --init fresh",
            )

    def _notes(self, found: Mapping[str, Decomposition]) -> Iterator[str]:
        """What is approximate, in a sentence for each method."""
        by_method: dict[str, dict[str, float]] = {}
        for path, made in found.items():
            by_method.setdefault(made.method, {})[path] = made.lost
        for method, lost in by_method.items():
            worst = max(lost, key=lambda path: lost[path])
            what = f"{self.member.title} in {len(lost)} layers: {method}"
            if not lost[worst]:
                yield f"{what}; no weight is left out"
                continue
            yield (
                f"not exact: {what}; what the planned non-zeros leave out is {min(lost.values()):.1%} to "
                f"{lost[worst]:.1%} of a layer's norm (most in {worst})"
            )


def _replace(row: LayerPlan, plan: Plan, structure: Structure, norm: _BatchNorm | None) -> Replace:
    """The edit for one row; a batch norm inside has the eps and momentum of the model's first one, `norm`."""
    spec, activation = plan.spec, None
    if row.inner_activation is not None and spec.activation != "none":
        known = structure.own_activations if row.inner_activation == "direct" else structure.activations
        activation = known.get(row.layer.name) if spec.activation == "model" else spec.activation
    options: dict[str, Any] = {}
    if norm is not None and row.inner_norm == "batch_norm":
        options = {"eps": norm.eps, "momentum": norm.momentum}
    return Replace(
        row.layer.name,
        written_name(spec.member),
        row.size,
        norm=row.inner_norm,
        activation=activation,
        every_branch=not plan.member.sums_before_activation(spec),
        **options,
    )


def _dense_layer(dense: nn.Module, path: str) -> tuple[Tensor, Tensor | None, int]:
    """Weight [out, in / groups, *kernel], bias [out] and groups of the layer at `path`, or of a projection in attention."""
    parent, _, name = path.rpartition(".")
    host = dense.get_submodule(parent)
    if isinstance(host, nn.MultiheadAttention) and name == "in_proj":
        assert host.in_proj_weight is not None
        return host.in_proj_weight.detach(), host.in_proj_bias, 1
    layer = dense.get_submodule(path)
    weight = weight_of(layer).detach()
    return weight.t() if is_transposed(layer) else weight, bias_of(layer), groups_of(layer)
