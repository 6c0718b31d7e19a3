"""TADFormer: task-adaptive dynamic filters and prompts in a transformer.

Paper: Baek et al., "TADFormer: Task-Adaptive Dynamic TransFormer for Efficient Multi-Task Learning", CVPR 2025.

Prompts     one token a task, given at the first stage and carried along: through norm1 with the patches, into every
            window without bias or mask, averaged over the windows. As in the released code the next block's prompts are
            P + MLP(norm2(attended P)): no residual around attention. Between stages a linear C -> 2C.
Low rank    shared LoRA of `rank` on qkv, proj, fc1 and fc2 of every block, scale 4, dropout 0.05; no per-task matrices.
Last block of each stage, for task t with f the attention's output after dropout:
            m_t = GELU(q_t . k) f, head by head, from the raw, unscaled logits of the task's prompt
            proj_t = W f + b + s B filter(A LN(m_t + f)) on each 7x7 window; fc1_t and fc2_t likewise, with the filter
            on the whole map of the task's own stream; W x is the shared stream's and undropped, as in MTLoRA
            F_t = sigmoid(g) m_t + (1 - sigmoid(g)) out_t with one g a stage; then patch merging (frozen) and neck.
Filter      dynamic: one a layer, made from each sample, as in the paper (published counts of Swin-T and B); static: a
            depthwise 3x3 convolution a task, as released (published count of Swin-S). The released code stores m_t with
            channels and positions swapped; that is not followed.
Extras, taps and decoder are MTLoRA's, but for the merging linears, which stay frozen. The norm of LN(m_t + f) is
allocated in every block and used in the last ones alone, as released and counted.

The paper knows Swin alone. On a plain ViT, as a reading of ours, the four groups of blocks stand for stages: the whole
map is one window, class and register tokens pass the low-rank factors without the filter, the prompts' attention passes
no layer scale, as it joins no residual, prompts go from group to group as they are, and taps are the groups' outputs.
Count       dynamic Swin-T 7,379,262, B 15,812,796, static S 11,717,454: exact.

Made cheaper than released, the same function: torch's fused attention for all tokens, the prompts' raw logits apart and
in a stage's last block alone; on a CPU a filter is nine shifted products instead of a convolution in as many groups as
samples times channels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone, Change, OpenTransformer, split_heads
from methods.backbones.swin import with_prompts
from methods.backbones.timm_import import timm
from methods.layers.lora import LowRank
from methods.layers.low_rank_filter import DynamicFilter, StaticFilter
from methods.layers.task_streams import (
    freeze_but_extras,
    require_open,
    stochastic_depth,
    taps_after_merging,
    with_family_decoder,
)
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, at_least_one, probability, register


@dataclass(frozen=True)
class Options:
    """`rank` of the shared updates. `filter`: made from each sample (`dynamic`), or a task's own convolution
    (`static`). `scale`: so many times an update counts. `dropout`: on their input. `drop_path`: stochastic depth's
    rate at the last block, rising from 0."""

    rank: int = 64
    filter: Literal["dynamic", "static"] = "dynamic"
    scale: float = 4.0
    dropout: float = 0.05
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        at_least_one(rank=self.rank)
        probability(dropout=self.dropout, drop_path=self.drop_path)


class TADLinear(nn.Module):
    """Shared LoRA around a frozen linear, and for each task the same factors with a filter in between."""

    def __init__(self, frozen: nn.Linear, options: Options, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.dropout = nn.Dropout(options.dropout)
        self.shared = LowRank(frozen.in_features, frozen.out_features, options.rank, options.scale)
        static = options.filter == "static"
        self.per_task = nn.ModuleDict({task: StaticFilter(options.rank) for task in tasks} if static else {})
        self.filter = DynamicFilter(options.rank) if tasks and not static else None

    def forward(self, frozen: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W x + b, the shared output, and x after the dropout."""
        base, dropped = frozen(x), self.dropout(x)
        return base, base + self.shared(dropped), dropped

    def update(self, task: str, z: Tensor, on_maps: Callable[[Tensor, Change], Tensor]) -> Tensor:
        """s B filter(A z), (..., in) -> (..., out); `on_maps(tokens, filter)` filters them where they have places."""
        filtered = on_maps(F.linear(z, self.shared.down), self.per_task[task] if self.filter is None else self.filter)
        return F.linear(self.shared.scale * filtered, self.shared.up)


class TADBlock(nn.Module):
    """One block with prompts; `tasks` is empty except in a stage's last block."""

    def __init__(
        self, block: nn.Module, options: Options, tasks: tuple[str, ...], drop_path: float, is_last: bool
    ) -> None:
        super().__init__()
        self.tasks, self.is_last = tasks, is_last
        self.qkv = TADLinear(block.attn.qkv, options, ())
        self.proj = TADLinear(block.attn.proj, options, tasks)
        self.fc1 = TADLinear(block.mlp.fc1, options, tasks)
        self.fc2 = TADLinear(block.mlp.fc2, options, tasks)
        self.norm = nn.LayerNorm(block.attn.proj.in_features)
        self.drop_path = timm.layers.DropPath(drop_path)

    def forward(
        self, backbone: OpenTransformer, block: nn.Module, x: Tensor, prompts: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Tokens x (B, ..., C), prompts (B, K, C) -> both after the block, task streams out_t and skip features m_t."""
        count = prompts.shape[1]
        tokens = with_prompts(backbone.into_attention(block, x), block.norm1(prompts))
        _, qkv, _ = self.qkv(block.attn.qkv, tokens)
        base_proj, projected, attended = self.proj(block.attn.proj, backbone.attend(block, qkv, count))
        attended_prompts = projected[:, :count].unflatten(0, (len(x), -1)).mean(1)
        shared = x + self.drop_path(backbone.out_of_attention(block, projected[:, count:], x))
        base_fc1, hidden, _ = self.fc1(block.mlp.fc1, block.norm2(shared))
        base_fc2, out, _ = self.fc2(block.mlp.fc2, block.mlp.act(hidden))
        if not self.is_last:
            updated = self._mlp(block, block.norm2(attended_prompts))
            prompts = prompts + self.drop_path(backbone.out_of_mlp(block, updated))

        streams, skips = {}, {}
        if self.tasks:
            f = attended[:, count:]
            frozen = base_proj[:, count:], base_fc1, base_fc2
            for task, m in zip(self.tasks, self._modulated(block, qkv, f, count), strict=True):
                streams[task] = self._stream(backbone, block, task, x, frozen, self.norm(m + f))
                skips[task] = backbone.rejoined(block, m, x)
        return shared + self.drop_path(backbone.out_of_mlp(block, out)), prompts, streams, skips

    def _mlp(self, block: nn.Module, x: Tensor) -> Tensor:
        _, hidden, _ = self.fc1(block.mlp.fc1, x)
        return self.fc2(block.mlp.fc2, block.mlp.act(hidden))[1]

    def _modulated(self, block: nn.Module, qkv: Tensor, f: Tensor, count: int) -> list[Tensor]:
        """m_t of every task, (B * windows, N, C): f weighted head by head with the task's prompt's logits."""
        query, key, _ = split_heads(block, qkv)
        logits = F.gelu(query[:, :, :count] @ key[:, :, count:].transpose(-1, -2))  # (B * windows, heads, K, N)
        by_head = f.unflatten(-1, (logits.shape[1], -1))  # (B * windows, N, heads, C / heads)
        return [(logits[:, :, t].transpose(1, 2).unsqueeze(-1) * by_head).flatten(2) for t in range(count)]

    def _stream(
        self,
        backbone: OpenTransformer,
        block: nn.Module,
        task: str,
        x: Tensor,
        frozen: tuple[Tensor, ...],
        f_t: Tensor,
    ) -> Tensor:
        """out_t; `frozen` holds W x + b of the shared stream for proj (in windows), fc1 and fc2."""
        base_proj, base_fc1, base_fc2 = frozen
        proj_t = base_proj + self.proj.update(task, f_t, functools.partial(backbone.on_windows, block))
        a_t = x + self.drop_path(backbone.out_of_attention(block, proj_t, x))
        hidden_t = block.mlp.act(base_fc1 + self.fc1.update(task, block.norm2(a_t), backbone.on_map))
        out_t = base_fc2 + self.fc2.update(task, hidden_t, backbone.on_map)
        return a_t + self.drop_path(backbone.out_of_mlp(block, out_t))


class TADFormerEncoder(nn.Module):
    def __init__(
        self, backbone: OpenTransformer, tasks: Mapping[str, int], options: Options, taps_after_merging: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = tuple(tasks)
        self.taps_after_merging = taps_after_merging
        channels = backbone.channels
        start = nn.init.trunc_normal_(torch.empty(len(tasks), channels[0]), mean=1.0, std=1.0)
        self.prompts = nn.ParameterDict(dict(zip(tasks, start, strict=True)))
        self.widen = nn.ModuleList(
            nn.Identity() if wide == c else nn.Linear(c, wide, bias=False) for c, wide in itertools.pairwise(channels)
        )
        for weight in self.widen.parameters():
            nn.init.trunc_normal_(weight, std=0.02)
        self.gates = nn.Parameter(torch.zeros(4))
        rates = stochastic_depth(backbone, options.drop_path)
        last = backbone.stages[-1][-1]
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                TADBlock(b, options, self.tasks if b is stage[-1] else (), next(rates), b is last) for b in stage
            )
            for stage in backbone.stages
        )

    def forward(self, image: Tensor) -> Features:
        backbone = self.backbone
        x = backbone.embed(image)
        # By name: a ParameterDict sorts its keys.
        prompts = torch.stack([self.prompts[task] for task in self.tasks]).expand(len(image), -1, -1)
        features: dict[str, list[Tensor]] = {}
        general = []
        for stage, own_blocks in enumerate(self.blocks):
            x = backbone.enter(stage, x)
            if stage:
                prompts = self.widen[stage - 1](prompts)
            for block, own in zip(backbone.stages[stage], own_blocks, strict=True):
                x, prompts, streams, skips = own(backbone, block, x, prompts)
            gate = self.gates[stage].sigmoid()
            for task, stream in streams.items():
                mixed = gate * skips[task] + (1 - gate) * stream
                if self.taps_after_merging and stage < 3:
                    mixed = backbone.enter(stage + 1, mixed)
                features.setdefault(task, []).append(backbone.output(stage, mixed))
            general.append(backbone.output(stage, x))
        return Features(features, general)


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_open("tadformer", backbone)
    freeze_but_extras(backbone, setting)
    encoder = TADFormerEncoder(backbone, tasks, options, taps_after_merging(backbone, setting))
    return with_family_decoder(encoder, backbone, tasks, setting)


register(
    Method(
        name="tadformer",
        title="TADFormer",
        family="multi-task PEFT",
        citation="Baek et al., CVPR 2025",
        build=build,
        unreached={r"blocks\.\d+\.\d+\.norm\.": "allocated in every block, used in the last of each stage"},
        options=Options,
        rows={Options(): "TADFormer"}.get,
    )
)
