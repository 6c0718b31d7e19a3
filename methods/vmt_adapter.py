"""VMT-Adapter and VMT-Adapter-Lite: one pass for all tasks, task-specific features on the way.

Paper: Xin et al., "VMT-Adapter: Parameter-Efficient Transfer Learning for Multi-Task Dense Scene Understanding", AAAI
2024 (no public code).

Eq. 3  F = ReLU(x W_down) W_up in parallel to the MLP of every block, x the MLP's input before its norm
Eq. 4  f_t = alpha_t * (s F) + gamma_t, for task t alone
Eq. 5  the decoder of task t gets f_g + f_t from each of the four stages
Eq. 6  Lite: W = sum_{i<=m} kron(A_i, B_i); W_down and W_up of a block share the A_i

Our choice where the paper is silent: s = 0.5, and (1 - s) F is the task-generic part that is added to the encoder; f_t
of a stage is the sum over its blocks; alpha = 1, gamma = 0 and W_up = 0 at the start. As counted, VMT-Adapter has a
LayerNorm on its input and Lite has none, and the A_i belong to a block (the paper's Table 1 has one set in all).
Count (Swin-T)  rho 1, 2, 4, 8: 6.915, 4.756, 3.677, 3.137 M (published 6.91, 4.56, 3.68, 3.14; the second is a slip of
4.76). Lite, m = 3, 6, 12: 2.950, 2.772, 2.700 M (2.95, 2.77, 2.70).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone, TransformerBackbone
from methods.layers.adapter import bottleneck_width, zero_linear
from methods.layers.encoders import require_blocks, with_decoder
from methods.layers.phm import kronecker_sum
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, MethodError, at_least_one, register


@dataclass(frozen=True)
class Options:
    """`rho`: the bottleneck is C / `rho` wide (eq. 3). `s`: the tasks' share of F, the rest is added to the
    encoder (eq. 4)."""

    rho: int = 4
    s: float = 0.5

    def __post_init__(self) -> None:
        at_least_one(rho=self.rho)
        if not 0 < self.s < 1:
            raise ValueError(f"s must be between 0 and 1, not {self.s:g}")


@dataclass(frozen=True)
class LiteOptions(Options):
    """`m`: so many Kronecker products make a matrix (eq. 6)."""

    m: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(m=self.m)


class CrossTask(nn.Module):
    """F of eq. 3: LayerNorm, C -> C / rho, ReLU, back to C."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.down = nn.Linear(channels, width)
        self.up = zero_linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(self.norm(x))))


class LiteCrossTask(nn.Module):
    """F of eq. 3 with the matrices of eq. 6, (C, k) and (k, C)."""

    def __init__(self, channels: int, width: int, m: int) -> None:
        super().__init__()
        if channels % m or width % m:
            both = max(k for k in range(1, m) if math.gcd(channels, width) % k == 0)
            raise MethodError(
                f"vmt_adapter_lite: m={m} does not divide {channels} channels and a width of {width}; [m={both}] does"
            )
        self.shared = nn.Parameter(torch.randn(m, m, m) / math.sqrt(m))
        self.down = nn.Parameter(torch.randn(m, channels // m, width // m) / math.sqrt(channels))
        self.up = nn.Parameter(torch.zeros(m, width // m, channels // m))
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        down, up = kronecker_sum(self.shared, self.down), kronecker_sum(self.shared, self.up)
        return F.linear(F.relu(F.linear(x, down.T, self.down_bias)), up.T, self.up_bias)


class Extraction(nn.Module):
    """f_t of eq. 4 for one task and block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.gamma


class VMTEncoder(nn.Module):
    def __init__(self, backbone: TransformerBackbone, tasks: Mapping[str, int], options: Options) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        self.s = options.s

        def cross_task(channels: int) -> nn.Module:
            width = bottleneck_width(channels, options.rho)
            if isinstance(options, LiteOptions):
                return LiteCrossTask(channels, width, options.m)
            return CrossTask(channels, width)

        self.cross_task = nn.ModuleList(cross_task(c) for c in backbone.widths())
        self.extract = nn.ModuleDict({t: nn.ModuleList(Extraction(c) for c in backbone.widths()) for t in tasks})

    def forward(self, image: Tensor) -> Features:
        backbone, index = self.backbone, 0
        features: dict[str, list[Tensor]] = {task: [] for task in self.extract}
        general = []
        x = backbone.embed(image)
        for stage, blocks in enumerate(backbone.stages):
            x = backbone.enter(stage, x)
            specific = dict.fromkeys(self.extract, 0)
            for block in blocks:
                x = backbone.attention(block, x)
                f = self.cross_task[index](x)
                x = backbone.feed_forward(block, x) + (1 - self.s) * f
                own_share = self.s * f  # once: alpha's gradient keeps it
                for task, extract in self.extract.items():
                    specific[task] = specific[task] + extract[index](own_share)
                index += 1
            for task, f_t in specific.items():
                features[task].append(backbone.output(stage, x + f_t))
            general.append(backbone.output(stage, x))
        return Features(features, general)


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_blocks("vmt_adapter_lite" if isinstance(options, LiteOptions) else "vmt_adapter", backbone)
    return with_decoder(VMTEncoder(backbone, tasks, options), backbone, tasks, setting)


_ROWS = {Options(rho=rho): f"VMT-Adapter rho={rho}" for rho in (1, 2, 8)} | {Options(): "VMT-Adapter"}
_LITE_ROWS = {LiteOptions(m=m): f"VMT-Adapter-Lite m={m}" for m in (6, 12)} | {LiteOptions(): "VMT-Adapter-Lite"}

for name, title, options, rows in (
    ("vmt_adapter", "VMT-Adapter", Options, _ROWS),
    ("vmt_adapter_lite", "VMT-Adapter-Lite", LiteOptions, _LITE_ROWS),
):
    register(
        Method(
            name=name,
            title=title,
            family="multi-task PEFT",
            citation="Xin et al., AAAI 2024",
            build=build,
            starts_pretrained=True,
            options=options,
            rows=rows.get,
        )
    )
