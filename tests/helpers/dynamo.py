"""A trace in a process that has not imported torch._dynamo yet: see tests/trace/test_odd_models.py."""

from __future__ import annotations

import sys
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparseift_cli.trace.build import trace


class _Net(nn.Module):
    def __init__(self, need: str) -> None:
        super().__init__()
        self.need = need
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.need == "constant":
            return self.c(self.b(self.a(x)) * torch.tensor([1.0, 2.0])[0])
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=False))


def trace_and_compile(need: str) -> None:
    """Trace a forward that needs the real torch._dynamo, because of a `constant` or a `checkpoint`, and then compile."""
    assert "torch._dynamo" not in sys.modules
    table = trace(_Net(need), (torch.zeros(2, 5, 16),), name="net", input_shape=(2, 5, 16)).table
    assert (table.macs, table.untraceable) == (10 * (2 * 16 * 16 + 16 * 3), None), table
    source = import_module("torch._dynamo.source")
    assert torch._dynamo.source is source is sys.modules["torch._dynamo.source"] and type(torch._dynamo) is type(sys)
    assert not [f for f in sys.meta_path if type(f).__name__ == "_StandIn"]
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
