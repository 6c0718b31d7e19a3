"""Low-rank adapter: the bottleneck adapter with both of its matrices factorised.

Our reading of a row of the VMT-Adapter paper (Xin et al., AAAI 2024, Table 2, which cites VL-Adapter, Sung et al., CVPR
2022); no code exists and the paper does not say how it is built. Placement and bottleneck are those of `adapter`; each
matrix is a product of rank 5, with which both counts come within 0.5 % of the published totals (of the shared row the
paper prints 0.10 M beside a total of 2.62 M, which do not agree: the decoder has 2.55 M).
Count (Swin-T)  per task 2,875,808 (published 2.89 M), shared 2,630,720 (2.62 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from methods.backbones.base import Backbone
from methods.layers.adapter import Bottleneck, bottleneck_width, zero_linear
from methods.layers.encoders import AdapterEncoder, BlockAdapters, Sharing, require_blocks, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, at_least_one, register


@dataclass(frozen=True)
class Options:
    """`sharing`: a set of parameters and a pass of the backbone for each task (`per_task`), or one for all
    (`shared`). `reduction`: the bottleneck is C / `reduction` wide. `rank` of both its matrices, each in two
    factors."""

    sharing: Sharing = "per_task"
    reduction: int = 2
    rank: int = 5

    def __post_init__(self) -> None:
        at_least_one(reduction=self.reduction, rank=self.rank)


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_blocks("low_rank_adapter", backbone)

    def make(channels: int) -> Bottleneck:
        width, rank = bottleneck_width(channels, options.reduction), options.rank
        return Bottleneck(
            nn.LayerNorm(channels),
            nn.Sequential(nn.Linear(channels, rank, bias=False), nn.Linear(rank, width)),
            nn.Sequential(nn.Linear(width, rank, bias=False), zero_linear(rank, channels)),
        )

    encoder = AdapterEncoder(backbone, tasks, options.sharing, lambda: BlockAdapters(backbone, feed_forward=make))
    return with_decoder(encoder, backbone, tasks, setting, independent=options.sharing == "per_task")


register(
    Method(
        name="low_rank_adapter",
        title="Low-rank adapter",
        family="single-task PEFT",
        citation="Sung et al., CVPR 2022, as in Xin et al., AAAI 2024",
        build=build,
        starts_pretrained=True,
        options=Options,
        rows={Options(): "Multiple Low-rank adapter", Options(sharing="shared"): "Shared Low-rank adapter"}.get,
    )
)
