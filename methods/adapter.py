"""Adapter: a bottleneck after the feed-forward network of every block.

Paper: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019; on vision transformers He et al.
2022. The papers' tables give two rows: "Multiple Adapter" (one set and one backbone pass a task) and "Shared Adapter".

x + W_up GELU(W_down LN(x)) on the output of the feed-forward network, before the residual sum; bottleneck C/2, biases,
a LayerNorm of its own. One adapter a block and the LayerNorm are what the published counts ask for; Houlsby et al. also
adapt the attention's output. Starts as the identity.
Count (Swin-T)  C^2 + 3.5 C a block: per task 11,237,024 (published 11.24 M), shared 4,721,024 (4.71 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.backbones.base import Backbone
from methods.layers.adapter import houlsby
from methods.layers.encoders import AdapterEncoder, BlockAdapters, Sharing, require_blocks, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, at_least_one, register


@dataclass(frozen=True)
class Options:
    """`sharing`: a set of parameters and a pass of the backbone for each task (`per_task`), or one for all
    (`shared`). `reduction`: the bottleneck is C / `reduction` wide."""

    sharing: Sharing = "per_task"
    reduction: int = 2

    def __post_init__(self) -> None:
        at_least_one(reduction=self.reduction)


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_blocks("adapter", backbone)
    make = houlsby(options.reduction)
    encoder = AdapterEncoder(backbone, tasks, options.sharing, lambda: BlockAdapters(backbone, feed_forward=make))
    return with_decoder(encoder, backbone, tasks, setting, independent=options.sharing == "per_task")


register(
    Method(
        name="adapter",
        title="Adapter",
        family="single-task PEFT",
        citation="Houlsby et al., ICML 2019",
        build=build,
        starts_pretrained=True,
        options=Options,
        rows={Options(): "Adapter", Options(sharing="shared"): "Shared Adapter"}.get,
    )
)
