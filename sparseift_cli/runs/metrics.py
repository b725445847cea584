"""metrics.jsonl: one JSON object a line, only ever appended to, cut back to a checkpoint on resume.

A line is in the file when `sync` returns. A crash may leave half a line at the end; readers skip it and the next writer
cuts it off. A checkpoint remembers how long the file was, so a resumed run continues it as if nothing had happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..base.atomic import explain_os_errors, sync_folder
from ..errors import ArtifactError


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a metrics file; half a line at its end is no line yet.

    Raises:
        ArtifactError: a line before the last is no JSON object.
    """
    with explain_os_errors("read", path):
        content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ArtifactError(f"{path}:{number}: this line is no JSON object", hint="somebody else wrote into it")
        yield row


class Metrics:
    """The open file. `append` is cheap; `sync` waits for the disk and is called before every checkpoint.

    Raises:
        ArtifactError: the file cannot be opened, written, or is shorter than the checkpoint says.
    """

    def __init__(self, path: Path, *, position: int | None = None) -> None:
        """Open to append, after cutting the file to `position` bytes (a checkpoint's), or to its last whole line."""
        self.path = path
        with explain_os_errors("open", path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with explain_os_errors("open", path):
                sync_folder(path.parent)
                self._cut(self._whole() if position is None else position)
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a line. Its values are JSON; a NaN or infinity is written as the word that Python reads back."""
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        with explain_os_errors("write", self.path):
            while line:  # one system call as a rule: a line is never mixed up with another process's
                line = line[os.write(self._handle, line) :]

    def sync(self) -> int:
        """Wait until every line is on disk. Returns the length of the file in bytes, which the checkpoint keeps."""
        with explain_os_errors("write", self.path):
            os.fsync(self._handle)
            return os.fstat(self._handle).st_size

    def close(self) -> None:
        if self._handle >= 0:
            self.sync()
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _whole(self) -> int:
        """Length up to and with the last line break."""
        end = os.fstat(self._handle).st_size
        while end:
            start = max(0, end - 4096)
            found = os.pread(self._handle, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def _cut(self, position: int) -> None:
        size = os.fstat(self._handle).st_size
        if position > size or (position and os.pread(self._handle, 1, position - 1) != b"\n"):
            raise ArtifactError(
                f"{self.path} does not match the checkpoint: a line should end at byte {position:,}, and the file has "
                f"{size:,} bytes",
                hint="put the file back, or start a new run",
            )
        if position < size:
            os.ftruncate(self._handle, position)
            os.fsync(self._handle)
