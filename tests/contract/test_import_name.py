"""`import sparseift` and `import sparseift_cli` are one package: from the wheel, an editable install and a plain checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import sparseift
import sparseift.sparsity.schedule
import sparseift_cli
import sparseift_cli.sparsity.schedule
from sparseift import UsageError
from sparseift.base.registry import Registry
from sparseift.plan import audit

assert sparseift is sparseift_cli
assert sparseift.__version__ == sparseift_cli.__version__
assert sparseift.sparsity.schedule.UpdateSchedule is sparseift_cli.sparsity.schedule.UpdateSchedule
assert UsageError is sparseift_cli.errors.UsageError
assert Registry.__module__ == "sparseift_cli.base.registry"
assert audit.__spec__.name == audit.__name__ == "sparseift_cli.plan.audit"
assert callable(sparseift.transform) and callable(sparseift.masks)
try:
    import sparseift.no_such_module
except ModuleNotFoundError as error:
    assert "sparseift_cli.no_such_module" in str(error)
else:
    raise AssertionError("sparseift.no_such_module was found")
print("one package")
"""


def probe(*paths: Path, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def test_both_names_are_one_package(root: Path, tmp_path: Path) -> None:
    assert probe(root, root / "sparseift_cli" / "import_name", cwd=tmp_path) == "one package\n"


def test_both_names_in_the_wheel(unpacked_wheel: Path, tmp_path: Path) -> None:
    assert (unpacked_wheel / "sparseift.py").is_file()
    assert not (unpacked_wheel / "sparseift_cli" / "import_name").exists()
    assert probe(unpacked_wheel, cwd=tmp_path) == "one package\n"


def test_an_editable_install_has_both(root: Path) -> None:
    """What `make setup` did: the environment's .pth names both folders."""
    files = [p for p in Path(sys.prefix).rglob("*sparseift*.pth") if "site-packages" in p.parts]
    if not files:
        pytest.skip("sparseift is not installed in this environment")
    folders = {Path(line).resolve() for file in files for line in file.read_text("utf-8").splitlines()}
    (checkout,) = {f for f in folders if (f / "sparseift_cli").is_dir()}
    assert checkout / "sparseift_cli" / "import_name" in folders
