"""MTLoRA and MTLoRA+: task-agnostic and task-specific low-rank adaptation of a Swin Transformer.

Paper: Agiza, Neseem, Reda, "MTLoRA: Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024.

Placement   shared LoRA of `rank` on qkv, proj, fc1 and fc2 of every block; task LoRA of `task_rank` on proj, fc1 and
            fc2 of the last block of each stage. Attention runs once, on the shared stream; in a stage's last block
            every task gets a stream of its own from proj on, and the next stage goes on from the shared one.
Features    after patch merging: (2C, 4C, 8C, 8C) at strides 8, 16, 32, 32. Task streams pass through the same merging.
Extras      patch embedding, all norms, relative position biases and the merging linears are trained as well.
MTLoRA+     the merging linears are frozen and carry a shared LoRA instead.
Decoder     HRNet head, a set of necks a task.
Count       Swin-T 8,344,634, S 13,105,994, B 17,758,136 at rank 64, task rank 4: exact. MTLoRA+ 7,054,394. Among them
            is the shared update of the very last fc2, which no gradient reaches: nothing reads the shared stream after
            the last block.

This follows the released code where the paper is open: the scale multiplies directly (not alpha / r), dropout acts on
the shared input alone, W x is always of the shared stream, the task output leaves the shared update out ("matrix").
Under `equal` the four stage outputs are tapped before merging and the extras stay frozen.

The paper knows Swin alone. On a plain ViT, as a reading of ours, the four groups of blocks stand for stages; there is
nothing to merge, so taps are the groups' outputs. Of the extras there are patch embedding and norms, the final one of
all taps among them; position embedding and layer scales stay frozen.

Made cheaper than released, the same function: torch's fused attention, whose shift mask is not repeated for every image
of the batch, and W x computed once for the shared output and all tasks (tests/methods/test_swin.py, test_mtlora.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from methods.backbones.base import Backbone
from methods.backbones.swin import SwinBackbone
from methods.layers.lora import MultiTaskLoRALinear
from methods.layers.task_streams import (
    Merging,
    TaskBlock,
    TaskStreamEncoder,
    freeze_but_extras,
    require_open,
    stochastic_depth,
    taps_after_merging,
    with_family_decoder,
)
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, MethodError, at_least_one, probability, register


@dataclass(frozen=True)
class Options:
    """`rank`, `task_rank`: of the shared and of the tasks' updates. `scale`: so many times an update counts.
    `dropout`: on the shared updates' input. `drop_path`: stochastic depth's rate at the last block, rising from 0."""

    rank: int = 64
    task_rank: int = 4
    scale: float = 4.0
    dropout: float = 0.05
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        at_least_one(rank=self.rank, task_rank=self.task_rank)
        probability(dropout=self.dropout, drop_path=self.drop_path)


@dataclass(frozen=True)
class PlusOptions(Options):
    """As MTLoRA's."""


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    plus = isinstance(options, PlusOptions)
    if plus and not isinstance(backbone, SwinBackbone):
        raise MethodError(f"mtlora_plus adapts Swin's patch merging and cannot run on {backbone.name}")
    backbone = require_open("mtlora", backbone)
    freeze_but_extras(backbone, setting, reductions=not plus)

    def lora(linear: nn.Linear, of_tasks: tuple[str, ...]) -> MultiTaskLoRALinear:
        return MultiTaskLoRALinear(linear, options.rank, options.scale, options.dropout, of_tasks, options.task_rank)

    rates = stochastic_depth(backbone, options.drop_path)
    blocks, mergings = [], []
    for index, stage in enumerate(backbone.stages):
        mergings.append(Merging(lora(backbone.layers[index].downsample.reduction, ()) if plus and index else None))
        blocks.append([TaskBlock(b, lora, tuple(tasks) if b is stage[-1] else (), next(rates)) for b in stage])
    encoder = TaskStreamEncoder(backbone, blocks, mergings, taps_after_merging(backbone, setting))
    return with_family_decoder(encoder, backbone, tasks, setting)


for name, title, options in (("mtlora", "MTLoRA", Options), ("mtlora_plus", "MTLoRA+", PlusOptions)):
    register(
        Method(
            name=name,
            title=title,
            family="multi-task PEFT",
            citation="Agiza et al., CVPR 2024",
            build=build,
            starts_pretrained=True,
            unreached={r"blocks\.3\.\d+\.fc2\.shared\.": "nothing reads the shared stream after the last block"},
            options=options,
            rows={options(): title}.get,
        )
    )
