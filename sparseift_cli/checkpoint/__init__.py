"""Reads checkpoints from strangers: headers only, without executing anything, and values in bounded memory.

opening           `open_checkpoint`: what kind of file it is, which reader reads it, shards, names -> a `Checkpoint`
facts             `Checkpoint` and `TensorInfo`: names, shapes, element types, and where in the file the bytes are
safetensors_file  safetensors files, by the library
torch_file        files of torch.save: the zip format and the legacy format
  inert_pickle    the pickle inside them, read as data: nothing is imported, called or built
  torch_rules     what the names in such a pickle mean: storages, tensors, dicts
  state_dict      finds the state dict in what a training script saved
blocks            weights of stored blocks (`kernels`): read as the dense weights that they store
reading           reads tensors in pieces
values            counts zeros, NaN and inf, and finds the pattern of the zeros
recognise         which model of the zoo the names and shapes fit
untrusted         the error, text that is safe to print, JSON of bounded size

Listing imports no torch; reading values does.
"""

from .facts import Checkpoint, OtherEntry, Storage, TensorInfo
from .opening import open_checkpoint
from .reading import read_tensor
from .values import TensorValues, scan

__all__ = [
    "Checkpoint",
    "OtherEntry",
    "Storage",
    "TensorInfo",
    "TensorValues",
    "open_checkpoint",
    "read_tensor",
    "scan",
]
