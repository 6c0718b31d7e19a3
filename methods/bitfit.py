"""BitFit: train the bias terms alone.

Paper: Ben Zaken, Goldberg, Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022. Trained is every parameter with "bias" in its name, as in the released code of the vision
benchmarks; on Swin that takes the relative position bias tables in, and the published count asks for them.
Count (Swin-T)  51,456 biases + 23,322: per task 2,848,136 (published 2.85 M), shared 2,623,802 (2.63 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.backbones.base import Backbone
from methods.layers.encoders import Sharing, selected_encoder, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, register


@dataclass(frozen=True)
class Options:
    sharing: Sharing = "per_task"


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    encoder = selected_encoder(backbone, tasks, options.sharing, lambda name: "bias" in name)
    return with_decoder(encoder, backbone, tasks, setting, independent=options.sharing == "per_task")


register(
    Method(
        name="bitfit",
        title="BitFit",
        family="single-task PEFT",
        citation="Ben Zaken et al., ACL 2022",
        build=build,
        starts_pretrained=True,
        options=Options,
        rows={Options(): "BitFit", Options(sharing="shared"): "Shared BitFit"}.get,
        trains_backbone=True,
    )
)
