"""A matplotlib SVG made fit to stand inside a page: own ids, own words, and the page's colours instead of its own."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from ..plots import style
from ..plots.pictures import Picture

_PAGE_COLORS = {
    style.INK: "ink",
    style.MUTED: "muted",
    style.GRID: "grid",
    style.PAPER: "paper",
    style.BLUE: "blue",
    style.VERMILLION: "vermillion",
    style.GREEN: "green",
    style.PURPLE: "purple",
    style.ORANGE: "orange",
    style.SKY: "sky",
}
_COLOR = re.compile("|".join(_PAGE_COLORS), re.IGNORECASE)
_PAINT = ("fill", "stroke")
_GONE = (
    "metadata",
    "style",
    "title",
)  # matplotlib's style would reach every SVG of the page; the title is written anew


def inline(picture: Picture, described_by: str) -> str:
    """The picture as an `<svg role="img">` with title and description; every id in it begins with the picture's name.

    It says the same to a screen reader as the element whose id is `described_by`. Its colours are the page's variables
    (`--ink`, `--blue`, ...), so it is dark where the page is.
    """
    root = ElementTree.fromstring(style.to_svg(picture.figure, picture.title, text=True))
    prefix = f"{picture.name}-"
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = dict(_attribute(key.rpartition("}")[2], value, prefix) for key, value in node.attrib.items())
        _paint_by_style(node)
        for child in list(node):
            if child.tag.rpartition("}")[2] in _GONE:
                node.remove(child)
    title, words = ElementTree.Element("title", id=f"{prefix}title"), ElementTree.Element("desc")
    title.text, words.text = picture.title, picture.described
    root[:0] = [title, words]
    width = float(root.attrib.pop("width").removesuffix("pt"))
    for key in ("height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {
        "role": "img",
        "aria-labelledby": f"{prefix}title",
        "aria-describedby": described_by,
        "style": f"max-width: {width * 1.75:.0f}px",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, prefix: str) -> tuple[str, str]:
    if key == "id":
        return key, prefix + value
    if key == "href" and value.startswith("#"):
        return key, f"#{prefix}{value[1:]}"
    return key, value.replace("url(#", f"url(#{prefix}")


def _paint_by_style(node: ElementTree.Element) -> None:
    """Colours into the style, as variables: an attribute cannot hold one in every browser."""
    told = [f"{key}: {value}" for key in _PAINT if (value := node.attrib.pop(key, None))]
    style_of = "; ".join([*told, *filter(None, [node.attrib.get("style")])])
    if style_of:
        node.attrib["style"] = _COLOR.sub(lambda found: f"var(--{_PAGE_COLORS[found[0].lower()]})", style_of)
