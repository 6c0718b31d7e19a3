"""Progressive task-specific adaptation: low-rank updates shared by all tasks early, by groups, and by none late.

Paper: Gangwar et al., "Parameter-Efficient Multi-Task Learning via Progressive Task-Specific Adaptation", 2025
(arXiv 2509.19602). Only its abstract and summary were at hand and there is no public code: this is our reading.

LoRA on qkv, proj, fc1 and fc2 of every block. Stages 1 and 2: one update for all tasks, one stream. Stage 3: an update
and a stream a group of tasks. Stage 4: an update and a stream a task. Groups: for a few batches of the training data
each task's loss gradient with respect to the shared updates of stages 1 and 2 is normalised, the pairwise cosines are
averaged over the batches, and average linkage clusters the tasks; similarity and groups go into the record. Until then
(when efficiency is measured) tasks are grouped in order. Backbone frozen; taps and decoder of the MTLoRA family. On a
plain ViT its four groups of blocks stand for stages.

`groups` is a number of groups, `auto` (half as many as tasks, rounded up) or the groups themselves, e.g.
`semseg+human_parts-saliency+normals`. Ranks 64, 24 and 16 bring #TP to a fifth of multi-task full fine-tuning, as the
abstract has it.
Count (Swin-T)  5,878,784 (published: "one-fifth" of 30.06 M).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone, OpenTransformer
from methods.layers.lora import LowRank
from methods.layers.task_streams import require_open, taps_after_merging, with_family_decoder
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, MethodError, at_least_one, near, register

EXAMPLE = "semseg+human_parts-saliency+normals"


@dataclass(frozen=True)
class Options:
    """`groups`: their number, `auto` (half as many as tasks), or the groups themselves. `rank`, `group_rank`,
    `task_rank`: of the updates of stages 1 and 2, of stage 3 and of stage 4. `scale`: so many times an update
    counts. `batches`: of training data, by whose gradients tasks are grouped."""

    groups: str = "auto"
    rank: int = 64
    group_rank: int = 24
    task_rank: int = 16
    scale: float = 4.0
    batches: int = 4

    def __post_init__(self) -> None:
        at_least_one(rank=self.rank, group_rank=self.group_rank, task_rank=self.task_rank, batches=self.batches)
        if self.groups.isdigit():
            at_least_one(groups=int(self.groups))
        elif not re.fullmatch(r"[a-z]\w*([+-][a-z]\w*)*", self.groups):
            raise ValueError(f"groups must be auto, a number, or groups like {EXAMPLE}, not {self.groups!r}")


class BlockLoRA(nn.Module):
    """A block on one stream with a low-rank update of its four linears."""

    def __init__(self, block: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        linears = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        self.updates = nn.ModuleDict(
            {name: LowRank(linear.in_features, linear.out_features, rank, scale) for name, linear in linears.items()}
        )

    def forward(self, backbone: OpenTransformer, block: nn.Module, x: Tensor) -> Tensor:
        def updated(name: str, linear: nn.Linear, z: Tensor) -> Tensor:
            return linear(z) + self.updates[name](z)

        attended = backbone.attend(block, updated("qkv", block.attn.qkv, backbone.into_attention(block, x)))
        x = x + backbone.out_of_attention(block, updated("proj", block.attn.proj, attended), x)
        hidden = block.mlp.act(updated("fc1", block.mlp.fc1, block.norm2(x)))
        return x + backbone.out_of_mlp(block, updated("fc2", block.mlp.fc2, hidden))


def _read_groups(encoder: ProgressiveEncoder, _: object) -> None:
    encoder.read_groups()


class ProgressiveEncoder(nn.Module):
    """`count` groups; `group_of_task` (K,) says which group each task is in."""

    def __init__(
        self, backbone: OpenTransformer, tasks: Sequence[str], groups: list[int], options: Options, merged_taps: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        self.tasks, self.options, self.merged_taps = tuple(tasks), options, merged_taps
        self.given = not (options.groups == "auto" or options.groups.isdigit())
        self.count = max(groups) + 1
        self.register_buffer("group_of_task", torch.tensor(groups, device="cpu"))  # part of the trained state
        self.groups = groups  # the same for the host, so that a GPU is not waited for
        self._read: tuple[Tensor | None, int] = None, 0  # buffer and version that they were read from
        self.register_load_state_dict_post_hook(_read_groups)

        def stage(index: int, rank: int) -> nn.ModuleList:
            return nn.ModuleList(BlockLoRA(b, rank, options.scale) for b in backbone.stages[index])

        self.shared = nn.ModuleList(stage(index, options.rank) for index in (0, 1))
        self.grouped = nn.ModuleList(stage(2, options.group_rank) for _ in range(self.count))
        self.per_task = nn.ModuleDict({task: stage(3, options.task_rank) for task in tasks})

    def read_groups(self) -> None:
        self.groups, self._read = self.group_of_task.tolist(), (self.group_of_task, self._version())

    def _version(self) -> int:
        return -1 if self.group_of_task.is_inference() else self.group_of_task._version

    def _follow_buffer(self) -> None:
        """Read the groups anew where the buffer was moved, or written in place as a moving average of weights does; and
        always where processes train together, since DDP's broadcast leaves no trace. A tracer has no values to read,
        and keeps to what was read before."""
        if torch.compiler.is_compiling():
            return
        held = self.group_of_task
        if type(held) is not Tensor or held.is_meta:
            return
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if together or self._read[0] is not held or self._read[1] != self._version():
            self.read_groups()

    def forward(self, image: Tensor) -> Features:
        self._follow_buffer()
        backbone = self.backbone

        def run(index: int, updates: nn.ModuleList, x: Tensor) -> Tensor:
            for block, own in zip(backbone.stages[index], updates, strict=True):
                x = own(backbone, block, x)
            return x

        first = run(0, self.shared[0], backbone.embed(image))
        merged_first = backbone.enter(1, first)
        second = run(1, self.shared[1], merged_first)
        merged_second = backbone.enter(2, second)
        third = [run(2, updates, merged_second) for updates in self.grouped]
        merged_third = [backbone.enter(3, x) for x in third]
        features = {}
        for task, group in zip(self.tasks, self.groups, strict=True):
            last = run(3, self.per_task[task], merged_third[group])
            if self.merged_taps:
                streams = [merged_first, merged_second, merged_third[group], last]
            else:
                streams = [first, second, third[group], last]
            features[task] = [backbone.output(stage, x) for stage, x in enumerate(streams)]
        return Features(features)

    def group_tasks(self, losses: Iterable[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Group the tasks by the gradients of their losses, one mapping of losses a batch; for the record: the groups
        and the similarity of every two tasks, None (and 0 for the groups) of two that no batch has labels of."""
        parameters = list(self.shared.parameters())
        total, count = torch.zeros(2, len(self.tasks), len(self.tasks), dtype=torch.double)
        for of_batch in itertools.islice(losses, self.options.batches):
            g = torch.stack([direction(of_batch[task], parameters) for task in self.tasks])
            told = g.any(1).double().cpu()
            total += (g @ g.T).cpu()
            count += told.outer(told)
            del of_batch  # and with it the graph, before the next one is made
        similarity = (total / count).clamp(-1, 1)
        if not self.given:
            self.group_of_task.copy_(torch.tensor(average_linkage(similarity.nan_to_num(0), self.count)))
            self.read_groups()
        members = [
            [task for task, group in zip(self.tasks, self.groups, strict=True) if group == g] for g in range(self.count)
        ]
        known = [[None if math.isnan(value) else value for value in row] for row in similarity.tolist()]
        return {"tasks": list(self.tasks), "similarity": known, "groups": members}


def direction(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The loss's normalised gradient, flat and in double precision; zero where there is none, as without a label."""
    for factor in (1, 2**-8, 2**-16, 2**-24):  # a scaled loss may overflow in half precision
        parts = torch.autograd.grad(factor * loss, parameters, retain_graph=True, materialize_grads=True)
        gradient = torch.cat([part.flatten() for part in parts]).double()
        if gradient.isfinite().all():
            return F.normalize(gradient, dim=0)
    return torch.zeros_like(gradient)


def average_linkage(similarity: Tensor, count: int) -> list[int]:
    """Cluster n items by their similarity (n, n) into `count` groups -> the group of every item, in order of its
    first item."""
    if len(similarity) == 1:
        return [0]
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    distance = (1 - similarity).double().numpy()
    labels = cut_tree(linkage(squareform(distance, checks=False), "average"), n_clusters=count)[:, 0].tolist()
    order = list(dict.fromkeys(labels))
    return [order.index(label) for label in labels]


def initial_groups(text: str, tasks: Sequence[str]) -> list[int]:
    """The group of every task before any gradient is known. Raises MethodError for groups that do not fit the tasks."""
    if text == "auto" or text.isdigit():
        count = (len(tasks) + 1) // 2 if text == "auto" else int(text)
        if count > len(tasks):
            raise MethodError(
                f"progressive: {len(tasks)} tasks ({', '.join(tasks)}) cannot be split into {count} groups"
            )
        return [index * count // len(tasks) for index in range(len(tasks))]
    groups = [part.split("+") for part in text.split("-")]
    named = [task for group in groups for task in group]
    unknown = [task for task in named if task not in tasks]
    if unknown:
        hint = near(unknown[0], tasks)
        raise MethodError(f"progressive: no task {unknown[0]!r} to group{hint}; groups are written like {EXAMPLE}")
    if sorted(named) != sorted(tasks):
        raise MethodError(f"progressive: groups={text} must name every task once; tasks: {', '.join(tasks)}")
    return [next(g for g, members in enumerate(groups) if task in members) for task in tasks]


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_open("progressive", backbone)
    groups = initial_groups(options.groups, list(tasks))
    encoder = ProgressiveEncoder(backbone, list(tasks), groups, options, taps_after_merging(backbone, setting))
    return with_family_decoder(encoder, backbone, tasks, setting, prepare=encoder.group_tasks)


register(
    Method(
        name="progressive",
        title="Progressive adaptation",
        family="multi-task PEFT",
        citation="Gangwar et al., arXiv 2509.19602",
        build=build,
        starts_pretrained=True,
        options=Options,
    )
)
