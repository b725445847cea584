"""What each of two gloo processes does in tests/kernels/test_copies.py."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from sparseift_cli.kernels.linear import BlockLinear
from sparseift_cli.train.processes import Processes


def net() -> nn.Sequential:
    """A model with a layer of 5 of 20 blocks of 4 x 4, from seed 0."""
    torch.manual_seed(0)
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[[0, 1, 2, 4, 4], [1, 0, 3, 2, 3]] = True
    return nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), BlockLinear(mask, 4))


def batch(rank: int) -> Tensor:
    """[6, 3], another on every rank."""
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(rank))


def average_gradients(rank: int, meet: str, out: str) -> None:
    """One step under DDP; prints the bytes of the gradient buckets and of the buffers that are sent, saves the gradients."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    model = net()
    wrapped = Processes(torch.device("cpu"), rank, 2).wrap(model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    sent: list[int] = []

    def hook(group, bucket):  # without annotations, which DDP compares with its own
        sent.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    wrapped(batch(rank)).square().sum().backward()
    buffers = sum(buffer.nbytes for buffer in wrapped.modules_buffers)
    print(json.dumps({"sent": sum(sent), "buffers": buffers}))
    torch.save({name: p.grad for name, p in model.named_parameters()}, out)
    dist.destroy_process_group()
