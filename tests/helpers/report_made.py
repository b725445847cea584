"""Small reports made by hand, for the tests of pictures and of the page: no directory is read and nothing is trained."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pandas as pd

from sparseift_cli.base.metrics import facts_of
from sparseift_cli.report.read import Run
from sparseift_cli.report.report import Report


def layer(name: str, status: str, dense: int, after: int, nnz: int | None, weights: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "conv",
        "role": "body",
        "status": status,
        "reason": "",
        "dense_macs": dense,
        "transformed_macs": after,
        "ratio": after / dense,
        "density": None,
        "nnz": nnz,
        "weights": weights,
    }


def audit(rows: list[dict[str, Any]], *, dense: bool = False, algorithm: str = "rigl") -> dict[str, Any]:
    return {
        "training": {"algorithm": "dense" if dense else algorithm},
        "flops_per_mac": 2,
        "causal": "full",
        "transform": None if dense else {"sparsity": 0.75},
        "layers": rows,
        "totals": {
            "dense": {"forward_flops": 10, "training_flops": 30, "params": 5},
            "transformed": None
            if dense
            else {
                "forward_flops": 10,
                "training_flops": 31,
                "params": 20,
                "nonzero_params": 5,
                "activation_factor": 2.0,
            },
        },
    }


ROWS = [
    layer("stem", "boundary", 1000, 2000, 16, 16),
    layer("body.conv", "transformed", 4000, 3000, 30, 120),
    layer("body.qk", "untouched", 500, 1000, None, None),
]


def run(
    name: str,
    seed: int,
    *,
    dense: bool,
    rows: list[dict[str, Any]] | None = None,
    state: str = "finished",
    algorithm: str = "rigl",
) -> Run:
    metrics = []
    for i in (1, 2, 3):
        line = {
            "step": 10 * i,
            "top1": 50.0 + 10 * i + seed + (0 if dense else 2),
            "train_loss": 3.0 / i,
            "flops": 10**9 * i,
        }
        metrics.append(line if dense else line | {"churn": 0.3 / i, "itop_rate": 0.2 + 0.1 * i})
    return Run(
        Path(f"runs/{name}/s{seed}"),
        name,
        state,
        seed,
        {"model": {"name": "pkg:net"}, "data": {"name": "toy"}},
        metrics,
        summary={"flops": {"dense": 3 * 10**9}},
        audit=audit(rows or ROWS, dense=dense, algorithm=algorithm),
    )


def report(runs: list[Run], **more: Any) -> Report:
    rows = []
    for name in dict.fromkeys(r.name for r in runs):
        values = [r.last["top1"] for r in runs if r.name == name and r.metrics and r.state == "finished"]
        mean = statistics.fmean(values) if values else None
        rows.append(
            {
                "group": name,
                "model": "pkg:net",
                "data": "toy",
                "metric": "top1",
                "metric_facts": facts_of("top1"),
                "comparison_key": "s",
                "n": len(values),
                "transform": "dense" if "dense" in name else "wide",
                "algorithm": "rigl",
                "sparsity": 0.0 if "dense" in name else 0.75,
                "mean": mean,
                "std": 1.0,
                "low": mean and mean - 1,
                "high": mean and mean + 1,
                "flops": 3 * 10**9,
            }
        )
    frame = pd.DataFrame([{"group": r.name, "counted": r.state == "finished"} for r in runs])
    return Report(runs, [], pd.DataFrame(rows, dtype=object), [], ["sparseift", "report", "runs"], frame, **more)
