"""The repository: files at the top, the two commands of the README, and a wheel that needs nothing else of it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import sparseift_cli

TOP = {"pyproject.toml", "sparseift_cli", "recipes", "tests", "README.md", "Makefile", "LICENSE", "CHANGELOG.md"}


@pytest.fixture(scope="module")
def files(root: Path) -> list[Path]:
    """Every file that is, or would be, committed."""
    if not (root / ".git").exists():
        pytest.skip("needs a git checkout to know which files are the project's")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(name) for name in sorted(set(listing.stdout.split("\0"))) if name and (root / name).is_file()]


def text_files(files: list[Path]) -> list[Path]:
    """Those of `files` that people write: code, recipes, documents, scripts."""
    return [p for p in files if p.suffix in {".py", ".md", ".toml", ".yaml", ".txt"} or p.name in {"Makefile", "run"}]


def test_top_level_holds_only_what_belongs(files: list[Path]) -> None:
    found = {path.parts[0] for path in files}
    assert {name for name in found if not name.startswith(".")} <= TOP


def test_no_file_names_a_machine(files: list[Path], root: Path) -> None:
    private = re.compile(r"/(home|root|work|Users)/\w")
    others = [p for p in text_files(files) if p.name != Path(__file__).name]
    assert [str(p) for p in others if private.search((root / p).read_text("utf-8"))] == []


def test_readme_commands_are_targets(root: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    shown = set(re.findall(r"^make ([a-z-]+)", (root / "README.md").read_text("utf-8"), flags=re.MULTILINE))
    assert {"demo", "test"} <= shown
    assert shown <= targets


def test_ci_runs_what_the_readme_says(root: Path) -> None:
    script = (root / ".ci" / "run").read_text("utf-8").splitlines()
    assert "set -euo pipefail" in script
    assert script.index("make test") < script.index("make check")
    assert os.access(root / ".ci" / "run", os.X_OK)


def test_dependencies_are_what_is_imported(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[\[<>=]", line)[0] for line in project["dependencies"]}
    found = {
        top
        for path in (root / "sparseift_cli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if (top := name.partition(".")[0]) not in {*sys.stdlib_module_names, "sparseift_cli"}
    }
    found.discard("triton")  # comes with torch's builds for GPUs, and is imported where one is used
    assert {{"yaml": "pyyaml"}.get(name, name) for name in found} == declared


def test_constraints_pin_what_pyproject_asks_for(root: Path) -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (root / ".ci" / "constraints.txt").read_text("utf-8"), flags=re.M))
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=]", line)[0] for line in asked}
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert names <= pinned
    assert pins["torch"] == "2.13.0"


def test_wheel_says_the_version_of_the_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Name"] == "sparseift"
    assert metadata["Version"] == sparseift_cli.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "sparseift = sparseift_cli.cli.app:main" in entry_points


def test_wheel_carries_data_and_no_tests(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    package = root / "sparseift_cli"
    data = {f"sparseift_cli/{p.relative_to(package)}" for p in package.glob("models/zoo/tables/*.json")}
    data |= {f"sparseift_cli/{p.relative_to(package)}" for p in package.rglob("*.cpp")}
    recipes = {f"sparseift_cli/{p.relative_to(root)}" for p in root.glob("recipes/*/*.yaml")}
    assert data | recipes | {"sparseift_cli/py.typed"} <= inside
    assert not [name for name in inside if "/results/" in name]  # runs kept in the repository
    metadata = f"sparseift-{sparseift_cli.__version__}.dist-info"
    assert {name.split("/")[0] for name in inside} == {"sparseift_cli", "sparseift.py", metadata}


def recipes_seen(path: Path, cwd: Path) -> tuple[Path, set[str]]:
    """The recipe folder, and what lies in it, of the package on `path` as a process in `cwd` sees it."""
    code = (
        "from sparseift_cli.base import locations; d = locations.recipes_dir(); print(d);"
        "print(*(p.relative_to(d).as_posix() for p in d.glob('*/*.yaml')), sep='\\n')"
    )
    env = {**os.environ, "PYTHONPATH": str(path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    folder, *names = run.stdout.splitlines()
    return Path(folder), set(filter(None, names))


def test_recipes_are_found_from_anywhere(unpacked_wheel: Path, root: Path, tmp_path: Path) -> None:
    want = {p.relative_to(root / "recipes").as_posix() for p in root.glob("recipes/*/*.yaml")}
    assert recipes_seen(root, tmp_path) == (root / "recipes", want)
    assert recipes_seen(unpacked_wheel, tmp_path) == (unpacked_wheel / "sparseift_cli" / "recipes", want)
