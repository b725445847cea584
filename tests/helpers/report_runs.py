"""Run directories without training: the files that a run leaves, with any numbers in them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sparseift_cli.base.metrics import MetricFacts, facts_of

RECIPE = """\
model:
  name: "{model}"
  num_classes: null
  input: null
  seq: null
data:
  name: {data}
  root: null
  limit: null
{transform}algorithm:
  name: {algorithm}
  delta_t: 100
  stop: 0.75
optimizer:
  name: sgd
  lr: {lr}
  weight_decay: 5.0e-4
training:
  epochs: {epochs}
  steps: null
  batch_size: 128
  device: auto
  seed: {seed}
  seeds: []
evaluation:
  every: 1 epoch
  metrics: [{metrics}]
  limit: null
checkpoint:
  every: 5%
  keep: 2
  best: {best}
"""
START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def make_run(
    root: Path,
    name: str = "net_dense",
    seed: int = 0,
    values: Sequence[float] = (50.0, 70.0),
    *,
    model: str = "resnet18_cifar",
    data: str = "cifar100",
    member: str | None = None,
    sparsity: float = 0.75,
    algorithm: str | None = None,
    lr: float = 0.1,
    epochs: int = 2,
    steps: int | None = None,
    metric: str = "top1",
    flops: int | None = 10**15,
    finished: bool = True,
    packed: bool = False,
    audit: Mapping[str, Any] | None = None,
    spent: int | None = None,
    data_hash: str = "d0",
    stamp: int = 0,
    plan: Mapping[str, Any] | None = None,
    device: str = "cpu",
    more: Mapping[str, Any] | None = None,
    at_once: int = 1,
    recorded: Mapping[str, MetricFacts] | None = None,
    seconds: float | None = None,
    begins: float | None = None,
    session: Mapping[str, Any] | None = None,
) -> Path:
    """`root/name/<date>-<hash>/` with one evaluation for each of `values`; finished unless asked otherwise.

    `seconds`: its wall time, 10 an evaluation unless given; `begins`: when it starts, in seconds after START; `session`: what
    its provenance has besides or in place of the usual.
    `recorded`: facts of metrics by their names in the recipe; the first of them is that of `values`, in place of `metric`.
    """
    named = next(iter(recorded), metric) if recorded else metric
    metric = recorded[named].name if recorded else metric
    recorded_by_key = {facts.name: facts for facts in (recorded or {}).values()}
    steps = steps or 390 * epochs
    begun = START + timedelta(seconds=seed + 1000 * stamp if begins is None else begins)
    wall = 10.0 * len(values) if seconds is None else seconds
    folder = root / name / f"{begun:%Y%m%dT%H%M%SZ}-{seed:08x}"
    folder.mkdir(parents=True)
    transform = f"transform:\n  member: {member}\n  sparsity: {sparsity}\n  match: layer\n" if member else ""
    algorithm = algorithm or ("rigl" if member else "dense")
    (folder / "recipe.yaml").write_text(
        RECIPE.format(
            model=model,
            data=data,
            transform=transform,
            algorithm=algorithm,
            lr=lr,
            epochs=epochs,
            seed=seed,
            metrics=named,
            best=named,
        )
    )
    rows = [
        {
            "step": steps * (i + 1) // len(values) if finished else i + 1,
            "epoch": epochs * (i + 1) / len(values),
            "lr": lr,
            "train_loss": 1.0 / (i + 1),
            "loss": 2.0 / (i + 1),
            metric: value,
            "flops": flops,
            "seconds": wall * (i + 1) / len(values),
            "peak_bytes": 2**28,
            "optimizer_bytes": 2**20,
            **(more or {}),
        }
        for i, value in enumerate(values)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if packed:
        (folder / "metrics.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / "metrics.jsonl").write_text(text)
    first = {
        "started": begun.isoformat(),
        "from_step": 0,
        "command": ["sparseift"],
        "versions": {"torch": "2.13.0"},
        "git": {"commit": "c0ffee" * 5, "dirty": False},
        "device": device,
        "threads": 2,
        "seed": seed,
        "at_once": at_once,
        "data": {data: data_hash},
        **(session or {}),
    }
    if recorded:
        first["metrics"] = {name: facts.to_json() for name, facts in recorded.items()}
    write(folder / "provenance.json", {"schema": "sparseift.provenance/1", "sessions": [first]})
    write(folder / "audit.json", audit or {"schema": "sparseift.flops/1", "training": {"steps": steps}})
    if plan:
        write(folder / "plan.json", plan)
    if finished:
        best = min(values) if facts_of(metric, recorded_by_key).lower_is_better else max(values)
        write(
            folder / "summary.json",
            {
                "schema": "sparseift.summary/1",
                "recipe": name,
                "seed": seed,
                "steps": steps,
                "metrics": rows[-1],
                "best": best,
                "flops": {"spent": spent or flops, "audited": flops, "dense": 10**15},
                "params": 1000,
                "nonzero_params": 250,
                "seconds": rows[-1]["seconds"],
            },
        )
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def seeds(root: Path, name: str, values: Sequence[float], **how: Any) -> list[Path]:
    """A finished run for each of the values, seeds 0, 1, ..."""
    return [make_run(root, name, seed, (value - 10, value), **how) for seed, value in enumerate(values)]
