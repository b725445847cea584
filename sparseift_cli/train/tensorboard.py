"""Metrics for TensorBoard, beside metrics.jsonl: an extra, for who likes curves while they grow."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError


class TensorBoard:
    """Writes the numbers of every line of metrics under `folder/tensorboard`, at the step of the line.

    Raises:
        UsageError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            raise UsageError(
                "--tensorboard needs the package tensorboard",
                hint="pip install tensorboard; metrics.jsonl is written in any case",
            ) from None
        self.writer = module.SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self.writer.add_scalar(name, value, row["step"])
        for weight, numbers in row.get("masks", {}).items():
            for name, value in numbers.items():
                self.writer.add_scalar(f"{name}/{weight}", value, row["step"])
        self.writer.flush()
