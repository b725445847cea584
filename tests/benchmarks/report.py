"""`sparseift report` of 500 runs: seconds and peak memory of the whole command, in a process of its own.

`python -m tests.benchmarks.report [--runs N] [--evaluations N] [--layers N]`. Runs come in groups of 20 seeds with 200
evaluations and an audit of 60 layers each, as ResNet-18 has. `--distinct` makes every recipe, audit and plan its own, so
that nothing can be shared between runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers.report_runs import make_run

SECONDS, MEGABYTES = 5.0, 500.0


def build(root: Path, runs: int, evaluations: int, layers: int, *, distinct: bool) -> None:
    """Groups of 20 seeds: a dense one first, then wider and wider ones at equal FLOPs."""
    for i in range(runs):
        group, seed = divmod(i, 20)
        own = i if distinct else group
        audit: dict[str, Any] = {
            "schema": "sparseift.flops/1",
            "model": "resnet18",
            "training": {"steps": 390 * evaluations},
            "layers": [
                {
                    "name": f"layer{own}.{n}.conv",
                    "kind": "conv2d",
                    "role": "body",
                    "status": "transformed",
                    "reason": "",
                    "calls": 1,
                    "dense_macs": 115605504,
                    "transformed_macs": 115605504,
                    "ratio": 1.0,
                    "density": 0.25,
                    "nnz": 36864,
                    "weights": 147456,
                    "params": 147584,
                    "parts": [
                        {
                            "name": "weight",
                            "inputs": 128,
                            "outputs": 128,
                            "taps": 9,
                            "groups": 1,
                            "dense": False,
                            "nnz": 36864,
                        }
                    ],
                }
                for n in range(layers)
            ],
        }
        values = [70 + group / 10 + seed / 50 + n / evaluations for n in range(evaluations)]
        how: dict[str, Any] = {"member": "wide", "sparsity": round(0.5 + group / 100, 2)} if group else {}
        name = f"net_wide{group}_rigl" if group else "net_dense"
        lr = 0.1 + own / 1e4 if distinct else 0.1
        make_run(
            root,
            name,
            seed,
            values,
            epochs=evaluations,
            audit=audit,
            plan=audit,
            lr=lr,
            more={"density": 0.25, "itop_rate": 0.6, "churn": 0.01},
            **how,
        )


def measure(root: Path, *options: str) -> tuple[float, float, float, int]:
    """(seconds, of them on a CPU, MB of peak resident memory, exit code) of one command."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "sparseift_cli", "report", str(root), *options]
    with (root / "out").open("wb") as out:
        process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1)])
        _, status, usage = os.wait4(process, 0)
    wall, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return wall, cpu, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)


def main() -> None:
    """Print one line a command; exit 1 above the limits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--distinct", action="store_true")
    asked = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(root, asked.runs, asked.evaluations, asked.layers, distinct=asked.distinct)
        for options in (
            ["--json"],
            ["--baseline", "net_dense", "--reference", "paper"],
            ["--group-by", "run", "-f", "csv"],
        ):
            seconds, cpu, megabytes, code = measure(root, *options)
            good = good and seconds < SECONDS and megabytes < MEGABYTES and code == 0
            print(
                f"{asked.runs} runs, {' '.join(options)}: {seconds:.2f} s ({cpu:.2f} s of CPU), {megabytes:.0f} MB, exit {code}"
            )
    sys.exit(not good)


if __name__ == "__main__":
    main()
