"""Which zoo model a checkpoint fits, by the names and shapes of its tensors alone.

Libraries save the same model with small differences, which do not count: a prefix more or less (`bert.`,
`transformer.`), an output layer left out because it is tied to the embedding, causal masks and counters kept or not,
and LayerNorm's `gamma` and `beta` for weight and bias. Another output layer or a widened model does count, and the
match says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Literal

Shapes = Mapping[str, Sequence[int]]
Kind = Literal["exact", "resized", "contains", "partial"]

_OPTIONAL = ("num_batches_tracked", "position_ids", "inv_freq", "masked_bias", "_extra_state")
_OUTPUTS = {"lm_head", "decoder", "output", "embed_out"}
_EMBEDDINGS = {"wte", "embed_tokens", "word_embeddings", "tok_embeddings"}
_HEADS = {"fc", "linear", "classifier", "head", "heads", "output", "score", "logits"}
MAX_TENSORS = 20_000  # no model of the zoo has as many
_ANCHORS = 5  # names that are searched for, to find a prefix
_CANDIDATES = 4  # prefixes that are tried


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor whose shape is not the model's."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """How a checkpoint fits one model. Names are the model's: without the prefix `removed`, with the prefix `added`.

    exact: every tensor with its shape; resized: every name, some with another shape; contains: the whole model and
    more; partial: less. `missing` and `unexpected` do not list tensors that may be absent or extra.
    """

    model: str
    kind: Kind
    removed: str
    added: str
    same: int
    expected: int
    differs: tuple[Difference, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def similarity(self) -> float:
        """Tensors with equal name and shape, as a share of all names on both sides."""
        return self.same / max(self._union, 1)

    @property
    def named(self) -> float:
        """Tensors with equal name, as a share of all names on both sides."""
        return (self.same + len(self.differs)) / max(self._union, 1)

    @property
    def _union(self) -> int:
        return self.same + len(self.differs) + len(self.missing) + len(self.unexpected)

    def resized_head(self) -> int | None:
        """The number of classes, where the output layer is the only difference."""
        return self._only_rows(_HEADS)

    def resized_vocabulary(self) -> int | None:
        """The size of the vocabulary, where the embedding (and what is tied to it) is the only difference."""
        return self._only_rows(_EMBEDDINGS | _OUTPUTS)

    def _only_rows(self, modules: set[str]) -> int | None:
        sizes = {d.found[0] for d in self.differs if d.found and d.found[1:] == d.expected[1:]}
        same_kind = all(set(d.name.split(".")[:-1]) & modules for d in self.differs)
        rows_only = all(d.found and d.found[1:] == d.expected[1:] for d in self.differs)
        return sizes.pop() if self.kind == "resized" and same_kind and rows_only and len(sizes) == 1 else None

    def sentence(self) -> str:
        """The match in one line for a person."""
        return _sentence(self) + _prefixes(self)


def recognise(tensors: Shapes, catalogue: Mapping[str, Shapes]) -> list[Match]:
    """The models of `catalogue` that `tensors` (name -> shape) fit, best first; empty when none does.

    A partial match counts if half of all tensors have equal name and shape, or four fifths of the names are equal, or
    four fifths of the model's tensors are there.

    >>> catalogue = {"small": {"fc.weight": (10, 4), "fc.bias": (10,)}}
    >>> [match.sentence() for match in recognise({"net.fc.weight": (7, 4), "net.fc.bias": (7,)}, catalogue)]
    ["small with 7 classes (without the prefix 'net.')"]
    """
    if len(tensors) > MAX_TENSORS:
        return []
    matches = (_best(model, tensors, expected) for model, expected in catalogue.items())
    fitting = [m for m in matches if m and _fits(m)]
    return sorted(fitting, key=lambda m: (m.kind != "exact", -m.similarity, -m.named, m.model))


def closest(tensors: Shapes, catalogue: Mapping[str, Shapes]) -> Match | None:
    """The model with the most tensors in common, however few; None where there are none."""
    if len(tensors) > MAX_TENSORS:
        return None
    matches = [_best(model, tensors, expected) for model, expected in catalogue.items()]
    return max((m for m in matches if m and m.same), key=lambda m: (m.similarity, m.named), default=None)


@cache
def load_catalogue() -> Mapping[str, Shapes]:
    """State dict shapes of every zoo model, from the generated tables, read once; empty where these are not built."""
    parsed = {name: json.loads((_tables() / f"{name}.json").read_text("utf-8")) for name in table_names()}
    return {name: table["state_dict"] for name, table in parsed.items() if "state_dict" in table}


def table_names() -> list[str]:
    """Names of the zoo models that have a generated table, without reading one."""
    folder = _tables()
    return (
        sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
        if folder.is_dir()
        else []
    )


def _tables() -> Traversable:
    return files("sparseift_cli.models.zoo") / "tables"


def _fits(match: Match) -> bool:
    return (
        match.kind in ("exact", "resized")
        or match.similarity >= 0.5
        or match.named >= 0.8
        or match.same >= 0.8 * match.expected
    )


def _best(model: str, tensors: Shapes, expected: Shapes) -> Match | None:
    """The best match over the prefixes that could be removed from the names or added to them."""
    pairs = [
        ("", ""),
        *((p, "") for p in _candidates(tensors, expected)),
        *(("", p) for p in _candidates(expected, tensors)),
    ]
    matches = [_compare(model, tensors, expected, removed, added) for removed, added in pairs]
    return max((m for m in matches if m.same or m.differs), key=lambda m: (m.similarity, m.named), default=None)


def _candidates(longer: Iterable[str], shorter: Iterable[str]) -> list[str]:
    """Prefixes that turn names of `shorter` into names of `longer`, the most frequent first."""
    names = [name for name in shorter if not name.endswith(_OPTIONAL)]
    anchors = names[:: max(len(names) // _ANCHORS, 1)]
    found = Counter(
        name[: -len(a)] for name in longer for a in anchors if len(name) > len(a) and name.endswith("." + a)
    )
    return [prefix for prefix, _ in found.most_common(_CANDIDATES)]


def _compare(model: str, tensors: Shapes, expected: Shapes, removed: str, added: str) -> Match:
    renamed: dict[str, tuple[int, ...]] = {}
    unexpected: list[str] = []
    for name, shape in tensors.items():
        new = _renamed(name, expected, removed, added)
        if new in renamed:
            unexpected.append(name)
        else:
            renamed[new] = tuple(shape)
    common = [name for name in expected if name in renamed]
    differs = tuple(Difference(n, renamed[n], tuple(expected[n])) for n in common if renamed[n] != tuple(expected[n]))
    embeddings = {shape for name, shape in renamed.items() if _module(name) in _EMBEDDINGS}
    missing = tuple(n for n in expected if n not in renamed and not _may_lack(n, tuple(expected[n]), embeddings))
    extra = [n for n, shape in renamed.items() if n not in expected and not _may_add(n, shape, embeddings)]
    kind: Kind = "partial"
    if not missing and not differs:
        kind = "contains" if extra or unexpected else "exact"
    elif not missing and not extra and not unexpected:
        kind = "resized"
    same = len(common) - len(differs)
    return Match(model, kind, removed, added, same, len(expected), differs, missing, (*extra, *unexpected))


def _renamed(name: str, expected: Shapes, removed: str, added: str) -> str:
    new = name.removeprefix(removed)
    for candidate in _spellings(new):
        if added + candidate in expected:
            return added + candidate
        if candidate in expected:
            return candidate
    return new


def _spellings(name: str) -> Iterator[str]:
    """The name, and the name that newer libraries use for it."""
    yield name
    if name.endswith(".gamma"):
        yield name.removesuffix("gamma") + "weight"
    if name.endswith(".beta"):
        yield name.removesuffix("beta") + "bias"


def _may_lack(name: str, shape: tuple[int, ...], embeddings: set[tuple[int, ...]]) -> bool:
    """Whether a checkpoint may lack this tensor: a counter, or an output layer that is tied to the embedding."""
    return name.endswith(_OPTIONAL) or (_module(name) in _OUTPUTS and shape in embeddings)


def _may_add(name: str, shape: tuple[int, ...], embeddings: set[tuple[int, ...]]) -> bool:
    """Whether a checkpoint may have this tensor in addition: the same, and the causal masks of GPT-2."""
    return _may_lack(name, shape, embeddings) or (name.endswith("attn.bias") and len(shape) == 4)


def _module(name: str) -> str:
    """The last module in the name of a weight: "transformer.wte.weight" -> "wte"; empty for other tensors."""
    path, _, last = name.rpartition(".")
    return path.rpartition(".")[2] if last == "weight" else ""


def _sentence(match: Match) -> str:
    if match.kind == "exact":
        return f"{match.model}, exactly"
    if match.kind == "contains":
        return f"all of {match.model}, and {len(match.unexpected)} other tensors"
    if (classes := match.resized_head()) is not None:
        return f"{match.model} with {classes:,} classes"
    if (words := match.resized_vocabulary()) is not None:
        return f"{match.model} with a vocabulary of {words:,}"
    if match.kind == "resized":
        d = match.differs[0]
        shapes = f"{'x'.join(map(str, d.found))} for {'x'.join(map(str, d.expected))}"
        return (
            f"{match.model} with other sizes in {len(match.differs)} of {match.expected} tensors ({d.name}: {shapes})"
        )
    expected = match.same + len(match.differs) + len(match.missing)  # without what may be absent, and is
    agree = f"{match.same} of {expected} tensors of {match.model}"
    rest = ((match.differs, "of another shape"), (match.missing, "missing"), (match.unexpected, "not of the model"))
    return ", ".join([agree, *(f"{len(found)} {what}" for found, what in rest if found)])


def _prefixes(match: Match) -> str:
    taken = f" (without the prefix {match.removed!r})" if match.removed else ""
    return taken + (f" (its names there begin with {match.added!r})" if match.added else "")
