"""Single-level deformable attention in plain PyTorch, and the feed-forward network that goes with it.

The sparse attention of ViT-Adapter (Chen et al., ICLR 2023), itself Deformable DETR's: every query looks at a few
points around its own position, at learned offsets and with learned weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DeformableAttention(nn.Module):
    """Queries (N, Hq, Wq, d) attend to a map (N', H, W, d) at `points` positions a head.

    Parameters: (d+1)*2*M*P offsets, (d+1)*M*P weights, (d+1)*d value, (d+1)*d output, for M heads and P points.
    `plain`: the samples are kept for backward.
    """

    plain = False

    def __init__(self, dim: int, heads: int, points: int = 4) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels")
        self.heads, self.points = heads, points
        self.offsets = nn.Linear(dim, heads * points * 2)
        self.weights = nn.Linear(dim, heads * points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads start by looking in evenly spread directions, point k at distance k, with equal weights."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1).view(1, -1, 1)
        nn.init.zeros_(self.offsets.weight)
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None] * distances).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, source: Tensor) -> Tensor:
        """query (N, Hq, Wq, d), source (K*N, H, W, d) -> (K*N, Hq, Wq, d).

        With K > 1 the same queries attend to K maps; where to look is then worked out once.
        """
        locations, weights = self.locate(query, source.shape[1:3])
        repeats = source.shape[0] // query.shape[0]
        if repeats > 1:
            locations, weights = (x.repeat(repeats, *[1] * (x.dim() - 1)) for x in (locations, weights))
        return self.output(self.sample(self.value(source), locations, weights))

    def locate(self, query: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Sampling positions in [0, 1] (x, y), (N, Hq, Wq, M, P, 2), and their weights (N, Hq, Wq, M, P).

        Offsets are in pixels of the (H, W) = size map, around the query's own pixel centre.
        """
        batch, height, width, _ = query.shape
        shape = (batch, height, width, self.heads, self.points)
        offsets = self.offsets(query).view(*shape, 2).float()
        rows = (torch.arange(height, device=query.device) + 0.5) / height
        columns = (torch.arange(width, device=query.device) + 0.5) / width
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).view(1, height, width, 1, 1, 2)
        # Divided by Python numbers: a tensor made from them would make a GPU wait for the copy.
        relative = torch.stack([offsets[..., 0] / size[1], offsets[..., 1] / size[0]], -1)
        return centres + relative, self.weights(query).view(shape).softmax(-1)

    def sample(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """Bilinear samples (zero outside) of value (N, H, W, d), weighted and summed -> (N, Hq, Wq, d)."""
        batch, height, width, dim = value.shape
        queries = locations.shape[1:3]

        def by_head(x: Tensor) -> Tensor:  # (N, Hq, Wq, M, ...) -> (N * M, Hq * Wq, ...)
            return x.flatten(1, 2).transpose(1, 2).flatten(0, 1)

        maps = value.view(batch, height, width, self.heads, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
        # Positions are sampled in float32: half precision would not resolve a pixel of a large map.
        maps, grid, weights = maps.float(), 2 * by_head(locations) - 1, by_head(weights).float()
        if self.plain:
            out = (_samples(maps, grid) * weights.unsqueeze(1)).sum(-1)
        else:
            out = sample_and_sum(maps, grid, weights)
        return out.view(batch, dim, *queries).permute(0, 2, 3, 1).to(value.dtype)


def sample_and_sum(maps: Tensor, grid: Tensor, weights: Tensor) -> Tensor:
    """maps (N, C, H, W), grid (N, Q, P, 2) in [-1, 1], weights (N, Q, P) -> weighted sums of P samples, (N, C, Q).

    The P samples of a query are P times its size, the largest thing here; none is kept, backward samples again.
    """
    return _SampleAndSum.apply(maps, grid, weights)


def _samples(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _SampleAndSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, grid: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(maps, grid, weights)
        return _samples(maps, grid).mul_(weights.unsqueeze(1)).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        maps, grid, weights = ctx.saved_tensors
        of_maps, of_grid, of_weights = ctx.needs_input_grad
        grad = grad.unsqueeze(-1)
        grad_weights = _samples(maps, grid).mul_(grad).sum(1) if of_weights else None
        grad_maps = grad_grid = None
        if of_maps or of_grid:
            spread = grad * weights.unsqueeze(1)  # the gradient of the samples
            grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                spread, maps, grid, BILINEAR, ZEROS, False, [of_maps, True]
            )
        return grad_maps, grad_grid if of_grid else None, grad_weights


BILINEAR = ZEROS = 0  # as aten numbers them


class ConvFFN(nn.Module):
    """Linear, depthwise 3x3 convolution, GELU, linear on (N, H, W, d) maps (ViT-Adapter)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.reduce = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.reduce(F.gelu(x))
