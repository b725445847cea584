"""The pages tell the truth: their outputs are what the tool prints, their options exist, their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from sparseift_cli.cli.app import SUMMARIES, subcommand
from tests.tools import docs


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", docs.PAGES)
def test_shown_output_is_current(name: str) -> None:
    assert not (difference := docs.stale(name)), f"run `make docs`:\n{difference}"


def test_every_marker_has_its_block(readme: str) -> None:
    assert readme.count("<!-- output:") == len(docs.BLOCK.findall(readme)) > 0


def test_generator_replaces_the_block_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "output", lambda args: f"new {args}")
    page = "a\n<!-- output: sparseift x --y 1 -->\n```text\nold\nold\n```\nb\n```text\nkept\n```\n"
    want = "a\n<!-- output: sparseift x --y 1 -->\n```text\nnew x --y 1\n```\nb\n```text\nkept\n```\n"
    assert docs.regenerate(page) == want
    assert docs.regenerate(want) == want


def test_failing_command_shows_its_exit_code() -> None:
    shown = docs.output("flops no_such_model").splitlines()
    assert shown[0] == "$ sparseift flops no_such_model"
    assert shown[-2:] == ["$ echo $?", "2"]


def shown_commands(text: str) -> list[list[str]]:
    """Every `sparseift ...` line of the shell blocks, in words, its continuation lines joined."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("sparseift ")]


def options_of(command: Any) -> set[str]:
    """Every option of a command; of a group, those of all its subcommands."""
    own = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("name", docs.PAGES)
def test_every_option_shown_exists(name: str, root: Path) -> None:
    options = {name: options_of(subcommand(name)) for name in SUMMARIES}
    shown = [words[1:] for words in shown_commands((root / name).read_text("utf-8"))]
    assert shown
    assert {words[0] for words in shown} <= {*options, "--help", "--version"}
    named = {(words[0], word.partition("=")[0]) for words in shown for word in words[1:] if word.startswith("--")}
    assert {(command, option) for command, option in named if option not in {*options[command], "--help"}} == set()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", docs.PAGES)
def test_links_lead_somewhere(name: str, root: Path) -> None:
    page = root / name
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_python_examples_run(
    readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    by_hand = []
    for block in python_blocks(readme):
        if "transformers" in block:  # run by hand where that is installed: it is no dependency of the tests
            by_hand.append(compile(block, "README.md", "exec"))
        else:
            exec(compile(block, "README.md", "exec"), {})
    assert len(by_hand) == 1
    ratio, kernels = capsys.readouterr().out.splitlines()  # of the training loop, and of the one on stored blocks
    assert re.fullmatch(r"\d+(/\d+)?", ratio)
    assert re.match(r"8 layers (in blocks of 32|masked-dense: Triton kernels need a CUDA device)", kernels)


@pytest.mark.parametrize("name", ["torchvision", "zoo", "transformers", "transformers_more", "timm", "others"])
def test_the_surveys_say_what_the_page_quotes(root: Path, name: str) -> None:
    page = (root / "sparseift_cli" / "cli" / "README.md").read_text("utf-8")
    survey = (root / "tests" / "tools" / "survey" / f"{name}.md").read_text("utf-8")
    verdicts = re.findall(r"^\| \S+ \| (full|half|refused|wrong|broken)\b", survey, re.M)
    counts = " | ".join(str(verdicts.count(verdict)) for verdict in ("full", "half", "refused", "wrong"))
    (of_those,) = re.findall(r"without a justified reason: (\d+)/(\d+)", survey)
    assert f"survey/{name}.md" in page
    assert f"| {counts} | {of_those[0]} of {of_those[1]} |" in page


def test_times_of_block_kernels_are_the_measured_ones(root: Path, readme: str) -> None:
    rows = json.loads((root / "tests" / "benchmarks" / "whole_step.json").read_text("utf-8"))["rows"]
    (dense,) = (row for row in rows if row["arm"] == "dense" and row["run"] == 1)
    ratios: dict[str, list[str]] = {}
    for row in rows:
        ratios.setdefault(row["arm"], []).append("{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"]))
    parts = ("weights", "gradients", "optimiser")
    held = {r["arm"]: sum(r["memory"][p] for p in parts) / sum(dense["memory"][p] for p in parts) for r in rows}
    quoted = re.findall(r"^\| `wide` (\S+?)(, `--scope inner`)? \| (.*?) \| (.*?) \| (.*?) \|$", readme, re.M)
    assert len(quoted) == 4
    for sparsity, inner, blocks, masked, memory in quoted:
        arm = f"{'inner' if inner else 'wide'} 0{sparsity}"
        assert blocks in ratios[arm], arm
        assert masked == "not run" or masked in ratios[f"{arm} masked-dense"]
        assert memory == f"{held[arm]:.2f}"


def test_step_times_are_the_measured_ones(root: Path) -> None:
    page = (root / "recipes" / "README.md").read_text("utf-8")
    for line in (root / "tests" / "benchmarks" / "gpu_step.jsonl").read_text("utf-8").splitlines():
        m = json.loads(line)
        assert f"| {m['ms']:.2f} [{m['low']:.2f}, {m['high']:.2f}] | {m['n']} |" in page
