"""Models from outside the package, and the old spelling of the quickstart models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from sparseift_cli.errors import UsageError
from sparseift_cli.models.request import Request
from sparseift_cli.models.source import build, load_table
from sparseift_cli.models.zoo.catalog import MODELS, ModelInfo
from sparseift_cli.recipe.load import load
from sparseift_cli.recipe.write import resolved_yaml


def two_layers(*, num_classes: int, image: tuple[int, int, int]) -> nn.Module:
    """[B, *image] -> [B, num_classes]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(image[0] * image[1] * image[2], 16), nn.Linear(16, num_classes))


@pytest.fixture
def two_layer_net() -> Iterator[str]:
    name = "two_layer_net"
    MODELS.register(name, ModelInfo(name, make=two_layers, title="Two layers", image=(1, 8, 8), num_classes=10))
    yield name
    del MODELS._entries[name]


def test_a_model_from_outside_has_a_name_classes_and_an_input(two_layer_net: str, tmp_path: Path) -> None:
    assert load_table(Request("Two-Layer-Net")).params == 64 * 16 + 16 + 16 * 10 + 10
    assert build(Request(two_layer_net, num_classes=3, image=(3, 2, 2))).input_shape == (1, 3, 2, 2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {two_layer_net}\ndata: cifar100\n", "utf-8")
    chosen = load(recipe).spec.model
    assert (chosen.num_classes, chosen.input) == (100, "3x32x32")


def test_what_is_no_model_is_refused() -> None:
    for entry, reason in (
        (two_layers, "not a ModelInfo"),
        (ModelInfo("net", image=(1, 8, 8), num_classes=2), "no `make`"),
        (ModelInfo("net", make=two_layers), "one of them"),
    ):
        with pytest.raises(UsageError, match=reason):
            MODELS.register("net", entry)


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn", "bytes_gpt", "wikitext_gpt"])
def test_recipes_and_runs_of_older_versions_name_the_quickstart_models_by_their_module(
    name: str, tmp_path: Path
) -> None:
    old = f"sparseift_cli.quickstart:{name}"
    assert Request(old) == Request(name)
    assert json.dumps(Request.from_json({"source": old}).to_json()) == json.dumps(Request(name).to_json())
    texts = []
    for source in (old, name):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"model: {source}\ndata: {'digits' if 'digits' in name else 'stdlib'}\n", "utf-8")
        texts.append(resolved_yaml(load(recipe).spec))
    assert texts[0] == texts[1]
