"""Two gloo processes: masks equal on both at every update, and a difference is found and named."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import torch

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.sparsity.statistics import check_ranks, fingerprint

RANK = """
import sys, torch, torch.distributed as dist
from torch import nn
from sparseift_cli.errors import CheckFailed
from sparseift_cli.base.randomness import generator_for
from sparseift_cli.mask import make_mask
from sparseift_cli.mask.attached import attach
from sparseift_cli.sparsity.sparsifier import Sparsifier

rank, file, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
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
    masks.append(net[0].weight_mask.clone())
torch.save(masks, out)
if rank:
    net[0].weight_mask[0, 0] ^= True
try:
    sparsifier.check_ranks()
except CheckFailed as error:
    print(f"rank {rank}: {error}")
dist.destroy_process_group()
"""


def test_masks_are_equal_on_every_rank(tmp_path: Path) -> None:
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet"), str(out)],
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    printed = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    for rank, text in enumerate(printed):
        assert f"rank {rank}: masks differ between ranks: 0.weight" in text
    one, two = (torch.load(out, weights_only=True) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(int(mask.sum()) == 30 for mask in one)


def test_fingerprints_tell_masks_apart() -> None:
    mask = torch.rand(37, 11, generator=generator_for(0)) < 0.3
    first = int(fingerprint(mask))
    assert first == int(fingerprint(mask.clone()))
    seen = {first}
    for i in range(mask.numel()):
        other = mask.clone()
        other.view(-1)[i] ^= True
        seen.add(int(fingerprint(other)))
    assert len(seen) == mask.numel() + 1
    assert int(fingerprint(mask.flip(0))) != first
    check_ranks({"mask": mask})  # nothing to compare with in a single process
