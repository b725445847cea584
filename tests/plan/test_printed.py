"""`print` of an audit, a plan or a layer table shows tables; a notebook shows HTML; their repr is a line."""

from __future__ import annotations

from sparseift_cli import flops
from sparseift_cli.models.request import Request
from sparseift_cli.models.source import load_table
from sparseift_cli.table.table import LayerTable


def test_an_audit_prints_what_the_command_prints(sparseift) -> None:
    _, out, _ = sparseift("flops", "resnet18", "--sparsity", "0.9")
    assert str(flops("resnet18", sparsity=0.9)) == out


def test_a_plan_prints_its_layers_and_widths() -> None:
    plan = flops("resnet18", sparsity=0.9).plan
    assert plan is not None
    text = str(plan)
    assert "3>64 7x7 -> 3>202 7x7" in text and "before rounding" in text and "202.39" in text


def test_a_table_prints_its_rows_and_names() -> None:
    table = load_table(Request("resnet18"))
    assert isinstance(table, LayerTable)
    assert "118,013,952" in str(table) and str(table).startswith("resnet18, input 1x3x224x224: 1,814,073,344 MACs")


def test_html_is_escaped_and_complete() -> None:
    audit = flops("resnet18", sparsity=0.9)
    html = audit._repr_html_()
    assert html.count("<table>") == 3 and "&gt;" in html and "3>64" not in html
    assert "2,069,647,928" in html


def test_a_repr_is_one_line() -> None:
    audit = flops("resnet18", sparsity=0.9)
    for shown in (audit, audit.plan, audit.table):
        assert len(repr(shown)) < 160 and "\n" not in repr(shown) and "resnet18" in repr(shown)
