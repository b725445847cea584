"""Llama-style decoders: RMSNorm, rotary positions, grouped-query attention (GQA), SwiGLU.

    tokens -> pre-norm blocks (causal attention, down(silu(gate(x)) * up(x))) -> norm -> lm_head

Every group of num_heads / num_kv_heads query heads shares one key and value head. Positions are rotations of queries
and keys, computed in the forward, so a sequence may have any length.

Papers: Touvron et al., LLaMA, arXiv 2302.13971; Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783, table
3 (`llama3_8b`). `state_dict` keys and initialisation: Hugging Face transformers' LlamaForCausalLM. `llama_tiny` is for
quick runs, of no paper: the vocabulary of Llama 2, with the head tied to the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import init_weights


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of one decoder."""

    hidden: int
    """Width of the residual stream."""
    depth: int
    """Transformer blocks."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads; divides num_heads."""
    mlp: int
    """Inner width of the SwiGLU."""
    vocab: int
    tied: bool
    """lm_head.weight is the token embedding."""
    rope_theta: float
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5


CONFIGS = {
    "llama_tiny": LlamaConfig(256, 4, 8, 2, mlp=688, vocab=32000, tied=True, rope_theta=10000.0),
    "llama3_8b": LlamaConfig(4096, 32, 32, 8, mlp=14336, vocab=128256, tied=False, rope_theta=500000.0),
}


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation at every position; pair i has a wavelength of 2 pi theta^(2i / head_dim)."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tables [length, head_dim / 2] on the device and in the dtype of `like`; computed in float32."""
        half = self.head_dim // 2
        exponent = torch.arange(half, device=like.device, dtype=torch.float32) / half
        positions = torch.arange(length, device=like.device, dtype=torch.float32)
        angles = positions[:, None] * (1.0 / self.theta**exponent)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` [B, heads, T, head_dim] rotated by position: element i turns with element i + head_dim / 2."""
    first, second = x.unflatten(-1, (2, cos.shape[-1])).unbind(-2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-2)


class Attention(nn.Module):
    """Causal grouped-query attention, [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.hidden // config.num_heads
        self.q_proj = nn.Linear(config.hidden, config.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, [..., hidden] -> [..., hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block, [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids [B, T] -> normalised hidden states [B, T, hidden]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.rotary_emb = RotaryEmbedding(config.hidden // config.num_heads, config.rope_theta)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.rotary_emb(ids.shape[1], x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocab] for the next token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        # A tied head gets its weight on the next line, so it needs no memory of its own.
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False, device="meta" if config.tied else None)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        init_weights(self, reset)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def reset(module: nn.Module) -> None:
    """Normals of deviation 0.02; norms keep their ones."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


MODEL = Llama
