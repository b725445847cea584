"""`sparseift train` in two processes: started by torchrun, or as torchrun starts them but forked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from .forked import command, in_processes


def on_two_processes(recipe: Path, root: Path, *words: str, forked: bool = False) -> dict[str, Any]:
    """The summary of one run; see `all_on_two_processes`."""
    (summary,) = all_on_two_processes([recipe], root, *words, forked=forked)
    return summary


def all_on_two_processes(recipes: list[Path], root: Path, *words: str, forked: bool = False) -> list[dict[str, Any]]:
    """Train `recipes` in turn and return the summaries of the runs.

    Args:
        recipes: the files.
        root: the folder of runs.
        words: further options of the command.
        forked: start the two processes without torchrun; saves the seconds in which three processes import torch.
    """
    train = ["train", *map(str, recipes), "--runs", str(root), "--json", *words]
    if forked:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **world} for rank in ("0", "1")]
        first, second = in_processes(command, [tuple(train)] * 2, ranks)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:] + second.stderr[-2000:]
        printed = first.stdout
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sparseift_cli"]
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, *torchrun, *train], capture_output=True, text=True, timeout=120, check=False, env=env
        )
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout
    return json.loads(printed)["runs"]
