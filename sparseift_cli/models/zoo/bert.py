"""BERT encoders with the pooler: BERT-base and BERT-large.

    words + positions + token types -> LayerNorm -> 12 or 24 post-LN blocks -> tanh(pooler(first token))

The forward returns the pooled vector alone (HF's `pooler_output`), so the hidden stream is an inner width of the model,
not one of its outputs.

Paper: Devlin et al., BERT, arXiv 1810.04805. `state_dict` keys and initialisation: Hugging Face transformers'
BertModel, with the sizes and the vocabulary of `bert-base-uncased` and `bert-large-uncased`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import init_weights


@dataclass(frozen=True)
class BertConfig:
    """Sizes of one BERT."""

    hidden: int
    """Width of the residual stream."""
    depth: int
    """Transformer blocks."""
    num_heads: int
    mlp: int
    """Inner width of the feed-forward layers."""
    vocab: int = 30522
    max_seq: int = 512
    """Learned positions, in tokens."""
    token_types: int = 2
    dropout: float = 0.1


CONFIGS = {
    "bert_base": BertConfig(hidden=768, depth=12, num_heads=12, mlp=3072),
    "bert_large": BertConfig(hidden=1024, depth=24, num_heads=16, mlp=4096),
}

LAYER_NORM_EPS = 1e-12


class Embeddings(nn.Module):
    """Token ids and types [B, T] -> normalised sum of word, position and type vectors [B, T, hidden]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab, config.hidden, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_seq, config.hidden)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, token_types: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings(token_types)
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Multi-head attention without its output projection, [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden // config.num_heads
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """LayerNorm(stream + dense(x)): the end of an attention or feed-forward branch, [..., width] -> [..., hidden]."""

    def __init__(self, width: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.LayerNorm = nn.LayerNorm(config.hidden, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        return self.LayerNorm(stream + self.dropout(self.dense(x)))


class Intermediate(nn.Module):
    """gelu(dense(x)): the first half of the feed-forward, [..., hidden] -> [..., mlp]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden, config.mlp)
        self.intermediate_act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))


class Attention(nn.Module):
    """Attention branch, [B, T, hidden] -> [B, T, hidden]. (`self` is the name the reference gives its submodule.)"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, mask), x)


class Layer(nn.Module):
    """Post-LN transformer block, [B, T, hidden] -> [B, T, hidden]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.mlp, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.depth))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nn.Module):
    """Token ids [B, T] -> pooled vectors [B, hidden].

    `token_types` [B, T] are 0 where not given. `attention_mask` [B, T] is true (or 1) for the tokens to attend to.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = nn.Sequential(OrderedDict(dense=nn.Linear(config.hidden, config.hidden), activation=nn.Tanh()))
        init_weights(self, reset)

    def forward(self, ids: Tensor, token_types: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        if token_types is None:
            token_types = torch.zeros_like(ids)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        x = self.encoder(self.embeddings(ids, token_types), mask)
        return self.pooler(x[:, 0])


def reset(module: nn.Module) -> None:
    """Normals of deviation 0.02, zero biases, a zero vector for the padding token."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


MODEL = Bert
