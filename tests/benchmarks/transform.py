"""`transform resnet18` against building the wide model: time interleaved, peak memory against both models' weights.

`python -m tests.benchmarks.transform [--runs N]`. The wide model is built as anyone would: modules by their constructors, then
Kaiming's rule, as the zoo does it. Memory is what the process grows by after everything was imported and tried once.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
from torch import nn

import sparseift_cli as sparseift
from sparseift_cli.models.zoo import registry


def build_like(model: nn.Module) -> list[nn.Module]:
    """Every layer of `model`, built anew."""
    made: list[nn.Module] = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            conv = nn.Conv2d(m.in_channels, m.out_channels, (m.kernel_size[0], m.kernel_size[1]), bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            made.append(conv)
        elif isinstance(m, nn.BatchNorm2d):
            made.append(nn.BatchNorm2d(m.num_features))
        elif isinstance(m, nn.Linear):
            made.append(nn.Linear(m.in_features, m.out_features))
    return made


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the ratio of times and the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    image = torch.zeros(1, 3, 224, 224)
    sparseift.transform(registry.build("resnet20"), torch.zeros(1, 3, 32, 32), sparsity=0.5)  # imports and first calls
    before = peak_mb()
    dense = registry.build("resnet18")
    wide, _ = sparseift.transform(dense, image, sparsity=0.9)
    grown = peak_mb() - before
    weights = sum(p.nbytes for m in (dense, wide) for p in m.parameters()) / 2**20
    times: list[tuple[float, float]] = []
    for _ in range(runs):
        start = time.perf_counter()
        again, _ = sparseift.transform(dense, image, sparsity=0.9)
        middle = time.perf_counter()
        built = build_like(again)
        times.append((middle - start, time.perf_counter() - middle))
        del again, built
    ratios = sorted(a / b for a, b in times)
    print(
        f"transform resnet18 at 0.9: {statistics.median(a for a, _ in times):.2f} s, building the wide model "
        f"{statistics.median(b for _, b in times):.2f} s; ratio {statistics.median(ratios):.2f} "
        f"[{ratios[0]:.2f}, {ratios[-1]:.2f}], n = {runs} (promise: <= 3)"
    )
    print(
        f"peak memory {grown:.0f} MB for {weights:.0f} MB of both models' weights: {grown / weights:.2f}x (promise: <= 1.3)"
    )


if __name__ == "__main__":
    main()
