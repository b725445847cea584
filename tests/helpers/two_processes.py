"""A command started by torchrun as two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def on_two_processes(recipe: Path, root: Path, *words: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sparseift_cli",
        "train",
        str(recipe),
        "--runs",
        str(root),
        "--json",
        *words,
    ]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    (summary,) = json.loads(done.stdout)["runs"]
    return summary
