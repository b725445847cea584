"""What a whole training step of a Sparse Wide GPT costs on a GPU, beside the dense GPT of as many FLOPs and the masked-dense one.

`python -m tests.benchmarks.whole_step [--arms TEXT|TEXT;TEXT] [--rounds N] [--json FILE] [--profile] [--write]`. The model is a
GPT-3 Small on bytes; a step is everything that `sparseift train` does: batch, forward, backward, clipping, AdamW, as CUDA
graphs. Each arm is a process of its own that stays on the GPU; the arms of a group are timed in turns, so that a change of the
GPU's clock meets all. Groups, separated by semicolons, come one after the other, because not all arms fit on one GPU.
`--write` writes the table of `whole_step.json` into `whole_step.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseift_cli.models.zoo.gpt import GPT, GPTConfig

RECIPE = Path(__file__).with_suffix(".yaml")
WIDE = ["transform.member=wide", "transform.match=model", "transform.pattern=128x128", "training.kernels=blocks"]
STATIC = [*WIDE, "transform.heads=scale_count", "algorithm=static"]
INNER = [*STATIC, "transform.scope=inner"]
MASKED = ["training.kernels=masked"]


def _arms() -> dict[str, list[str]]:
    arms = {"dense": [], "dense, heads of 64": ["model.name=tests.benchmarks.whole_step:gpt_heads_of_64"]}
    for sparsity in (0.5, 0.75, 0.9):
        for name, sets in (("wide", STATIC), ("inner", INNER)):
            blocks = [*sets, f"sparsity={sparsity}"]
            arms[f"{name} {sparsity}"] = blocks
            arms[f"{name} {sparsity} masked-dense"] = [*blocks, *MASKED]
    for sparsity in (0.5, 0.75, 0.9):
        for algorithm in ("set", "rigl"):  # an update costs the same at any interval; a short one is measured sooner
            moving = [*STATIC, f"sparsity={sparsity}", f"algorithm.name={algorithm}", "algorithm.delta_t=20"]
            arms[f"wide {sparsity} {algorithm}"] = [word for word in moving if word != "algorithm=static"]
    stream = "model.name=tests.benchmarks.whole_step:gpt_16_bit_stream"
    return arms | {f"{name}, 16-bit stream": [*sets, stream] for name, sets in arms.items()}


ARMS = _arms()
DEFAULT = ";".join(
    (
        "dense|dense, heads of 64|wide 0.5|wide 0.75|wide 0.9",
        "dense|inner 0.5|inner 0.75|wide 0.5 masked-dense|wide 0.75 masked-dense",
        "dense|wide 0.9 masked-dense",
        "dense|wide 0.5 rigl|wide 0.75 set|wide 0.75 rigl|wide 0.9 rigl",
        "dense, 16-bit stream|wide 0.5, 16-bit stream|wide 0.75, 16-bit stream|wide 0.9, 16-bit stream",
    )
)
GOALS = {"wide 0.5": 1.08, "wide 0.75": 1.30, "wide 0.9": 1.75, "inner 0.5": 1.05, "inner 0.75": 1.15}
GROUPS = {
    "pointwise, norms, reductions": r"^triton_",
    "block products": r"multiply_kernel|_multiply|weight_gradient|_sum_parts|column_sums",
    "attention": r"flash|fmha|sdpa|cudnn",
    "dense products": r"nvjet|gemm|cutlass|splitK",
    "optimiser": r"[Ff]used_?[Aa]dam",
    "clipping, NaN flag": r"lpnorm|LpNorm|multi_tensor_apply",
}
"""Kernels by what they compute: the first pattern that is found in the name."""


def _gpt(heads: int) -> tuple[nn.Module, torch.Tensor]:
    config = GPTConfig(768, 12, heads, vocab=256, dropout=0.0)
    return GPT(config), torch.zeros(1, 1024, dtype=torch.long)


def gpt_heads_of_128() -> tuple[nn.Module, torch.Tensor]:
    """GPT-3 Small on bytes with 6 heads of 128."""
    return _gpt(6)


class StreamDtype(nn.Module):
    """Casts the stream [B, T, hidden] to the dtype of the surrounding autocast: residual sums are 16 bits wide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def gpt_16_bit_stream() -> tuple[nn.Module, torch.Tensor]:
    """`gpt_heads_of_128` with a residual stream of 16 bits, which autocast leaves at 32."""
    model, example = _gpt(6)
    model.get_submodule("transformer").drop = StreamDtype()
    return model, example


def gpt_heads_of_64() -> tuple[nn.Module, torch.Tensor]:
    """GPT-3 Small on bytes with 12 heads of 64, as in the paper."""
    return _gpt(12)


class Worker:
    """One arm in its own process: makes steps of it when its parent asks for them by a line on stdin."""

    def __init__(self, arm: str, device: torch.device, sets: list[str]) -> None:
        from torch.amp.grad_scaler import GradScaler

        from sparseift_cli.recipe.load import load
        from sparseift_cli.train.graphed import GraphedStep
        from sparseift_cli.train.prepare import prepare
        from sparseift_cli.train.processes import Processes
        from sparseift_cli.train.step import EagerStep

        processes = Processes(device)
        self.cuda = device.type == "cuda"
        self.run = prepare(load(RECIPE, [*ARMS[arm], *sets]), 0, processes)
        scaler: Any = GradScaler(device.type, enabled=False)
        self.step: Any = GraphedStep(self.run) if self.cuda else EagerStep(self.run, scaler, processes)
        self.made = 0
        self.time(6 if self.cuda else 1)

    def time(self, steps: int) -> float:
        """Milliseconds a step."""
        self.wait()
        began = time.perf_counter()
        for step in range(self.made, self.made + steps):
            self.step(step)
        self.wait()
        self.made += steps
        return 1e3 * (time.perf_counter() - began) / steps

    def wait(self) -> None:
        """Until the device has finished."""
        if self.cuda:
            torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        """GB of the peak, and of weights, their gradients and the state of the optimiser."""
        weights = [p for p in self.run.model.parameters() if p.requires_grad]
        state = [t for s in self.run.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        sizes = {"weights": weights, "gradients": [p.grad for p in weights if p.grad is not None], "optimiser": state}
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        return {
            "peak": peak / 1e9,
            **{name: sum(t.nbytes for t in tensors) / 1e9 for name, tensors in sizes.items()},
        }

    def update(self, again: int = 3) -> list[float]:
        """Milliseconds that a mask update adds to a step, each time beside still steps; nothing where masks do not move."""
        sparsifier = self.run.sparsifier
        if sparsifier is None or not sparsifier.algorithm.drops_and_grows:
            return []
        every = sparsifier.schedule.delta_t
        found = []
        for _ in range(again):
            self.time(-self.made % every or every)
            moving = self.time(1)
            found.append(moving - statistics.median(self.time(1) for _ in range(9)))
        return found

    def profile(self, steps: int = 3) -> list[tuple[str, float, float]]:
        """(kernel, launches a step, milliseconds a step) of the next steps, the longest first."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            self.time(steps)
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        return [(e.key, e.count / steps, e.self_device_time_total / 1e3 / steps) for e in events]

    def serve(self) -> None:
        """Answer a line of JSON, [method, arguments], by a line of JSON, until stdin ends."""
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            method, arguments = json.loads(line)
            print(json.dumps(getattr(self, method)(*arguments)), flush=True)


class Arm:
    """The parent's side of a `Worker`."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        command = [sys.executable, "-m", "tests.benchmarks.whole_step", "--worker", name, "--device", options.device]
        command += [word for pair in options.set for word in ("--set", pair)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the worker's method returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, arguments]) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line of the worker."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:  # a library's own line
                print(line, end="", file=sys.stderr)
        raise RuntimeError(f"{self.name}: ended with exit code {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def grouped(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """Milliseconds a step by GROUPS."""
    total = Counter[str]()
    for name, _, milliseconds in kernels:
        group = next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "other")
        total[group] += milliseconds
    return dict(total)


def measure(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One group of arms: started together, then timed in turns."""
    arms, failed = [Arm(name, options) for name in names], list[Arm]()
    for arm in arms:
        try:
            arm.answer()
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            failed.append(arm)
    arms = [arm for arm in arms if arm not in failed]
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(options.rounds + 1):  # the first warms up
        for arm in arms:
            arm.ask("time", 2)  # the first steps after another process had the GPU are slower
            milliseconds = arm.ask("time", options.steps)
            if turn:
                times[arm.name].append(milliseconds)
    dense = [min(values) for values in zip(*(times[n] for n in times if n.startswith("dense")), strict=True)]
    rows = []
    for arm in arms:
        ratios = [time / base for time, base in zip(times[arm.name], dense, strict=False)]
        row: dict[str, Any] = {
            "arm": arm.name,
            "ms": statistics.median(times[arm.name]),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None,
            "times": [round(value, 3) for value in times[arm.name]],
            "rounds": len(times[arm.name]),
            "steps": options.steps,
            "memory": arm.ask("memory"),
            "update_ms": arm.ask("update"),
        }
        if options.profile:
            row["kernels"] = arm.ask("profile")[:40]
            row["groups"] = grouped(row["kernels"])
        rows.append(row)
    for arm in arms:
        arm.close()
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["ratio"]) if row["ratio"] else ""
    memory = ", ".join(f"{name} {size:.2f}" for name, size in row["memory"].items())
    return f"{row['arm']:26} {row['ms']:8.2f} ms  {ratio:22} GB: {memory}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of Markdown, each beside the dense arm of its group."""
    names = ("peak", "weights", "gradients", "optimiser")
    lines = [
        f"| run | arm | ms | ratio | goal | {' | '.join(f'{name}, GB' for name in names)} | mask update |",
        f"|{'---|' * (6 + len(names))}",
    ]
    for row in rows:
        ratio = "**{:.2f}** [{:.2f}, {:.2f}]".format(*row["ratio"]) if row["ratio"] else ""
        sizes = " | ".join(f"{row['memory'][name]:.2f}" for name in names)
        moving = row["update_ms"]
        update = (
            f"{statistics.median(moving):.1f} ms, {statistics.median(moving) / row['ms']:.2f} % of 100 steps"
            if moving
            else ""
        )
        goal = f"{GOALS[row['arm']]:.2f}" if row["arm"] in GOALS else ""
        lines.append(
            f"| {row.get('run', 1)} | {row['arm']} | {row['ms']:.1f} | {ratio} | {goal} | {sizes} | {update} |"
        )
    return "\n".join(lines)


def write() -> None:
    """Replace what follows the heading Results in whole_step.md by the table of whole_step.json."""
    measured = json.loads(RECIPE.with_suffix(".json").read_text("utf-8"))
    page = RECIPE.with_suffix(".md")
    before = page.read_text("utf-8").partition("\n## Results\n")[0]
    rounds, steps = ({row[key] for row in measured["rows"]} for key in ("rounds", "steps"))
    how = (
        f"{measured['gpu']}, torch {measured['torch']}, triton {measured['triton']}; medians of {_range(rounds)} rounds of "
        f"{_range(steps)} steps, [smallest, largest] ratio of a round to the dense arm of the same round."
    )
    page.write_text(f"{before}\n## Results\n\n{how}\n\n{table(measured['rows'])}\n", "utf-8")


def _range(numbers: set[int]) -> str:
    return " to ".join(str(n) for n in sorted({min(numbers), max(numbers)}))


def main() -> int:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=DEFAULT, metavar="TEXT|TEXT;TEXT", help=f"known: {' | '.join(ARMS)}")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of a round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--profile", action="store_true", help="also time every kernel of a step")
    parser.add_argument("--write", action="store_true", help="write the table of whole_step.json into whole_step.md")
    parser.add_argument("--worker", metavar="ARM", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        Worker(options.worker, torch.device(options.device), options.set).serve()
        return 0
    if options.write:
        write()
        return 0
    rows: list[dict[str, Any]] = []
    for group in options.arms.split(";"):
        for row in measure(group.split("|"), options):
            print(line(row), flush=True)
            for name, milliseconds in row.get("groups", {}).items():
                print(f"    {milliseconds:8.2f} ms {name}")
            rows.append(row)
    if options.json:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else options.device
        triton = version("triton") if torch.cuda.is_available() else None
        versions = {"gpu": gpu, "torch": torch.__version__, "triton": triton}
        options.json.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
