"""Functions in processes of their own whose start takes milliseconds: forked from one process that has imported torch.

That process starts with the first use, imports what most tests need (two to three seconds) and computes nothing itself, so
every child begins as a fresh interpreter would with `sparseift_cli.train.run` imported.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["sparseift_cli.train.run", "sparseift_cli.cli.train", "sparseift_cli.trace.build"]


class Done(NamedTuple):
    """How a process ended: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def in_processes(
    function: Callable[..., None], calls: Sequence[tuple[Any, ...]], environments: Sequence[Mapping[str, str]] = ()
) -> list[Done]:
    """Call `function` (of a module of tests.helpers) with each of the `calls`, at once, in a process each.

    Args:
        function: found by its name in the child.
        calls: the arguments of each process.
        environments: variables that each process has besides those of the server.
    """
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    started = []
    for number, arguments in enumerate(calls):
        receive, send = context.Pipe(duplex=False)
        environment = environments[number] if environments else {}
        process = context.Process(target=_call, args=(send, str(Path.cwd()), dict(environment), function, arguments))
        process.start()
        send.close()
        started.append((process, receive))
    done = []
    for process, receive in started:
        try:
            code, out, err = receive.recv() if receive.poll(120) else (1, "", "no answer within 120 s")
        except EOFError:
            code, out, err = 1, "", "ended without an answer"
        process.join(30)
        process.kill()
        process.join()
        process.close()
        receive.close()
        done.append(Done(code, out, err))
    return done


def _call(send: Any, folder: str, environment: dict[str, str], function: Callable[..., None], arguments: Any) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            function(*arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
    send.send((code, out.getvalue(), err.getvalue()))
    send.close()


def command(*words: str) -> None:
    """`sparseift WORDS`."""
    from sparseift_cli.cli.app import main

    sys.argv = ["sparseift", *words]
    main()
