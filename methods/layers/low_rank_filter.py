"""Depthwise 3x3 filters on low-rank maps (H, W, r): learned once, or made from the map itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """x (N, H, W, r), kernels (N or 1, r, 9) row by row -> the 3x3 correlation with zero padding, (N, H, W, r)."""
    return grouped_convolution(x, kernels) if x.is_cuda else shifted_products(x, kernels)


def grouped_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """One group a sample and channel, as in TADFormer's released code: on a GPU a few kernels in place of dozens, on a
    CPU slower for small maps."""
    count, height, width, rank = x.shape
    maps = x.permute(0, 3, 1, 2)
    if len(kernels) == count:
        maps = maps.reshape(1, count * rank, height, width)
    out = F.conv2d(maps, kernels.reshape(-1, 1, 3, 3), padding=1, groups=maps.shape[1])
    return out.reshape(count, rank, height, width).permute(0, 2, 3, 1)


def shifted_products(x: Tensor, kernels: Tensor) -> Tensor:
    """Nine of them, summed."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    out = 0
    for index in range(9):
        row, column = divmod(index, 3)
        shifted = padded[:, row : row + height, column : column + width]
        out = out + shifted * kernels[..., index].unsqueeze(1).unsqueeze(1)
    return out


class StaticFilter(nn.Module):
    """One kernel and bias a channel: 10 r parameters."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(rank, 9).uniform_(-1 / 3, 1 / 3))
        self.bias = nn.Parameter(torch.empty(rank).uniform_(-1 / 3, 1 / 3))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.kernel.unsqueeze(0)) + self.bias


class DynamicFilter(nn.Module):
    """Kernels from each sample's own mean: FilterNorm(conv1x1(GAP(x))), 9 r^2 + 27 r parameters.

    FilterNorm (Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021): each kernel is brought to mean 0 and
    deviation 1 over its nine taps, then scaled and shifted by learned values.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.make = nn.Linear(rank, 9 * rank)
        self.scale = nn.Parameter(torch.randn(rank, 9) * math.sqrt(2) / 3)
        self.shift = nn.Parameter(torch.randn(rank, 9))

    def kernels(self, x: Tensor) -> Tensor:
        """x (N, H, W, r) -> (N, r, 9)."""
        made = self.make(x.mean((1, 2))).unflatten(-1, (-1, 9))
        made = (made - made.mean(-1, keepdim=True)) / (made.std(-1, keepdim=True) + 1e-10)
        return made * self.scale + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.kernels(x))
