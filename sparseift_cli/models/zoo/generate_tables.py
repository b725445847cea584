"""Write the zoo's layer tables anew: `python -m sparseift_cli.models.zoo.generate_tables [NAME ...]`.

Each file holds one model at its default input: the table that every command reads without torch, and the names and shapes
of its `state_dict`, by which `inspect` recognises checkpoints. A test proves them current.
"""

from __future__ import annotations

import json
import sys

from ...trace.build import layer_table
from ..source import TABLES, Built, Request, build
from . import registry


def document(name: str, built: Built) -> str:
    """The generated file of the zoo model `name`, built at its default input, as text."""
    table = layer_table(built.model, built.args, name=name, input_shape=built.input_shape)
    shapes = {key: list(tensor.shape) for key, tensor in built.model.state_dict().items()}
    data = {"table": table.to_json(), "state_dict": shapes}
    return json.dumps(data, separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n"


def main(names: list[str]) -> None:
    """Write the files of the named models, or of all."""
    TABLES.mkdir(exist_ok=True)
    for name in names or registry.names():
        (TABLES / f"{name}.json").write_text(document(name, build(Request(name))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
