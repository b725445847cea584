"""The whole recipe as one frozen model, its fields by dotted path, and the JSON schema that editors use.

Everything that a recipe can say is in `model_sections` and `training_sections`; checking, `--set`, the JSON schema and
`sparseift recipe show` all read it from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from ..errors import UsageError
from ..sparsity.algorithms import SHIPPED
from . import sections as how
from . import sections as what
from .sections import OBJECT_PATTERN, REGISTRIES, Section, chosen_section, names_or_object

if TYPE_CHECKING:
    MaskAlgorithm = what.AlgorithmSection

    class Optimizer(Section):  # noqa: D101
        name: str
        lr: float

    class Schedule(Section):  # noqa: D101
        name: str

else:  # made from the registries, which a type checker cannot know
    MaskAlgorithm = Annotated[Union[what.ALGORITHM_SECTIONS], Field(discriminator="name")]  # noqa: UP007
    Optimizer = how.Optimizer
    Schedule = how.Schedule


class Spec(Section):
    """A recipe with every value filled in. What the training loop reads."""

    model: what.Model = Field(description="The dense model: a name, or name and input.")
    data: what.Data | None = Field(None, description="The data set: a name, or name and options. Training needs it.")
    transform: what.Transform | None = Field(
        None, description="The member of Sparse-IFT; without it the model is dense."
    )
    algorithm: MaskAlgorithm = Field(description="How masks change: a name, or name and options.")
    init: what.Init = Field(what.Init(), description="Weights and masks at step 0.")
    optimizer: Optimizer = Field(description="The optimiser: sgd or adamw, or its name and options.")
    schedule: Schedule = Field(description="The learning rate: constant, multistep, cosine or linear.")
    training: how.Training = Field(description="Length, batches, precision, seeds.")
    evaluation: how.Evaluation = Field(description="What is measured, and when.")
    checkpoint: how.CheckpointSettings = Field(description="What is kept to resume from.")


def spec_for(algorithm: str) -> type[Spec]:
    """`Spec` for a recipe with this mask algorithm: one from outside this package has a section of its own.

    Raises:
        UsageError: no such algorithm.
    """
    if algorithm in SHIPPED:
        return Spec
    section = what.algorithm_section(algorithm)
    return create_model("Spec", __base__=Spec, algorithm=(section, Spec.model_fields["algorithm"]))


SECTIONS = tuple(Spec.model_fields)
SPARSITY = "sparsity"
"""The one field with a second name: `sparsity` at the top level is `transform.sparsity`."""
EXTENDS = "extends"
"""The key of a recipe that names another one, whose values it has where it gives none itself."""
SWEEP = "sweep"
"""The key of a recipe under which the axes of a sweep are listed (`recipe.axes`)."""
ABOUT_SWEEP = (
    "Axes of a sweep, as `train --sweep KEY=VALUE,...` has them: a key of --set, and the list of its values. Every combination "
    "of the values is trained, with every seed."
)


@cache
def variants(section: str) -> tuple[type[Section], ...]:
    """The models that a section may be: one for each optimiser, schedule and mask algorithm, one for any other section."""
    return tuple(_models(Spec.model_fields[section].annotation))


def _models(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _models(part)


def variant(section: str, given: Mapping[str, Any]) -> type[Section] | None:
    """The model that `given` chooses by its name; None where the name is unknown or does not say."""
    models = variants(section)
    if len(models) == 1:
        return models[0]
    name = given.get("name")
    if section == "algorithm" and isinstance(name, str) and name not in SHIPPED:
        try:
            return what.algorithm_section(name)
        except UsageError:  # `resolve` says what is wrong with the name
            return None
    found = next((m for m in models if get_args(m.model_fields["name"].annotation)[0] == name), None)
    registry = REGISTRIES.get(section)
    if found or registry is None or not isinstance(name, str):
        return found
    try:  # an entry of another package, or package.module:Name
        return chosen_section(registry, name)
    except UsageError:
        return None


def short(section: str) -> str | None:
    """The field that a single word in place of the section sets."""
    return variants(section)[0].SHORT


def fields(section: str, given: Mapping[str, Any] | None = None) -> dict[str, FieldInfo]:
    """Fields of a section by name: those of the variant that `given` chooses, or of all variants."""
    chosen = variant(section, given or {})
    models = (chosen,) if chosen else variants(section)
    return {name: info for model in reversed(models) for name, info in model.model_fields.items()}


def choices(annotation: Any) -> tuple[str, ...]:
    """The words that a field, or an item of it, may be; empty where it is free."""
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    return tuple(word for part in get_args(annotation) for word in choices(part))


def names(section: str) -> tuple[str, ...]:
    """What the short word of a section may be, over all its variants."""
    key = short(section)
    return tuple(
        word
        for model in variants(section)
        if key
        for word in model.WORDS or choices(model.model_fields[key].annotation)
    )


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file, generated from the models."""
    schema = Spec.model_json_schema()
    properties = schema["properties"]
    for section in SECTIONS:
        _let_omit(schema, section)
        if short(section):
            words = names(section)
            word = [{"enum": list(words)} if words else {"type": "string"}]
            from_outside = section in (*REGISTRIES, "algorithm")
            if from_outside or any(model.WORDS for model in variants(section)):
                word = names_or_object(words)["anyOf"]
            about = properties[section].get("description")
            properties[section] = {"anyOf": [*word, _without(properties[section], "description", "default")]}
            if from_outside:  # one from outside, with options that are not known here
                (_, name) = names_or_object(())["anyOf"]
                outside = {"type": "object", "properties": {"name": name}, "required": ["name"]}
                properties[section]["anyOf"].append(outside)
            properties[section]["description"] = about
        else:
            properties[section].pop("default", None)
    transform = schema["$defs"]["Transform"]
    properties[SPARSITY] = dict(transform["properties"][SPARSITY])
    transform["required"] = []
    properties[EXTENDS] = {
        "type": "string",
        "description": "A recipe that this one changes: a file next to it, or a shipped recipe. Values here win over its values.",
    }
    words = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "boolean"}, {"type": "null"}]}
    axis = {"type": "array", "minItems": 1, "uniqueItems": True, "items": words}
    properties[SWEEP] = {"type": "object", "additionalProperties": axis, "description": ABOUT_SWEEP}
    schema["required"] = []
    schema["anyOf"] = [{"required": ["model"]}, {"required": [EXTENDS]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "sparseift recipe"}


def _without(schema: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in schema.items() if k not in keys}


def _let_omit(schema: dict[str, Any], section: str) -> None:
    """Values that a default fills in need not be written, but for the one that names the section."""
    for model in variants(section):
        definition = schema["$defs"][model.__name__]
        key = model.SHORT
        needed = key and key in definition.get("required", []) and section in ("model", "data")
        definition["required"] = [key] if needed else []


def json_schema_text() -> str:
    """The file recipes/schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def markdown() -> str:
    """The file recipes/OPTIONS.md: every key of a recipe with its values, default and meaning, generated as the JSON schema."""
    schema = json_schema()
    lines = [
        "# What a recipe can say",
        "",
        "Generated by `sparseift recipe schema --format md` from the declarations of the options. A section that has",
        "a name may be one word (`optimizer: sgd`), `sparsity` may be at the top level, and `extends` names a recipe",
        "that this one changes. `--set section.key=value` of `train` and `recipe show` takes the same keys.",
        "",
    ]
    for section in SECTIONS:
        lines += [f"## {section}", "", str(Spec.model_fields[section].description), ""]
        models = variants(section)
        for model in models:
            properties = schema["$defs"][model.__name__]["properties"]
            if len(models) > 1:
                lines += [f"### {section}: {get_args(model.model_fields['name'].annotation)[0]}", ""]
            lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
            first = model.SHORT
            for key in sorted(properties, key=lambda key: key != first):
                about = properties[key]
                default = json.dumps(about["default"]) if about.get("default") is not None else ""
                cells = (f"`{key}`", _values(about), default, about.get("description", ""))
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
    lines += [f"## {SWEEP}", "", ABOUT_SWEEP, "", "```yaml", "sweep:", "  sparsity: [0.5, 0.75, 0.9]"]
    lines += ["  transform.member: [wide, doped]", "```", ""]
    return "\n".join(lines)


def _values(piece: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in a few words: `whole number, at least 1`."""
    if "anyOf" in piece:
        return " or ".join(_values(option) for option in piece["anyOf"] if option.get("type") != "null")
    if "enum" in piece or "const" in piece:
        return ", ".join(map(str, piece.get("enum", [piece.get("const")])))
    if piece.get("type") == "array":
        items = piece.get("items") or {"anyOf": piece.get("prefixItems", [])[:1]}
        return f"list of: {_values(items)}"
    if piece.get("pattern") == OBJECT_PATTERN:
        return "package.module:Name"
    words = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {piece[key]:g}" for key, word in limits.items() if key in piece]
    return ", ".join([words.get(str(piece.get("type")), "text"), *bounds])
