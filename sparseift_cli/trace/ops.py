"""What is known about PyTorch's primitive (aten) ops: which cost no MACs, which are views, which are linear.

By convention only convolutions, linear layers and attention products cost MACs. Elementwise ops are recognised by
PyTorch's own `pointwise` tag and views by their schema; everything else that costs no MACs is listed here by name. An
op that is in none of these groups is reported as uncounted, so a new op can never be missed silently.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

aten = torch.ops.aten

_NAMES = """
    arange empty empty_like empty_strided full full_like
    linspace new_empty new_empty_strided new_full new_ones new_zeros ones
    ones_like rand randn rand_like randn_like randint randperm
    uniform uniform_ normal normal_ random_ exponential_ multinomial
    bernoulli_ scalar_tensor tril triu tril_indices triu_indices zeros
    zeros_like eye bernoulli lift_fresh lift_fresh_copy
    _to_copy clone copy copy_ contiguous as_strided_ hardswish_
    fill fill_ zero_ set_ resize_ detach_copy transpose_ squeeze_ unsqueeze_ t_
    cat stack repeat roll flip gather index index_put index_put_ index_add index_select scatter scatter_ scatter_add
    masked_fill masked_fill_ masked_select select_scatter slice_scatter take nonzero constant_pad_nd reflection_pad1d
    reflection_pad2d replication_pad1d replication_pad2d _unsafe_view _reshape_copy im2col col2im pixel_shuffle
    pixel_unshuffle channel_shuffle native_channel_shuffle unfold unsafe_split unsafe_split_with_sizes unsafe_chunk
    embedding _embedding_bag _embedding_bag_forward_only embedding_bag one_hot
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
    cudnn_batch_norm native_layer_norm native_group_norm _fused_rms_norm
    rms_norm linalg_vector_norm norm renorm _weight_norm_interface
    batch_norm_update_stats _batch_norm_with_update _batch_norm_no_update
    native_dropout dropout _softmax _log_softmax _safe_softmax logsumexp nll_loss_forward nll_loss2d_forward
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d max_pool1d
    max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool1d
    upsample_bilinear2d upsample_nearest2d upsample_bicubic2d upsample_linear1d upsample_nearest1d _upsample_bilinear2d_aa
    sum mean amax amin max min argmax argmin aminmax any all prod cumsum cumprod std var var_mean std_mean topk sort argsort
    median mode unique2 _unique2 bincount count_nonzero allclose equal is_same_size
    item _local_scalar_dense sym_size sym_stride sym_numel sym_storage_offset size stride
    grid_sampler_2d isin bucketize searchsorted glu prelu _prelu_kernel rrelu_with_noise_functional celu mish softplus
    addr complex polar _linalg_check_errors _efficientzerotensor _has_same_storage_numel
    histc floor_divide unbind_copy narrow_copy _assert_async _assert_tensor_metadata
"""
_FREE = frozenset(f"aten.{name}" for name in _NAMES.split())

# Linear in their tensors and the same for every channel: the result is a sum of the same summands (see `flow`).
_LINEAR_NAMES = """
    add add_ sub sub_ rsub neg clone _to_copy contiguous cat stack roll flip index index_select gather repeat
    _unsafe_view constant_pad_nd mean sum avg_pool1d avg_pool2d _adaptive_avg_pool2d
    upsample_bilinear2d upsample_nearest2d upsample_bicubic2d im2col
"""
LINEAR = {getattr(aten, name) for name in _LINEAR_NAMES.split()}
# These put values into a tensor as they are: of a constant they make no other use than a sum does (see `constants`).
_MOVING_NAMES = """
    copy copy_ index_put index_put_ index_copy slice_scatter select_scatter scatter scatter_ where masked_fill masked_fill_
    masked_scatter stack embedding
"""
MOVING = LINEAR | {getattr(aten, name) for name in _MOVING_NAMES.split()}
SCALING = {aten.mul, aten.mul_, aten.div, aten.div_}  # linear where only one operand is a tensor of activations
COPYING = {aten.clone, aten._to_copy, aten.contiguous, aten._unsafe_view, aten._reshape_copy}  # the same values
ALLOCATING = {aten.new_empty, aten.new_zeros, aten.empty_like, aten.zeros_like, aten.new_empty_strided}
_CONSTANTS = "new_full new_ones full_like ones_like rand_like randn_like randint_like nextafter heaviside histc"
NO_GRADIENT = ALLOCATING | {getattr(aten, name) for name in _CONSTANTS.split()}  # though the result may be floating


@cache
def costs_no_macs(op: Any) -> bool:
    """Whether an op overload (`aten.add.Tensor`) is known to cost no multiply-accumulates."""
    if torch.Tag.pointwise in op.tags or str(op.overloadpacket) in _FREE or op.namespace in ("prims", "prim"):
        return True
    return is_view(op)


@cache
def is_view(op: Any) -> bool:
    """Whether the result of an op overload shares the memory of its input (`aten.transpose.int`)."""
    return op.is_view or any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
