"""VL-Adapter: one adapter a block for all tasks, and a little that is the task's own.

Paper: Sung, Cho, Bansal, "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks", CVPR 2022;
its best variant trains a single adapter for all tasks, and the norms. The row is the BDTA+MoTE paper's.

Our reading, from the published count: a bias-free bottleneck of C/2 after the feed-forward network of every block,
shared by all tasks, and a LayerNorm before it for each task. A task's stream is thus its own: one pass a task.
Count (Swin-T)  C^2 + 2C a task, 4,740,896 (published 4.74 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from methods.backbones.base import Backbone
from methods.layers.adapter import Bottleneck, bottleneck_width, zero_linear
from methods.layers.encoders import AdapterEncoder, BlockAdapters, require_blocks, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, at_least_one, register


@dataclass(frozen=True)
class Options:
    """`reduction`: the bottleneck is C / `reduction` wide."""

    reduction: int = 2

    def __post_init__(self) -> None:
        at_least_one(reduction=self.reduction)


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_blocks("vl_adapter", backbone)
    shared = []
    for channels in backbone.widths():
        width = bottleneck_width(channels, options.reduction)
        shared.append((nn.Linear(channels, width, bias=False), zero_linear(width, channels, bias=False)))

    def adapters_of_a_task() -> BlockAdapters:
        matrices = iter(shared)
        return BlockAdapters(backbone, feed_forward=lambda c: Bottleneck(nn.LayerNorm(c), *next(matrices)))

    encoder = AdapterEncoder(backbone, tasks, "per_task", adapters_of_a_task)
    return with_decoder(encoder, backbone, tasks, setting)


register(
    Method(
        name="vl_adapter",
        title="VL-Adapter",
        family="single-task PEFT",
        citation="Sung et al., CVPR 2022",
        build=build,
        starts_pretrained=True,
        options=Options,
        rows={Options(): "VL-Adapter"}.get,
    )
)
