"""Decoder-only fine-tuning: the backbone is frozen, its four maps go to every task's decoder.

2.55 M on Swin-T in the Polyhistor table: SegFormer decoders of 256 channels with a set of output norms a task (the
ledger's decoder B). The frozen maps are the same for all tasks and need no gradient: one pass, no graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from methods.backbones.base import Backbone
from methods.decoder import DECODERS
from methods.model import Features, MultiTaskModel, Setting
from methods.multi_task_full import SharedEncoder
from methods.registry import Method, NoOptions, register


class FrozenEncoder(SharedEncoder):
    """One pass of the frozen backbone for all tasks."""

    def __init__(self, backbone: Backbone, tasks: Mapping[str, int]) -> None:
        super().__init__(backbone.freeze(), tasks)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        return super().forward(image)


def build(backbone: Backbone, tasks: Mapping[str, int], options: NoOptions, setting: Setting) -> MultiTaskModel:
    decoder = DECODERS[setting.decoder_name("segformer")](tasks, backbone.channels)
    return MultiTaskModel(FrozenEncoder(backbone, tasks), decoder, tasks)


register(
    Method(
        name="decoder_only",
        title="Decoder-only fine-tuning",
        family="fine-tuning",
        citation="",
        build=build,
        rows=lambda options: "Decoder-only fine-tuning",
    )
)
