"""Every command output that a page shows is what the tool prints: `python -m tests.tools.docs --write` writes it anew.

A block is a marker line and the fence below it; the fence's content belongs to the generator:

    <!-- output: sparseift flops resnet18 --sparsity 0.9 -->
    ```text
    ...
    ```

The command runs as a pipe would (no colour, no cut columns, help at 100 columns) from the repository root. A failing
command shows its exit code too. Without --write this prints what differs and exits 1. The pages of kept results
(tests/results.py) are written on the way.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.tools import results

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ("README.md", "recipes/README.md", "sparseift_cli/cli/README.md")
BLOCK = re.compile(r"(?P<marker><!-- output: sparseift (?P<args>.*?) -->\n)```text\n.*?^```$", re.DOTALL | re.MULTILINE)
SCRIPT = "import sys; from sparseift_cli.cli.app import main; sys.argv[0] = 'sparseift'; main()"
PLAIN = {
    "COLUMNS": "100",
    "TERMINAL_WIDTH": "100",
    "NO_COLOR": "1",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONUNBUFFERED": "1",
}


def output(args: str) -> str:
    """What a terminal shows for `sparseift ARGS`: the command, its output, and its exit code where it is not 0."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *shlex.split(args)],
        cwd=ROOT,
        env={**os.environ, **PLAIN},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if "Traceback (most recent call last)" in run.stdout:
        raise RuntimeError(f"sparseift {args} broke:\n{run.stdout}")
    lines = [f"$ sparseift {args}", *run.stdout.strip("\n").splitlines()]
    if run.returncode:
        lines += ["$ echo $?", str(run.returncode)]
    return "\n".join(line.rstrip() for line in lines)


def regenerate(page: str) -> str:
    """The text of `page` with the content of every output block made anew."""
    return BLOCK.sub(lambda block: f"{block['marker']}```text\n{output(block['args'])}\n```", page)


def stale(name: str) -> str:
    """How the page `name` differs from what the tool prints today, as a unified diff; empty when it is current."""
    old = (ROOT / name).read_text("utf-8")
    new = regenerate(old)
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, f"{name} (as printed today)"))


def main(write: bool) -> int:
    """Bring every page up to date, or say how it differs. Returns the exit code."""
    for name in PAGES:
        if difference := stale(name):
            if not write:
                print(difference)
                return 1
            (ROOT / name).write_text(regenerate((ROOT / name).read_text("utf-8")), "utf-8")
            print(f"{name}: written")
    return results.main(write)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
