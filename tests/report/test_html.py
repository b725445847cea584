"""The page: one file that loads nothing, well-formed, with an alternative for every picture and every name escaped."""

from __future__ import annotations

import itertools
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparseift_cli.base.locations import recipes_dir
from sparseift_cli.recipe.load import find
from sparseift_cli.report.html.page import OUTCOMES, command, page
from sparseift_cli.report.published import published_rows
from sparseift_cli.report.read import Run
from sparseift_cli.report.report import Comparison, Costs, Report
from tests.helpers.report_made import report, run

EVIL = "net_<script>alert('x')</script>&\"><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Every element with its attributes and text; `problems` are tags that do not close where they should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.problems: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"never closed: {self.found[i][0]}" for i in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len(dict(attrs)) != len(attrs):
            self.problems.append(f"an attribute twice in <{tag}>")
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))  # in SVG

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.found[self.open.pop()][0] != tag:
            self.problems.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.found[i][2].append(data)

    def all(self, *tags: str) -> list[tuple[str, dict[str, str | None], str]]:
        return [(tag, attributes, "".join(text)) for tag, attributes, text in self.found if tag in tags]


def compared(candidate: str, outcome: str) -> Comparison:
    costs = Costs(3 * 10**9, 1.0, 1.0, 1.0)
    return Comparison(
        "net_dense",
        candidate,
        "top1",
        False,
        outcome,
        f"+2.0 points [1.5, 2.5], n=3: {outcome}",
        81.0,
        83.0,
        costs,
        costs,
        1.0,
        outcome != "refused",
        True,
        3,
        3,
        3,
        2.0,
        1.5,
        2.5,
        2.0,
        notes=["a <note>"],
    )


def with_provenance(one: Run) -> Run:
    session = {
        "started": "2026-01-01T00:00:00+00:00",
        "command": ["/some/where/bin/sparseift", "train", "a recipe", "--seed", "0"],
        "versions": {"torch": "2.13.0"},
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "device": "cpu",
        "threads": 2,
        "kernels": [{"backend": "blocks", "block": 64, "how": "Triton", "reason": "", "weights": ["a.weight"]}],
    }
    return Run(
        one.path,
        one.name,
        one.state,
        one.seed,
        one.recipe,
        one.metrics,
        one.summary,
        one.audit,
        None,
        {"sessions": [session]},
        ["half a line of metrics was left out"],
    )


@pytest.fixture(scope="module")
def full() -> Report:
    runs = [run(name, seed, dense="dense" in name) for name in ("net_dense", EVIL) for seed in (0, 1, 2)]
    made = report([with_provenance(one) for one in runs])
    made = report([with_provenance(one) for one in runs], notes=["a <b>note</b>"], reference=published_rows([]))
    return Report(
        made.runs,
        [(Path("runs/<broken>"), "no recipe.yaml")],
        made.groups,
        [compared(EVIL, o) for o in OUTCOMES],
        ["sparseift", "report", "it's here", "--html", "r.html"],
        made.frame,
        made.reference,
        made.notes,
    )


@pytest.fixture(scope="module")
def text(full: Report) -> str:
    return page(full)


@pytest.fixture(scope="module")
def parsed(text: str) -> Page:
    return Page(text)


def test_it_is_well_formed(text: str, parsed: Page) -> None:
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert parsed.problems == []
    assert "1 layer in blocks of 64 (Triton)" in text and "a.weight" not in text
    assert [len(parsed.all(tag)) for tag in ("main", "h1", "style")] == [1, 1, 1]


def test_nothing_is_loaded(text: str, parsed: Page) -> None:
    assert parsed.all("script", "link", "img", "iframe", "object", "image", "base") == []
    for _, attributes, _ in parsed.all(*{tag for tag, _, _ in parsed.found}):
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "srcset", "xlink:href")]
        assert (attributes.get("href") or "#").startswith("#")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_names_are_escaped(text: str, parsed: Page) -> None:
    assert "<script" not in text and "<img" not in text and "<note>" not in text and "<broken>" not in text
    assert any(said == EVIL for _, _, said in parsed.all("strong"))
    assert not [a for _, a, _ in parsed.all("p", "td", "th", "span", "svg", "title", "text") if "onerror" in a]


def test_ids_are_unique_and_found(text: str, parsed: Page) -> None:
    ids = [a["id"] for _, a, _ in parsed.found if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", text))
    for _, attributes, _ in parsed.found:
        wanted |= {w for key in ("aria-labelledby", "aria-describedby") for w in (attributes.get(key) or "").split()}
        wanted |= {h.removeprefix("#") for h in [attributes.get("href")] if h}
    assert wanted <= set(ids)
    assert not [i for i in ids if re.search(r"[\s<>\"]", i or "")]


def test_every_picture_has_words(parsed: Page) -> None:
    pictures = [(i, a) for i, (tag, a, _) in enumerate(parsed.found) if tag == "svg"]
    assert len(pictures) == 5
    for at, attributes in pictures:
        assert attributes["role"] == "img"
        title, words = parsed.found[at + 1], parsed.found[at + 2]
        assert (title[0], words[0]) == ("title", "desc")
        assert "".join(title[2]) and len("".join(words[2])) > 30
        assert title[1]["id"] == attributes["aria-labelledby"]
    assert len(parsed.all("figcaption")) == len(parsed.all("figure")) == len(pictures)


def test_pictures_take_the_colours_of_the_page(parsed: Page) -> None:
    css = parsed.all("style")[0][2]
    used = {name for _, a, _ in parsed.found for name in re.findall(r"var\(--(\w+)\)", a.get("style") or "")}
    assert {"ink", "paper", "blue"} <= used <= set(re.findall(r"--(\w+):", css))
    painted = {a.get("style") or "" for tag, a, _ in parsed.found if tag in ("path", "text", "rect", "use")}
    assert not [style for style in painted if re.search(r"#[0-9a-f]{6}", style)]
    assert not [a for _, a, _ in parsed.found if (a.get("fill") or "").startswith("#")]
    assert "prefers-color-scheme: dark" in css and "@media print" in css


def test_headings_go_down_by_one(parsed: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in parsed.all("h1", "h2", "h3", "h4", "h5")]
    assert levels[:2] == [1, 2]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_the_verdict_is_first_and_said_in_words(parsed: Page) -> None:
    assert parsed.all("h2")[0][2] == "Verdict"
    shown = [said for _, a, said in parsed.all("span") if a.get("class") == "outcome"]
    assert shown == [f"{mark} {outcome}" for outcome, mark in OUTCOMES.items()]
    headline = next(said for _, a, said in parsed.all("p") if a.get("class") == "headline")
    assert (
        headline == "5 comparisons with the baseline: 1 better, 1 worse, 1 no difference shown, 1 no claim, 1 refused."
    )


def test_tables_have_captions_and_scopes(parsed: Page) -> None:
    assert len(parsed.all("table")) == len(parsed.all("caption"))
    assert {a.get("scope") for _, a, _ in parsed.all("th")} == {"col", "row"}
    regions = [a for _, a, _ in parsed.all("div") if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def test_what_it_says(text: str, parsed: Page) -> None:
    cells = [said for _, _, said in parsed.all("td", "th")]
    assert {"body.qk", "untouched", "83.00", "82.00 to 84.00", "3,000,000,000", "wide 75 %", "+1.50 to +2.50"} <= set(
        cells
    )
    assert [said for _, _, said in parsed.all("code")] == [
        "sparseift train 'a recipe' --seed 0",
        "sparseift report 'it'\"'\"'s here' --html r.html",
    ]
    assert "/some/where" not in parsed.all("code")[0][2]
    assert "0123456789 + changes" in cells
    items = [said for _, _, said in parsed.all("li")]
    assert "runs/<broken>: no recipe.yaml" in items and "a <b>note</b>" in items
    assert "resnet18 on imagenet: wide 90 %, rigl" in cells and "our group" not in cells
    assert parsed.all("a")[0][1] == {"class": "skip", "href": "#verdict"}


def test_the_same_report_is_the_same_page(full: Report, text: str) -> None:
    assert page(full) == text


def test_with_nothing_to_compare() -> None:
    parsed = Page(page(report([Run(Path("runs/new/s0"), "new", "running", None, {}, [])])))
    assert parsed.problems == []
    assert "1 run, 1 running, 1 group" in parsed.all("header")[0][2]
    assert "Nothing was compared" in parsed.all("main")[0][2]
    assert parsed.all("svg") == []


def test_cells(text: str, parsed: Page) -> None:
    assert '<th scope="row">body.<wbr>conv</th>' in text  # a long name may go over lines
    assert '<td class="number">83.00</td>' in text
    assert "None" not in [said for _, _, said in parsed.all("td", "th")]


@pytest.mark.parametrize(
    "sessions", [None, {}, {"sessions": []}, {"sessions": [{"command": None}]}, {"sessions": [{"command": []}]}]
)
def test_a_run_without_its_command(sessions: dict | None) -> None:
    assert command(Run(Path("r"), "r", "finished", 0, {}, [], provenance=sessions)) is None


def test_the_command_of_a_run_of_several_at_once_is_what_repeats_it_alone() -> None:
    given = [
        "/lib/sparseift_cli/__main__.py",
        "train",
        "--seeds",
        "12",
        "--events",
        "--at-once=3",
        "--seat=2",
        "--json",
        "--",
        "r.yaml",
    ]
    run = Run(Path("r"), "r", "finished", 0, {}, [], provenance={"sessions": [{"command": given}]})
    assert command(run) == "sparseift train --seeds 12 r.yaml"


def test_the_command_names_a_recipe_as_others_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train --parallel` gives each of its processes an absolute path; elsewhere that is nowhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shipped, elsewhere = recipes_dir() / "quickstart" / "digits_mlp_dense.yaml", tmp_path / "b.yaml"
    edited = tmp_path / "recipes" / "resnet18" / "wide90_rigl.yaml"  # somebody's own, called as a shipped one
    edited.parent.mkdir(parents=True)
    edited.touch()
    given = {
        str(shipped): "quickstart/digits_mlp_dense",
        "/usr/lib/python3/sparseift_cli/recipes/resnet18/wide90_rigl.yaml": "resnet18/wide90_rigl",
        "/usr/lib/recipes/resnet18/mine.yaml": "/usr/lib/recipes/resnet18/mine.yaml",
        str(Path.cwd() / "mine" / "a.yaml"): "mine/a.yaml",
        str(Path.cwd() / "recipes" / "resnet18" / "dense.yaml"): "recipes/resnet18/dense.yaml",
        str(elsewhere): str(elsewhere),
        str(edited): str(edited),
        "/usr/lib/recipes/resnet18/wide90_rigl.yml": "/usr/lib/recipes/resnet18/wide90_rigl.yml",
        "c.yaml": "c.yaml",
        f"data.root={tmp_path}": f"data.root={tmp_path}",
        "model.name=a//b.yaml": "model.name=a//b.yaml",
    }
    run = Run(
        Path("r"), "r", "finished", 0, {}, [], provenance={"sessions": [{"command": ["sparseift", "train", *given]}]}
    )
    assert command(run) == shlex.join(["sparseift", "train", *given.values()])
    assert find(given[str(shipped)]) == shipped
