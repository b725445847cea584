"""What a whole training step costs on a GPU, ours against plainer ways, on the ResNet-18 of the CIFAR-100 recipes.

`python -m tests.benchmarks.gpu_step [dense wide50 ...]`; needs CUDA, and torchvision for the first way. A step is everything: the
batch, its augmentation, forward, backward, masks, optimiser. Images are made up (50,000 of 32x32): their values do not
matter to the time. The ways are timed in turns, so that a change of the GPU's clock meets all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from sparseift_cli.recipe.load import load
from sparseift_cli.train.graphed import GraphedStep
from sparseift_cli.train.prepare import Prepared, prepare
from sparseift_cli.train.processes import Processes
from sparseift_cli.train.step import EagerStep

FOLDER = Path(__file__).parents[2] / "recipes" / "resnet18_cifar100"
DATA = ["data=synthetic-images", "data.limit=50000", "training.epochs=200"]
FAST = ["training.precision=bf16", "training.channels_last=true"]
WAYS: dict[str, list[str] | None] = {
    "torchvision workers fp32": None,
    "eager fp32": ["training.compile=false", "training.cuda_graph=false"],
    "eager bf16": [*FAST, "training.compile=false", "training.cuda_graph=false"],
    "graph bf16": [*FAST, "training.compile=false"],
    "compile bf16": [*FAST, "training.compile=true", "training.cuda_graph=false"],
    "compile + graph bf16": [*FAST, "training.compile=true"],
}


@dataclass
class Way:
    name: str
    make: Callable[[int], Any]
    run: Prepared | None
    next: int = 0

    def time(self, steps: int) -> float:
        """Milliseconds a step."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        for step in range(self.next, self.next + steps):
            self.make(step)
        torch.cuda.synchronize()
        self.next += steps
        return 1e3 * (time.perf_counter() - began) / steps


def ours(recipe: Path, sets: list[str]) -> tuple[Prepared, Callable[[int], Any]]:
    run = prepare(load(recipe, [*DATA, *sets]), 0, Processes(torch.device("cuda")))
    graphed = "training.cuda_graph=false" not in sets
    scaler: Any = GradScaler("cuda", enabled=False)
    return run, GraphedStep(run) if graphed else EagerStep(run, scaler, Processes(torch.device("cuda")))


def official_style(recipe: Path, sets: list[str], workers: int) -> tuple[Prepared, Callable[[int], Any]]:
    """The loop of the authors' scripts as they describe it: worker-loaded torchvision data, fp32, one operation at a time."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms  # pyright: ignore[reportMissingImports]

    run = prepare(load(recipe, [*DATA, *sets]), 0, Processes(torch.device("cuda")))
    images, labels = run.dataset.images("train")
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    change = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.2,) * 3),
        ]
    )

    class Images(Dataset[Any]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return change(Image.fromarray(arrays[index])), int(labels[index])

    def batches() -> Iterator[Any]:
        while True:
            yield from DataLoader(Images(), 128, shuffle=True, num_workers=workers, pin_memory=True, drop_last=True)

    stream = batches()

    def step(_: int) -> None:
        x, y = (part.cuda(non_blocking=True) for part in next(stream))
        loss = nn.functional.cross_entropy(run.model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        if run.sparsifier is not None:
            run.sparsifier.step()
        run.optimizer.step()
        loss.item()  # as they print it

    return run, step


def beside(ways: list[Way], steps: int) -> float:
    """Milliseconds in which each of these makes a step, each on a stream of its own."""
    streams = [torch.cuda.Stream() for _ in ways]
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        for way, stream in zip(ways, streams, strict=True):
            with torch.cuda.stream(stream):
                way.make(way.next)
            way.next += 1
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / steps


def go_to_update(way: Way) -> None:
    """Make steps until the one that comes has a mask update."""
    assert way.run is not None
    assert way.run.sparsifier is not None
    every = way.run.sparsifier.schedule.delta_t
    way.time(-way.next % every or every)


def update_milliseconds(way: Way, again: int = 5) -> tuple[float, float, float]:
    """Milliseconds that a mask update adds to a step: median, least and most of `again` updates, each beside still steps."""
    found = []
    for _ in range(again):
        go_to_update(way)
        moving = way.time(1)
        still = statistics.median(way.time(1) for _ in range(9))
        found.append(moving - still)
    return statistics.median(found), min(found), max(found)


def profile(way: Way, what: str, steps: int = 10, top: int = 30) -> None:
    """Which kernels the time of the next steps goes to, on stderr."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        way.time(steps)
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    whole = sum(e.self_device_time_total for e in events)
    print(f"  kernels of {way.name}: {whole / 1e3 / steps:.3f} ms {what}", file=sys.stderr)
    for event in events[:top]:
        spent = event.self_device_time_total / 1e3 / steps
        print(f"    {spent:8.4f} ms {event.count / steps:6.1f}x {event.key[:90]}", file=sys.stderr)


def side_by_side(recipe: Path, first: Way, count: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`count` runs of the last way at once, and the first of them alone, in turns."""
    crew = [first]
    while len(crew) < count:
        run, make = ours(recipe, [*args.set, *(WAYS[first.name] or [])])
        crew.append(Way(first.name, make, run))
        crew[-1].time(10)
    alone, together = list[float](), list[float]()
    for _ in range(args.rounds):
        alone.append(first.time(args.steps))
        together.append(beside(crew, args.steps))
    for label, at_once, found in (("alone", 1, alone), (f"{count} on streams", count, together)):
        yield {
            "recipe": recipe.stem,
            "sets": args.set,
            "way": f"{first.name}, {label}",
            "ms": round(statistics.median(found), 3),
            "low": round(min(found), 3),
            "high": round(max(found), 3),
            "n": len(found),
            "steps": args.steps,
            "at_once": at_once,
            "gpu": torch.cuda.get_device_name(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=["dense", "wide75_rigl"])
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--beside", type=int, nargs="*", default=[], help="so many copies at once, each on a stream")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = []
    for name in args.recipes:
        ways = []
        for label in args.ways.split(","):
            sets = WAYS[label]
            began = time.perf_counter()
            recipe = FOLDER / f"{name}.yaml"
            run, make = (
                official_style(recipe, args.set, args.workers) if sets is None else ours(recipe, [*args.set, *sets])
            )
            way = Way(label, make, run)
            way.time(10)
            torch.cuda.synchronize()
            ready = time.perf_counter() - began
            print(f"{name}: {label}: ready after {ready:.1f} s", file=sys.stderr, flush=True)
            ways.append(way)
        found: dict[str, list[float]] = {way.name: [] for way in ways}
        for _ in range(args.rounds):
            for way in ways:
                found[way.name].append(way.time(args.steps))
        for way in ways:
            each = sorted(found[way.name])
            line = {
                "recipe": name,
                "sets": args.set,
                "way": way.name,
                "ms": round(statistics.median(each), 3),
                "low": round(each[0], 3),
                "high": round(each[-1], 3),
                "n": len(each),
                "steps": args.steps,
                "gpu": torch.cuda.get_device_name(),
            }
            if args.profile:
                profile(way, "a step")
            sparsifier = way.run.sparsifier if way.run is not None else None
            if sparsifier is not None and sparsifier.algorithm.drops_and_grows and way.next:
                line["update_ms"] = [round(value, 3) for value in update_milliseconds(way)]
                if args.profile:
                    go_to_update(way)
                    profile(way, "a step with a mask update", steps=1, top=60)
            lines.append(line)
            print(json.dumps(line), flush=True)
        for count in args.beside:
            for line in side_by_side(FOLDER / f"{name}.yaml", ways[-1], count, args):
                lines.append(line)
                print(json.dumps(line), flush=True)
        ways.clear()
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    if args.out:
        args.out.write_text("\n".join(map(json.dumps, lines)) + "\n")


if __name__ == "__main__":
    main()
