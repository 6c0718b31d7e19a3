"""What every backbone offers: an image in, a stem map and four stage maps out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self.images_seen: int | None = None  # a number while passes are counted
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """The first thing that happens to an image. `MultiTaskModel.passes` has passes counted here, and nobody else:
        a number that changes would have a compiled model made anew at each step."""
        if self.images_seen is not None:
            self.images_seen += len(image)
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
        """Like nn.Module.train, but batch norms that are not trained as a whole keep to their running statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not all(
                parameter.requires_grad for parameter in module.parameters()
            ):
                module.eval()
        return self


Change = Callable[[Tensor], Tensor]  # of a sub-layer's output (..., C), before it is added to the residual stream


class TransformerBackbone(Backbone):
    """Four stages of blocks `x + attn(norm1(x))`, `x + mlp(norm2(x))`, as verbs that a method can put itself between.

    The tokens x have whatever shape the architecture works in, always (B, ..., C). A method that changes what a
    sub-layer gives passes a function on (..., C) as `change`; one that needs more calls the verbs itself:

        x = backbone.embed(image)
        for stage, blocks in enumerate(backbone.stages):
            x = backbone.enter(stage, x)
            for block in blocks:
                x = backbone.feed_forward(block, backbone.attention(block, x))
            maps.append(backbone.output(stage, x))
    """

    stages: Sequence[Sequence[nn.Module]]

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> tokens."""
        raise NotImplementedError

    def stem(self, x: Tensor) -> Tensor:
        """Embedded tokens -> the stem map (B, C_0, H/s, W/s)."""
        raise NotImplementedError

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """Tokens of the stage before -> tokens that the blocks of `stage` take."""
        raise NotImplementedError

    def attention(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        """x + change(attn(norm1(x)))."""
        raise NotImplementedError

    def feed_forward(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        """x + change(mlp(norm2(x)))."""
        raise NotImplementedError

    def output(self, stage: int, x: Tensor) -> Tensor:
        """Tokens after the last block of `stage` -> the stage's map (B, C_i, H_i, W_i)."""
        raise NotImplementedError

    def widths(self) -> list[int]:
        """The channels of every block, in order."""
        return [channels for channels, blocks in zip(self.channels, self.stages, strict=True) for _ in blocks]

    def forward(
        self, image: Tensor, attention: Sequence[Change] | None = None, feed_forward: Sequence[Change] | None = None
    ) -> Pyramid:
        """`attention` and `feed_forward` hold one change a block, in order."""
        x = self.embed(image)
        stem, maps, index = self.stem(x), [], 0
        for stage, blocks in enumerate(self.stages):
            x = self.enter(stage, x)
            for block in blocks:
                x = self.attention(block, x, attention[index] if attention else None)
                x = self.feed_forward(block, x, feed_forward[index] if feed_forward else None)
                index += 1
            maps.append(self.output(stage, x))
        return Pyramid(stem, maps)


class OpenTransformer(TransformerBackbone):
    """Blocks of four linears and an attention between them, for methods that replace the linears. A block reads

        z = backbone.attend(block, block.attn.qkv(backbone.into_attention(block, x)))
        x = x + backbone.out_of_attention(block, block.attn.proj(z), x)
        x = x + backbone.out_of_mlp(block, block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x)))))

    with any of its linears called through the method's own module. Attention works on (B', N, C), which is B * windows
    sequences of a window's tokens where there are windows, and B of all tokens where there are none.
    """

    def into_attention(self, block: nn.Module, x: Tensor) -> Tensor:
        """Tokens x -> what qkv takes: normed, (B', N, C)."""
        raise NotImplementedError

    def attend(self, block: nn.Module, qkv: Tensor, prompts: int = 0) -> Tensor:
        """(B', P + N, 3 * C) -> (B', P + N, C), without the output projection; P prompts first, without a position."""
        raise NotImplementedError

    def out_of_attention(self, block: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        """What proj gives, (B', N, C) -> what is added to the residual stream, in the shape of x."""
        return self.rejoined(block, out, x)

    def rejoined(self, block: nn.Module, tokens: Tensor, x: Tensor) -> Tensor:
        """(B', N, C) -> the shape of x."""
        raise NotImplementedError

    def out_of_mlp(self, block: nn.Module, out: Tensor) -> Tensor:
        """What fc2 gives -> what is added to the residual stream."""
        return out

    def on_map(self, x: Tensor, function: Change) -> Tensor:
        """`function` (B, H, W, c) -> (B, H, W, c) on tokens in the shape of x; those without a place stay as is."""
        raise NotImplementedError

    def on_windows(self, block: nn.Module, tokens: Tensor, function: Change) -> Tensor:
        """As `on_map`, on tokens (B', N, c) of attention: on each window's map where there are windows."""
        raise NotImplementedError


def split_heads(block: nn.Module, qkv: Tensor) -> Tensor:
    """(B', N, 3 * C) -> query, key and value (3, B', heads, N, C / heads)."""
    return qkv.view(*qkv.shape[:2], 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def changed(out: Tensor, change: Change | None) -> Tensor:
    return out if change is None else change(out)
