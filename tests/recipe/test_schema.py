"""The schema: generated from the models, current on disk, one with the specs and algorithms it speaks of."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from sparseift_cli.base.locations import recipes_dir
from sparseift_cli.base.options import options_of
from sparseift_cli.data import DATASETS
from sparseift_cli.models.zoo import lookup
from sparseift_cli.models.zoo.catalog import QUICKSTART
from sparseift_cli.plan.spec import TransformSpec
from sparseift_cli.recipe import schema
from sparseift_cli.recipe.catalog import schema_file, shipped
from sparseift_cli.recipe.load import load
from sparseift_cli.recipe.sections import Init, Transform
from sparseift_cli.sparsity.algorithms import ALGORITHMS

SHIPPED = list(shipped())


def test_schema_on_disk_is_current() -> None:
    assert schema_file().read_text("utf-8") == schema.json_schema_text(), (
        "run: sparseift recipe schema > recipes/schema.json"
    )


def test_page_of_options_is_current() -> None:
    """It has every key of every section, from the same declarations."""
    page = schema_file().with_name("OPTIONS.md").read_text("utf-8")
    assert page == schema.markdown(), "run: sparseift recipe schema --format md > recipes/OPTIONS.md"
    for section in schema.SECTIONS:
        assert all(f"| `{name}` |" in page for name in schema.fields(section))


def test_every_field_says_what_it_means() -> None:
    for section in schema.SECTIONS:
        assert schema.Spec.model_fields[section].description
        for model in schema.variants(section):
            for name, info in model.model_fields.items():
                assert info.description, f"{section}.{name}"
                assert info.description.endswith((".", ")")), f"{section}.{name}"


def test_transform_section_has_the_fields_of_the_spec() -> None:
    spec = {f.name: f for f in dataclasses.fields(TransformSpec)}
    assert set(Transform.model_fields) == set(spec)
    hints = get_type_hints(TransformSpec)
    for name, field in Transform.model_fields.items():
        if name in ("member", "sparsity"):
            continue
        assert field.default == spec[name].default, name
        assert schema.choices(field.annotation) == schema.choices(hints[name]), name


def test_algorithm_sections_have_the_options_of_the_algorithms() -> None:
    assert schema.names("algorithm") == tuple(ALGORITHMS)
    for name in ALGORITHMS:
        section, options = schema.variant("algorithm", {"name": name}), options_of(ALGORITHMS.get(name))
        assert section is not None and list(section.model_fields) == ["name", *options]
        for key, option in options.items():
            assert str(section.model_fields[key].default) == str(option.default), key
            assert schema.choices(section.model_fields[key].annotation) == option.choices, key


def test_init_section_has_the_options_of_the_transformation() -> None:
    from sparseift_cli.transforms.transformation import Options

    hints = get_type_hints(Options)
    assert schema.choices(Init.model_fields["start"].annotation) == get_args(get_args(hints["start"])[0])
    assert schema.choices(Init.model_fields["weights"].annotation) == get_args(hints["init"])
    assert Init.model_fields["slack"].default == Options().preserve_slack


def test_json_schema_takes_short_and_long_forms() -> None:
    found = schema.json_schema()
    assert found["anyOf"] == [{"required": ["model"]}, {"required": ["extends"]}]
    assert {"enum": ["sgd", "adamw"]} in found["properties"]["optimizer"]["anyOf"]
    assert {"type": "string"} in found["properties"]["model"]["anyOf"]
    assert found["properties"]["sparsity"]["exclusiveMaximum"] == 1
    assert found["$defs"]["Training"]["properties"]["batch_size"]["description"].startswith("Samples of a step")
    assert found["$defs"]["Transform"]["required"] == []
    assert found["$defs"]["Data"]["properties"]["name"]["anyOf"][0] == {"enum": list(DATASETS)}
    assert json.loads(schema.json_schema_text()) == found


def accepts(piece: Any, value: Any, whole: dict[str, Any]) -> bool:
    """Does the part of JSON schema that ours uses accept a value?"""
    if "$ref" in piece:
        return accepts(whole["$defs"][piece["$ref"].rpartition("/")[2]], value, whole)
    for key in ("anyOf", "oneOf"):
        if key in piece:
            return any(accepts(option, value, whole) for option in piece[key])
    if "enum" in piece or "const" in piece:
        return value in piece.get("enum", [piece.get("const")])
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if not isinstance(value, kinds[piece["type"]]) or (isinstance(value, bool) and piece["type"] != "boolean"):
        return False
    if isinstance(value, dict):
        known = piece.get("properties", {})
        return set(piece.get("required", [])) <= set(value) <= set(known) and all(
            accepts(known[k], v, whole) for k, v in value.items()
        )
    if isinstance(value, list) and isinstance(piece.get("items"), dict):
        return all(accepts(piece["items"], v, whole) for v in value)
    return not isinstance(value, str) or re.search(piece.get("pattern", ""), value) is not None


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda e: e.name)
def test_shipped_recipes_fit_the_json_schema(entry: Any) -> None:
    from sparseift_cli.recipe.strict_yaml import read

    document, _ = read(entry.path)
    whole = schema.json_schema()
    for key, value in document.plain().items():
        assert accepts(whole["properties"][key], value, whole), key
    assert not accepts(whole["properties"]["optimizer"], {"name": "sgd", "rl": 1}, whole)


@pytest.mark.parametrize("entry", SHIPPED, ids=lambda e: e.name)
def test_shipped_recipes_open_with_what_they_show(entry: Any) -> None:
    first, second, *_ = entry.path.read_text("utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=../schema.json"
    assert (entry.path.parent / "../schema.json").resolve() == schema_file().resolve()
    assert second.startswith("# ")
    assert 20 < len(entry.headline) < 160
    assert f"sparseift flops {entry.name}" in " ".join(entry.path.read_text("utf-8").replace("\n# ", " ").split())


@pytest.mark.parametrize(
    "entry", [e for e in SHIPPED if lookup(load(e.path).model).source != QUICKSTART], ids=lambda e: e.name
)
def test_shipped_recipes_audit(entry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseift_cli.cli.app import app

    app(["flops", entry.name, "--json"], standalone_mode=False)
    data = json.loads(capsys.readouterr().out)
    recipe = load(entry.path)
    if not recipe.transform:
        assert data["transform"] is None
        return
    assert data["transform"]["sparsity"] == float(recipe.transform["sparsity"])
    assert data["training"]["algorithm"] == recipe.training["algorithm"]
    assert data["training"]["steps"] == recipe.training.get("steps")
    match, ratios = recipe.transform["match"], data["totals"]["ratio"]
    if recipe.transform["scope"] == "none":  # a control
        assert ratios["forward"] < 1
    elif match in ("model", "train"):
        assert 0.99 < ratios["forward" if match == "model" else "training"] <= 1
    else:
        assert ratios["forward"] >= 0.999


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn", "bytes_gpt"])
def test_quickstart_models_build_and_widen(name: str) -> None:
    import torch

    from sparseift_cli.models.request import Request
    from sparseift_cli.models.source import build
    from sparseift_cli.recipe.load import find, resolve_request

    built = build(Request(name), device="cpu")
    model, inputs = built.model.train(), built.args[0]
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert model(inputs.expand(2, *inputs.shape[1:])).shape[-1] in (10, 256)
    assert torch.isfinite(model(inputs.expand(2, *inputs.shape[1:]))).all()
    for size in ("dense", "wide50_rigl", "wide75_rigl"):
        path = find(f"quickstart/{name}_{size}")
        assert path is not None
        request, recipe = resolve_request(Request(str(path)))
        assert (request.source, recipe is not None) == (name, True)


def test_siblings_differ_in_their_transform_only() -> None:
    """A fair comparison: the dense baseline of a folder has the settings of what is held against it."""
    whole = {entry.name: load(entry.path).spec for entry in SHIPPED}
    for name, spec in whole.items():
        stem = name.rpartition("/")[2]
        dense = f"{Path(name).parent}/{'imagenet_dense' if stem.startswith('imagenet') else ''}"
        candidates = [d for d in whole if d.startswith(str(Path(name).parent)) and d.endswith("dense")]
        baseline = next(
            (d for d in candidates if d == dense or stem.startswith(Path(d).stem.removesuffix("dense"))), None
        )
        assert baseline is not None, name
        longer = ("schedule", "training", "evaluation") if stem.endswith("_long") else ()
        for section in ("model", "data", "optimizer", "schedule", "training", "evaluation", "checkpoint"):
            if section not in longer:
                assert getattr(spec, section) == getattr(whole[baseline], section), (name, section)


def test_the_long_control_is_the_baseline_twice_as_long() -> None:
    short, long = (
        load(e.path).spec for n in ("dense", "dense_long") for e in SHIPPED if e.name == f"resnet18_cifar100/{n}"
    )
    assert long.training == short.training.model_copy(update={"epochs": 400.0})
    assert short.training.epochs == 200.0
    assert long.schedule == short.schedule.model_copy(update={"milestones": (120.0, 240.0, 320.0)})
    assert long.evaluation == short.evaluation.model_copy(update={"every": 20.0})


def test_recipes_folder_is_the_shipped_one() -> None:
    assert len(SHIPPED) == len(list(recipes_dir().glob("*/*.yaml"))) >= 30
