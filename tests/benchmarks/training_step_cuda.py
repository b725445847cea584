"""The Sparsifier on a GPU: equal masks on both devices, no wait for the device outside updates, what a step and an update cost.

`python -m tests.benchmarks.training_step_cuda`; needs CUDA and torch alone. Prints one line a check and fails at the first
that does not hold.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings

import torch
from torch import Tensor, nn

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.mask.attached import attach
from sparseift_cli.mask.mask import make_mask
from sparseift_cli.sparsity.drop_and_grow import drop_and_grow, extend
from sparseift_cli.sparsity.sparsifier import Sparsifier
from tests.helpers.sparse_net import STEPS, assert_zeros, make, sparse_net

CUDA = "cuda"
EVERY = 5  # steps between the updates that are timed


def equal_masks() -> None:
    """One mask update of a large weight with many ties, on both devices."""
    for ties in (False, True):
        scores = torch.rand(1500, 1500, generator=generator_for(0))
        scores = scores.mul(500).floor() if ties else scores
        mask = extend(torch.zeros(1500, 1500, dtype=torch.bool), 0, 500_000, generator_for(1))
        found = [
            drop_and_grow(mask.to(d), 500_000, scores.to(d), scores.flip(0).to(d), 150_000, 2).cpu()
            for d in ("cpu", CUDA)
        ]
        assert torch.equal(*found)
    print("masks of cpu and cuda are equal, ties too")


def zeros_and_waits() -> None:
    """Every algorithm and kind of optimiser; between updates nothing waits for the device."""
    for algorithm in ("static", "set", "rigl", "gmp", "granet"):
        for how in ({"foreach": True}, {"fused": True}):
            net = sparse_net().to(CUDA)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, **how)
            sparsifier = make(net, optimizer, algorithm)
            x, y = torch.randn(4, 3, 5, 5, device=CUDA), torch.arange(4, device=CUDA)
            for t in range(STEPS):
                quiet = t % 3 == 1  # neither an update nor the step before one
                nn.functional.cross_entropy(net(x), y).backward()
                torch.cuda.set_sync_debug_mode("error" if quiet else "default")
                sparsifier.step()
                optimizer.step()
                torch.cuda.set_sync_debug_mode("default")
                optimizer.zero_grad()
                assert_zeros(sparsifier)
    print("zeros stay zeros; no wait for the device between updates")


def half_precision() -> None:
    """GradScaler with overflows at two updates, fused and not."""
    for fused in (False, True):
        net = sparse_net().to(CUDA)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)
        sparsifier, scaler = make(net, optimizer), torch.amp.GradScaler(CUDA, init_scale=8.0)
        for t in range(STEPS):
            before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
            with torch.autocast(CUDA, torch.float16):
                loss = net(torch.randn(4, 3, 5, 5, device=CUDA)).float().square().mean()
            scaler.scale(loss * (torch.inf if t in (3, 9) else 1)).backward()
            scaler.unscale_(optimizer)
            sparsifier.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert_zeros(sparsifier)
            moved = any(not torch.equal(before[name], mask) for name, mask in sparsifier.masks().items())
            assert moved == (t in (6, 12, 15))
    print("updates that fp16 skips are lost")


def seconds(model: nn.Module, x: Tensor, kind: str, runs: int = 50) -> list[float]:
    """Times of whole steps: `plain`, `masked`, or with an `update` each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    sparsifier = None
    if kind != "plain":
        algorithm = "rigl" if kind == "update" else "static"
        sparsifier = Sparsifier(model, optimizer, algorithm=algorithm, delta_t=EVERY, total_steps=10**6)
    found = list[float]()
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(CUDA, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        if sparsifier is not None:
            sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        if kind != "update" or (sparsifier and sparsifier.last and sparsifier.last.dense_gradients):
            found.append(time.perf_counter() - start)
    return found[3:]


def cost() -> None:
    """24 layers of 3072 x 3072, 226 million weights, on 16,384 tokens in bfloat16 autocast."""
    width, depth, tokens = 3072, 24, 16_384
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.GELU()))).to(CUDA)
    for p in model.parameters():  # activations and gradients of ordinary size: where all are zero, everything is a tie
        nn.init.normal_(p, std=(2 / (width / 4)) ** 0.5)
    attach(
        model,
        {
            f"{2 * i}.weight": make_mask((width, width), width * width // 4, generator=generator_for(i))
            for i in range(depth)
        },
    )
    x = torch.randn(tokens, width, device=CUDA)
    times = {kind: seconds(copy.deepcopy(model), x, kind) for kind in ("plain", "masked", "update")}
    plain, masked, update = (statistics.median(t) for t in times.values())
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {depth} x {width}^2, {tokens} tokens, bf16 autocast, fused AdamW"
    )
    print(
        f"plain {plain * 1e3:.1f} ms, masked {masked * 1e3:.1f} ms, with a RigL update {update * 1e3:.1f} ms (medians of {len(times['plain'])})"
    )
    print(f"masked / plain {masked / plain:.3f}; update over 100 steps {(update - masked) / plain / 100:.2%} of a step")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    equal_masks()
    zeros_and_waits()
    half_precision()
    cost()
