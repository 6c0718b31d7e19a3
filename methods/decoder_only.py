"""Decoder-only fine-tuning: the backbone is frozen, its four maps go to every task's decoder.

2.55 M on Swin-T in the Polyhistor table: SegFormer decoders of 256 channels with a set of output norms a task (the
ledger's decoder B). The frozen maps are the same for all tasks and need no gradient: one pass, no graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from methods.backbones.base import Backbone
from methods.layers.encoders import FrozenEncoder, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, NoOptions, register


def build(backbone: Backbone, tasks: Mapping[str, int], options: NoOptions, setting: Setting) -> MultiTaskModel:
    return with_decoder(FrozenEncoder(backbone, tasks), backbone, tasks, setting)


register(
    Method(
        name="decoder_only",
        title="Decoder-only fine-tuning",
        family="fine-tuning",
        citation="",
        build=build,
        starts_pretrained=True,
        rows=lambda options: "Decoder-only fine-tuning",
    )
)
