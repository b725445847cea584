"""How the code is written: plain words, shapes in docstrings, functions that fit a screen, one meaning a class name.

The words are those of the field; what is listed in DIALECT once stood for them here and made readers stop.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools import docs

LONGEST_FUNCTION = 60  # lines
DIALECT = frozenset(
    [
        "hear",
        "hears",
        "heard",
        "nobody",
        "whoever",
        "patient",
        "hush",
        "told",
        "lies",
        "stands",
        "deal",
        "deals",
        "dealt",
        "become",
        "seat",
        "lots",
        "spend",
        "spends",
        "spent",
        "price",
        "prices",
    ]
)
SCHEMA_KEYS = re.compile(r"\bflops_spent\b|\"spent\"|--seat=")
"""Keys of metrics.jsonl and summary.json, and an option that recorded command lines of older runs have: they are read for ever."""
SHAPE = re.compile(r"\[[^\]]*\]|scalar|any shape|same shape|of the shape")
OUTSIDE = re.compile(r"\bdesign(\.md| section)|shared/|layout\.md", re.IGNORECASE)


def sources(root: Path, *folders: str) -> list[Path]:
    """Every Python file of the package, and of `folders`."""
    return [path for folder in ("sparseift_cli", *folders) for path in sorted((root / folder).rglob("*.py"))]


def functions(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    """Functions and methods outside of functions, with the class of each method."""
    waiting: list[tuple[ast.AST, ast.ClassDef | None]] = [(tree, None)]
    while waiting:
        node, owner = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, owner
            elif isinstance(child, ast.ClassDef):
                waiting.append((child, child))
            elif not isinstance(child, ast.expr):
                waiting.append((child, owner))


def dialect(text: str) -> list[str]:
    """The words of DIALECT in a piece of source, as words of text or as parts of a name.

    >>> dialect("nobody_told"), dialect("steps"), dialect("The mask is given back.")
    (['nobody', 'told'], [], ['given back'])
    """
    found = [word for word in re.findall(r"[a-z]+", text.lower()) if word in DIALECT]
    return found + re.findall(r"\b(?:gives? back|given back)\b", text)


def test_plain_words(root: Path) -> None:
    found = []
    for path in sources(root):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
            kinds = (tokenize.COMMENT, tokenize.STRING, tokenize.NAME, getattr(tokenize, "FSTRING_MIDDLE", -1))
            if token.type in kinds and (words := dialect(SCHEMA_KEYS.sub("", token.string))):
                found.append(f"{path.relative_to(root)}:{token.start[0]}: {', '.join(words)}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", [*docs.PAGES, "sparseift_cli/README.md"])
def test_plain_words_on_pages(name: str, root: Path) -> None:
    lines = (root / name).read_text("utf-8").splitlines()
    found = [f"{name}:{i}: {', '.join(words)}" for i, line in enumerate(lines, 1) if (words := dialect(line))]
    assert not found, "\n".join(found)


def test_the_dialect_is_seen() -> None:
    assert dialect("the step was not heard of") == ["heard"] and dialect("is_hushed, stand, priceless") == []


def test_functions_fit_a_screen(root: Path) -> None:
    long = [
        f"{path.relative_to(root)}:{f.lineno}: {f.name} has {f.end_lineno - f.lineno + 1} lines"
        for path in sources(root)
        for f, _ in functions(ast.parse(path.read_text("utf-8")))
        if f.end_lineno is not None and f.end_lineno - f.lineno >= LONGEST_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_one_meaning_a_class_name(root: Path) -> None:
    """Models of the zoo apart: an Attention is one of its family."""
    places: dict[str, set[str]] = defaultdict(set)
    for path in sources(root):
        if "zoo" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    places[node.name].add(str(path.relative_to(root)))
    assert {name: sorted(where) for name, where in places.items() if len(where) > 1} == {}


def test_public_functions_of_tensors_give_shapes(root: Path) -> None:
    bare = []
    for path in sources(root):
        for function, owner in functions(ast.parse(path.read_text("utf-8"))):
            public = not function.name.startswith("_") and not (owner and owner.name.startswith("_"))
            arguments = (*function.args.args, *function.args.kwonlyargs)
            types = " ".join(ast.unparse(a) for a in (*(x.annotation for x in arguments), function.returns) if a)
            said = (ast.get_docstring(function) or "") + ((ast.get_docstring(owner) or "") if owner else "")
            if public and re.search(r"\bTensor\b", types) and function.name != "forward" and not SHAPE.search(said):
                bare.append(f"{path.relative_to(root)}:{function.lineno}: {function.name}")
    assert not bare, "\n".join(bare)


def test_the_formatter_formats_everything(root: Path) -> None:
    skipped = re.compile(r"#\s*fmt:\s*(skip|off)\s*$", re.MULTILINE)
    assert [str(p) for p in sources(root, "tests") if skipped.search(p.read_text("utf-8"))] == []


def test_docstrings_point_inside(root: Path) -> None:
    """A reader has this repository and the papers, and nothing else."""
    found = []
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and OUTSIDE.search(ast.get_docstring(node) or ""):
                found.append(f"{path.relative_to(root)}: {getattr(node, 'name', 'module')}")
    assert not found, "\n".join(found)


def with_examples() -> list[str]:
    """Modules of the package that have doctests."""
    root = Path(__file__).resolve().parents[2]
    files = [p for p in sources(root) if re.search(r"^\s*>>> ", p.read_text("utf-8"), re.MULTILINE)]
    names = [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in files]
    assert len(names) > 5
    return names


@pytest.mark.parametrize("name", with_examples())
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed
