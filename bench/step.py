"""What a training step is of, apart from its method and batch size: for the verbs that look at single steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel, ConfigDict

from bench import options
from bench import recipe as recipes
from bench.data import card as cards
from bench.options import one_of
from bench.recipe import Recipe
from bench.spec import Precision
from methods.choices import DecoderName, MemoryUse, Protocol

if TYPE_CHECKING:
    from methods.model import MultiTaskModel, Setting
    from methods.registry import Configured


class Step(BaseModel):
    """A backbone with random weights takes images of one size to the outputs of `channels`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str  # as asked for, or full timm name
    image_size: tuple[int, int]  # (height, width)
    channels: dict[str, int]  # task -> outputs
    recipe: Recipe  # for optimizer and clipping
    protocol: Protocol = "published"
    decoder: DecoderName | None = None
    precision: Precision = "fp32"
    memory: MemoryUse = "default"

    @property
    def setting(self) -> Setting:
        from methods.model import Setting

        return Setting(self.protocol, self.decoder)

    def model(self, method: Configured | str) -> MultiTaskModel:
        """Raises MethodError in one line."""
        from methods.build import build_model

        return build_model(
            method, self.backbone, self.channels, self.image_size, "random", self.protocol, self.decoder, self.memory
        )

    def fitting(self, methods: str, tell: Callable[[str], None]) -> list[Configured]:
        """The methods that the backbone can serve, by the rule of `bench.fitting`."""
        from bench.fitting import fitting
        from methods.backbones.load import full_name

        name = full_name(self.backbone)
        return fitting(methods, [name], self.image_size, self.channels, self.setting, tell)[name]

    def title(self) -> list[str]:
        """What a table of such steps says above it."""
        height, width = self.image_size
        parts = [self.backbone, f"{height}x{width}", self.precision, f"protocol {self.protocol}"]
        parts += [f"decoder {self.decoder}"] if self.decoder else []
        return parts + (["activation checkpointing"] if self.memory == "low" else [])


def asked(
    *,
    backbone: str,
    dataset: str,
    tasks: str | None,
    protocol: str,
    decoder: str | None,
    recipe: str,
    image_size: str,
    precision: str,
    memory: str,
) -> Step:
    """From the words of a command line. Free of torch, so that what is wrong is said at once. Raises BenchError."""
    one_of("protocol", protocol, get_args(Protocol))
    one_of("precision", precision, get_args(Precision))
    one_of("memory", memory, get_args(MemoryUse))
    if decoder is not None:
        one_of("decoder", decoder, get_args(DecoderName))
    card = cards.load(dataset)
    return Step(
        backbone=backbone.strip(),
        image_size=options.image_size(image_size),
        channels=card.channels(cards.choose_tasks(card, tasks)),
        recipe=recipes.load(recipe).untuned(),
        protocol=protocol,
        decoder=decoder,
        precision=precision,
        memory=memory,
    )
