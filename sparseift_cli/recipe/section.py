"""What the sections of a recipe share: frozen, strict models whose fields say in a sentence what they mean."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from . import durations


class Section(BaseModel):
    """One section. `SHORT` is the field that a single word stands for: `optimizer: sgd` is `optimizer: {name: sgd}`.

    `WORDS` are what this word may be, where the field's type does not say it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    SHORT: ClassVar[str | None] = None
    WORDS: ClassVar[tuple[str, ...]] = ()


Duration = Annotated[
    float | str,
    PlainValidator(durations.check),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": durations.PATTERN}]}),
]
"""A number in the unit of the run's length, or text: `500 steps`, `2 epochs`, `10%`."""

Count = Annotated[int, Field(ge=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
