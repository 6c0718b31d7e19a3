"""BitFit: train the bias terms alone.

Paper: Ben Zaken, Goldberg, Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022. Trained is every parameter with "bias" in its name, as in the released code of the vision
benchmarks; on Swin that takes the relative position bias tables in, and the published count asks for them.
Count (Swin-T)  51,456 biases + 23,322: per task 2,848,136 (published 2.85 M), shared 2,623,802 (2.63 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone
from methods.backbones.timm_import import timm
from methods.layers.encoders import Sharing, selected_encoder, with_decoder
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, register


@dataclass(frozen=True)
class Options:
    """`sharing`: a set of parameters and a pass of the backbone for each task (`per_task`), or one for all
    (`shared`)."""

    sharing: Sharing = "per_task"


ON_TOKENS, ON_MAPS = (nn.LayerNorm, timm.layers.LayerNorm), timm.layers.LayerNorm2d


class LayerNorm(nn.Module):
    """The same function with the bias added apart. On CUDA torch's own backward (seen in 2.11) stops with an empty
    gradient of the bias where the weight wants none and there are more than 65,536 tokens in the batch."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.shape, self.eps, self.on_maps = norm.normalized_shape, norm.eps, isinstance(norm, ON_MAPS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C), or maps (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1) if self.on_maps else x
        x = F.layer_norm(x, self.shape, self.weight, None, self.eps)
        x = x + self.bias.to(x.dtype)
        return x.permute(0, 3, 1, 2) if self.on_maps else x


def separate_biases(backbone: Backbone) -> None:
    """Of every LayerNorm, in place; parameters keep their names."""
    for parent in list(backbone.modules()):
        for name, norm in parent.named_children():
            if type(norm) in (*ON_TOKENS, ON_MAPS) and norm.bias is not None:
                setattr(parent, name, LayerNorm(norm))


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    encoder = selected_encoder(backbone, tasks, options.sharing, lambda name: "bias" in name, separate_biases)
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
