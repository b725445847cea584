"""The file of a kept run, `<recipe>/<utc>-<hash8>.json`: everything that a report reads of one run, in one JSON document.

    {"schema": "sparseift.kept_run/1",
     "recipe": {...}, "provenance": {...}, "summary": {...}, "audit": {...}, "metrics": [...],
     "sha256": "..."}

The lines of metrics.jsonl and the layers of the audit are tables: `columns` names the keys once, and every row is one line of
the file, so that a difference between two versions shows the evaluation or the layer that changed. A nested mapping is nested
columns. Rows with other keys start another table. The summary's last metrics are left out where they equal the last row.

`sha256` is that of everything else as compact JSON with sorted keys. It protects the numbers against an edit or a bad copy,
and does not depend on how the file is laid out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SCHEMA = "sparseift.kept_run/1"
PARTS = ("recipe", "provenance", "summary", "audit", "metrics")
_ONE_LINE = 120  # characters up to which a value is not broken into lines
_DEPTH = {"recipe": 1, "provenance": 3, "summary": 1, "audit": 4, "metrics": 3}
"""How deep each part is broken into lines: to sections, to facts of a session, to numbers, and to rows of the tables."""


class NotAKeptRun(ValueError):
    """The content is JSON, and not of this schema."""


def encode(parts: Mapping[str, Any]) -> bytes:
    """The content of the file. The same run gives the same bytes.

    Args:
        parts: PARTS as a run directory has them: mappings, and for metrics a list of them.
    """
    summary, metrics = dict(parts["summary"]), parts["metrics"]
    if metrics and json.dumps(summary.get("metrics")) == json.dumps(metrics[-1]):  # as text: NaN is equal to itself
        del summary["metrics"]
    audit = dict(parts["audit"])
    if audit.get("layers"):
        audit["layers"] = to_tables(audit["layers"])
    document = {
        "schema": SCHEMA,
        "recipe": parts["recipe"],
        "provenance": parts["provenance"],
        "summary": summary,
        "audit": audit,
        "metrics": to_tables(metrics),
    }
    document["sha256"] = digest(document)
    lines = [f"{json.dumps(key)}: {_layout(value, _DEPTH.get(key, 0))}" for key, value in document.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def decode(content: bytes) -> dict[str, Any]:
    """PARTS of the file, as `encode` was given them.

    Raises:
        NotAKeptRun: the document is of another schema.
        ValueError: it is not JSON, or not what was written; the message says what is wrong.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise NotAKeptRun(f"is not a kept run: its schema is not {SCHEMA!r}")
    if document.get("sha256") != digest(document):
        raise ValueError("is not what was written: its SHA-256 differs")
    try:
        parts = {name: document[name] for name in PARTS}
        parts["metrics"] = from_tables(parts["metrics"])
        if parts["audit"].get("layers"):
            parts["audit"]["layers"] = from_tables(parts["audit"]["layers"])
        if parts["metrics"]:
            parts["summary"].setdefault("metrics", parts["metrics"][-1])
    except (KeyError, TypeError, AttributeError):
        raise ValueError("lacks a part, or has one of another form") from None
    return parts


def digest(document: Mapping[str, Any]) -> str:
    """The SHA-256 of a document without its key sha256, in hexadecimal digits."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(_compact(rest, sort_keys=True).encode()).hexdigest()


def to_tables(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mappings as tables; consecutive ones with the same keys in the same order share a table.

    >>> to_tables([{"step": 1, "masks": {"fc": {"density": 0.5}}}, {"step": 2, "masks": {"fc": {"density": 0.25}}}])
    [{'columns': ['step', {'masks': [{'fc': ['density']}]}], 'rows': [[1, 0.5], [2, 0.25]]}]
    """
    tables: list[dict[str, Any]] = []
    for row in rows:
        columns = _columns(row)
        if not tables or tables[-1]["columns"] != columns:
            tables.append({"columns": columns, "rows": []})
        tables[-1]["rows"].append(list(_values(row)))
    return tables


def from_tables(tables: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mappings again; `from_tables(to_tables(rows)) == rows`.

    Raises:
        ValueError: a row has more or fewer values than columns.
    """
    rows = []
    for table in tables:
        for values in table["rows"]:
            left = iter(values)
            try:
                rows.append(_row(table["columns"], left))
            except StopIteration:
                raise ValueError("has a row with fewer values than columns") from None
            if next(left, left) is not left:
                raise ValueError("has a row with more values than columns")
    return rows


def _columns(row: Mapping[str, Any]) -> list[Any]:
    return [{key: _columns(value)} if isinstance(value, Mapping) and value else key for key, value in row.items()]


def _values(row: Mapping[str, Any]) -> Iterator[Any]:
    for value in row.values():
        if isinstance(value, Mapping) and value:
            yield from _values(value)
        else:
            yield value


def _row(columns: Sequence[Any], values: Iterator[Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in columns:
        if isinstance(column, str):
            row[column] = next(values)
        else:
            ((name, inner),) = column.items()
            row[name] = _row(inner, values)
    return row


def _layout(value: Any, depth: int) -> str:
    """JSON text: a mapping or list that is too long for a line is broken into one line an item, down to `depth`."""
    text = _compact(value)
    if depth == 0 or len(text) <= _ONE_LINE or not isinstance(value, dict | list):
        return text
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_layout(v, 0 if k == 'columns' else depth - 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + "\n}"
    return "[\n" + ",\n".join(_layout(item, depth - 1) for item in value) + "\n]"


def _compact(value: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"))
