"""MTLoRA: task-agnostic and task-specific low-rank adaptation of a Swin Transformer.

Paper: Agiza, Neseem, Reda, "MTLoRA: Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024.

Placement   shared LoRA of `rank` on qkv, proj, fc1 and fc2 of every block; task LoRA of `task_rank` on proj, fc1 and
            fc2 of the last block of each stage. Attention runs once, on the shared stream; in a stage's last block
            every task gets a stream of its own from proj on, and the next stage goes on from the shared one.
Features    after patch merging: (2C, 4C, 8C, 8C) at strides 8, 16, 32, 32. Task streams pass through the same merging.
Extras      patch embedding, all norms, relative position biases and the merging linears are trained as well.
Decoder     HRNet head, a set of necks a task.
Count       Swin-T 8,344,634, S 13,105,994, B 17,758,136 at rank 64, task rank 4: exact. Among them is the shared update
            of the very last fc2, which no gradient reaches: nothing reads the shared stream after the last block.

This follows the released code where the paper is open: the scale multiplies directly (not alpha / r), dropout acts on
the shared input alone, W x is always of the shared stream, the task output leaves the shared update out ("matrix").
Under `equal` the four stage outputs are tapped before merging and the extras stay frozen.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from methods.backbones.base import Backbone
from methods.backbones.swin import SwinBackbone, attend, into_windows, out_of_windows
from methods.backbones.timm_import import timm
from methods.decoder import DECODERS
from methods.layers.lora import MultiTaskLoRALinear
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, MethodError, register


@dataclass(frozen=True)
class Options:
    rank: int = 64
    task_rank: int = 4
    scale: float = 4.0
    dropout: float = 0.05
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        if self.rank < 1 or self.task_rank < 1:
            raise ValueError(f"rank and task_rank must be at least 1, not {self.rank} and {self.task_rank}")
        if not (0 <= self.dropout < 1 and 0 <= self.drop_path < 1):
            raise ValueError(f"dropout and drop_path must be in [0, 1), not {self.dropout} and {self.drop_path}")


class BlockLoRA(nn.Module):
    """The low-rank parts of one Swin block; `tasks` is empty except in a stage's last block."""

    def __init__(self, block: nn.Module, options: Options, tasks: tuple[str, ...], drop_path: float) -> None:
        super().__init__()

        def lora(linear: nn.Linear, tasks: tuple[str, ...]) -> MultiTaskLoRALinear:
            return MultiTaskLoRALinear(linear, options.rank, options.scale, options.dropout, tasks, options.task_rank)

        self.qkv = lora(block.attn.qkv, ())
        self.proj = lora(block.attn.proj, tasks)
        self.fc1 = lora(block.mlp.fc1, tasks)
        self.fc2 = lora(block.mlp.fc2, tasks)
        self.drop_path = timm.layers.DropPath(drop_path)

    def forward(self, block: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, H, W, C) -> the shared stream and the task streams, of the same shape."""
        size = x.shape[1:3]

        def residual(windows: Tensor) -> Tensor:
            return x + self.drop_path(out_of_windows(block, windows, size))

        qkv, _ = self.qkv(block.attn.qkv, into_windows(block, block.norm1(x)))
        attended, attended_t = self.proj(block.attn.proj, attend(block, qkv))
        shared, streams = residual(attended), {task: residual(a) for task, a in attended_t.items()}

        hidden, hidden_t = self.fc1(
            block.mlp.fc1, block.norm2(shared), {task: block.norm2(a) for task, a in streams.items()}
        )
        out, out_t = self.fc2(block.mlp.fc2, block.mlp.act(hidden), {t: block.mlp.act(h) for t, h in hidden_t.items()})
        return shared + self.drop_path(out), {t: a + self.drop_path(out_t[t]) for t, a in streams.items()}


class MTLoRAEncoder(nn.Module):
    """A frozen Swin with low-rank updates. `taps_after_merging` selects the paper's features."""

    def __init__(
        self, backbone: SwinBackbone, tasks: Mapping[str, int], options: Options, taps_after_merging: bool, extras: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        self.taps_after_merging = taps_after_merging
        last = max(sum(backbone.depths) - 1, 1)
        rates = (options.drop_path * index / last for index in itertools.count())
        self.lora = nn.ModuleList(
            nn.ModuleList(
                BlockLoRA(block, options, tuple(tasks) if block is stage.blocks[-1] else (), next(rates))
                for block in stage.blocks
            )
            for stage in backbone.layers
        )
        if extras:
            for name, parameter in backbone.named_parameters():
                if any(part in name for part in ("patch_embed", "norm", "relative_position_bias_table", "reduction")):
                    parameter.requires_grad_(True)

    @property
    def channels(self) -> tuple[int, ...]:
        c = self.backbone.channels
        return (*c[1:], c[-1]) if self.taps_after_merging else c

    def forward(self, image: Tensor) -> Features:
        x = self.backbone.embed(image)
        features: dict[str, list[Tensor]] = {}
        general = []
        for index, (stage, loras) in enumerate(zip(self.backbone.layers, self.lora, strict=True)):
            x = stage.downsample(x)
            for block, lora in zip(stage.blocks, loras, strict=True):
                x, streams = lora(block, x)
            following = (
                self.backbone.layers[index + 1].downsample if index + 1 < len(self.backbone.layers) else nn.Identity()
            )
            for task, stream in streams.items():
                tap = following(stream) if self.taps_after_merging else stream
                features.setdefault(task, []).append(tap.permute(0, 3, 1, 2))
            general.append(x.permute(0, 3, 1, 2))
        return Features(features, general)


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    if not isinstance(backbone, SwinBackbone):
        raise MethodError(f"mtlora adapts the attention blocks of a Swin Transformer and cannot run on {backbone.name}")
    published = not setting.equal
    encoder = MTLoRAEncoder(backbone, tasks, options, taps_after_merging=published, extras=published)
    decoder = DECODERS[setting.decoder_name("hrnet")](tasks, encoder.channels)
    return MultiTaskModel(encoder, decoder, tasks)


register(
    Method(
        name="mtlora",
        title="MTLoRA",
        family="multi-task PEFT",
        citation="Agiza et al., CVPR 2024",
        build=build,
        options=Options,
        rows=lambda options: "MTLoRA" if options == Options() else None,
    )
)
