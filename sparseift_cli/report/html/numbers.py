"""The page's numbers: the groups, the comparisons, and every layer of the audits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..plots.families import Family, Group, is_number
from ..plots.pictures import Picture
from ..report import Report
from .element import Child, Safe, element, folded, join, numbers, plain, table, words


def results(families: Sequence[Family]) -> Safe | None:
    """A table a family, a row a group."""
    parts = []
    for family in families:
        columns = [
            *plain("group", "transform", "algorithm"),
            *numbers(
                "n",
                family.metric_name,
                "± std",
                "95 % interval",
                "training FLOPs",
                "× dense",
                "non-zero parameters",
                "parameters",
                "seconds",
            ),
        ]
        caption = f"{family.title}: means of n finished runs, one a seed, at the end of training; audited FLOPs of a whole run"
        parts += [element("h3", family.title), table(caption, columns, [_group(g) for g in family.groups])]
    return join(parts) if parts else None


def comparisons(report: Report) -> Safe | None:
    """Every comparison in figures."""
    if not report.comparisons:
        return None
    columns = [
        *plain("candidate", "baseline", "metric"),
        *numbers("candidate mean", "baseline mean", "difference", "interval", "n", "FLOPs ratio"),
        *plain("outcome"),
    ]
    rows = [
        [
            c.candidate,
            c.baseline,
            c.metric,
            _short(c.candidate_mean),
            _short(c.baseline_mean),
            _signed(c.difference),
            f"{_signed(c.low, 3)} to {_signed(c.high, 3)}" if c.low is not None else None,
            f"{c.n}{' pairs' if c.paired else ''}",
            _ratio(c.flops_ratio),
            c.outcome,
        ]
        for c in report.comparisons
    ]
    how = {f"{100 * c.confidence:g} %" for c in report.comparisons}
    caption = f"Differences, candidate minus baseline, with {' or '.join(sorted(how))} intervals by Student's t"
    return join([element("h3", "Comparisons"), table(caption, columns, rows)])


def audits(drawn: Sequence[tuple[Family, Sequence[Picture]]], figure: Callable[[Picture], Safe]) -> Safe | None:
    """For each transformed group: its totals, its picture, and a row a layer on demand."""
    parts = []
    for family, made in drawn:
        about = {picture.group.name: picture for picture in made if picture.group}
        shown = [_audit(family.plan_name(group), group, about.get(group.name), figure) for group in family.transformed]
        if shown:
            parts += [element("h3", family.title), element("div", *shown, class_="figures")]
            parts += [_layers(family.plan_name(group), group) for group in family.transformed]
    return join(parts) if parts else None


def _group(group: Group) -> list[Child]:
    row = group.row
    interval = f"{_short(row.get('low'))} to {_short(row.get('high'))}" if is_number(row.get("low")) else None
    sparsity = row.get("sparsity")
    transform = (
        f"{row.get('transform')} {100 * sparsity:g} %" if is_number(sparsity) and sparsity else row.get("transform")
    )
    return [
        group.short,
        _text(transform),
        _text(row.get("algorithm")),
        str(row.get("n")),
        _short(row.get("mean")),
        _short(row.get("std")),
        interval,
        _count(row.get("flops")),
        _ratio(row.get("flops_ratio")),
        _count(row.get("nonzero_params")),
        _count(row.get("params")),
        _short(row.get("seconds")),
    ]


def _audit(name: str, group: Group, picture: Picture | None, figure: Callable[[Picture], Safe]) -> Safe:
    audit = group.audit or {}
    totals = audit.get("totals") or {}
    columns = [*plain("total"), *numbers("dense", "transformed", "ratio")]
    counted = f"1 MAC = {audit.get('flops_per_mac', 2)} FLOPs, causal attention counted {audit.get('causal')}"
    masks = ", trained without masks" if group.unmasked else ""
    caption = f"{name}{masks}: totals of one sample; {counted}"
    return element(
        "div", element("h4", name), figure(picture) if picture else None, table(caption, columns, _totals(totals))
    )


def _totals(totals: Mapping[str, Any]) -> list[list[Child]]:
    dense, after = totals.get("dense") or {}, totals.get("transformed") or {}
    named = {
        "forward_flops": "forward FLOPs",
        "training_flops": "training FLOPs",
        "params": "parameters",
        "nonzero_params": "non-zero parameters",
        "activation_factor": "activations, × dense",
    }
    rows: list[list[Child]] = []
    for key, name in named.items():
        before, now = dense.get("params" if key == "nonzero_params" else key), after.get(key)
        ratio = now / before if is_number(now) and is_number(before) and before else None
        shown = _short(now) if key == "activation_factor" else _count(now)
        rows.append([name, _count(before), shown, _ratio(ratio)])
    return rows


def _layers(name: str, group: Group) -> Safe:
    """Folded, and as wide as the page: a row has ten cells."""
    columns = [
        *plain("layer", "kind", "role", "status"),
        *numbers("dense MACs", "transformed MACs", "ratio", "density", "non-zeros"),
        *words("why"),
    ]
    rows = [
        [
            _text(r["name"]),
            _text(r.get("kind")),
            _text(r.get("role")),
            _text(r["status"]),
            _count(r["dense_macs"]),
            _count(r["transformed_macs"]),
            _ratio(r.get("ratio")),
            _ratio(r.get("density")),
            _count(r.get("nnz")),
            _text(r.get("reason")),
        ]
        for r in (group.audit or {}).get("layers", ())
    ]
    said = f"{name}: every layer, untouched ones too"
    return folded(f"{name}: all {len(rows)} layers", table(said, columns, rows))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _count(value: Any) -> str | None:
    return f"{round(value):,}" if is_number(value) else None


def _short(value: Any) -> str | None:
    """Four digits, zeros at the end too; large numbers whole, up to a million."""
    if not is_number(value) or 1000 <= abs(value) < 1e6:
        return _count(value)
    return f"{value:#.4g}".rstrip(".")


def _signed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:+#.{digits}g}".rstrip(".").replace("-", "−")


def _ratio(value: Any) -> str | None:
    return f"{value:.4f}" if is_number(value) else None
