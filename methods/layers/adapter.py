"""Bottleneck adapters (Houlsby et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """x -> x + up(GELU(down(LN(x)))) on (..., C), with `down` C -> n and `up` n -> C.

    `up` must give zero at the start, so that the adapter starts as the identity.
    """

    def __init__(self, norm: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.norm, self.down, self.up = norm, down, up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(self.norm(x))))


def zero_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer that gives zero."""
    linear = nn.Linear(inputs, outputs, bias)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def bottleneck_width(channels: int, reduction: int) -> int:
    return max(channels // reduction, 1)


def houlsby(reduction: int) -> Callable[[int], Bottleneck]:
    """channels -> an adapter of width channels / reduction: 2C^2/r weights, (1 + 1/r)C biases, a LayerNorm."""

    def make(channels: int) -> Bottleneck:
        width = bottleneck_width(channels, reduction)
        return Bottleneck(nn.LayerNorm(channels), nn.Linear(channels, width), zero_linear(width, channels))

    return make
