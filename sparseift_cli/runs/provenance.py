"""Where a run's numbers come from: versions, commit, command, device, threads, seeds and the hashes of the data.

`provenance.json` has one entry a session: a run that is resumed elsewhere says so. Bits depend on the thread count, the
device and the capabilities of the CPU, so `differences` says what differs from the session before when a run is resumed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ..base.metrics import MetricFacts
from ..kernels.registry import LayerChoice, in_words
from ..version import __version__

SCHEMA = "sparseift.provenance/1"
PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "triton")
BITS = {
    "device": "device",
    "threads": "CPU threads",
    "cpu_capability": "CPU capability",
    "versions.torch": "torch",
    "processes": "processes",
    "versions.sparseift": "sparseift",
    "git.commit": "commit of sparseift",
}
"""What the bits of a result depend on, by dotted key, and what people call it. Another commit may transform otherwise."""
HOW_IT_RUNS = ("device", "threads", "kernels")
"""Settings of `training` that say on what a run is computed, not what: it may go on with others, which `differences` tells."""


def session(
    *,
    device: str,
    seed: int,
    data: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
    step: int = 0,
    processes: int = 1,
    at_once: int = 1,
    recipe: str | None = None,
    source: Mapping[str, str] | None = None,
    metrics: Mapping[str, MetricFacts] | None = None,
    held_out: Mapping[str, Any] | None = None,
    kernels: Sequence[LayerChoice] = (),
    sweep: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An entry of provenance.json: this process, now, about to run from `step` on.

    `data` maps what was read to its SHA-256 (or whatever identifies it); `device` is PyTorch's name for it.
    `recipe` is the name that the run was begun with; `source` maps the user's own modules to the SHA-256 of their files.
    `metrics`: what the run measures, by the name in its recipe: a report knows by it the metrics from outside the package.
    `held_out`: the split that is measured on, and how it was divided from the training split where the files do not say.
    `at_once`: how many runs `train --parallel` keeps going beside each other, which lengthens the wall time of each.
    `kernels`: which way computes each sparse weight, and why not better.
    `sweep`: the recipe of a sweep, and the run's value on each of its axes by name; None where it belongs to none.
    """
    import torch

    named = torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": step,
        "command": list(command if command is not None else sys.argv),
        "versions": {
            "sparseift": __version__,
            "python": platform.python_version(),
            **_versions(),
            "torch": str(torch.__version__),
        },  # its build too (+cu130), which an index's package does not name
        "git": git_commit(Path(__file__).resolve().parent),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "device_name": named,
        "device_id": _device_id(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "at_once": at_once,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in _TELLING},
        "seed": seed,
        "data": dict(data or {}),
        "held_out": dict(held_out or {}),
        "recipe": recipe,
        "source": dict(source or {}),
        "metrics": {name: facts.to_json() for name, facts in (metrics or {}).items()},
        "kernels": _grouped(kernels),
        **({} if sweep is None else {"sweep": dict(sweep)}),
    }


def _device_id(device: str) -> str | None:
    """Eight hexadecimal digits, equal where two sessions used one device between two starts of its machine; else None.

    A report sees by it which runs were beside each other. It is a hash that includes Linux's identifier of this boot, which is
    another one after a restart, so it identifies no machine.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.is_file():
        return None
    which = device
    if device.startswith(
        "cuda"
    ):  # CUDA_VISIBLE_DEVICES numbers devices anew, so the number alone does not say which one
        import torch

        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if torch.cuda.is_available() else None
        if uuid is None:
            return None
        which = str(uuid)
    return hashlib.sha256(f"{boot.read_text('utf-8')} {which}".encode()).hexdigest()[:8]


def _grouped(choices: Sequence[LayerChoice]) -> list[dict[str, Any]]:
    """Choices that differ in the name of the weight alone as one."""
    groups: dict[LayerChoice, list[str]] = {}
    for choice in choices:
        groups.setdefault(replace(choice, name=""), []).append(choice.name)
    return [
        {"backend": c.backend, "block": c.block, "how": c.how, "reason": c.reason, "weights": names}
        for c, names in groups.items()
    ]


def kernels_in_words(session: Mapping[str, Any]) -> str:
    """Which ways compute how many sparse weights in a session, in one line; empty where it does not say."""
    return in_words(
        LayerChoice(name, group["backend"], group["block"], group["reason"], group["how"])
        for group in session.get("kernels") or ()
        for name in group["weights"]
    )


_TELLING = (
    "CUBLAS_WORKSPACE_CONFIG",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
)


def begun_as(sessions: Sequence[Mapping[str, Any]]) -> str | None:
    """The recipe's name that a run was begun with, whatever file it continues with; None of versions that did not write it."""
    return next((session["recipe"] for session in sessions if session.get("recipe")), None)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may change the bits of a resumed run, and data and code that are not the same, in words.

    A GPU is known by its model where both sessions name one, not by its number in the machine.
    """
    keys = {
        "device_name" if key == "device" and before.get("device_name") and now.get("device_name") else key: name
        for key, name in BITS.items()
    }
    found = [(name, _at(before, key), _at(now, key)) for key, name in keys.items()]
    ways = kernels_in_words(before), kernels_in_words(now)
    if all(ways):
        found.append(("kernels", *ways))
    said = [f"{name}: {then} before, {today} now" for name, then, today in found if then != today]
    for key, what in (("data", "data"), ("source", "the source of"), ("metrics", "the metric")):
        old, new = before.get(key) or {}, now.get(key) or {}
        said += [f"{what} {name} has changed" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    return said


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds `folder`, and whether it has changes that are not committed; None outside one."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if not folder.is_relative_to(top) or "site-packages" in folder.relative_to(top).parts:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", str(folder)))}
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _at(entry: Mapping[str, Any], key: str) -> Any:
    value: Any = entry
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
