"""Somebody else's configuration as a recipe of ours, with an account of what could not be carried over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UsageError
from ..catalog import schema_file
from ..write import short_yaml
from . import model_zoo, sparse_ift
from .foreign import Foreign, Imported


def read_foreign(
    paths: Sequence[Path], *, model: str | None = None, picks: Mapping[str, str] | None = None
) -> list[Imported]:
    """The recipes that one Model Zoo file describes, or a Sparse-IFT base file and experiment.

    `model` names the dense model of a Model Zoo file; `picks` chooses from the grid of a Sparse-IFT experiment.

    Raises:
        UsageError: the files are of no known format, or describe what is not there.
    """
    files = [Foreign.open(path) for path in paths]
    named = " and ".join(map(str, paths))
    if len(files) == 1 and model_zoo.recognises(files[0]):
        if picks:
            raise UsageError("--pick chooses from the grid of a Sparse-IFT experiment; this is a Model Zoo file")
        return [model_zoo.convert(files[0], model)]
    if sparse_ift.recognises(files):
        if model:
            raise UsageError("--model is for Model Zoo files; a Sparse-IFT configuration names its own")
        return sparse_ift.convert(files, picks or {})
    raise UsageError(
        f"{named}: neither a Cerebras Model Zoo configuration nor one of the Sparse-IFT authors",
        hint="a Model Zoo file has trainer.init.model or model.hidden_size; a Sparse-IFT one maskopt and sift_family",
    )


def as_recipe(imported: Imported) -> str:
    """The recipe as text: its first comment names what is not carried over."""
    about = imported.about
    if imported.notes:
        about += "\n\nNot carried over:\n" + "\n".join(f"- {note}" for note in imported.notes)
    return short_yaml(imported.sections, about, str(schema_file()))
