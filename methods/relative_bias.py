"""Relative bias: train Swin's relative position bias tables alone.

A row of the VMT-Adapter paper (Xin et al., AAAI 2024, Table 2), after Liu et al., "Swin Transformer", ICCV 2021.
Count (Swin-T)  23,322 in the tables: per task 2,642,312 (published 2.64 M), shared 2,572,346 (2.58 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.backbones.base import Backbone
from methods.backbones.swin import SwinBackbone
from methods.layers.encoders import Sharing, selected_encoder, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, MethodError, register


@dataclass(frozen=True)
class Options:
    """`sharing`: a set of parameters and a pass of the backbone for each task (`per_task`), or one for all
    (`shared`)."""

    sharing: Sharing = "per_task"


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    if not isinstance(backbone, SwinBackbone):
        raise MethodError(f"relative_bias trains Swin's position bias tables and cannot run on {backbone.name}")
    encoder = selected_encoder(backbone, tasks, options.sharing, lambda name: "relative_position_bias_table" in name)
    return with_decoder(encoder, backbone, tasks, setting, independent=options.sharing == "per_task")


register(
    Method(
        name="relative_bias",
        title="Relative bias",
        family="single-task PEFT",
        citation="Xin et al., AAAI 2024, Table 2",
        build=build,
        starts_pretrained=True,
        options=Options,
        rows={Options(): "Multiple Relative bias", Options(sharing="shared"): "Shared Relative bias"}.get,
        trains_backbone=True,
    )
)
