"""Single-task full fine-tuning: one fully trained backbone and decoder a task, K independent models.

The reference of Delta-m (equation 13 of the BDTA+MoTE paper), 112.62 M on Swin-T in the Polyhistor table: K
backbones, a set of output norms a task and a SegFormer decoder of 256 channels (the ledger's decoder B).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from methods.backbones.base import Backbone
from methods.layers.encoders import PerTaskEncoder, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.multi_task_full import Options
from methods.registry import Method, register


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    encoder = PerTaskEncoder({task: copy.deepcopy(backbone) for task in tasks})
    factor = options.backbone_factor
    return with_decoder(encoder, backbone, tasks, setting, independent=True, backbone_factor=factor)


register(
    Method(
        name="single_task_full",
        title="Single-task full fine-tuning",
        family="fine-tuning",
        citation="reference of equation 13",
        options=Options,
        build=build,
        starts_pretrained=True,
        trains_backbone=True,
        rows=lambda options: "Single-task full fine-tuning",
    )
)
