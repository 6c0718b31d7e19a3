"""Parametrised hypercomplex multiplication (PHM): matrices that are sums of Kronecker products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kronecker_sum(rule: Tensor, factors: Tensor) -> Tensor:
    """sum_i kron(A_i, B_i) for A (n, a, b) and B (n, p, q) -> (a * p, b * q)."""
    (_, a, b), (_, p, q) = rule.shape, factors.shape
    return torch.einsum("nab,npq->apbq", rule, factors).reshape(a * p, b * q)


class PHMLinear(nn.Module):
    """y = x W + b with W = sum_i kron(A_i, l_i r_i): the factors have rank one (Karimi Mahabadi et al., NeurIPS 2021).

    A (n, n, n) is handed in and may be shared by many layers; l_i (inputs / n), r_i (outputs / n).
    Raises ValueError where n does not divide both widths.
    """

    def __init__(self, inputs: int, outputs: int, rule: nn.Parameter) -> None:
        super().__init__()
        n = rule.shape[0]
        if inputs % n or outputs % n:
            raise ValueError(f"n={n} does not divide a layer of {inputs} inputs and {outputs} outputs")
        self.rule = rule
        self.left = nn.Parameter(torch.empty(n, inputs // n))
        self.right = nn.Parameter(torch.empty(n, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for factor in (self.left, self.right):  # Glorot uniform of a (width, 1) matrix, gain sqrt(2)
            bound = math.sqrt(2) * math.sqrt(6 / (factor.shape[1] + 1))
            nn.init.uniform_(factor, -bound, bound)

    def weight(self) -> Tensor:
        """(inputs, outputs)."""
        return kronecker_sum(self.rule, self.left.unsqueeze(2) * self.right.unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight().T, self.bias)
