"""GPT-2 and GPT-3 decoders with a language-model head tied to the token embedding.

    tokens + positions -> pre-LN blocks (causal attention, GELU feed-forward of 4x width) -> ln_f -> lm_head

Papers: Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2, 2019); Brown et al., Language Models
are Few-Shot Learners, arXiv 2005.14165, table 2.1 (GPT-3). `state_dict` keys and initialisation: Hugging Face
transformers' GPT2LMHeadModel, whose Conv1D keeps weights as [in, out].

GPT-3 as built here attends densely everywhere (the paper alternates with locally banded attention). Two rows of table
2.1 do not satisfy heads * d_head = d_model. We keep their layers and d_head and read
- XL (d_model 2048, 24 heads of 128) with 16 heads, which gives the 1.3 B parameters that the paper states;
- 13B (d_model 5140, 40 heads of 128) with d_model 5120.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import init_weights


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of one decoder; the feed-forward layers are four times as wide as the stream."""

    hidden: int
    """Width of the residual stream (d_model)."""
    depth: int
    """Transformer blocks."""
    num_heads: int
    max_seq: int = 1024
    """Learned positions, in tokens."""
    vocab: int = 50257
    dropout: float = 0.1


CONFIGS = {
    "gpt2": GPTConfig(768, 12, 12),
    "gpt2_medium": GPTConfig(1024, 24, 16),
    "gpt2_large": GPTConfig(1280, 36, 20),
    "gpt2_xl": GPTConfig(1600, 48, 25),
    "gpt3_small": GPTConfig(768, 12, 12, max_seq=2048),
    "gpt3_medium": GPTConfig(1024, 24, 16, max_seq=2048),
    "gpt3_large": GPTConfig(1536, 24, 16, max_seq=2048),
    "gpt3_xl": GPTConfig(2048, 24, 16, max_seq=2048),
    "gpt3_2_7b": GPTConfig(2560, 32, 32, max_seq=2048),
    "gpt3_6_7b": GPTConfig(4096, 32, 32, max_seq=2048),
    "gpt3_13b": GPTConfig(5120, 40, 40, max_seq=2048),
    "gpt3_175b": GPTConfig(12288, 96, 96, max_seq=2048),
    "gpt3_small_bytes": GPTConfig(768, 12, 12, vocab=256, dropout=0.0),
    "bytes_gpt": GPTConfig(64, 4, 4, max_seq=128, vocab=256, dropout=0.0),
    "wikitext_gpt": GPTConfig(256, 6, 4, max_seq=256, vocab=256, dropout=0.0),
}


class Conv1D(nn.Module):
    """x @ weight + bias, a linear layer whose weight is stored as [in, out]: [..., in] -> [..., out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    """Causal multi-head self-attention, [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden // config.num_heads
        self.c_attn = Conv1D(config.hidden, 3 * config.hidden)
        self.c_proj = Conv1D(config.hidden, config.hidden)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each [B, heads, T, head_dim]
        dropout = self.attn_dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(x.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """c_proj(gelu(c_fc(x))), with GELU in its tanh form: [..., hidden] -> [..., hidden]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.hidden, 4 * config.hidden)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = Conv1D(4 * config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Pre-LN transformer block, [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Token ids [B, T], T at most max_seq -> normalised hidden states [B, T, hidden]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.hidden)
        self.wpe = nn.Embedding(config.max_seq, config.hidden)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.ln_f = nn.LayerNorm(config.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    """Token ids [B, T] -> logits [B, T, vocab] for the next token. `lm_head.weight` is `transformer.wte.weight`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.transformer = Transformer(config)
        # The head gets its weight on the next line, so it needs no memory of its own.
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False, device="meta")
        self.lm_head.weight = self.transformer.wte.weight
        init_weights(self, reset)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.transformer(ids))


def reset(module: nn.Module) -> None:
    """Normals of deviation 0.02, zero biases; the last layer of each residual branch has 0.02/sqrt(2 * depth)."""
    if isinstance(module, Conv1D | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, Conv1D):
        nn.init.zeros_(module.bias)
    elif isinstance(module, Transformer):
        for block in module.h:
            assert isinstance(block, Block)
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * len(module.h)))


MODEL = GPT
