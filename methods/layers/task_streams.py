"""The multi-stream transformer of the MTLoRA family: one shared stream, and a stream a task in each stage's last block.

Agiza, Neseem, Reda, "MTLoRA: Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024. The frozen
linears of a block are each called through a module of the method's own, which gives the shared stream's output and one
a task; attention runs once, on the shared stream, from which the next stage goes on. The papers know Swin alone; on a
plain ViT the four groups of blocks stand for stages, with nothing to merge between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from methods.backbones.base import Backbone, OpenTransformer
from methods.backbones.swin import SwinBackbone, neighbours
from methods.backbones.timm_import import timm
from methods.decoder import DECODERS
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import MethodError

Streams = Mapping[str, Tensor]
# (frozen linear, shared stream, task streams or None) -> shared output, task outputs
TaskLinear = Callable[..., tuple[Tensor, dict[str, Tensor]]]
ATTENTIONS = (timm.models.swin_transformer.WindowAttention, timm.models.vision_transformer.Attention)
EXTRAS = ("patch_embed", "norm", "relative_position_bias_table")


class TaskBlock(nn.Module):
    """One block; `make(frozen linear, tasks)` gives the method's module for it.

    `tasks` is empty except in a stage's last block.
    """

    def __init__(
        self,
        block: nn.Module,
        make: Callable[[nn.Linear, tuple[str, ...]], nn.Module],
        tasks: tuple[str, ...],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.qkv = make(block.attn.qkv, ())
        self.proj = make(block.attn.proj, tasks)
        self.fc1 = make(block.mlp.fc1, tasks)
        self.fc2 = make(block.mlp.fc2, tasks)
        self.drop_path = timm.layers.DropPath(drop_path)

    def linears(self, context: Any) -> tuple[TaskLinear, TaskLinear, TaskLinear, TaskLinear]:
        """What the linears of the block are called through; `context` is what the encoder worked out for this step."""
        return self.qkv, self.proj, self.fc1, self.fc2

    def forward(
        self, backbone: OpenTransformer, block: nn.Module, x: Tensor, context: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens x (B, ..., C) -> the shared stream and the task streams, of the same shape."""
        qkv, proj, fc1, fc2 = self.linears(context)

        def residual(out: Tensor) -> Tensor:
            return x + self.drop_path(backbone.out_of_attention(block, out, x))

        def added(stream: Tensor, out: Tensor) -> Tensor:
            return stream + self.drop_path(backbone.out_of_mlp(block, out))

        merged, _ = qkv(block.attn.qkv, backbone.into_attention(block, x), None)
        attended, attended_t = proj(block.attn.proj, backbone.attend(block, merged), None)
        shared, streams = residual(attended), {task: residual(a) for task, a in attended_t.items()}

        hidden, hidden_t = fc1(
            block.mlp.fc1, block.norm2(shared), {task: block.norm2(a) for task, a in streams.items()}
        )
        out, out_t = fc2(block.mlp.fc2, block.mlp.act(hidden), {t: block.mlp.act(h) for t, h in hidden_t.items()})
        return added(shared, out), {task: added(a, out_t[task]) for task, a in streams.items()}


class Merging(nn.Module):
    """Any stream into the next stage by the backbone's own layer; a method's module may go around its linear."""

    def __init__(self, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, backbone: OpenTransformer, stage: int, x: Tensor) -> Tensor:
        """Swin's patch merging, (B, H, W, C) -> (B, H/2, W/2, 2C); the identity where there is nothing to merge."""
        if self.linear is None:
            return backbone.enter(stage, x)
        merging = backbone.layers[stage].downsample
        return self.linear(merging.reduction, neighbours(merging, x), None)[0]


class TaskStreamEncoder(nn.Module):
    """A frozen transformer run through TaskBlocks.

    taps_after_merging   the family's features: task streams after the following patch merging, (2C, 4C, 8C, 8C) at
                         strides 8, 16, 32, 32; else the four stage outputs
    """

    def __init__(
        self,
        backbone: OpenTransformer,
        blocks: list[list[nn.Module]],
        mergings: list[Merging],
        taps_after_merging: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.blocks = nn.ModuleList(nn.ModuleList(stage) for stage in blocks)
        self.mergings = nn.ModuleList(mergings)
        self.taps_after_merging = taps_after_merging

    def context(self) -> Any:
        """What all blocks need and is worked out once a step."""
        return None

    def forward(self, image: Tensor) -> Features:
        backbone, context = self.backbone, self.context()
        x = backbone.embed(image)
        features: dict[str, list[Tensor]] = {}
        general = []
        for stage, own_blocks in enumerate(self.blocks):
            x = self.mergings[stage](backbone, stage, x)
            for block, own in zip(backbone.stages[stage], own_blocks, strict=True):
                x, streams = own(backbone, block, x, context)
            for task, stream in streams.items():
                features.setdefault(task, []).append(self.tap(stage, stream))
            general.append(backbone.output(stage, x))
        return Features(features, general)

    def tap(self, stage: int, stream: Tensor) -> Tensor:
        """A task stream at the end of a stage -> the map (B, C', H', W') that the decoder gets."""
        if self.taps_after_merging and stage < 3:
            stage, stream = stage + 1, self.mergings[stage + 1](self.backbone, stage + 1, stream)
        return self.backbone.output(stage, stream)


def require_open(method: str, backbone: Backbone) -> OpenTransformer:
    """The backbone as one whose linears can be replaced, or a MethodError that says in one line why not."""
    if not isinstance(backbone, OpenTransformer):
        raise MethodError(f"{method} needs a Swin Transformer or a plain ViT and cannot run on {backbone.name}")
    for block in itertools.chain(*backbone.stages):
        attention, mlp = block.attn, block.mlp
        usual = type(attention) in ATTENTIONS and getattr(attention, "gate", None) is None
        if not usual or type(mlp) is not timm.layers.Mlp or not isinstance(mlp.norm, nn.Identity):
            raise MethodError(
                f"{method} adapts qkv, proj, fc1 and fc2, and blocks of {backbone.name} have more than these"
            )
    return backbone


def freeze_but_extras(backbone: OpenTransformer, setting: Setting, reductions: bool = False) -> None:
    """Frozen; under `published` the family trains patch embedding, norms and position bias tables as well, and some of
    its methods the linears of patch merging."""
    backbone.freeze()
    if setting.equal:
        return
    names = (*EXTRAS, "reduction") if reductions else EXTRAS
    for name, parameter in backbone.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(True)


def taps_after_merging(backbone: OpenTransformer, setting: Setting) -> bool:
    """The family's own taps, but for a decoder that asks for the stage outputs, and where nothing is merged."""
    return isinstance(backbone, SwinBackbone) and not setting.equal and setting.decoder != "highres"


def tapped_channels(backbone: OpenTransformer, after_merging: bool) -> tuple[int, ...]:
    c = backbone.channels
    return (*c[1:], c[-1]) if after_merging else c


def with_family_decoder(
    encoder: nn.Module, backbone: OpenTransformer, tasks: Mapping[str, int], setting: Setting, **options: Any
) -> MultiTaskModel:
    """The HRNet head, or the protocol's decoder, on the encoder's taps."""
    channels = tapped_channels(backbone, taps_after_merging(backbone, setting))
    return MultiTaskModel(encoder, DECODERS[setting.decoder_name("hrnet")](tasks, channels), tasks, **options)


def stochastic_depth(backbone: OpenTransformer, rate: float) -> Iterator[float]:
    """Drop rates of the blocks in order, growing linearly from 0 to `rate`."""
    last = max(sum(backbone.depths) - 1, 1)
    return (rate * index / last for index in range(last + 1))
