"""Decoders: necks -> [mixer] -> fuse -> head, one set a task.

`segformer` is the all-MLP decoder of SegFormer (Xie et al., NeurIPS 2021) with 256 channels and output norms that
the Polyhistor table uses (2,549,024 parameters on Swin-T); `hrnet` the head of the MTLoRA code family (1,946,624).
A method may bring its own decoder by composing the same four parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.model import Features

Maps = dict[str, list[Tensor]]  # task -> four maps (B, H_i, W_i, width_i), channels last
Mixer = nn.Module  # (Maps, general maps) -> Maps


class Decoder(nn.Module):
    """necks[task][i]: (B, H_i, W_i, C_i) -> width_i; heads[task]: four maps -> logits (B, n, H_1, W_1).

    `plain`: maps are upsampled as soon as they have passed the necks, as SegFormer does it.
    """

    plain = False

    def __init__(
        self,
        necks: Mapping[str, Sequence[nn.Module]],
        heads: Mapping[str, nn.Module],
        widths: Sequence[int],
        shared_norms: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.necks = nn.ModuleDict({task: nn.ModuleList(modules) for task, modules in necks.items()})
        self.heads = nn.ModuleDict(dict(heads))
        self.shared_norms = shared_norms
        self.widths = tuple(widths)
        self.mixer: Mixer | None = None

    def forward(self, features: Features) -> dict[str, Tensor]:
        maps: Maps = {}
        for task, necks in self.necks.items():
            tokens = [x.permute(0, 2, 3, 1) for x in features.task[task]]
            if self.shared_norms is not None:
                tokens = [norm(x) for norm, x in zip(self.shared_norms, tokens, strict=True)]
            maps[task] = [neck(x) for neck, x in zip(necks, tokens, strict=True)]
            if self.plain:
                maps[task] = upsampled(maps[task])
        if self.mixer is not None:
            maps = self.mixer(maps, features.general)
        return {task: head(maps[task]) for task, head in self.heads.items()}


class LinearFuse(nn.Module):
    """Linear map of the channel-wise concatenation of maps at their finest resolution.

    Bilinear upsampling and a linear map over channels commute, so every map is multiplied with its own slice of
    the weight at its own resolution and the results are upsampled and added: the same function, without the
    concatenated map. `plain` makes that map.
    """

    plain = False

    def __init__(self, widths: Sequence[int], out: int, bias: bool) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.linear = nn.Linear(sum(widths), out, bias=bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps (B, H_i, W_i, width_i), finest first -> (B, out, H_1, W_1)."""
        size = maps[0].shape[1:3]
        if self.plain:
            return self.linear(torch.cat(upsampled(maps), -1)).permute(0, 3, 1, 2)
        weights = self.linear.weight.split(self.widths, dim=1)
        fused = F.linear(maps[0], weights[0], self.linear.bias).permute(0, 3, 1, 2)
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            fused = fused + resize(F.linear(x, weight).permute(0, 3, 1, 2), size)
        return fused


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def upsampled(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, H_i, W_i, C_i), all at the size of the first."""
    size = maps[0].shape[1:3]
    return [x if x.shape[1:3] == size else resize(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1) for x in maps]


class SegFormerHead(nn.Module):
    """Fuse to `width` channels, batch norm, ReLU, 1x1 convolution to the task's outputs."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fuse = LinearFuse([width] * 4, width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.predict = nn.Conv2d(width, out, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.predict(F.relu(self.norm(self.fuse(maps))))


class HRNetHead(nn.Module):
    """Upsample, concatenate, 1x1 convolution to four times the channels, batch norm, ReLU, 1x1 convolution."""

    def __init__(self, widths: Sequence[int], out: int) -> None:
        super().__init__()
        total = sum(widths)
        self.expand = nn.Conv2d(total, 4 * total, 1)
        self.norm = nn.BatchNorm2d(4 * total)
        self.predict = nn.Conv2d(4 * total, out, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[1:3]
        x = torch.cat(
            [x.permute(0, 3, 1, 2) if i == 0 else resize(x.permute(0, 3, 1, 2), size) for i, x in enumerate(maps)], 1
        )
        return self.predict(F.relu(self.norm(self.expand(x))))


def segformer(
    tasks: Mapping[str, int],
    channels: Sequence[int],
    norms: Literal["per_task", "shared"] = "per_task",
    width: int = 256,
) -> Decoder:
    """A norm and a linear a stage, then SegFormer's head.

    `norms="shared"`: one set of output norms for all tasks, as multi-task full fine-tuning is counted.
    """

    def neck(channel: int) -> nn.Module:
        linear = nn.Linear(channel, width)
        return nn.Sequential(nn.LayerNorm(channel), linear) if norms == "per_task" else linear

    shared = nn.ModuleList(nn.LayerNorm(c) for c in channels) if norms == "shared" else None
    return Decoder(
        {task: [neck(c) for c in channels] for task in tasks},
        {task: SegFormerHead(width, out) for task, out in tasks.items()},
        [width] * 4,
        shared,
    )


def hrnet(tasks: Mapping[str, int], channels: Sequence[int], widths: Sequence[int] = (18, 36, 72, 144)) -> Decoder:
    """A bias-free linear a stage to 18, 36, 72 and 144 channels, then the HRNet head."""
    return Decoder(
        {task: [nn.Linear(c, w, bias=False) for c, w in zip(channels, widths, strict=True)] for task in tasks},
        {task: HRNetHead(widths, out) for task, out in tasks.items()},
        widths,
    )


# `highres` is the high-resolution decoder of the VMT-Adapter paper: the same head, always on the four stage outputs.
DECODERS: dict[str, Callable[[Mapping[str, int], Sequence[int]], Decoder]] = {
    "segformer": segformer,
    "hrnet": hrnet,
    "highres": hrnet,
}
