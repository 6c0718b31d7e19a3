"""Low-rank updates of a frozen linear layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """x -> scale * x A^T B^T with A (rank, in) and B (out, rank); zero at the start (Hu et al., ICLR 2022)."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * F.linear(x, self.down), self.up)


class MultiTaskLoRALinear(nn.Module):
    """MTLoRA's layer around a frozen linear (Agiza et al., CVPR 2024, "matrix" mode of the released code).

    shared output  y   = W x + b + s   B   A   drop(x)
    task output    y_t = W x + b + s_t B_t A_t z_t,  z_t = the task's own stream, or drop(x) where it has none yet

    W x is of the shared stream in both. The frozen layer stays where it is and is passed in at each call.
    """

    def __init__(
        self, frozen: nn.Linear, rank: int, scale: float, dropout: float, tasks: Iterable[str] = (), task_rank: int = 0
    ) -> None:
        super().__init__()
        size = (frozen.in_features, frozen.out_features)
        self.shared = LowRank(*size, rank, scale)
        self.per_task = nn.ModuleDict({task: LowRank(*size, task_rank, scale) for task in tasks})
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, frozen: nn.Linear, x: Tensor, streams: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (..., in), streams task -> (..., in); returns y and task -> y_t, all (..., out)."""
        base = frozen(x)
        dropped = self.dropout(x)
        outputs = {
            task: base + low_rank(streams[task] if streams else dropped) for task, low_rank in self.per_task.items()
        }
        return base + self.shared(dropped), outputs
