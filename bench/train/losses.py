"""The losses of the MTLoRA code family (inherited from ASTMT), its bugs left out.

Each takes full-resolution logits (B, C, H, W) in float32 and labels as bench.data.transforms describes them, and
averages over the valid pixels of the batch; a batch without one gives zero, not NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.decode import IGNORE

EDGE_POSITIVE_WEIGHT = 0.95


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over valid pixels; label (B, H, W), 255 = ignore."""
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp_min(1)


def balanced_bce(logits: Tensor, label: Tensor, positive_weight: float | None = None) -> Tensor:
    """(w * sum over positives + (1 - w) * sum over negatives) / valid pixels (Xie and Tu, HED, ICCV 2015).

    w is the share of negatives in the batch, or the fixed `positive_weight`. label (B, H, W) in {0, 1}, 255 = ignore.
    """
    logits, valid = logits[:, 0], label != IGNORE
    positive, negative = valid & (label > 0.5), valid & (label <= 0.5)
    count = valid.sum().clamp_min(1)
    weight = negative.sum() / count if positive_weight is None else positive_weight
    per_pixel = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return (weight * (per_pixel * positive).sum() + (1 - weight) * (per_pixel * negative).sum()) / count


def edge_bce(logits: Tensor, label: Tensor) -> Tensor:
    """Balanced cross-entropy with the positive weight fixed at 0.95."""
    return balanced_bce(logits, label, EDGE_POSITIVE_WEIGHT)


def normals_l1(logits: Tensor, label: Tensor) -> Tensor:
    """Mean absolute difference of the unit-normalised prediction; label (B, 3, H, W), zero vector = ignore."""
    # A norm over the channel axis is some thirty times slower on a CPU; 1e-24 keeps the gradient finite at zero.
    unit = logits / (logits.square().sum(1, keepdim=True) + 1e-24).sqrt()
    valid = (label != 0).any(1, keepdim=True)
    return ((unit - label).abs() * valid).sum() / (3 * valid.sum()).clamp_min(1)


def depth_l1(logits: Tensor, label: Tensor) -> Tensor:
    """Mean absolute difference in metres; label (B, H, W), 0 = ignore."""
    valid = label > 0
    return ((logits[:, 0] - label).abs() * valid).sum() / valid.sum().clamp_min(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "semseg": cross_entropy,
    "human_parts": cross_entropy,
    "saliency": balanced_bce,
    "normals": normals_l1,
    "depth": depth_l1,
    "edge": edge_bce,
}


def synthetic_label(task: str, channels: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """A random label (B, H, W) = shape with the task's encoding, for measurements that need no data."""
    if task == "normals":
        return F.normalize(torch.randn(shape[0], 3, *shape[1:], generator=generator), dim=1)
    if task == "depth":
        return 1 + 9 * torch.rand(shape, generator=generator)
    if task in ("saliency", "edge"):
        return (torch.rand(shape, generator=generator) > 0.7).float()
    return torch.randint(0, channels, shape, generator=generator)
