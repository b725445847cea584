"""What LSTM, GRU and plain RNN layers ask of their shapes, and what they cost.

PyTorch runs a whole recurrent layer in one op that neither takes symbolic sizes nor has a count. Per step and direction it is
two matrix products: input [B, I] by W_ih [G H, I] and state [B, H] by W_hh [G H, H], with G = 4, 3 or 1 gates.

In the backward pass the first step differs: the state it reads is what the caller gave (zeros, unless told), and needs a
gradient only where that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..poly import Poly
from .layouts import note_order, note_sum
from .record import FROM_LAYER, NEEDS_GRAD, flags_of, mark, numel
from .symint import poly_of


def _layer(gates: int) -> Callable[..., Any]:
    def rule(rules: Any, input: Tensor, hx: Any, params: Sequence[Tensor], has_biases: Any, num_layers: Any = None,
             dropout: float = 0, train: bool = False, bidirectional: Any = False, batch_first: Any = False) -> Any:  # fmt: skip
        if not isinstance(has_biases, bool) or not isinstance(batch_first, bool):
            return NotImplemented  # a packed sequence
        states = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        directions = 1 + bool(bidirectional)
        per_layer = len(params) // (int(num_layers) * directions)
        steps = input.shape[1 if batch_first else 0]
        x, hidden = input, None
        for layer in range(int(num_layers)):
            outputs = []
            for direction in range(directions):
                at = (layer * directions + direction) * per_layer
                out, hidden = _direction(rules, x, states, params[at : at + per_layer], has_biases, gates, steps)
                rules.tie(states[0].shape[-1], out.shape[-1])
                rules.tie(states[-1].shape[-1], hidden if len(states) == 2 else out.shape[-1])
                outputs.append(out)
            width = sum(o.shape[-1] for o in outputs)
            note_sum(rules.facts, width, [o.shape[-1] for o in outputs])
            x = rules.made(outputs[0], (*x.shape[:-1], width), *outputs, counted=True)
        finals = tuple(mark(s.new_empty(s.shape), flags_of(x)) for s in states)
        return (x, *finals)

    return rule


def _direction(rules: Any, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, gates: int,
               steps: int) -> tuple[Tensor, Any]:  # fmt: skip
    """One layer in one direction: [..., I] -> [..., H] (or what a projection makes of H), and H."""
    w_ih, w_hh = params[:2]
    biases = params[2:4] if has_biases else ()
    projection = params[-1] if len(params) > 2 + 2 * has_biases else None
    hidden = rules.facts.exact_quotient(poly_of(w_ih.shape[0]), Poly.const(gates))
    rules.facts.equal(hidden * Poly.const(gates), poly_of(w_hh.shape[0]))
    rules.tie(x.shape[-1], w_ih.shape[1])
    for bias in biases:
        rules.tie(bias.shape[0], w_ih.shape[0])
    cell = size = rules.facts.symint(hidden)
    if gates > 1:
        for weight in (w_ih, w_hh):
            note_order(rules.facts, "product", weight.shape[0], [gates, cell])
    if projection is not None:
        rules.tie(projection.shape[1], size)
        size = projection.shape[0]
    rules.tie(w_hh.shape[1], size)
    out = rules.made(x, (*x.shape[:-1], size), *states, *params, counted=True)
    tokens = numel(x.shape[:-1])
    first = (tokens.divided_by(Poly.const(steps)) if steps else None) or Poly()  # tokens of the first step
    cells = [t for t in params if t is not projection]
    rows = [(x, w_ih, None), (None, w_hh, states[:1])]
    if projection is not None:
        rows.append((None, projection, [x, *states, *cells]))
    for source, weight, beginning in rows:
        made = mark(out.new_empty((*x.shape[:-1], weight.shape[0])), flags_of(out))
        inputs, outputs = poly_of(weight.shape[1]), poly_of(weight.shape[0])
        read = source if source is not None else mark(out.new_empty(out.shape), flags_of(out) | FROM_LAYER)
        row = rules.recorder.weighted("linear", read, weight, made, tokens * inputs * outputs, inputs, outputs)
        if beginning is not None and flags_of(read) & NEEDS_GRAD and not _any_needs_grad(beginning):
            row.grad_inputs -= first * inputs * outputs
    return out, cell


def _any_needs_grad(tensors: Sequence[Tensor]) -> bool:
    return any(flags_of(t) & NEEDS_GRAD for t in tensors)


RECURRENT = {torch.lstm: _layer(4), torch.gru: _layer(3), torch.rnn_tanh: _layer(1), torch.rnn_relu: _layer(1)}
