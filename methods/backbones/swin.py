"""Swin Transformer V1 as verbs over timm's own modules, so that a paper's block is a few lines that call them.

A block of the paper reads

    windows = into_windows(block, block.norm1(x))
    x = x + out_of_windows(block, block.attn.proj(attend(block, block.attn.qkv(windows))), size)
    x = x + block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x))))

with any of its linears replaced by the method's own. Maps are (B, H, W, C) inside, as in timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Change, OpenTransformer, changed, split_heads
from methods.backbones.timm_import import timm

_WINDOWS = timm.models.swin_transformer


def pad(x: Tensor, amounts: tuple[int, ...]) -> Tensor:
    """torch's, which copies where there is nothing to pad."""
    return F.pad(x, amounts) if any(amounts) else x


def into_windows(block: nn.Module, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * windows, N, C): cyclic shift, zero padding to whole windows, partition."""
    if any(block.shift_size):
        x = torch.roll(x, shifts=(-block.shift_size[0], -block.shift_size[1]), dims=(1, 2))
    (window_h, window_w), (_, height, width, channels) = block.window_size, x.shape
    x = pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
    return _WINDOWS.window_partition(x, block.window_size).view(-1, block.window_area, channels)


class _WantsGradient(torch.autograd.Function):
    """The first tensor as it is; gradients are taken through it where the second wants one, and thrown away."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def attend(block: nn.Module, qkv: Tensor, prompts: int = 0) -> Tensor:
    """Window attention with relative position bias and shift mask; no output projection.

    qkv (B * windows, N, 3 * C), as the block's merged linear gives it -> (B * windows, N, C). The first `prompts`
    tokens of a window have no position: they attend and are attended to without bias and mask.
    """
    attention = block.attn
    batch, tokens, _ = qkv.shape
    query, key, value = split_heads(block, qkv)
    bias = pad(attention._get_rel_pos_bias(), (prompts, 0, prompts, 0))  # (1, heads, N, N)
    if bias.requires_grad and not qkv.requires_grad:
        # CUDA's fused attention prepares a backward where a query, key or value wants gradients, not where a bias does.
        query = _WantsGradient.apply(query, bias)
    if block.attn_mask is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return out.transpose(1, 2).reshape(batch, tokens, -1)
    # Windows of one image differ in their mask, images of a batch do not: with (windows, heads) as one axis the
    # mask broadcasts over the batch instead of being repeated for every image.
    windows, heads = block.attn_mask.shape[0], attention.num_heads
    mask = bias + pad(block.attn_mask, (prompts, 0, prompts, 0)).unsqueeze(1)
    mask = mask.reshape(1, windows * heads, tokens, tokens).to(query.dtype)
    folded = (part.reshape(batch // windows, windows * heads, tokens, -1) for part in (query, key, value))
    out = F.scaled_dot_product_attention(*folded, attn_mask=mask)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2).reshape(batch, tokens, -1)


def with_prompts(windows: Tensor, prompts: Tensor) -> Tensor:
    """windows (B * windows, N, C), prompts (B, P, C) -> (B * windows, P + N, C), every image with its own prompts."""
    copies = prompts.repeat_interleave(windows.shape[0] // prompts.shape[0], 0)
    return torch.cat([copies, windows], 1)


def out_of_windows(block: nn.Module, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """(B * windows, N, C) -> (B, H, W, C) with (H, W) = size: the inverse of `into_windows`."""
    (window_h, window_w), (height, width) = block.window_size, size
    windows = windows.view(-1, window_h, window_w, windows.shape[-1])
    padded = (height + -height % window_h, width + -width % window_w)
    x = _WINDOWS.window_reverse(windows, block.window_size, *padded)[:, :height, :width]
    return torch.roll(x, shifts=tuple(block.shift_size), dims=(1, 2)) if any(block.shift_size) else x


def neighbours(merging: nn.Module, x: Tensor) -> Tensor:
    """Patch merging up to its linear: (B, H, W, C) -> (B, H/2, W/2, 4C), normed; odd sides are padded."""
    x = pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
    return merging.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3))


def merge(merging: nn.Module, x: Tensor) -> Tensor:
    """Patch merging, (B, H, W, C) -> (B, H/2, W/2, 2C); nothing where a stage begins without."""
    return x if isinstance(merging, nn.Identity) else merging.reduction(neighbours(merging, x))


class SwinBackbone(OpenTransformer):
    """A timm SwinTransformer without its final norm and head (Swin-T: 27,517,818 parameters)."""

    def __init__(self, name: str, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(name, mean, std)
        self.patch_embed = model.patch_embed
        self.layers = model.layers
        self.channels = tuple(info["num_chs"] for info in model.feature_info)
        self.strides = tuple(info["reduction"] for info in model.feature_info)
        self.stem_channels = self.channels[0]
        self.depths = tuple(stage.depth for stage in self.layers)
        grid = tuple(model.patch_embed.grid_size)
        for index, stage in enumerate(self.layers):
            # Merging pads odd maps, so halves are rounded up (early versions of timm rounded down here).
            grid = tuple(-(-side // 2) for side in grid) if index else grid
            for block in stage.blocks:
                # Where a map is no larger than the window there is nothing to shift to (the Swin paper's code does
                # the same); the window stays whole, so that the bias tables do not depend on the image size.
                block.input_resolution = grid
                block.shift_size = tuple(
                    0 if side <= window else shift
                    for side, window, shift in zip(grid, block.window_size, block.shift_size, strict=True)
                )
                block.register_buffer("attn_mask", block.get_attn_mask(), persistent=False)
        self.pretrained_names = frozenset(name for name, _ in self.named_parameters())

    @property
    def stages(self) -> list[nn.ModuleList]:
        return [stage.blocks for stage in self.layers]

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, H/4, W/4, C): patch embedding and its norm."""
        return self.patch_embed(self.normalise(image))

    def stem(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """Patch merging, (B, H, W, C) -> (B, H/2, W/2, 2C)."""
        return merge(self.layers[stage].downsample, x)

    def attention(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        windows = attend(block, block.attn.qkv(self.into_attention(block, x)))
        return x + changed(self.out_of_attention(block, block.attn.proj(windows), x), change)

    def feed_forward(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        # As a sequence: some tuners of linear layers take no maps.
        out = block.mlp(block.norm2(x).flatten(1, 2))
        return x + changed(out.view(x.shape), change)

    def into_attention(self, block: nn.Module, x: Tensor) -> Tensor:
        return into_windows(block, block.norm1(x))

    def attend(self, block: nn.Module, qkv: Tensor, prompts: int = 0) -> Tensor:
        return attend(block, qkv, prompts)

    def rejoined(self, block: nn.Module, tokens: Tensor, x: Tensor) -> Tensor:
        return out_of_windows(block, tokens.contiguous(), x.shape[1:3])

    def on_map(self, x: Tensor, function: Change) -> Tensor:
        return function(x)

    def on_windows(self, block: nn.Module, tokens: Tensor, function: Change) -> Tensor:
        return function(tokens.unflatten(1, tuple(block.window_size))).flatten(1, 2)

    def output(self, stage: int, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def downsampling(self, stage: int) -> Callable[[Tensor], Tensor] | None:
        if stage == 0:
            return None
        merging = self.layers[stage].downsample
        return lambda maps: merge(merging, maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
