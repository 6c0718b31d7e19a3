"""How tasks share a backbone: one pass for all of them, or one pass each.

The "Multiple" rows of the Polyhistor and VMT-Adapter papers keep one set of adaptation parameters a task and run the
backbone once a task; their "Shared" rows keep one set and run it once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from methods.backbones.base import Backbone, TransformerBackbone
from methods.decoder import DECODERS
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import MethodError

Sharing = Literal["per_task", "shared"]


class SharedEncoder(nn.Module):
    """One pass of one backbone, the same four maps for every task."""

    def __init__(self, backbone: Backbone, tasks: Mapping[str, int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = tuple(tasks)

    def forward(self, image: Tensor) -> Features:
        maps = self.backbone(image).maps
        return Features(dict.fromkeys(self.tasks, maps), maps)


class FrozenEncoder(SharedEncoder):
    """One pass of the frozen backbone, without a graph."""

    def __init__(self, backbone: Backbone, tasks: Mapping[str, int]) -> None:
        super().__init__(backbone.freeze(), tasks)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        return super().forward(image)


class PerTaskEncoder(nn.Module):
    """A backbone and a pass of it a task. The backbones may share tensors."""

    def __init__(self, backbones: Mapping[str, Backbone]) -> None:
        super().__init__()
        self.backbones = nn.ModuleDict(dict(backbones))

    def forward(self, image: Tensor) -> Features:
        return Features({task: backbone(image).maps for task, backbone in self.backbones.items()})


class BlockAdapters(nn.Module):
    """Adapters on the outputs of every block's attention and feed-forward network, one of each a block.

    An adapter maps (..., C) to (..., C); `attention` or `feed_forward` may be missing.
    """

    def __init__(
        self,
        backbone: TransformerBackbone,
        attention: Callable[[int], nn.Module] | None = None,
        feed_forward: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        widths = backbone.widths()
        self.attention = nn.ModuleList(attention(width) for width in widths) if attention else None
        self.feed_forward = nn.ModuleList(feed_forward(width) for width in widths) if feed_forward else None


class AdapterEncoder(nn.Module):
    """The frozen backbone with one set of BlockAdapters for all tasks, or one set and one pass a task."""

    def __init__(
        self,
        backbone: TransformerBackbone,
        tasks: Mapping[str, int],
        sharing: Sharing,
        make: Callable[[], BlockAdapters],
    ) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        self.tasks = tuple(tasks)
        self.shared = make() if sharing == "shared" else None
        self.per_task = nn.ModuleDict({t: make() for t in tasks} if sharing == "per_task" else {})

    def forward(self, image: Tensor) -> Features:
        if self.shared is not None:
            maps = self._adapted(image, self.shared)
            return Features(dict.fromkeys(self.tasks, maps), maps)
        return Features({task: self._adapted(image, adapters) for task, adapters in self.per_task.items()})

    def _adapted(self, image: Tensor, adapters: BlockAdapters) -> list[Tensor]:
        return self.backbone(image, adapters.attention, adapters.feed_forward).maps


def train_selected(backbone: Backbone, trained: Callable[[str], bool]) -> Backbone:
    """Freeze a backbone but for the parameters whose name `trained` accepts."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(trained(name))
    return backbone


def structural_copy(backbone: Backbone) -> Backbone:
    """A copy with modules and trained parameters of its own that shares every frozen tensor with the original.

    Moved to another device, the parameters stay shared; buffers (masks, index tables) are then copied.
    """
    shared: dict[int, Tensor] = {id(p): p for p in backbone.parameters() if not p.requires_grad}
    for module in backbone.modules():
        # What a frozen layer keeps beside its parameters never changes; a trained batch norm's statistics do.
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            shared |= {id(buffer): buffer for buffer in module.buffers(recurse=False)}
    return copy.deepcopy(backbone, shared)


def selected_encoder(
    backbone: Backbone,
    tasks: Mapping[str, int],
    sharing: Sharing,
    trained: Callable[[str], bool],
    insert: Callable[[Backbone], None] = lambda backbone: None,
) -> nn.Module:
    """Backbone parameters that `trained` accepts are trained, and `insert` puts new modules into the backbone: once
    for all tasks, or in a structural copy a task."""
    train_selected(backbone, trained)
    if sharing == "shared":
        insert(backbone)
        return SharedEncoder(backbone, tasks)
    copies = {task: structural_copy(backbone) for task in tasks}
    for backbone_of_task in copies.values():
        insert(backbone_of_task)
    return PerTaskEncoder(copies)


def with_decoder(
    encoder: nn.Module, backbone: Backbone, tasks: Mapping[str, int], setting: Setting, **options: Any
) -> MultiTaskModel:
    """An encoder that gives the backbone's own stage outputs, and the SegFormer decoder of the Polyhistor table."""
    decoder = DECODERS[setting.decoder_name("segformer")](tasks, backbone.channels)
    return MultiTaskModel(encoder, decoder, tasks, **options)


def require_blocks(method: str, backbone: Backbone) -> TransformerBackbone:
    """The backbone as a transformer, or a MethodError that says in one line why not."""
    if not isinstance(backbone, TransformerBackbone):
        raise MethodError(f"{method} adapts the blocks of a transformer and cannot run on {backbone.name}")
    return backbone
