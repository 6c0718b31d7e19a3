"""What CUDA does otherwise than a CPU, where it changes which tensors live: for estimates without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# ATen/autocast_mode.h: AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32 with AT_FORALL_FP32_SET_OPT_DTYPE, and
# AT_FORALL_PROMOTE, as far as they have a name in torch or torch.nn.functional that a model calls.
LOWER = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "addmm",
    "matmul", "__matmul__", "__rmatmul__", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm",
    "scaled_dot_product_attention",
})  # fmt: skip
FLOAT32 = frozenset({
    "acos", "asin", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "tan", "pow", "__pow__",
    "softplus", "layer_norm", "rms_norm", "group_norm", "cosine_similarity", "nll_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "mse_loss", "cross_entropy", "binary_cross_entropy_with_logits", "logsumexp", "interpolate",
    "norm", "softmax", "log_softmax",
})  # fmt: skip
FLOAT32_INSIDE = frozenset({"sum", "prod", "cumsum", "cumprod"})  # summed in float32 without a copy of the input
PROMOTE = frozenset({"addcdiv", "addcmul", "atan2", "cross", "dot", "grid_sample", "tensordot"})
IS_CUDA = Tensor.is_cuda.__get__  # as `x.is_cuda` comes to a function mode


class LikeCUDA(TorchFunctionMode):
    """Tensors say that they are on a GPU, for code that asks; dropout keeps a boolean mask, attention is the fused
    kernel, and with `dtype` autocast follows CUDA's lists.

    Casts of trained weights are kept until `forget_casts`, as CUDA's autocast keeps them.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self._cast_weights: dict[int, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        self.forget_casts()
        super().__exit__(*error)

    def forget_casts(self) -> None:
        """What autocast does at its end."""
        self._cast_weights.clear()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_CUDA:
            return True
        name = getattr(func, "__name__", "")
        if self.dtype is not None:
            if name in LOWER:
                args, kwargs = self._cast(self.dtype, args, kwargs)
            elif name in FLOAT32 or (name in PROMOTE and _mixed(args, kwargs)):
                args, kwargs = self._cast(torch.float32, args, kwargs)
            elif name in FLOAT32_INSIDE and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                kwargs = {"dtype": torch.float32} | kwargs
        if name == "dropout":
            return _dropout(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, dtype: torch.dtype, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def one(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
                return x
            if not (x.is_leaf and x.requires_grad):
                return x.to(dtype)
            if id(x) not in self._cast_weights:
                self._cast_weights[id(x)] = x.to(dtype)
            return self._cast_weights[id(x)]

        return tree_map(one, args), tree_map(one, kwargs)


def _mixed(args: tuple, kwargs: dict) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in tree_leaves((args, kwargs)))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any) -> Tensor:
    """CUDA's fused dropout: a boolean mask, where a CPU keeps one of the input's type."""
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """CUDA's memory-efficient kernel, which also takes biases that are trained, where a CPU falls back to plain
    products. Biases are padded to 16 columns for it."""
    tokens, keys = query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, -keys % 16))[..., :keys].expand(*query.shape[:-2], tokens, keys)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad or key.requires_grad, dropout_p, is_causal, scale=scale
    )[0]
