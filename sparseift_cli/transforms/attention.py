"""Members inside nn.MultiheadAttention, whose forward multiplies with its weights itself instead of calling layers.

PyTorch's encoder layer has a fast path that reads the weights of its child layers in the same way; it is switched off
where one of them was replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..errors import UsageError
from .edits import Replace
from .members.base import MemberModule


class MemberAttention(nn.Module):
    """Self-attention as nn.MultiheadAttention computes it, with members for its projections.

    `in_proj` maps [batch, tokens, E] to [batch, tokens, 3 E] (query, key and value stacked), `out_proj` maps E to E.
    Arguments and results are those of nn.MultiheadAttention, but query, key and value must be the same tensor.
    """

    def __init__(self, old: nn.MultiheadAttention, in_proj: nn.Module, out_proj: nn.Module) -> None:
        super().__init__()
        self.in_proj, self.out_proj = in_proj, out_proj
        self.embed_dim, self.num_heads, self.head_dim = old.embed_dim, old.num_heads, old.head_dim
        self.dropout, self.batch_first = old.dropout, old.batch_first
        # PyTorch's encoder layer reads these two before it takes its fast path; so set, it does not.
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if key is not query or value is not query:
            raise UsageError(
                "this attention layer was transformed as self-attention, but got another key or value",
                hint="leave attention projections untouched, or --exclude this layer",
            )
        x = query if self.batch_first or query.dim() == 2 else query.transpose(0, 1)
        batched = x.dim() == 3
        x = x if batched else x[None]
        heads = self.in_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, tokens, head_dim]
        mask = self._mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(weights, self.dropout, self.training) @ v
        else:
            causal = is_causal and key_padding_mask is None
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, is_causal=causal)
            weights = None
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        out = out if batched else out[0]
        return (out if self.batch_first or not batched else out.transpose(0, 1)), weights

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores: [batch or 1, heads or 1, tokens or 1, tokens].

        Boolean masks of nn.MultiheadAttention are True where nothing is read.

        Args:
            attn_mask: [tokens, tokens] or [batch * heads, tokens, tokens].
            padding: [batch, tokens].
            q: [batch, heads, tokens, head_dim].
        """
        total = None
        for mask, shape in ((attn_mask, None), (padding, (q.shape[0], 1, 1, q.shape[2]))):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            if shape is not None:
                mask = mask.view(shape)
            elif mask.dim() == 3:
                mask = mask.view(q.shape[0], self.num_heads, *mask.shape[1:])
            total = mask if total is None else total + mask
        return total


def with_members(
    root: nn.Module,
    module: nn.MultiheadAttention,
    edits: Mapping[str, Replace],
    build: Callable[[nn.Module, nn.Module, Replace], MemberModule],
) -> MemberAttention:
    """`module` with members for the projections in `edits`, and linear layers for the others.

    Args:
        root: the model, from which activation modules are copied.
        edits: by projection: `in_proj`, `out_proj`.
        build: makes the member of (root, layer, edit).
    """
    weight = module.in_proj_weight
    stacked = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device="meta")
    stacked.weight = weight
    stacked._parameters["bias"] = module._parameters["in_proj_bias"]
    projections: dict[str, nn.Module] = {"in_proj": stacked, "out_proj": module.out_proj}
    for name, edit in edits.items():
        projections[name] = build(root, projections[name], edit)
    return MemberAttention(module, projections["in_proj"], projections["out_proj"])


def leave_fast_path(module: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Make an encoder layer of PyTorch call its children, where one of them is in `replaced` (by the id of the old child)."""
    if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in replaced for m in module.modules()):
        module.activation_relu_or_gelu = 0
