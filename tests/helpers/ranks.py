"""What each of two gloo processes does in tests/sparsity/test_ranks.py and tests/kernels/test_select.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.errors import CheckFailed
from sparseift_cli.kernels import KERNELS, LayerRequest, LayerSize, measure, select
from sparseift_cli.kernels.registry import MASKED, Reference
from sparseift_cli.mask.attached import attach
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.sparsity.sparsifier import Sparsifier


def train_and_compare(rank: int, meet: str, out: str) -> None:
    """Train with each algorithm and save the masks in `out`; then change a mask of rank 1 and print what is noticed."""
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    masks = []
    for algorithm in ("set", "rigl", "granet", "snfs"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        attach(net, {"0.weight": make_mask((16, 6), 30, generator=generator_for(0))})
        model = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier = Sparsifier(model, optimizer, algorithm=algorithm, total_steps=12, delta_t=2)
        for t in range(12):
            x = torch.randn(8, 6, generator=generator_for(rank, str(t)))  # every rank its own batch
            model(x).square().mean().backward()
            sparsifier.step()
            optimizer.step()
            optimizer.zero_grad()
            sparsifier.check_ranks()
        masks.append(net[0].get_buffer("weight_mask").clone())
    torch.save(masks, out)
    if rank:
        net[0].get_buffer("weight_mask")[0, 0] ^= True
    try:
        sparsifier.check_ranks()
    except CheckFailed as error:
        print(f"rank {rank}: {error}")
    dist.destroy_process_group()


def select_kernels(rank: int, meet: str) -> None:
    """Choose kernels for three layers, where blocks are the faster way in process 0, masked layers in process 1."""

    class Fast(Reference):
        fast = True

    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    KERNELS.register("fast", Fast())
    measure.milliseconds = lambda *_: {"fast": 1.0 + rank, MASKED: 2.0 - rank}
    layer = LayerRequest(8, "float32", "cpu")
    print(*(select("auto", layer, LayerSize(2, 2, 3, tokens)).backend for tokens in (1, 2, 3)))
    dist.destroy_process_group()
