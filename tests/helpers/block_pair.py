"""The same training twice, with zeros and in stored blocks, compared after every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.helpers.block_net import block_net, dense_weights, loss_of, make

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


class Pair:
    """The same run twice: with zeros and without."""

    def __init__(self, algorithm: Any = "rigl", cls: Any = ADAMW, **options: Any) -> None:
        self.nets = block_net(compact=False), block_net(compact=True)
        self.optimizers = [cls(net.parameters(), lr=0.01, **options) for net in self.nets]
        self.sparsifiers = [make(n, o, algorithm) for n, o in zip(self.nets, self.optimizers, strict=True)]

    def runs(self) -> Any:
        return zip(self.nets, self.optimizers, self.sparsifiers, strict=True)

    def step(self, t: int, *, micro: int = 1, clip: float | None = None, skip: bool = False) -> None:
        for net, optimizer, sparsifier in self.runs():
            for part in range(micro):
                (loss_of(net, t, part) / micro).backward()
            made = sparsifier.step(found_inf=skip)
            assert made is not skip
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            if made:
                optimizer.step()
            optimizer.zero_grad()
        self.require_equal(t)

    def require_equal(self, t: int) -> None:
        zeros, blocks = self.sparsifiers
        for name, mask in zeros.masks().items():
            assert torch.equal(mask, blocks.masks()[name]), (t, name)
        for (name, a), b in zip(dense_weights(self.nets[0]).items(), dense_weights(self.nets[1]).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{name} after step {t}")
        assert zeros.nnz == blocks.nnz and zeros.last == blocks.last
        assert zeros.statistics() == blocks.statistics()
        for w in blocks.weights:
            assert w.parameter.numel() == w.nnz
            assert all(t.shape == w.parameter.shape for t in blocks.state_of(w))
