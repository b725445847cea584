"""One list of metrics: what recipes may ask for, with `test_` before each; and the sets that recipes call unsplit are so."""

from __future__ import annotations

from typing import get_args

import pytest

from sparseift_cli.base.metrics import LOWER_IS_BETTER, METRICS, TEST
from sparseift_cli.data import open_data
from sparseift_cli.recipe.defaults import DATA, NO_TEST, SPLITTABLE
from sparseift_cli.recipe.sections import Metric


def test_recipes_ask_for_these_metrics() -> None:
    watched = get_args(Metric)
    assert (*watched, *(TEST + name for name in watched)) == METRICS
    assert {name for name in METRICS if "top" in name} == set(METRICS) - LOWER_IS_BETTER


@pytest.mark.parametrize("name", ["digits", "synthetic-images", "stdlib", "synthetic-text"])
def test_sets_that_recipes_say_have_no_test_of_their_own_have_none(name: str) -> None:
    """The others need files, and are looked at when a run begins."""
    dataset = open_data(name)
    assert name in NO_TEST
    assert "test" not in dataset.split_names or dataset.held_out == "test"


def test_every_named_set_exists() -> None:
    assert {*NO_TEST, *SPLITTABLE} <= set(DATA)
