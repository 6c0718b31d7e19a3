"""Visual prompt tuning (VPT): learned tokens beside the patches.

Paper: Jia et al., "Visual Prompt Tuning", ECCV 2022. Shallow: prompts at the first block, carried along. Deep: fresh
prompts for every block. 50 prompts a task, one pass a task (the Polyhistor table).

On Swin, as in the released code: prompts go through norm1 with the patches, are copied into every window and attend
without bias or mask; their outputs are averaged over the windows; residual and MLP treat them as tokens; at a patch
merging a prompt is repeated four times along its channels. The released code orders the copies window-major while the
windows are image-major, which mixes the prompts of different images; here they are image-major.
On a plain ViT they stand between class token and patches.
Count (Swin-T)  50 * 96 a task: 2,568,224 (published 2.57 M); deep 50 * sum of C: 3,432,224 (3.43 M).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.backbones.base import Backbone
from methods.backbones.swin import SwinBackbone, attend, into_windows, out_of_windows, with_prompts
from methods.backbones.vit import ViTBackbone
from methods.layers.encoders import with_decoder
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, MethodError, at_least_one, register


@dataclass(frozen=True)
class ShallowOptions:
    """`prompts`: tokens a task, in the deep variant a task and block."""

    prompts: int = 50

    def __post_init__(self) -> None:
        at_least_one(prompts=self.prompts)


@dataclass(frozen=True)
class DeepOptions(ShallowOptions):
    """As the shallow variant's."""


def prompted_swin(backbone: SwinBackbone, image: Tensor, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The four maps; `prompts` holds (P, C) for the first block, or for each block."""
    x = backbone.embed(image)
    tokens, fresh, maps = x.new_empty(0), iter(prompts), []
    for stage, blocks in enumerate(backbone.stages):
        if stage and len(prompts) == 1:
            merging = backbone.layers[stage].downsample
            tokens = merging.reduction(merging.norm(tokens.repeat(1, 1, 4)))
        x = backbone.enter(stage, x)
        for block in blocks:
            if (replacement := next(fresh, None)) is not None:
                tokens = replacement.expand(len(image), -1, -1)
            x, tokens = prompted_block(block, x, tokens)
        maps.append(backbone.output(stage, x))
    return maps


def prompted_block(block: nn.Module, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A Swin block on x (B, H, W, C) and prompts (B, P, C)."""
    count = prompts.shape[1]
    windows = with_prompts(into_windows(block, block.norm1(x)), block.norm1(prompts))
    attended = block.attn.proj(attend(block, block.attn.qkv(windows), count))
    prompts = prompts + attended[:, :count].unflatten(0, (len(x), -1)).mean(1)
    x = x + out_of_windows(block, attended[:, count:].contiguous(), x.shape[1:3])
    return x + block.mlp(block.norm2(x)), prompts + block.mlp(block.norm2(prompts))


def prompted_vit(backbone: ViTBackbone, image: Tensor, prompts: Sequence[Tensor]) -> list[Tensor]:
    """The four maps; `prompts` holds (P, C) for the first block, or for each block."""
    x = backbone.embed(image)
    prefix, count, carried, fresh, maps = backbone.prefix, len(prompts[0]), 0, iter(prompts), []
    for stage, blocks in enumerate(backbone.stages):
        for block in blocks:
            if (replacement := next(fresh, None)) is not None:
                x = torch.cat([x[:, :prefix], replacement.expand(len(image), -1, -1), x[:, prefix + carried :]], 1)
                carried = count
            x = backbone.feed_forward(block, backbone.attention(block, x))
        maps.append(backbone.output(stage, torch.cat([x[:, :prefix], x[:, prefix + count :]], 1)))
    return maps


class PromptedEncoder(nn.Module):
    """The frozen backbone, and a set of prompts and a pass a task."""

    def __init__(self, backbone: SwinBackbone | ViTBackbone, tasks: Mapping[str, int], options: ShallowOptions) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        self.run = prompted_swin if isinstance(backbone, SwinBackbone) else prompted_vit
        widths = backbone.widths() if isinstance(options, DeepOptions) else [backbone.stem_channels]
        bound = math.sqrt(6 / (3 * backbone.strides[0] ** 2 + backbone.stem_channels))

        def fresh(channels: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(options.prompts, channels).uniform_(-bound, bound))

        self.prompts = nn.ModuleDict({task: nn.ParameterList(fresh(width) for width in widths) for task in tasks})

    def forward(self, image: Tensor) -> Features:
        return Features({task: self.run(self.backbone, image, list(p)) for task, p in self.prompts.items()})


def build(backbone: Backbone, tasks: Mapping[str, int], options: ShallowOptions, setting: Setting) -> MultiTaskModel:
    if not isinstance(backbone, (SwinBackbone, ViTBackbone)):
        name = "vpt_deep" if isinstance(options, DeepOptions) else "vpt_shallow"
        raise MethodError(f"{name} needs a Swin Transformer or a plain ViT and cannot run on {backbone.name}")
    return with_decoder(PromptedEncoder(backbone, tasks, options), backbone, tasks, setting, independent=True)


for name, title, options in (
    ("vpt_shallow", "VPT-shallow", ShallowOptions),
    ("vpt_deep", "VPT-deep", DeepOptions),
):
    register(
        Method(
            name=name,
            title=title,
            family="single-task PEFT",
            citation="Jia et al., ECCV 2022",
            build=build,
            options=options,
            rows={options(): title}.get,
        )
    )
