"""Time and memory of whole commands against the promises, interleaved so that a noisy machine hits all of them alike.

`make bench`, or `python -m tests.benchmarks.run [--runs N]`. Prints median, minimum and maximum of N runs each; a promise in
seconds is for a quiet machine, so the ratio to `python -c pass` and to `import torch` stands beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

PYTHON = sys.executable
SCRIPT = [PYTHON, "-m", "sparseift_cli"]
FRESH = """
import torch
from sparseift_cli.source import Request, load_table
import time; t = time.perf_counter(); table = load_table(Request("gpt3_175b"), fresh=True)
print(f"{time.perf_counter() - t:.3f}")
"""


@dataclass
class Case:
    """A command, what is promised of it, and what was measured."""

    name: str
    command: list[str]
    promise: str
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    inner: list[float] = field(default_factory=list)  # seconds that the command itself reports


CASES = [
    Case("python -c pass", [PYTHON, "-c", "pass"], "the unit"),
    Case("import torch", [PYTHON, "-c", "import torch"], "the unit"),
    Case("--help", [*SCRIPT, "--help"], "<= 0.2 s"),
    Case("flops resnet18 -s 0.9", [*SCRIPT, "flops", "resnet18", "--sparsity", "0.9"], "<= 0.35 s"),
    Case("flops gpt3-175b", [*SCRIPT, "flops", "gpt3-175b"], "<= 1 s, <= 100 MB"),
    Case("flops gpt3-175b -s 0.5", [*SCRIPT, "flops", "gpt3-175b", "--sparsity", "0.5"], "<= 1 s, <= 100 MB"),
    Case(
        "flops pkg.module:callable",
        [*SCRIPT, "flops", "tests.benchmarks.model:make", "--input", "3x224x224", "--sparsity", "0.9"],
        "<= 1.5 x import torch + 1 s",
    ),
    Case(
        "transform gpt3_13b",
        [*SCRIPT, "transform", "gpt3_13b", "--sparsity", "0.5", "--plan-only", "--summary"],
        "<= 10 s, <= 500 MB",
    ),
    Case("trace gpt3-175b afresh", [PYTHON, "-c", FRESH], "trace <= 3 s, <= 400 MB"),
]


def measure(case: Case) -> None:
    """One run: wall seconds and peak resident memory of the process."""
    start = time.perf_counter()
    process = subprocess.Popen(case.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    case.seconds.append(time.perf_counter() - start)
    case.megabytes.append(usage.ru_maxrss / 1024)
    if case.command[-1] == FRESH:
        case.inner.append(float(printed))
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{case.name} exited with {process.returncode}")


def main() -> None:
    """Run every case in turn, N times over, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    for case in CASES:
        measure(case)  # warm the file cache
        for figures in (case.seconds, case.megabytes, case.inner):
            figures.clear()
    for _ in range(runs):
        for case in CASES:
            measure(case)
    unit, torch_unit = (statistics.median(c.seconds) for c in CASES[:2])
    print(
        f"n = {runs}, seconds as median [min, max], peak MB as maximum; pass = {unit:.3f} s, import torch = {torch_unit:.3f} s\n"
    )
    print(f"{'command':28}{'seconds':26}{'x pass':>8}{'x torch':>9}{'MB':>7}   promise")
    for case in CASES:
        median = statistics.median(case.seconds)
        spread = f"{median:.3f} [{min(case.seconds):.3f}, {max(case.seconds):.3f}]"
        inside = f" (trace alone {statistics.median(case.inner):.2f} s)" if case.inner else ""
        print(
            f"{case.name:28}{spread:26}{median / unit:8.1f}{median / torch_unit:9.2f}{max(case.megabytes):7.0f}"
            f"   {case.promise}{inside}"
        )


if __name__ == "__main__":
    main()
