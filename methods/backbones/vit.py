"""A plain Vision Transformer as four groups of blocks at one resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Change, OpenTransformer, changed, split_heads
from methods.registry import MethodError


class ViTBackbone(OpenTransformer):
    """A timm VisionTransformer (DINOv2, DeiT, CLIP ...); tokens (B, prefix + N, C), class and register tokens first.

    Position embeddings are resampled to the image at every call, so that the parameters do not depend on its size.
    Every group's map goes through the model's own final norm, as intermediate features of DINOv2 are used.
    """

    def __init__(
        self, name: str, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: tuple[int, int]
    ) -> None:
        super().__init__(name, mean, std)
        patch = model.patch_embed.patch_size
        if any(side % p for side, p in zip(size, patch, strict=True)):
            fitting = [max(round(side / p), 1) * p for side, p in zip(size, patch, strict=True)]
            raise MethodError(
                f"backbone {name} cannot take images of {size[0]}x{size[1]}: its patches are {patch[0]}x{patch[1]}; "
                f"the nearest size that fits is {fitting[0]}x{fitting[1]}"
            )
        if not all(hasattr(block, "ls1") and hasattr(block, "attn") for block in model.blocks):
            raise MethodError(f"backbone {name} has blocks of another kind than attention, then feed-forward network")
        depth = len(model.blocks)
        if depth < 4:
            raise MethodError(f"backbone {name} has {depth} blocks, too few for four groups")
        model.fc_norm, model.attn_pool = nn.Identity(), None  # of a classifier: no map goes through them
        self.model = model
        self.prefix = model.num_prefix_tokens
        self.grid = tuple(side // p for side, p in zip(size, patch, strict=True))
        self.channels = (model.embed_dim,) * 4
        self.strides = (patch[0],) * 4
        self.stem_channels = model.embed_dim
        self.depths = tuple((depth * (i + 1)) // 4 - (depth * i) // 4 for i in range(4))
        self.pretrained_names = frozenset(name for name, _ in self.named_parameters())

    @property
    def stages(self) -> list[nn.Sequential]:
        ends = [sum(self.depths[: i + 1]) for i in range(4)]
        return [self.model.blocks[end - depth : end] for end, depth in zip(ends, self.depths, strict=True)]

    def embed(self, image: Tensor) -> Tensor:
        return self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(self.normalise(image))))

    def stem(self, x: Tensor) -> Tensor:
        """Patch and position embedding, without the prefix tokens."""
        return x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        return x

    def attention(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        return x + changed(block.ls1(block.attn(block.norm1(x))), change)

    def feed_forward(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        return x + changed(block.ls2(block.mlp(block.norm2(x))), change)

    def into_attention(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.norm1(x)

    def attend(self, block: nn.Module, qkv: Tensor, prompts: int = 0) -> Tensor:
        query, key, value = split_heads(block, qkv)
        attention = block.attn
        out = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
        return attention.norm(out.transpose(1, 2).flatten(2))

    def out_of_attention(self, block: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        return block.ls1(out)

    def rejoined(self, block: nn.Module, tokens: Tensor, x: Tensor) -> Tensor:
        return tokens

    def out_of_mlp(self, block: nn.Module, out: Tensor) -> Tensor:
        return block.ls2(out)

    def on_map(self, x: Tensor, function: Change) -> Tensor:
        placed = function(x[:, self.prefix :].unflatten(1, self.grid))
        return torch.cat([x[:, : self.prefix], placed.flatten(1, 2)], 1)

    def on_windows(self, block: nn.Module, tokens: Tensor, function: Change) -> Tensor:
        return self.on_map(tokens, function)

    def output(self, stage: int, x: Tensor) -> Tensor:
        return self.stem(self.model.norm(x))
