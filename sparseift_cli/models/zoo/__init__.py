"""Model zoo: the networks of the Sparse-IFT papers and their kin, with the `state_dict` keys of well-known libraries.

One family a file, each with `CONFIGS` (sizes by name) and `MODEL` (the class that a config builds).
"""

from .catalog import Image, ModelInfo
from .registry import build, example_input, lookup, names

__all__ = ["Image", "ModelInfo", "build", "example_input", "lookup", "names"]
