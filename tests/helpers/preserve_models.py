"""Small dense models for the tests of `preserve`, and a function that makes a wide network of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseift_cli.models.zoo import registry
from sparseift_cli.models.zoo.gpt import GPT, GPTConfig
from sparseift_cli.models.zoo.llama import Llama, LlamaConfig
from sparseift_cli.plan.plan import Plan, make_plan
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.trace.build import trace
from sparseift_cli.transforms.compare import deviation
from sparseift_cli.transforms.edits import Surgery
from sparseift_cli.transforms.initialise import initialise, preserve
from sparseift_cli.transforms.preserve import Preserved
from sparseift_cli.transforms.surgery import apply_surgery, surgery_for

EXACT = 1e-5


@dataclass
class Widened:
    dense: Any
    new: Any
    preserved: Preserved
    plan: Plan
    surgery: Surgery

    def deviation(self, *inputs: Tensor) -> float:
        return deviation(self.new, self.dense, inputs, {})


def widened(dense: Any, *inputs: Tensor, slack: float = 0.0, **spec: Any) -> Widened:
    traced = trace(dense, inputs, name="model", input_shape=tuple(inputs[0].shape))
    plan = make_plan(traced.table, TransformSpec(**{"sparsity": "0.9", **spec}))
    surgery = surgery_for(plan, traced.structure, dense)
    new = apply_surgery(dense, surgery)
    initialise(new, dense, surgery)
    preserved = preserve(new, dense, plan, surgery, traced.structure, slack=slack)
    return Widened(dense, new, preserved, plan, surgery)


def trained(model: nn.Module, *inputs: Tensor) -> Any:
    """`model` changed as by training: norms and biases are not at their initial values, running statistics fit the data."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            model.train()(*inputs)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def images(side: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(3))


def features() -> Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3))


def tokens(length: int = 16, rows: int = 101) -> Tensor:
    return torch.randint(rows, (2, length), generator=torch.Generator().manual_seed(3))


def tiny_gpt() -> GPT:
    return GPT(GPTConfig(48, 2, 4, max_seq=32, vocab=101))


def tiny_llama(*, tied: bool) -> Llama:
    return Llama(LlamaConfig(48, 2, 4, 2, mlp=96, vocab=101, tied=tied, rope_theta=1e4))


def encoder(*, pre: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=pre)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(7, 16), stack, nn.LayerNorm(16), nn.Linear(16, 3))


def in_heads(x: Tensor) -> Tensor:
    """[B, T, 4 d] -> [B, 4, T, d]."""
    return x.unflatten(-1, (4, x.shape[-1] // 4)).transpose(1, 2)


class VGG(nn.Module):
    """Convolutions, a flatten that puts 2x2 pixels beside each channel, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.c, self.d = nn.Linear(48, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.n(self.a(x))), 4)
        return self.d(F.relu(self.c(F.max_pool2d(F.relu(self.b(x)), 4).flatten(1))))


class Dense(nn.Module):
    """DenseNet's concatenations: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3))
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(self.norms[3](x).mean((2, 3)))


class Gated(nn.Module):
    """Grouped convolution, a gated linear unit, a pixel shuffle, a PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.c, self.act = nn.Conv2d(16, 24, 1), nn.PReLU(12)
        self.d, self.up = nn.Conv2d(12, 16, 1), nn.PixelShuffle(2)
        self.e, self.f = nn.Conv2d(4, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        x = self.act(F.glu(self.c(x), dim=1))
        return self.f(F.relu(self.e(self.up(self.d(x)))).mean((2, 3)))


def upsampling() -> nn.Module:
    """Transposed convolutions of 2 and of 4 groups, nested in each other; then 2 groups again."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, 2, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 3, groups=4, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 1, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Recurrent(nn.Module):
    """An LSTM: its weights hold four gates one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(101, 12), nn.LSTM(12, 20, 2, batch_first=True), nn.Linear(20, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(ids))[0])


class QKNorm(nn.Module):
    """A norm over each head's query, so that the scale must go into its gain instead of the weight before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(7, 16), nn.RMSNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(4, eps=1e-4), nn.RMSNorm(4)
        self.out, self.head = nn.RMSNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(x)
        q, k, v = (in_heads(f(h)) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.head(self.out(x + self.o(mixed.transpose(1, 2).flatten(2))))


class KeptScale(nn.Module):
    """Attention whose scale is a number of the module, beside an embedding scale of the same kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.embed_scale = nn.Embedding(101, 16), 16**0.5
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.scale, self.head = nn.LayerNorm(16), 4**-0.5, nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) * self.embed_scale
        q, k, v = (in_heads(f(x)) for f in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.head(self.norm(self.o(mixed.transpose(1, 2).flatten(2))))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "resnet20": (lambda: registry.build("resnet20"), images()),
    "gpt": (tiny_gpt, tokens()),
    "llama": (lambda: tiny_llama(tied=False), tokens()),
    "llama, tied": (lambda: tiny_llama(tied=True), tokens()),
    "encoder": (encoder, features()),
    "vgg": (VGG, images()),
    "densenet": (Dense, images(8)),
    "gated": (Gated, images(8)),
    "upsampling": (upsampling, images(8)),
    "lstm": (Recurrent, tokens()),
    "qk norm": (QKNorm, features()),
    "kept scale": (KeptScale, tokens()),
}
