"""Polyhistor and Polyhistor-Lite: adapters from decomposed hyper-networks.

Paper: Liu, Ma, Tian, He, Kira, "Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks", NeurIPS
2022. No public code, and the counts are open: what follows is our reading. One pass a task.

An adapter x + W_up GELU(W_down LN(x)) of width n = C / rho on the output of every block's feed-forward network;
LayerNorm and biases are the task's own parameters, both matrices are made from the task's embedding (64, N(0, 1)).
Polyhistor        W = W_p W_q with W_p (inputs, k) and W_q (k, outputs), each by a linear hyper-network, a pair of them
                  for every block and matrix. k = 10 and rho = 8 come nearest to the published count.
                  Count (Swin-T) 8,963,520 (published 8.96 M).
Polyhistor-Lite   one pair a matrix for the whole network makes a template T at the first stage's width; a block s
                  times wider uses kron(S, T) with a scaling kernel S (s, s) of its own, shared by the tasks. k = 16,
                  rho = 4. Count (Swin-T) 2,852,916 (published 2.96 M).
W_up is zero at the start, so that every adapter starts as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone, TransformerBackbone
from methods.layers.adapter import bottleneck_width
from methods.layers.encoders import require_blocks, with_decoder
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, MethodError, at_least_one, register

EMBEDDING = 64


@dataclass(frozen=True)
class Options:
    """`k`: inner width of W_p W_q, of which a matrix is made. `rho`: an adapter is C / `rho` wide."""

    k: int = 10
    rho: int = 8

    def __post_init__(self) -> None:
        at_least_one(k=self.k, rho=self.rho)


@dataclass(frozen=True)
class LiteOptions:
    """`k`: inner width of W_p W_q, of which the template is made. `rho`: an adapter is C / `rho` wide."""

    k: int = 16
    rho: int = 4

    def __post_init__(self) -> None:
        at_least_one(k=self.k, rho=self.rho)


class DecomposedHyperNetwork(nn.Module):
    """Embedding (64) -> W_p W_q (inputs, outputs); `zero` lets it start at zero."""

    def __init__(self, inputs: int, outputs: int, k: int, zero: bool) -> None:
        super().__init__()
        self.shapes = (inputs, k), (k, outputs)
        self.p = nn.Linear(EMBEDDING, inputs * k, bias=False)
        self.q = nn.Linear(EMBEDDING, k * outputs, bias=False)
        # For an embedding of unit variance: entries of W with variance 1 / inputs.
        nn.init.normal_(self.p.weight, std=1 / math.sqrt(EMBEDDING * inputs))
        nn.init.normal_(self.q.weight, std=0 if zero else 1 / math.sqrt(EMBEDDING * k))

    def forward(self, embedding: Tensor) -> Tensor:
        return self.p(embedding).view(self.shapes[0]) @ self.q(embedding).view(self.shapes[1])


class TaskParameters(nn.Module):
    """LayerNorm and biases of one task's adapter; the matrices are handed in."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up_bias = nn.Parameter(torch.zeros(channels))

    def adapter(self, down: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
        """down (C, n), up (n, C)."""

        def adapt(x: Tensor) -> Tensor:
            hidden = F.gelu(F.linear(self.norm(x), down.T, self.down_bias))
            return x + F.linear(hidden, up.T, self.up_bias)

        return adapt


class PolyhistorEncoder(nn.Module):
    """What both variants share; `matrices` gives W_down and W_up of every block from a task's embedding.

    `sizes` holds channels and bottleneck of every block.
    """

    def __init__(
        self, backbone: TransformerBackbone, tasks: Mapping[str, int], sizes: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        self.embeddings = nn.ParameterDict({task: torch.randn(EMBEDDING) for task in tasks})
        self.own = nn.ModuleDict({task: nn.ModuleList(TaskParameters(*size) for size in sizes) for task in tasks})

    def matrices(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def forward(self, image: Tensor) -> Features:
        features = {}
        for task, embedding in self.embeddings.items():
            pairs = zip(self.own[task], self.matrices(embedding), strict=True)
            adapters = [own.adapter(down, up) for own, (down, up) in pairs]
            features[task] = self.backbone(image, feed_forward=adapters).maps
        return Features(features)


class Polyhistor(PolyhistorEncoder):
    def __init__(self, backbone: TransformerBackbone, tasks: Mapping[str, int], options: Options) -> None:
        sizes = [(channels, bottleneck_width(channels, options.rho)) for channels in backbone.widths()]
        super().__init__(backbone, tasks, sizes)
        self.down = nn.ModuleList(DecomposedHyperNetwork(c, n, options.k, zero=False) for c, n in sizes)
        self.up = nn.ModuleList(DecomposedHyperNetwork(n, c, options.k, zero=True) for c, n in sizes)

    def matrices(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(down(embedding), up(embedding)) for down, up in zip(self.down, self.up, strict=True)]


class PolyhistorLite(PolyhistorEncoder):
    def __init__(self, backbone: TransformerBackbone, tasks: Mapping[str, int], options: LiteOptions) -> None:
        channels = backbone.channels[0]
        width = bottleneck_width(channels, options.rho)
        odd = [c for c in backbone.channels if c % channels]
        if odd:
            raise MethodError(
                f"polyhistor_lite enlarges the first stage's {channels} channels by whole numbers and cannot run on "
                f"{backbone.name}, which has a stage of {odd[0]}"
            )
        scales = [c // channels for c in backbone.widths()]
        super().__init__(backbone, tasks, [(channels * scale, width * scale) for scale in scales])
        self.down = DecomposedHyperNetwork(channels, width, options.k, zero=False)
        self.up = DecomposedHyperNetwork(width, channels, options.k, zero=True)

        def scaling_kernels() -> nn.ParameterList:
            return nn.ParameterList(nn.init.orthogonal_(torch.empty(s, s)) for s in scales)

        self.scale_down, self.scale_up = scaling_kernels(), scaling_kernels()

    def matrices(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        down, up = self.down(embedding), self.up(embedding)
        kernels = zip(self.scale_down, self.scale_up, strict=True)
        return [(torch.kron(s_down, down), torch.kron(s_up, up)) for s_down, s_up in kernels]


def build(
    backbone: Backbone, tasks: Mapping[str, int], options: Options | LiteOptions, setting: Setting
) -> MultiTaskModel:
    lite = isinstance(options, LiteOptions)
    backbone = require_blocks("polyhistor_lite" if lite else "polyhistor", backbone)
    encoder = PolyhistorLite(backbone, tasks, options) if lite else Polyhistor(backbone, tasks, options)
    return with_decoder(encoder, backbone, tasks, setting)


for name, title, options, row in (
    ("polyhistor", "Polyhistor", Options, "Polyhistor"),
    ("polyhistor_lite", "Polyhistor-Lite", LiteOptions, "Polyhistor-lite"),
):
    register(
        Method(
            name=name,
            title=title,
            family="multi-task PEFT",
            citation="Liu et al., NeurIPS 2022",
            build=build,
            starts_pretrained=True,
            options=options,
            rows={options(): row}.get,
        )
    )
