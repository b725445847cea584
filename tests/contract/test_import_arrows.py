"""Imports point one way. Every arrow of the design is a line of RULES, and every line is shown to bite."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = "sparseift_cli"


@dataclass(frozen=True)
class Rule:
    """Modules that match `who` (globs, less `but`) never import `never`, or anything below it.

    A lazy rule speaks of module level only: what runs on import. Names in `never` that start with a dot are ours.
    `breaks` is a module and a line that the rule must catch.
    """

    who: tuple[str, ...]
    never: tuple[str, ...]
    breaks: tuple[str, str]
    but: tuple[str, ...] = ()
    lazy: bool = False


TORCH = ("torch", "fvcore", "safetensors.torch")
HEAVY = (*TORCH, "pandas", "numpy", "scipy", "sympy", "matplotlib", "pydantic", "yaml", "safetensors")

RULES = {
    "nothing imports the command line": Rule(
        who=("*",), but=("cli", "cli.*", "__main__"), never=(".cli",), breaks=("trace.build", "from ..cli import app")
    ),
    "the roots import nothing of ours": Rule(
        who=("table.poly", "table.shape", "errors"),
        never=(".",),
        breaks=("table.poly", "from ..errors import UsageError"),
    ),
    "base rests on errors alone": Rule(
        who=("base", "base.*"),
        never=(".plan", ".table", ".models", ".trace", ".mask", ".sparsity", ".data", ".recipe", ".runs", ".report"),
        breaks=("base.machine", "from ..plan import spec"),
    ),
    "the roots need no torch": Rule(
        who=("table.*", "errors", "base.locations"),
        never=HEAVY,
        breaks=("table.poly", "import numpy as np"),
    ),
    "facts, plan and audit are pure": Rule(
        who=("table", "table.*", "plan", "plan.*"),
        never=(*TORCH, ".trace", ".models"),
        breaks=("plan.plan", "def f():\n    import torch.nn"),
    ),
    "transforms never see the zoo": Rule(
        who=("transforms", "transforms.*"),
        but=("transforms.convert", "transforms.restore", "transforms.artifact"),
        never=(".models",),
        breaks=("transforms.surgery", "from ..models.zoo import registry"),
    ),
    "masks know no algorithm, plan or model": Rule(
        who=("mask", "mask.*"),
        never=(".sparsity", ".plan", ".transforms", ".models", ".recipe"),
        breaks=("mask.mask", "from ..plan import spec"),
    ),
    "kernels see tensors and indices": Rule(
        who=("kernels", "kernels.*"),
        never=(".plan", ".table", ".recipe", ".transforms", ".train", ".models", ".sparsity"),
        breaks=("kernels.blocks", "from ..plan import spec"),
    ),
    "kernels cost nothing until one is used": Rule(
        who=("kernels",), never=HEAVY, lazy=True, breaks=("kernels", "import torch")
    ),
    "sparsity never sees transforms": Rule(
        who=("sparsity", "sparsity.*"),
        never=(".transforms", ".plan"),
        breaks=("sparsity.sparsifier", "from .. import transforms"),
    ),
    "report never imports torch": Rule(
        who=("report", "report.*"), never=TORCH, breaks=("report.html.page", "def f():\n    from torch import nn")
    ),
    "registries start without torch": Rule(
        who=(
            *("models", "models.zoo", "models.zoo.registry", "models.zoo.catalog", "data", "data.registry"),
            *(
                "optim",
                "optim.optimizers",
                "optim.schedules",
                "sparsity.algorithms",
                "sparsity.schedule",
                "mask.patterns",
            ),
        ),
        never=TORCH,
        lazy=True,
        breaks=("models.zoo.registry", "from torch import nn"),
    ),
    "commands start light": Rule(
        who=("cli", "cli.*", "__main__"), never=HEAVY, lazy=True, breaks=("cli.flops", "if True:\n    import pandas")
    ),
}


def matches(rule: Rule, module: str) -> bool:
    """Does `rule` speak of `module` (its name inside the package)?"""
    named = any(fnmatchcase(module, glob) for glob in rule.who)
    return named and not any(fnmatchcase(module, glob) for glob in rule.but)


def imports(source: str, package: str, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that `source`, a module of `package`, imports.

    `from a import b` gives `a.b`: b may be a module. With `lazy`, only what runs when the module is imported: no
    function bodies, nothing under TYPE_CHECKING.
    """
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if lazy and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(rule: Rule, module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Every import in `source` that `rule` forbids, as `module:line: name`."""
    if not matches(rule, module):
        return []
    name = f"{PACKAGE}.{module}".rstrip(".")
    package = name if is_package else name.rpartition(".")[0]
    forbidden = [PACKAGE + n.rstrip(".") if n.startswith(".") else n for n in rule.never]
    return [
        f"{name}:{line}: {found}"
        for line, found in imports(source, package, lazy=rule.lazy)
        if any(f"{found}.".startswith(f"{never}.") for never in forbidden)
    ]


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Every module of the package: its dotted name inside the package ("" for the package itself) and its file."""
    top = root / PACKAGE
    for path in sorted(top.rglob("*.py")):
        parts = path.relative_to(top).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_arrow_holds(rule: Rule, root: Path) -> None:
    found = [
        broken
        for module, path in modules(root)
        for broken in violations(rule, module, path.read_text("utf-8"), is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_speaks_of_what_exists(rule: Rule, root: Path) -> None:
    existing = {module for module, _ in modules(root)}
    named = {name for name in (*rule.who, *rule.but) if "*" not in name}
    assert named - existing == set()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_can_fail(rule: Rule) -> None:
    module, snippet = rule.breaks
    assert violations(rule, module, snippet)
    assert not violations(rule, module, "import math\nfrom pathlib import Path")


@pytest.mark.parametrize(
    ("package", "line", "name"),
    [
        ("sparseift_cli.cli", "from .. import __version__", "sparseift_cli.__version__"),
        ("sparseift_cli.cli", "from ..models.zoo.registry import load", "sparseift_cli.models.zoo.registry.load"),
        ("sparseift_cli", "from . import plan", "sparseift_cli.plan"),
        ("sparseift_cli", "import torch.nn as nn", "torch.nn"),
        ("sparseift_cli", "def f():\n  import importlib\n  return importlib.import_module('torch')", "torch"),
    ],
)
def test_names_are_resolved(package: str, line: str, name: str) -> None:
    assert name in [found for _, found in imports(line, package, lazy=False)]


@pytest.mark.parametrize(
    "source", ["def f():\n    import torch", "if TYPE_CHECKING:\n    import torch", "f = lambda: __import__('torch')"]
)
def test_lazy_sees_only_what_runs_on_import(source: str) -> None:
    assert not list(imports(source, PACKAGE, lazy=True))
    assert "torch" in [found for _, found in imports(source, PACKAGE, lazy=False)]


def loaded(code: str, root: Path) -> set[str]:
    """Top-level modules in sys.modules after `code` ran in a fresh interpreter, whatever it printed or exited with."""
    probe = f"import atexit, sys\natexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\n{code}"
    run = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stderr.split()}


def test_start_up_is_light(root: Path) -> None:
    found = loaded("import sparseift_cli.cli.app", root)
    assert "typer" in found
    assert not found & {"torch", "pandas", "numpy", "pydantic", "sympy", "yaml", "fvcore", "safetensors"}


def test_help_is_drawn_without_a_markdown_parser_and_tracebacks_which_are_there_for_others(root: Path) -> None:
    call = "import sys\nsys.argv = ['sparseift', '--help']\nfrom sparseift_cli.cli.app import main\n"
    found = loaded(f"{call}main()", root)
    assert "rich" in found and not {"markdown_it", "pygments"} & found
    after = (
        f"{call}try:\n    main()\nexcept SystemExit:\n    from rich.markdown import Markdown\n    Markdown('# real')\n"
        "    from rich.traceback import Traceback\n    Traceback"
    )
    assert {"markdown_it", "pygments"} <= loaded(after, root)


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "flops --help",
        "inspect --help",
        "report --help",
        "report diff --help",
        "flops resnet18 --sparsity 0.9",
        "flops resnet18 --sparsity 0.5,0.9",
    ],
)
def test_command_without_torch(line: str, root: Path) -> None:
    code = f"import sys\nsys.argv = 'sparseift {line}'.split()\nfrom sparseift_cli.cli.app import main\nmain()"
    assert not loaded(code, root) & {"torch", "pandas", "numpy", "sympy", "fvcore"}
