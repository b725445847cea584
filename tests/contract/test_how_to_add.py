"""The pages' way from nothing to a result works as it is printed: every block is written to its file, every command is run.

A block of a page belongs to a file where its first line is a comment with the file's name. `sparseift` commands of shell blocks run
in the order of the page, in an empty folder that has what the page says the reader has.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import Sparseift

BLOCK = re.compile(r"^```(python|yaml|bash)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def follow(page: str, folder: Path, sparseift: Sparseift) -> list[str]:
    """Do what `page` shows, and return the commands that were run.

    Raises:
        AssertionError: a command ended with another exit code than 0.
    """
    done = []
    for kind, text in BLOCK.findall(page):
        named = re.match(r"# ([\w./]+\.(?:py|yaml))\n", text)
        if named:
            (folder / named[1]).write_text(text)
        elif kind == "bash":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["sparseift"]:
                    code, _, err = sparseift(*words[1:])
                    assert code == 0, f"{line}\n{err}"
                    done.append(line)
    return done


def photos(folder: Path) -> None:
    """Three classes of noise in red, green and blue: photos/{train,val}/CLASS/*.png of 40 x 36 pixels."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 4)):
        for channel, name in enumerate(("cat", "dog", "hen")):
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 120, (40, 36, 3), generator=generator)
                pixels[..., channel] += 130
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{k}.png")


def test_the_second_screen_of_the_readme(root: Path, folder: Path, sparseift: Sparseift) -> None:
    page = (root / "README.md").read_text("utf-8")
    start = page.index("## Your model, your data, five minutes")
    assert page[:start].count("\n") < 60  # it is the second screen
    photos(folder)
    done = follow(page[start : page.index("In a training loop of your own")], folder, sparseift)
    assert [line.split()[1] for line in done] == ["flops", "inspect", "recipe", "train", "report"]
    assert len(list((folder / "runs").glob("*/*/summary.json"))) == 6


def test_how_to_add(root: Path, folder: Path, sparseift: Sparseift) -> None:
    page = (root / "sparseift_cli" / "README.md").read_text("utf-8")
    done = follow(page[page.index("## How to add") :], folder, sparseift)
    assert [line.split()[1] for line in done].count("train") == 3
    (metrics,) = (folder / "runs" / "own").glob("*/metrics.jsonl")
    assert '"sure"' in metrics.read_text()
    for run in (
        "own",
        "quickstart_digits_mlp_wide75_rigl",
    ):  # the algorithm of the page has moved weights, not only been named
        (metrics,) = (folder / "runs" / run).glob("*/metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert lines[-1]["itop_rate"] > lines[-1]["density"], run
