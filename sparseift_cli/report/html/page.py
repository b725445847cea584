"""The report as one HTML file that needs nothing else: no network, no script, light and dark, made to print.

In the order of a reader's questions: what is the verdict, what are the numbers, what do they look like, where do the FLOPs
go, what was published, where does it come from, how do I repeat it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...version import __version__
from ..plots.families import Family
from ..plots.pictures import Picture, pictures
from ..report import Comparison, Report
from .element import Safe, element, join, listing
from .facts import left_out, provenance, published, repeat
from .numbers import audits, comparisons, results
from .spectra import spectra
from .svg import inline

CSS = Path(__file__).with_name("page.css")
OUTCOMES = {  # a mark beside the word, so that it is not told by colour alone
    "better": "▲",
    "worse": "▼",
    "no difference shown": "≈",
    "no claim": "○",
    "refused": "✕",
}


def page(report: Report, title: str = "Iso-FLOP report") -> str:
    """The whole document. Every name in it is escaped; it loads nothing, from no network and no other file.

    The same report gives the same page: nothing in it is of the moment at which it was made.
    """
    drawn = list(pictures(report))
    sections = [
        ("verdict", "Verdict", _verdict(report)),
        ("results", "Results", join([results([family for family, _ in drawn]), comparisons(report)])),
        ("pictures", "Pictures", _pictures(drawn)),
        ("masks", "How well the masks connect", spectra(report)),
        ("audit", "Where the FLOPs go", audits(drawn, figure)),
        ("published", "Beside the published results", published(report)),
        ("provenance", "Provenance", provenance(report)),
        ("left-out", "Left out, and warnings", left_out(report)),
        ("repeat", "Repeat it", repeat(report)),
    ]
    kept = [(name, heading, body) for name, heading, body in sections if body]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"sparseift {__version__}"),
        element("title", title),
        Safe(f"<style>\n{CSS.read_text(encoding='utf-8')}</style>"),
    )
    links = listing(element("a", heading, href=f"#{name}") for name, heading, _ in kept)
    body = element(
        "body",
        element("a", "Skip to the verdict", class_="skip", href="#verdict"),
        element(
            "header",
            element("h1", title),
            element("p", _scope(report), class_="muted"),
            element("nav", links, aria_label="On this page"),
        ),
        element("main", *(_section(*section) for section in kept)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def figure(picture: Picture) -> Safe:
    """A picture and its caption, which says the main numbers."""
    caption = f"{picture.name}-caption"
    return element("figure", inline(picture, caption), element("figcaption", picture.described, id=caption))


def _section(name: str, heading: str, body: Safe) -> Safe:
    return element(
        "section", element("h2", heading, id=f"{name}-heading"), body, id=name, aria_labelledby=f"{name}-heading"
    )


def _scope(report: Report) -> str:
    states = Counter(run.state for run in report.runs if run.state != "finished")
    unfinished = "".join(f", {count} {state}" for state, count in sorted(states.items()))
    return (
        f"{_many(len(report.runs), 'run')}{unfinished}, {_many(len(report.groups), 'group')}; sparseift {__version__}"
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _verdict(report: Report) -> Safe:
    if not report.comparisons:
        return element(
            "p",
            "Nothing was compared: it takes finished runs of a dense model and of a transformed one.",
            class_="headline",
        )
    fair = [c for c in report.comparisons if c.equal_flops or not c.allowed]
    unequal = [c for c in report.comparisons if c.allowed and not c.equal_flops]
    told = [_counted(fair)] if fair else []
    told += [f"at unequal FLOPs: {_counted(unequal)}"] if unequal else []
    headline = f"{_many(len(report.comparisons), 'comparison')} with the baseline: {'; '.join(told)}."
    return join(
        [
            element("p", headline, class_="headline"),
            element("ul", *(_compared(c) for c in [*fair, *unequal]), class_="verdicts"),
        ]
    )


def _counted(comparisons: Sequence[Comparison]) -> str:
    found = Counter(c.outcome for c in comparisons)
    return ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES if found[outcome])


def _compared(comparison: Comparison) -> Safe:
    mark = element("span", f"{OUTCOMES[comparison.outcome]} ", aria_hidden="true")
    unequal = " at unequal FLOPs" if comparison.allowed and not comparison.equal_flops else ""
    who = element(
        "p",
        element("span", mark, comparison.outcome, unequal, class_="outcome"),
        ": ",
        element("strong", comparison.candidate),
        " against ",
        comparison.baseline,
    )
    notes = [element("p", note, class_="muted") for note in comparison.notes]
    return element(
        "li",
        who,
        element("p", comparison.verdict.removeprefix(f"{comparison.outcome}: ")),
        *notes,
        class_=comparison.outcome.replace(" ", "-"),
    )


def _pictures(drawn: list[tuple[Family, list[Picture]]]) -> Safe | None:
    parts = []
    for family, made in drawn:
        shown = [picture for picture in made if picture.group is None]
        if shown:
            parts += [element("h3", family.title), element("div", *map(figure, shown), class_="figures")]
    return join(parts) if parts else None
