"""Layers whose weight is stored and computed block by block, so that a zero block costs neither time nor memory.

`BlockLinear` (in `linear`) is the layer, `BlockIndex` (in `index`) says where its blocks are, `KERNELS` (in `registry`) lists
the backends that compute it. Kernels see tensors and indices, never plans or recipes. This module imports neither torch
nor triton.
"""

from .registry import KERNELS, Backend, LayerChoice, LayerRequest, LayerSize, choose, select

__all__ = ["KERNELS", "Backend", "LayerChoice", "LayerRequest", "LayerSize", "choose", "select"]
