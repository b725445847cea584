"""`sparseift_cli.transform` and `sparseift_cli.masks` are functions, whatever subpackages were imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("first", ["transform.edits", "masks.layout", "api", "sparsity.sparsifier"])
def test_public_functions_are_not_replaced_by_subpackages_of_the_same_name(first: str) -> None:
    code = (
        f"import sparseift_cli.{first}\n"
        "import sparseift_cli\n"
        "assert all(callable(getattr(sparseift_cli, n)) for n in sparseift_cli.__all__ if n != '__version__')\n"
        "import sparseift_cli.transform.restore\n"
        "assert callable(sparseift_cli.masks) and callable(sparseift_cli.transform)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
