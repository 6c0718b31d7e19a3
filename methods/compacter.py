"""Compacter and Compacter++: adapters of hypercomplex layers.

Paper: Karimi Mahabadi, Henderson, Ruder, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021.

x + phm_up(GELU(phm_down(LN(x)))) with W = sum_{i<n} kron(A_i, l_i r_i), n = 4; one rule A for all the layers of a task,
drawn from N(0, 1e-4^2) as in the released code, so that training starts next to the pretrained function. Compacter
adapts the outputs of attention and feed-forward network of every block, Compacter++ the latter alone. The papers'
tables train a set a task, with bottleneck C/2 (the released code divides by 32) and, as counted, a LayerNorm each; the
released code trains the model's own norms instead.
Count (Swin-T)  6.5 C an adapter and 64 a rule: 2,778,912 and 2,664,096 (published 2.78 and 2.66 M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from methods.backbones.base import Backbone
from methods.layers.adapter import Bottleneck, bottleneck_width
from methods.layers.encoders import AdapterEncoder, BlockAdapters, require_blocks, with_decoder
from methods.layers.phm import PHMLinear
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, MethodError, at_least_one, register


@dataclass(frozen=True)
class Options:
    """`n`: so many Kronecker products make a matrix, of rules A_i (`n` x `n`). `reduction`: the bottleneck is C /
    `reduction` wide."""

    n: int = 4
    reduction: int = 2

    def __post_init__(self) -> None:
        at_least_one(n=self.n, reduction=self.reduction)


@dataclass(frozen=True)
class PlusPlusOptions(Options):
    """As Compacter's."""


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    plus_plus = isinstance(options, PlusPlusOptions)
    name = "compacter_pp" if plus_plus else "compacter"
    backbone = require_blocks(name, backbone)

    def adapters_of_a_task() -> BlockAdapters:
        rule = nn.Parameter(1e-4 * torch.randn(options.n, options.n, options.n))

        def make(channels: int) -> Bottleneck:
            width = bottleneck_width(channels, options.reduction)
            return Bottleneck(
                nn.LayerNorm(channels), PHMLinear(channels, width, rule), PHMLinear(width, channels, rule)
            )

        return BlockAdapters(backbone, None if plus_plus else make, make)

    try:
        encoder = AdapterEncoder(backbone, tasks, "per_task", adapters_of_a_task)
    except ValueError as error:
        raise MethodError(f"{name} on {backbone.name}: {error}") from error
    return with_decoder(encoder, backbone, tasks, setting, independent=True)


for name, title, options, row in (
    ("compacter", "Compacter", Options, "Compactor"),
    ("compacter_pp", "Compacter++", PlusPlusOptions, "Compactor++"),
):
    register(
        Method(
            name=name,
            title=title,
            family="single-task PEFT",
            citation="Karimi Mahabadi et al., NeurIPS 2021",
            build=build,
            starts_pretrained=True,
            options=options,
            rows={options(): row}.get,
        )
    )
