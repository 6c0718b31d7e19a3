"""Models as the efficiency figures need them: random weights are as heavy as any."""

from __future__ import annotations

from collections.abc import Mapping

from bench.spec import MemoryUse, Protocol
from methods.backbones.load import WeightSource, load_backbone
from methods.layers.checkpointing import checkpoint_activations
from methods.model import MultiTaskModel, Setting
from methods.registry import Configured


def random_model(
    method: Configured,
    backbone: str,
    size: tuple[int, int],
    channels: Mapping[str, int],
    protocol: Protocol,
    memory: MemoryUse,
) -> MultiTaskModel:
    """Raises MethodError where the method cannot be built on the backbone."""
    frame = load_backbone(backbone, size, WeightSource("random"))
    model = method.try_build(frame, channels, Setting(protocol))
    if memory == "low":
        checkpoint_activations(model)
    return model
