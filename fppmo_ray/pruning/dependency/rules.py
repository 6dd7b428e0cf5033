"""Which rule follows which of torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch._ops import OpOverload

from fppmo_ray.pruning.dependency import compute_ops, shape_ops
from fppmo_ray.pruning.dependency.operation import Channels, Operation

Rule = Callable[[Operation], list[Channels]]
"""From an operation to what the axes of each of its results are."""

_RULES: Mapping[Rule, str] = {
    compute_ops.elementwise: "copy hardswish hardsigmoid hardtanh mish _prelu_kernel prelu lerp",
    compute_ops.like_first: (
        "_to_copy native_dropout empty_like zeros_like ones_like full_like rand_like randn_like "
        "new_empty new_zeros new_ones new_full bernoulli fill zero normal uniform dropout "
        "alpha_dropout lift_fresh detach alias rrelu_with_noise"
    ),
    compute_ops.mixed: "_softmax _log_softmax cumsum cumprod logcumsumexp sort",
    compute_ops.reduced: (
        "mean sum amax amin max min var std var_mean std_mean prod logsumexp linalg_vector_norm "
        "norm argmax argmin any all median mode"
    ),
    compute_ops.pooled: (
        "max_pool2d_with_indices max_pool3d_with_indices max_pool2d max_pool3d avg_pool1d "
        "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d "
        "adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
        "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d "
        "replication_pad1d replication_pad2d replication_pad3d"
    ),
    compute_ops.batch_norm: (
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "_batch_norm_with_update cudnn_batch_norm"
    ),
    compute_ops.group_norm: "native_group_norm",
    compute_ops.layer_norm: "native_layer_norm _fused_rms_norm",
    compute_ops.convolution: "convolution",
    compute_ops.matrix_product: "mm bmm addmm baddbmm",
    compute_ops.linear: "linear",
    compute_ops.attention: (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention scaled_dot_product_attention "
        "_scaled_dot_product_attention_math"
    ),
    shape_ops.reshaped: (
        "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten"
    ),
    shape_ops.restrided: "as_strided",
    shape_ops.permuted: "permute transpose t",
    shape_ops.expanded: "expand",
    shape_ops.repeated: "repeat",
    shape_ops.concatenated: "cat",
    shape_ops.stacked: "stack",
    shape_ops.split: "split split_with_sizes",
    shape_ops.sliced: "slice",
    shape_ops.selected: "select unbind",
    shape_ops.rearranged: "roll flip index_select",
    shape_ops.indexed: "index",
    shape_ops.embedded: "embedding",
    shape_ops.padded: "constant_pad_nd",
    shape_ops.pixel_shuffled: "pixel_shuffle",
    shape_ops.pixel_unshuffled: "pixel_unshuffle",
    shape_ops.channel_shuffled: "channel_shuffle native_channel_shuffle",
    shape_ops.columns: "im2col",
    shape_ops.windows: "unfold",
    shape_ops.gated: "glu",
}
_UNEXPECTED_FORM = (AssertionError, LookupError, TypeError, ValueError)
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names.split()}


def operation_name(overload: OpOverload) -> str:
    """``add`` for ``aten::add_.Tensor``."""
    return str(overload.overloadpacket.__name__).removesuffix("_")


def apply_rule(overload: OpOverload, op: Operation) -> list[Channels]:
    """What the axes of the results are; an operation in a form that its rule does not know is none.

    Such an operation keeps all that it reads, which says so when the groups are chosen.
    """
    try:
        results = _rule_of(overload)(op)
    except _UNEXPECTED_FORM:
        return compute_ops.not_followed(op)
    if not results or len(results) != len(op.outputs):
        return compute_ops.not_followed(op)
    return results


def _rule_of(overload: OpOverload) -> Rule:
    """The rule by name, or by torch's own tag for what works element by element."""
    rule = _BY_NAME.get(operation_name(overload))
    if rule is not None:
        return rule
    if torch.Tag.pointwise in overload.tags:
        return compute_ops.elementwise
    return compute_ops.not_followed
