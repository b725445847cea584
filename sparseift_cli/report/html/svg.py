"""A matplotlib SVG changed for use inside a page: unique ids, a description, and the page's colours."""

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
_REMOVED = (
    "metadata",
    "style",
    "title",
)  # matplotlib's style would apply to every SVG of the page; the title is replaced


def inline(picture: Picture, described_by: str) -> str:
    """The picture as an `<svg role="img">` with title and description; every id in it begins with the picture's name.

    A screen reader gets the description of the element with the id `described_by`. Colours are the page's variables (`--ink`,
    `--blue`, ...), so that the picture is dark where the page is.
    """
    root = ElementTree.fromstring(style.to_svg(picture.draw(), picture.title, text=True))
    prefix = f"{picture.name}-"
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = dict(_attribute(key.rpartition("}")[2], value, prefix) for key, value in node.attrib.items())
        _paint_by_style(node)
        for child in list(node):
            if child.tag.rpartition("}")[2] in _REMOVED:
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
    """Move colours from attributes to the style, as variables: not every browser accepts a variable in an attribute."""
    paint = [f"{key}: {value}" for key in _PAINT if (value := node.attrib.pop(key, None))]
    style_of = "; ".join([*paint, *filter(None, [node.attrib.get("style")])])
    if style_of:
        node.attrib["style"] = _COLOR.sub(lambda found: f"var(--{_PAGE_COLORS[found[0].lower()]})", style_of)
