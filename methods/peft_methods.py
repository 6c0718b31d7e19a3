"""`peft:NAME`: any Hugging Face peft method for linear layers as a row, e.g. peft:dora, peft:vera, peft:ia3, peft:boft.

Library: Mangrulkar et al., "PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods", 2022. The tuner's modules
take the place of the attention's input projections (`targets=attention`, as `lora` here) or of all linears of every
block (`targets=block`), with peft's own defaults; `rank=0` is the tuner's own default rank. Under either protocol the
backbone's own parameters stay frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from methods.backbones.base import Backbone
from methods.layers.encoders import Sharing, require_blocks, selected_encoder, with_decoder
from methods.layers.peft_layers import ATTENTION, BLOCK, insert_tuner, tuner_config
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, Prefix, register_prefix


@dataclass(frozen=True)
class Options:
    """`sharing`: a set of parameters and a pass of the backbone for each task (`per_task`), or one for all
    (`shared`). `targets`: the attention's input projections (`attention`), or all linears of a block (`block`).
    `rank`: 0 is the tuner's own."""

    sharing: Sharing = "per_task"
    targets: Literal["attention", "block"] = "attention"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be at least 1, or 0 for the tuner's own, not {self.rank}")


def build(
    name: str, backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting
) -> MultiTaskModel:
    backbone = require_blocks(f"peft:{name}", backbone)
    targets = ATTENTION if options.targets == "attention" else BLOCK

    def insert(frozen: Backbone) -> None:
        insert_tuner(frozen, tuner_config(name, targets, options.rank))

    encoder = selected_encoder(backbone, tasks, options.sharing, lambda name: False, insert)
    return with_decoder(encoder, backbone, tasks, setting, independent=options.sharing == "per_task")


def make(name: str) -> Method:
    tuner_config(name, ATTENTION)  # raises for a name that peft does not know
    return Method(
        name=f"peft:{name}",
        title=f"peft {name}",
        family="single-task PEFT",
        citation="Hugging Face peft",
        build=functools.partial(build, name),
        options=Options,
    )


register_prefix(
    Prefix("peft", "Any peft method for linear layers", "dora, vera, ia3, oft, boft, ...", options=Options, make=make)
)
