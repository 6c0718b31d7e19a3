"""Any timm model with `features_only=True` whose maps reach strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from methods.backbones.base import Backbone, Pyramid
from methods.backbones.timm_import import timm
from methods.registry import MethodError

STRIDES = (4, 8, 16, 32)


class PyramidBackbone(Backbone):
    """Four stage maps of a timm feature extractor; a finer map, where there is one, is the stem.

    `size` is the image size that the network's layers are probed with.
    """

    def __init__(
        self, name: str, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: tuple[int, int]
    ) -> None:
        super().__init__(name, mean, std)
        self.model = model
        reductions = model.feature_info.reduction()
        if not set(STRIDES) <= set(reductions):
            raise MethodError(
                f"backbone {name} gives maps at strides {reductions}, not 4, 8, 16 and 32; "
                "choose a hierarchical one, e.g. swin_tiny or tf_efficientnet_lite0"
            )
        # The last map of a stride is the deepest one.
        self._taps = [max(i for i, r in enumerate(reductions) if r == stride) for stride in STRIDES]
        self._stem = self._taps[0] - 1 if self._taps[0] > 0 else None
        self._channels_last = timm.layers.Format(getattr(model, "output_fmt", "NCHW")) == timm.layers.Format.NHWC
        channels = model.feature_info.channels()
        self.channels = tuple(channels[tap] for tap in self._taps)
        self.strides = STRIDES
        self.stem_channels = self.channels[0] if self._stem is None else channels[self._stem]
        self.pretrained_names = frozenset(name for name, _ in self.named_parameters())
        self._layers = self._find_downsampling(size)

    def forward(self, image: Tensor) -> Pyramid:
        maps = self.model(self.normalise(image))
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        stem = None if self._stem is None else maps[self._stem]
        return Pyramid(stem, [maps[tap] for tap in self._taps])

    def downsampling(self, stage: int) -> Callable[[Tensor], Tensor] | None:
        path = self._layers[stage]
        return self.model.get_submodule(path) if path else None

    @torch.no_grad()
    def _find_downsampling(self, size: tuple[int, int]) -> list[str]:
        """By stage, the path of the layer named `downsample` (ConvNeXt) that maps the stage before to its size."""
        was_training = self.training
        self.eval()
        maps = self(torch.zeros(1, 3, *size)).maps
        # Of a stage, not of a block: a residual block's `downsample` is the shortcut of a sum, half a layer.
        candidates = [p for p, _ in self.model.named_modules() if p.endswith(".downsample") and p.count(".") == 1]
        found = [""]
        for before, after in zip(maps, maps[1:], strict=False):
            fitting = [path for path in candidates if _maps_to(self.model.get_submodule(path), before, after)]
            found.append(fitting[0] if len(fitting) == 1 else "")
        self.train(was_training)
        return found


def _maps_to(layer: nn.Module, before: Tensor, after: Tensor) -> bool:
    if not any(True for _ in layer.parameters()):
        return False
    try:
        out = layer(before)
    except (RuntimeError, TypeError, ValueError):  # a layer for other channels or another layout
        return False
    return isinstance(out, Tensor) and out.shape == after.shape
