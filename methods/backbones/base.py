"""What every backbone offers: an image in, a stem map and four stage maps out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Pyramid(NamedTuple):
    """A backbone's general features.

    stem   (B, C_0, H/s, W/s): the patch embedding of a transformer, or the first map of a convolutional network;
           None where the network has no such map.
    maps   four maps (B, C_i, H_i, W_i), finest first.
    """

    stem: Tensor | None
    maps: list[Tensor]


class Backbone(nn.Module):
    """A timm model as stem + four stages.

    The image is (B, 3, H, W) in [0, 1]; the mean and std of the model's own timm configuration are applied here,
    so that a dataset needs to know nothing of the backbone. `pretrained_names` are the parameters that came with
    the backbone, before a method added its own.
    """

    def __init__(self, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.name = name
        self.channels: tuple[int, ...] = ()
        self.strides: tuple[int, ...] = ()
        self.stem_channels = 0  # of `Pyramid.stem`, or of the first map where there is no stem
        self.pretrained_names: frozenset[str] = frozenset()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def forward(self, image: Tensor) -> Pyramid:
        raise NotImplementedError

    def downsampling(self, stage: int) -> Callable[[Tensor], Tensor] | None:
        """The backbone's own layer from stage `stage - 1` to `stage` (0..3), (B, C, H, W) -> (B, C', H/2, W/2).

        None for stage 0 and where the architecture has no such single layer. The layer stays the backbone's: call
        it, but do not register it a second time.
        """
        return None

    def freeze(self) -> Backbone:
        self.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> Backbone:
        """Like nn.Module.train, but frozen batch norms keep to their running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
                parameter.requires_grad for parameter in module.parameters()
            ):
                module.eval()
        return self
