"""Sparse Wide that starts as the dense network: the dense weights inside the wide ones, their positions as the mask.

No dense output has a weight on an added input, so the added channels change nothing:

                 dense inputs   added inputs
    dense outputs      W              0
    added outputs   0 or slack        0

Operations that work channel by channel (activations, BatchNorm, pooling) therefore give the dense channels their old
values, in train mode too. Norms and attention scores mix channels: `norms` and `attention` make them fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...base.randomness import generator_for
from ...errors import UsageError
from ...trace.constants import named_constants
from ...trace.flow import PARAMETER_PREFIX, is_layer_norm
from ..edits import Masked, SetAttribute, number_at
from ..layers import set_attribute
from ..masking import draw_masks, whole_masks
from ..rotary import keep_frequencies
from . import DenseStart, Preserved
from .attention import query_rows, scale_queries
from .coordinates import HINT, Coordinates, LayerWeight, canonical_names, layer_weights
from .norms import configured_eps, plan_norms, widened_norms
from .slack import FreePositions, SlackMask, distribute_slack

_NEUTRAL = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}  # of an added channel of a norm


def fill_wide(start: DenseStart) -> Preserved:
    """Put the parameters and buffers of the dense module into the wide one, in place.

    Raises:
        UsageError: a pattern other than unstructured, or a width whose channels have no single order.
    """
    pattern = next((row.pattern for row in start.plan.layers if not row.mask_pattern.unrestricted), None)
    if pattern is not None:
        raise UsageError(f"the positions of the dense weights do not form a {pattern} pattern", hint=HINT)
    return _WideFill(start).run()


class _WideFill:
    """The steps of `fill_wide`, and what they share."""

    def __init__(self, start: DenseStart) -> None:
        self.new, self.dense = start.new, start.dense
        self.surgery, self.structure = start.surgery, start.structure
        self.seed, self.slack = start.seed, start.slack
        plan, structure, surgery, dense = start.plan, start.structure, start.surgery, start.dense
        self.coordinates = Coordinates(plan, structure)
        self.names = canonical_names(dense)
        self.weights = layer_weights(plan, structure, surgery, dense)
        self.weight_by_name = {self.names[key]: w for key, w in self.weights.items()}
        norms = widened_norms(dense, structure, self.coordinates)
        self.norm_plan = plan_norms(dense, structure, self.coordinates, norms, self.weights, self.names)
        self.norm_by_gain = {n.gain_key: n for n in norms}
        self.summands = {  # parameters that are added to a stream: embeddings, positions
            self.names[s.removeprefix(PARAMETER_PREFIX)]
            for read in structure.norm_inputs.values()
            for s in read
            if s.startswith(PARAMETER_PREFIX)
        }

    def run(self) -> Preserved:
        state = {**dict(self.new.named_parameters()), **dict(named_constants(self.new))}
        for name, value in (*self.dense.named_parameters(), *named_constants(self.dense)):
            if name in self.structure.shapes and self.names[name] == name:
                self._place(name, self._adjust(name, value.detach()), state[name])
        choices = {m.name: self._mask(m) for m in self.surgery.masked}
        attention_notes, compensated = scale_queries(
            self.new, self.dense, self.surgery, self.structure, self.coordinates, self.weights, self.norm_plan.norms
        )
        edits = [e for n in self.norm_plan.norms if (e := n.eps_edit()) is not None]
        sizes = self.coordinates.new_size, self.coordinates.dense_size
        edits += keep_frequencies(self.new, self.dense, self.surgery, self.structure, *sizes)
        edits += self._restored_factors(compensated)
        edits += configured_eps(self.new, edits)
        for edit in edits:
            set_attribute(self.new, edit)
        notes = [*self.norm_plan.notes, *attention_notes, *self._mask_notes(choices)]
        buffers, saved = dict(named_constants(self.new)), self.new.state_dict()
        unsaved = {r.key: buffers[r.key] for r in self.surgery.resizes if r.key in buffers and r.key not in saved}
        masks = whole_masks(self.new, {name: choice.mask for name, choice in choices.items()}, self.surgery)
        return Preserved(masks, tuple(notes), tuple(edits), unsaved, dict(self._positions()))

    def _positions(self) -> Iterator[tuple[str, Tensor]]:
        """Modules that must give the dense outputs: norms, and layers whose weights are neither centred nor scaled."""
        for norm in self.norm_plan.norms:
            yield norm.path, self.coordinates.positions(norm.width)
        for key, weight in self.weights.items():
            changed = self.names[key] in self.norm_plan.centred or key in self.structure.query_parts
            if not changed and key.endswith(".weight"):
                yield key.removesuffix(".weight"), self.coordinates.positions(weight.outputs)

    # --- values ---

    def _adjust(self, name: str, value: Tensor) -> Tensor:
        """The dense values as the wide model needs them: a centred writer of a LayerNorm's input, a scaled gain."""
        if name in self.norm_plan.centred:
            exact = value.double()
            return (exact - exact.mean(self.norm_plan.centred[name], keepdim=True)).to(value.dtype)
        norm = self.norm_by_gain.get(name)
        return value if norm is None else norm.scale_for_width(value)

    def _place(self, name: str, value: Tensor, target: Tensor) -> None:
        """Write the dense `value` into `target` at the dense coordinates, and what is neutral everywhere else."""
        dims = self.structure.shapes[name]
        if target.shape == value.shape:
            target.copy_(value)
            return
        target.copy_(self._background(name, value, target))
        target[self.coordinates.index(dims)] = value
        if name in self.norm_plan.filled:
            axis = self.norm_plan.filled[name] % value.dim()
            where = list(self.coordinates.index(dims))
            added = self.coordinates.is_added(dims[axis]).nonzero().flatten()
            where[axis] = added.view([-1 if i == axis else 1 for i in range(value.dim())])
            target[tuple(where)] = value.double().mean(axis, keepdim=True).to(value.dtype)

    def _background(self, name: str, value: Tensor, fresh: Tensor) -> Tensor:
        """A tensor of the wide shape with the values of the added coordinates; the dense ones are written over it."""
        path, _, last = name.rpartition(".")
        module = self.dense.get_submodule(path)
        table = name in self.norm_plan.filled or name in self.summands  # also where the output layer is tied to it
        if name in self.weight_by_name and not table:
            return self._layer_background(self.weight_by_name[name], fresh)
        if name in self.norm_by_gain:  # a gain of 1, scaled
            norm = self.norm_by_gain[name]
            return torch.full_like(fresh, norm.scale_for_width(torch.tensor(1 - norm.offset)).item())
        if isinstance(module, (_NormBase, nn.GroupNorm)) or is_layer_norm(module):
            return torch.full_like(fresh, _NEUTRAL.get(last, 0.0))
        if name not in dict(self.dense.named_parameters()):
            return torch.zeros_like(fresh) if name in self.summands else fresh.clone()
        if value.dim() == 1 and "bias" not in last and name not in self.summands:  # a layer scale, a PReLU's slopes
            return torch.full_like(fresh, float(value.mean()))
        return torch.zeros_like(fresh)

    def _layer_background(self, weight: LayerWeight, fresh: Tensor) -> Tensor:
        """Of a dense layer: zero on added inputs; fresh weights for added outputs, where no norm or score mixes them in."""
        values = fresh.clone()
        if weight.masked:
            return values  # its mask decides
        outputs, inputs = values.movedim(weight.axis, 0), values.movedim(1 - weight.axis, 0)
        free_inputs = self.slack and weight.key in self.norm_plan.zero_inputs
        if not free_inputs and len(inputs) == self.coordinates.new_size(weight.inputs):
            inputs[self.coordinates.is_added(weight.inputs)] = 0
        outputs[self.coordinates.is_added(weight.outputs) & ~self._free_outputs(weight)] = 0
        return values

    def _restored_factors(self, compensated: set[SetAttribute]) -> Iterator[SetAttribute]:
        """Numbers that surgery made to follow a width and that the forward multiplies with, set back to their dense values.

        The scale of an embedding, sqrt(hidden size), say. Left alone are numbers that shapes depend on, and the
        attention scales that the queries make up for (`compensated`).
        """
        for edit in self.surgery.attributes:
            sets_shape = (edit.owner, edit.name, edit.index) in self.structure.attributes
            is_factor = type(edit.value) is float or (edit.owner, edit.name) in self.structure.float_attributes
            if not sets_shape and is_factor and edit not in compensated:
                yield SetAttribute(edit.owner, edit.name, number_at(self.dense, edit.owner, edit.name))

    # --- masks ---

    def _free_outputs(self, weight: LayerWeight) -> Tensor:
        """bool [new outputs]: added outputs that may hold anything, since no norm and no attention score reads them.

        A score is the sum of query times key over head_dim: with zero added queries the added keys are free.
        """
        free = self.coordinates.is_added(weight.outputs)
        if weight.key in self.norm_plan.zero_outputs:
            free[:] = False
        queries = query_rows(weight, self.structure, self.coordinates)
        if queries is not None:
            free[queries if len(queries) else slice(None)] = False
        return free

    def _mask(self, masked: Masked) -> SlackMask:
        """Choose the mask of one sparse weight, or part of one, and zero the weight outside it."""
        values = masked.of(self.new.get_parameter(masked.key))
        weight = self.weights.get(masked.key)
        free: list[FreePositions] = []
        if weight is not None:
            shape, axis = values.shape, weight.axis
            outputs = _within(masked.rows, self._free_outputs(weight).nonzero().flatten())
            free.append(FreePositions.along(shape, axis, outputs, 1 - axis, self.coordinates.positions(weight.inputs)))
            if weight.key in self.norm_plan.zero_inputs:
                inputs = self.coordinates.is_added(weight.inputs).nonzero().flatten()
                outputs = _within(masked.rows, self.coordinates.positions(weight.outputs))
                free.append(FreePositions.along(shape, 1 - axis, inputs, axis, outputs))
        dims = self.structure.shapes[masked.key]
        first, *others = self.coordinates.index(dims[1:] if masked.expert else dims)
        rows = None if masked.expert else masked.rows
        index = (_within(rows, first.flatten()).view(-1, *first.shape[1:]), *others)
        generator = generator_for(self.seed, "preserve", masked.name)
        choice = distribute_slack(values.detach().cpu(), index, masked.nnz, self.slack, free, generator)
        mask = choice.mask.to(values.device)
        values.mul_(mask)
        values.view(-1)[choice.zero_positions.to(values.device)] = 0
        axis = self.norm_plan.centred.get(self.names[masked.key])
        if axis is not None and choice.num_kept < choice.num_dense:  # the removed weights had a mean of their own
            exact = values.double()
            mean = exact.sum(axis, keepdim=True) / mask.sum(axis, keepdim=True).clamp(min=1)
            values.copy_((exact - mean) * mask)
        return choice

    # --- notes ---

    def _mask_notes(self, choices: Mapping[str, SlackMask]) -> Iterator[str]:
        """What the masks mean for the function and for training."""
        nnz = {m.name: m.nnz for m in self.surgery.masked}
        short = {k: c for k, c in choices.items() if nnz[k] < c.num_dense}
        if short:
            worst = max(short, key=lambda k: short[k].lost_norm)
            yield (
                f"not exact: the plan has fewer non-zeros than the dense model in {len(short)} layers "
                f"({sum(nnz[k] for k in short):,} for {sum(c.num_dense for c in short.values()):,}), so the smallest "
                f"weights are removed: up to {short[worst].lost_norm:.2%} of a layer's norm ({worst})"
            )
        if not self.slack:
            read = self.summands & self.norm_plan.filled.keys() & self.weight_by_name.keys()
            but = f" (except through {min(read)}, which the output layer shares)" if read else ""
            yield (
                f"warning: without slack the added channels have no gradient{but}: static training stays the dense network, "
                "RigL grows among equal gradients of zero, and SET grows weights that stay zero (--preserve-slack 0.1 "
                "replaces some weights)"
            )
            return
        yield from self._slack_notes(choices)

    def _slack_notes(self, choices: Mapping[str, SlackMask]) -> Iterator[str]:
        num_random = sum(c.num_random for c in choices.values())
        num_removed = sum(c.num_dense - c.num_kept for c in choices.values())
        total = sum(c.num_dense for c in choices.values())
        lost = max(c.lost_norm for c in choices.values())
        yield (
            f"slack {self.slack:g}: the {num_removed:,} smallest of {total:,} dense weights are replaced by {num_random:,} "
            f"random ones on added channels, which no dense output reads; up to {lost:.2%} of a layer's norm is removed"
        )
        without = [k for k, c in choices.items() if not c.num_random]
        if without:
            yield (
                f"{len(without)} of {len(choices)} sparse layers have no slack ({', '.join(without[:2])}, ...): they write "
                "to no added channel, or only to channels that a norm or an attention score reads"
            )


def _within(rows: tuple[int, int] | None, indices: Tensor) -> Tensor:
    """Those of `indices` [n] that are in rows [start, stop), counted from start; all of them where there are no rows."""
    if rows is None:
        return indices
    start, stop = rows
    return indices[(indices >= start) & (indices < stop)] - start


def keep_largest(start: DenseStart) -> Preserved:
    """Scope none, the control of Sparse Wide: keep the largest weights of every sparse layer at its dense size, in place.

    There are fewer non-zeros than dense weights and no added channels, so the function changes. The criterion is that
    of one-shot magnitude pruning (Han et al. 2015, arXiv 1506.02626). The masks have the plan's pattern, and the heads
    of an attention projection keep equal numbers. All other tensors are clones of the dense ones already.

    Raises:
        UsageError: the pattern cannot hold the planned counts.
    """
    new, dense, plan, surgery = start.new, start.dense, start.plan, start.surgery
    old = {key: dense.get_parameter(key).detach() for key in surgery.nonzeros}
    for key, weight in old.items():
        new.get_parameter(key).copy_(weight)
    masks = draw_masks(new, plan, surgery, seed=start.seed, connect=False, scores={k: w.abs() for k, w in old.items()})
    for key, mask in masks.items():
        new.get_parameter(key).mul_(mask.to(old[key].device))
    if not masks:
        return Preserved(masks, ())
    lost = {key: _lost_norm(old[key], mask) for key, mask in masks.items()}
    worst = max(lost, key=lambda key: lost[key])
    kept, total = sum(int(m.count_nonzero()) for m in masks.values()), sum(w.numel() for w in old.values())
    note = (
        f"not exact: scope none has fewer non-zeros than dense weights, so each layer keeps its largest: {kept:,} of "
        f"{total:,} in all; up to {lost[worst]:.2%} of a layer's norm is removed ({worst})"
    )
    return Preserved(masks, (note,))


def _lost_norm(weight: Tensor, mask: Tensor) -> float:
    """Norm of what a mask removes from a weight of the same shape, over the norm of the weight."""
    norm = float(weight.float().norm())
    return float((weight * ~mask.to(weight.device)).float().norm()) / norm if norm else 0.0
