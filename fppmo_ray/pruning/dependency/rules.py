"""The table from torch's operations to rules, and their application."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch._ops import OpOverload

from fppmo_ray.pruning.dependency import compute_ops, shape_ops
from fppmo_ray.pruning.dependency.operation import Channels, Operation, UnsupportedForm

Rule = Callable[[Operation], list[Channels]]
"""Takes an operation, and returns the tracked positions of each of its results."""

_RULES: Mapping[Rule, str] = {
    compute_ops.elementwise: "copy hardswish hardsigmoid hardtanh mish _prelu_kernel prelu lerp",
    compute_ops.like_first: (
        "_to_copy native_dropout empty_like zeros_like ones_like full_like rand_like randn_like "
        "new_empty new_zeros new_ones new_full bernoulli fill zero normal uniform dropout "
        "alpha_dropout lift_fresh detach alias rrelu_with_noise"
    ),
    compute_ops.mixed: (
        "_softmax _log_softmax cumsum cumprod logcumsumexp sort topk _fft_r2c _fft_c2r _fft_c2c"
    ),
    compute_ops.observed: "_is_all_true _is_any_true device",
    compute_ops.resampled: "grid_sampler_2d grid_sampler_3d",
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
    shape_ops.folded: "col2im",
    shape_ops.complex_parts: "view_as_real view_as_complex",
    shape_ops.windows: "unfold",
    shape_ops.gated: "glu",
}
_BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names.split()}


class RuleError(Exception):
    """A rule raised an exception: a bug in this package, not a property of the network."""


def operation_name(overload: OpOverload) -> str:
    """Return the name without overload and in-place mark: ``add`` for ``aten::add_.Tensor``."""
    return str(overload.overloadpacket.__name__).removesuffix("_")


def apply_rule(overload: OpOverload, op: Operation) -> list[Channels]:
    """Apply the rule of an operation; the units change in place.

    An operation that has no rule, or has a form that its rule refuses, keeps all positions that it
    reads.

    Args:
        overload: The operation as torch dispatched it.
        op: The same operation with traced tensors as arguments.

    Returns:
        The tracked positions of every resulting tensor.

    Raises:
        RuleError: the rule itself failed.
    """
    if not op.outputs and _rule_of(overload) is not compute_ops.observed:
        return compute_ops.without_rule(op)
    try:
        return _checked(op, _rule_of(overload)(op))
    except UnsupportedForm:
        return compute_ops.without_rule(op)
    except _BUGS as error:
        # A type of its own: networks that do not run raise built-in ones, which trace() explains.
        shapes = ", ".join(str(tensor.shape) for tensor in op.tensors)
        raise RuleError(
            f"the dependency rule of {overload} failed on tensors of shapes {shapes}, in "
            f"{op.module or 'the network'}: {type(error).__name__}: {error}; this is a bug in "
            "fppmo_ray, please report it with the code that calls the operation"
        ) from error


def _checked(op: Operation, results: list[Channels]) -> list[Channels]:
    """Check that a rule returned positions of the right length for every result."""
    for shape, channels in zip(op.outputs, results, strict=True):
        for axis, positions in channels.items():
            if positions.shape != (shape[axis],):
                raise ValueError(f"{positions.shape} positions along axis {axis} of {shape}")
    return results


def _rule_of(overload: OpOverload) -> Rule:
    """Find the rule by name, or by torch's own tag for elementwise operations."""
    if overload.namespace == "quantized":
        return compute_ops.quantised
    rule = _BY_NAME.get(operation_name(overload))
    if rule is not None:
        return rule
    if torch.Tag.pointwise in overload.tags:
        return compute_ops.elementwise
    return compute_ops.without_rule
