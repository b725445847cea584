"""What stands in the header of a safetensors file of ours: names, types, shapes and where the bytes are. No tensor is read."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.facts import TensorInfo
from ..checkpoint.safetensors_file import read_header
from ..checkpoint.untrusted import Malformed
from ..errors import ArtifactError


def tensors_in(path: Path) -> dict[str, TensorInfo]:
    """Name -> facts, in the file's order.

    Raises:
        ArtifactError: the file is missing, cannot be read, or is not of its format.
    """
    try:
        return {info.name: info for info in read_header(path)[0]}
    except Malformed as error:
        raise ArtifactError(f"{path}: {error.what}", hint=error.hint) from None
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}", hint="the folder is incomplete") from None
