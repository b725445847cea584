"""Where the files shipped beside the code are, in a wheel and in a source checkout, and where caches are. Imports errors only."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError

_PACKAGE = Path(__file__).resolve().parent.parent


def recipes_dir() -> Path:
    """The folder of the shipped recipes, `<model>/*.yaml`, whatever the working directory.

    A wheel carries it inside the package; a checkout (and so an editable install) keeps it beside the package.

    Raises:
        UsageError: this installation has no recipes.
    """
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UsageError(f"no recipes beside {_PACKAGE}", hint="the installation is incomplete: install sparseift again")


def cache_dir() -> Path:
    """The folder of what can be fetched or measured again: ~/.cache/sparseift. It need not exist."""
    return Path.home() / ".cache" / "sparseift"
