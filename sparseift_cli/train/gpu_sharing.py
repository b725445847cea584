"""Kernels of several processes at the same time on one NVIDIA GPU: a private daemon of its Multi-Process Service (MPS).

Without it the processes take turns, and where one leaves half of the GPU idle, so do all of them. NVIDIA's driver brings the
daemon; it needs no rights and changes no setting of the GPU. No torch here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_USUAL = Path("/tmp/nvidia-mps/nvidia-cuda-mps-control.pid")
PATIENCE = 20.0  # seconds for a word of the daemon, or for a process that asks it for the GPU
_ATTACH = """
import ctypes, sys
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
sys.exit(cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
         or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
"""
"""What a process does first on a GPU; exits with CUDA's error number, 0 where it got its place."""


@contextmanager
def shared_gpu(note: Callable[[str], object]) -> Iterator[Mapping[str, str]]:
    """Environment variables that let child processes share the GPU; none where they already do, or cannot.

    Who sets CUDA_MPS_PIPE_DIRECTORY has a daemon, or wants none: nothing is started then. The daemon ends with the context.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if PIPES in os.environ or hidden or shutil.which(CONTROL) is None or _another_runs():
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="sparseift-mps-", ignore_cleanup_errors=True) as folder:
        places = {PIPES: folder, LOGS: folder}
        environment = {**os.environ, **places}
        try:
            works = _started(environment)
            if not works:
                note("runs on a GPU take turns: NVIDIA's Multi-Process Service does not work here")
            yield places if works else {}
        finally:
            _ended(environment)


def _another_runs() -> bool:
    """Does a daemon have the usual place, where every CUDA program looks for one?"""
    try:
        os.kill(int(_USUAL.read_text("utf-8")), 0)
    except PermissionError:
        return True  # somebody else's process
    except (OSError, ValueError):
        return False
    return True


def _started(environment: Mapping[str, str]) -> bool:
    """Start the daemon; can a process reach the GPU through it?

    The daemon sees every GPU, whatever CUDA_VISIBLE_DEVICES: it would number anew those that it sees, and the runs, which
    obey the variable too, would look for theirs among these.
    """
    try:
        _call([CONTROL, "-d"], {k: v for k, v in environment.items() if k != "CUDA_VISIBLE_DEVICES"})
        _call([sys.executable, "-c", _ATTACH], environment)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _ended(environment: Mapping[str, str]) -> None:
    """End the daemon, and after ten seconds whatever still uses it."""
    with suppress(OSError, subprocess.SubprocessError):
        _call([CONTROL], environment, "quit -t 10\n")


def _call(command: list[str], environment: Mapping[str, str], said: str = "") -> None:
    # A session of its own: Ctrl-C is for the runs, which need the daemon while they save. No pipes: it would hold them open.
    subprocess.run(
        command, input=said, text=True, env=dict(environment), timeout=PATIENCE, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
