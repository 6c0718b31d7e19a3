"""Single-task full fine-tuning: one fully trained backbone and decoder a task, K independent models.

The reference of Delta-m (equation 13 of the BDTA+MoTE paper), 112.62 M on Swin-T in the Polyhistor table: K
backbones, a set of output norms a task and a SegFormer decoder of 256 channels (the ledger's decoder B).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from methods.backbones.base import Backbone
from methods.decoder import DECODERS
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, NoOptions, register


class SingleTaskEncoder(nn.Module):
    """A backbone a task, each its own copy."""

    def __init__(self, backbone: Backbone, tasks: Mapping[str, int]) -> None:
        super().__init__()
        self.backbones = nn.ModuleDict({task: copy.deepcopy(backbone) for task in tasks})

    def forward(self, image: Tensor) -> Features:
        return Features({task: backbone(image).maps for task, backbone in self.backbones.items()})


def build(backbone: Backbone, tasks: Mapping[str, int], options: NoOptions, setting: Setting) -> MultiTaskModel:
    decoder = DECODERS[setting.decoder_name("segformer")](tasks, backbone.channels)
    return MultiTaskModel(SingleTaskEncoder(backbone, tasks), decoder, tasks, independent=True)


register(
    Method(
        name="single_task_full",
        title="Single-task full fine-tuning",
        family="fine-tuning",
        citation="reference of equation 13",
        build=build,
        rows=lambda options: "Single-task full fine-tuning",
    )
)
