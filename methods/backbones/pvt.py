"""Pyramid Vision Transformer v2 (Wang et al., Computational Visual Media 2022) as four stages of blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from methods.backbones.base import Change, TransformerBackbone, changed


class PVTBackbone(TransformerBackbone):
    """A timm PyramidVisionTransformerV2; tokens (B, H, W, C). Every stage ends with its own norm."""

    def __init__(self, name: str, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(name, mean, std)
        self.patch_embed = model.patch_embed
        self.layers = model.stages
        self.channels = tuple(info["num_chs"] for info in model.feature_info)
        self.strides = tuple(info["reduction"] for info in model.feature_info)
        self.stem_channels = self.channels[0]
        self.depths = tuple(len(stage.blocks) for stage in self.layers)
        self.pretrained_names = frozenset(name for name, _ in self.named_parameters())

    @property
    def stages(self) -> list[nn.ModuleList]:
        return [stage.blocks for stage in self.layers]

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed(self.normalise(image))

    def stem(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """Norm of the stage before, then overlapping patch embedding."""
        return self.layers[stage].downsample(self.output(stage - 1, x)) if stage else x

    def attention(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        out = block.attn(block.norm1(x).flatten(1, 2), x.shape[1:3])
        return x + changed(out.view(x.shape), change)

    def feed_forward(self, block: nn.Module, x: Tensor, change: Change | None = None) -> Tensor:
        out = block.mlp(block.norm2(x).flatten(1, 2), x.shape[1:3])
        return x + changed(out.view(x.shape), change)

    def output(self, stage: int, x: Tensor) -> Tensor:
        return self.layers[stage].norm(x).permute(0, 3, 1, 2)

    def downsampling(self, stage: int) -> Callable[[Tensor], Tensor] | None:
        if stage == 0:
            return None
        embedding = self.layers[stage].downsample
        return lambda maps: embedding(maps).permute(0, 3, 1, 2)
