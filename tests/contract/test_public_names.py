"""No module has the name of a public function: Python would replace `sparseift_cli.transform` when it imports the module."""

from __future__ import annotations

from pathlib import Path

import sparseift_cli


def test_no_module_has_the_name_of_a_public_function() -> None:
    folder = Path(sparseift_cli.__file__).parent
    modules = {p.stem for p in folder.glob("*.py")} | {p.name for p in folder.iterdir() if p.is_dir()}
    assert not modules & set(sparseift_cli.__all__)
    assert all(hasattr(sparseift_cli, name) for name in sparseift_cli.__all__)
