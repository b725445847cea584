"""What a user of the library sees of an error that is not caught."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import nn

import sparseift_cli
from sparseift_cli.errors import UsageError


def test_a_traceback_shows_the_hint() -> None:
    with pytest.raises(UsageError) as caught:
        sparseift_cli.transform(nn.Linear(3, 3), torch.zeros(1, 3), member="wid", sparsity=0.5)
    shown = "".join(traceback.format_exception(caught.value))
    assert "unknown member 'wid'\nhint: did you mean 'wide'?" in shown


def test_a_shell_completes_the_public_names() -> None:
    assert {"transform", "flops", "Sparsifier"} <= set(dir(sparseift_cli)) and "Any" not in dir(sparseift_cli)
