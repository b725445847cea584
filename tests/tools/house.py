"""What the code base looks like in numbers: `python -m tests.tools.house [CHECKOUT]`.

Files, lines, modules with a single importer, short modules, arrows between the packages of `sparseift_cli`, and the files that
name a member or a mask algorithm. Imports are read from the source, those inside functions too; nothing is run.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "sparseift_cli"
SHORT = 40


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in its code."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known or base in known:
                    yield inner if inner in known else base


def room(name: str) -> str:
    """The folder of the package that a module is in; the module itself where it is in none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def naming(files: dict[str, Path], word: str) -> int:
    """How many modules have `word` as a name or in a string, docstrings and comments apart."""
    count = 0
    for path in files.values():
        tree = ast.parse(path.read_text("utf-8"))
        texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in texts]
        count += any(isinstance(s, str) and re.search(rf"\b(sparse_)?{word}\b", s) for s in strings)
    return count


def figures(root: Path) -> dict[str, int]:
    """The numbers of the checkout at `root`, by what they count."""
    files = modules(root)
    importers: dict[str, set[str]] = defaultdict(set)
    arrows: set[tuple[str, str]] = set()
    for name, path in files.items():
        for target in imported(name, path, set(files)):
            if target != name:
                importers[target].add(name)
            if room(target) != room(name):
                arrows.add((room(name), room(target)))
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in files.items()}
    code = {name for name, path in files.items() if path.name not in ("__init__.py", "__main__.py")}
    sources = [*(root / PACKAGE).rglob("*.py"), *(root / "tests").rglob("*.py")]
    classes: dict[str, set[str]] = defaultdict(set)
    for name, path in files.items():
        if ".zoo." not in name:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    classes[node.name].add(name)
    return {
        "modules": len(files),
        "lines": sum(lines.values()),
        "modules with one importer": sum(len(importers[name]) == 1 for name in code),
        f"modules under {SHORT} lines": sum(lines[name] < SHORT for name in code),
        "modules beside the folders": sum(name.count(".") == 1 for name in code),
        "folders": len({room(name) for name in files if name.count(".") > 1}),
        "arrows between rooms": len(arrows),
        "longest module, lines": max(lines.values()),
        "class names with more than one meaning": sum(len(places) > 1 for places in classes.values()),
        "lines with fmt: skip": sum(
            len(re.findall(r"#\s*fmt:\s*skip\s*$", p.read_text("utf-8"), re.M)) for p in sources
        ),
        "modules that name Sparse Parallel": naming(files, "parallel"),
        "modules that name RigL": naming(files, "rigl"),
        "modules that name CIFAR-100": naming(files, "cifar100"),
        "modules that name top-1": naming(files, "top1"),
        "test files": len(list((root / "tests").rglob("test_*.py"))),
        "lines of tests": sum(len(p.read_text("utf-8").splitlines()) for p in (root / "tests").rglob("*.py")),
    }


def main(checkouts: list[str]) -> None:
    """Print the figures of each checkout, side by side."""
    found = [figures(Path(folder)) for folder in checkouts]
    for what in found[0]:
        print(f"{what:42}" + "".join(f"{each[what]:>10,}" for each in found))


if __name__ == "__main__":
    main(sys.argv[1:] or ["."])
