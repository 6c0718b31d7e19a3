"""Multi-task full fine-tuning: one fully trained backbone shared by all tasks, a decoder a task.

30.06 M on Swin-T in the Polyhistor table: one backbone, one set of output norms for all tasks, and SegFormer
decoders of 256 channels (the ledger's decoder B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from methods.backbones.base import Backbone
from methods.decoder import DECODERS, segformer
from methods.layers.encoders import SharedEncoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, register


@dataclass(frozen=True)
class Options:
    """`backbone_factor`: the backbone's parameters learn at this share of the rate, in place of the recipe's."""

    backbone_factor: float | None = field(default=None, metadata={"default": "the recipe's"})

    def __post_init__(self) -> None:
        if self.backbone_factor is not None and not 0 < self.backbone_factor <= 1:
            raise ValueError(f"backbone_factor must be above 0 and at most 1, not {self.backbone_factor:g}")


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    if setting.decoder_name("segformer") == "segformer" and not setting.equal:
        decoder = segformer(tasks, backbone.channels, norms="shared")
    else:
        decoder = DECODERS[setting.decoder_name("segformer")](tasks, backbone.channels)
    return MultiTaskModel(SharedEncoder(backbone, tasks), decoder, tasks, backbone_factor=options.backbone_factor)


register(
    Method(
        name="multi_task_full",
        title="Multi-task full fine-tuning",
        family="fine-tuning",
        citation="",
        options=Options,
        build=build,
        starts_pretrained=True,
        trains_backbone=True,
        rows=lambda options: "Multi-task full fine-tuning",
    )
)
