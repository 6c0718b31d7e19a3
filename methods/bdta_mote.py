"""BDTA+MoTE ("ours"): bi-directional task adaptation beside a frozen backbone, and a mixture of task experts.

Paper: Yao et al., "Parameter-, Memory-, Time-Efficient Multi-Task Dense Vision Adaptation", AAAI 2026. No public
code: equations 1-11 are built as printed, and what they leave open is marked "our choice" below.

Main branch (eq. 1)    the frozen backbone; its forward builds no graph.
Task branch (eq. 2)    one BDTA module a stage. A_t^0 is the backbone's patch embedding for every task; between stages
                       A_t passes through the backbone's own frozen patch merging.
BDTA (eq. 3-8)         projections to d = C/r, general-to-task and task-to-general adaptation by per-task adapters and
                       deformable attention, sum, projection back to C. Only the adapters are per task.
MoTE (eq. 9-11)        per stage and task a linear to C_1; gates from the general features, noisy in training alone;
                       R_t = A'_t + gamma_t * sum_q g_t(q) A'_q with gamma zero at the start; fuse; head.
Count                  Swin-T 2,362,108 (published 2.36 M), B 4,142,064 (4.13); without MoTE's routing 1,965,164
                       (1.96); one direction 2,109,550 (2.11). All within 0.3 %.

Our choice, fitted to those counts: 6 heads (or the largest divisor of d below it) of 4 points, adapter bottleneck and
feed-forward width d/4, router width C/16 with ReLU, a 3x3 half-width head. Also ours, the initialisation: the
projection to d of the general features has orthonormal rows and the one back to C is its transpose; with T2G present,
the projection of A_t^{i-1} and the outputs of attention and feed-forward network are zero, so that A_t^i starts as
F_pre^i projected onto d dimensions, and as F_pre^i itself with r=1.
`direction=g2t` takes A_g2t for the sum of eq. 8; `t2g` runs eq. 6-8 with the projected A_t^{i-1} in A_g2t's place;
`mote=off` keeps the linears, the fuse and the head and drops the routing.

Linear maps and the mixing commute with bilinear upsampling, so eq. 9-11 run at each stage's own resolution; the
queries of T2G are the same for all tasks and worked out once; sampled features are not kept but sampled again in
backward; the adapters of all tasks are batched products; the routers of a stage read the features once, and their
second layers, which commute with pooling, run after it. All exact, and held to the plain equations by the tests;
`form=plain` runs none of them. MoTE's routing sits in the decoder between neck and fuse and is counted as adaptation;
under `equal` the common decoder's necks, fuse and head take the places of W_t^i, W_t and the paper's head.

On a backbone without a patch-merging layer the task maps go through 2x2 average pooling and a trained 1x1 projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from methods.backbones.base import Backbone
from methods.decoder import DECODERS, Decoder, LinearFuse, Maps
from methods.layers.deformable_attention import ConvFFN, DeformableAttention
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, MethodError, at_least_one, register


@dataclass(frozen=True)
class Options:
    """`r`: the task branch works on d = C / `r` channels (eq. 3). `direction`: of the adaptation, general to task
    (`g2t`), task to general (`t2g`) or `both` (eq. 3-8). `mote`: the mixture of task experts (eq. 9-11). `form`:
    `plain` is the equations as printed, the same function in more memory and time."""

    r: int = 4
    direction: Literal["both", "g2t", "t2g"] = "both"
    mote: bool = True
    form: Literal["fast", "plain"] = "fast"

    def __post_init__(self) -> None:
        at_least_one(r=self.r)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Adapter(nn.Module):
    """GELU(x W_down) W_up + x (eq. 4 and 6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down = _linear(dim, max(dim // 4, 4))
        self.up = _linear(self.down.out_features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(x))) + x


def adapt(adapters: Sequence[Adapter], x: Tensor) -> Tensor:
    """x (1 or K, B, H, W, d) through K adapters, in batched products -> (K, B, H, W, d)."""

    def linears(name: str, tokens: Tensor) -> Tensor:
        each = [getattr(adapter, name) for adapter in adapters]
        weight, bias = (torch.stack([getattr(linear, part) for linear in each]) for part in ("weight", "bias"))
        return torch.baddbmm(bias.unsqueeze(1), tokens, weight.mT)

    tokens = x.flatten(1, -2).expand(len(adapters), -1, -1)
    return (linears("up", F.gelu(linears("down", tokens))) + tokens).unflatten(1, x.shape[1:-1])


class Injection(nn.Module):
    """Per-task adapters on the source, then deformable cross-attention and a feed-forward network.

    G2T (eq. 4-5): query = task features, source = general features. T2G (eq. 6-7): the other way round. `plain`: one
    adapter after the other.
    """

    plain = False

    def __init__(self, dim: int, tasks: Sequence[str]) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({task: Adapter(dim) for task in tasks})
        self.norm_query = nn.LayerNorm(dim, eps=1e-6)
        self.norm_source = nn.LayerNorm(dim, eps=1e-6)
        self.attention = DeformableAttention(dim, heads=max(h for h in range(1, 7) if dim % h == 0))
        self.norm_ffn = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim, max(dim // 4, 4))

    def start_at_zero(self) -> None:
        """Let attention and feed-forward network add nothing to the query."""
        for last in (self.attention.output, self.ffn.reduce):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, query: Tensor, source: Tensor) -> Tensor:
        """query, source (1 or K, B, H, W, d) -> (K, B, H, W, d); a leading 1 stands for all tasks alike."""
        adapters = list(self.adapters.values())
        if self.plain:
            source = source.expand(len(adapters), *source.shape[1:])
            source = torch.stack([adapter(x) for adapter, x in zip(adapters, source, strict=True)])
        else:
            source = adapt(adapters, source)
        attended = self.attention(self.norm_query(query).flatten(0, 1), self.norm_source(source).flatten(0, 1))
        x = query + attended.reshape(source.shape)
        return x + self.ffn(self.norm_ffn(x).flatten(0, 1)).reshape(x.shape)


class BDTA(nn.Module):
    """One stage of the task branch (eq. 3-8). `plain`: what all tasks share is worked out for each anew."""

    plain = False

    def __init__(self, channels: int, tasks: Sequence[str], options: Options) -> None:
        super().__init__()
        dim = channels // options.r
        self.project_general = _linear(channels, dim)
        self.project_task = _linear(channels, dim)
        self.project_out = _linear(dim, channels)
        self.g2t = Injection(dim, tasks) if options.direction != "t2g" else None
        self.t2g = Injection(dim, tasks) if options.direction != "g2t" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.project_general.weight)
        self.project_out.weight.copy_(self.project_general.weight.T)
        if self.t2g is None:  # the general features come in through G2T's attention alone
            nn.init.orthogonal_(self.project_task.weight)
            return
        nn.init.zeros_(self.project_task.weight)
        for injection in filter(None, (self.g2t, self.t2g)):
            injection.start_at_zero()

    def forward(self, general: Tensor, task: Tensor) -> Tensor:
        """general (B, H, W, C), task (1 or K, B, H, W, C) -> (K, B, H, W, C)."""
        f = self.project_general(general).unsqueeze(0)
        if self.plain:
            adapters = (self.g2t or self.t2g).adapters
            task = task.expand(len(adapters), *task.shape[1:])  # in the first stage one map stands for all tasks
        a = self.project_task(task)
        if self.g2t is not None:
            a = self.g2t(a, f)
        if self.t2g is not None:
            a = a + self.t2g(f.expand_as(a) if self.plain else f, a)
        return self.project_out(a)


class Transition(nn.Module):
    """Task maps from one stage's resolution and width to the next: the backbone's own layer, or pool and project."""

    def __init__(self, before: int, after: int, inherited: bool) -> None:
        super().__init__()
        self.project = None if inherited or before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, size: torch.Size, layer: Callable[[Tensor], Tensor] | None) -> Tensor:
        """x (K, B, H, W, C) -> (K, B, H', W', C') with (H', W') = size; `layer` is the backbone's, where it has one."""
        maps = x.flatten(0, 1).permute(0, 3, 1, 2)
        if layer is not None:
            maps = layer(maps)
        else:
            maps = maps if maps.shape[-2:] == size else F.adaptive_avg_pool2d(maps, size)
            maps = maps if self.project is None else self.project(maps)
        return maps.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class TaskBypass(nn.Module):
    """The frozen main branch and the task branch beside it (eq. 1-2)."""

    def __init__(self, backbone: Backbone, stem_channels: int, tasks: Sequence[str], options: Options) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        self.tasks = tuple(tasks)
        widths = (stem_channels, *backbone.channels)
        self.transitions = nn.ModuleList(
            Transition(widths[stage], widths[stage + 1], backbone.downsampling(stage) is not None) for stage in range(4)
        )
        self.stages = nn.ModuleList(BDTA(channels, tasks, options) for channels in backbone.channels)

    def forward(self, image: Tensor) -> Features:
        with torch.no_grad():
            stem, general = self.backbone(image)
        a = (general[0] if stem is None else stem).permute(0, 2, 3, 1).unsqueeze(0)
        adapted = []
        for stage, (f, transition, bdta) in enumerate(zip(general, self.transitions, self.stages, strict=True)):
            a = bdta(f.permute(0, 2, 3, 1), transition(a, f.shape[-2:], self.backbone.downsampling(stage)))
            adapted.append(a)
        return Features(
            {task: [a[k].permute(0, 3, 1, 2) for a in adapted] for k, task in enumerate(self.tasks)}, general
        )


class Router(nn.Module):
    """Gating scores of one task in one stage (eq. 10): two-layer MLPs on the general features, pooled."""

    def __init__(self, channels: int, tasks: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.score = nn.Sequential(_linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, tasks))
        self.noise = nn.Sequential(_linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, tasks))

    def forward(self, general: Tensor, noise: Tensor | None) -> Tensor:
        """general (B, H, W, C), normal noise (B, K) in training alone -> gates (B, K) that sum to one."""
        scores = self.score(general).mean((1, 2))
        if noise is not None:
            spread = F.softplus(self.noise(general).mean((1, 2)))
            scores = scores + noise.to(spread.dtype) * spread
        return scores.softmax(-1)


def route(routers: Sequence[Router], general: Tensor, noise: Tensor | None) -> Tensor:
    """The gates of all routers at once, (B, K, K); general (B, H, W, C), noise (K, B, K).

    One linear map for all first layers, so that the features are read once; the second ones after pooling.
    """
    mlps = [mlp for router in routers for mlp in ((router.score,) if noise is None else (router.score, router.noise))]
    first = (torch.cat([getattr(mlp[0], name) for mlp in mlps]) for name in ("weight", "bias"))
    second, bias = (torch.stack([getattr(mlp[2], name) for mlp in mlps]) for name in ("weight", "bias"))
    hidden = F.relu(F.linear(general, *first)).mean((1, 2)).unflatten(-1, (len(mlps), -1))
    scores = torch.baddbmm(bias.unsqueeze(1), hidden.transpose(0, 1), second.mT)
    if noise is not None:
        scores, spread = scores[0::2], F.softplus(scores[1::2])
        scores = scores + noise.to(spread.dtype) * spread
    return scores.softmax(-1).transpose(0, 1)


class MoTE(nn.Module):
    """Cross-task mixing of every stage's maps (eq. 10-11). `plain`: router by router, and by blends of all experts."""

    plain = False

    def __init__(self, channels: Sequence[int], widths: Sequence[int], tasks: Sequence[str]) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.ModuleDict({t: Router(c, len(tasks)) for t in tasks}) for c in channels)
        self.gamma = nn.ModuleList(nn.ParameterDict({t: torch.zeros(w) for t in tasks}) for w in widths)

    def gates(self, general: Sequence[Tensor]) -> list[Tensor]:
        """A stage: (B, K, K) with [b, t, q] the weight that task t gives task q's expert."""
        found = []
        for x, routers in zip(general, self.routers, strict=True):
            x, tasks = x.permute(0, 2, 3, 1), len(routers)
            noise = torch.randn(tasks, len(x), tasks, device=x.device) if self.training else None
            if self.plain:
                of_task = noise if self.training else [None] * tasks
                each = [router(x, n) for router, n in zip(routers.values(), of_task, strict=True)]
                found.append(torch.stack(each, 1))
            else:
                found.append(route(list(routers.values()), x, noise))
        return found

    def forward(self, maps: Maps, general: Sequence[Tensor]) -> Maps:
        """R_t = A'_t + sum_q (gamma_t g_t(q)) A'_q: no stack of experts and no blend is kept for backward."""
        mixed: Maps = {task: [] for task in maps}
        for stage, (gates, gamma) in enumerate(zip(self.gates(general), self.gamma, strict=True)):
            experts = {task: maps[task][stage] for task in maps}
            if self.plain:
                for t, (task, own) in enumerate(experts.items()):
                    blend = sum(gates[:, t, q].view(-1, 1, 1, 1) * x for q, x in enumerate(experts.values()))
                    mixed[task].append(own + gamma[task] * blend)
                continue
            scale = torch.stack([gamma[task] for task in maps])
            shares = gates.unsqueeze(-1) * scale.unsqueeze(1)
            for task, out in zip(maps, mix(shares, list(experts.values())), strict=True):
                mixed[task].append(out)
        return mixed


def mix(shares: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x_t + sum_q s_tq x_q for all t; shares (B, K, K, C), K experts (B, H, W, C)."""
    return _Mix.apply(shares[..., None, None, :].to(experts[0].dtype), *experts)


class _Mix(torch.autograd.Function):
    """Of torch's own operators, addcmul's backward would write every expert once more for each task."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, *experts: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(shares, *experts)
        return tuple(_add(x, row.unbind(1), experts) for x, row in zip(experts, shares.unbind(1), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        shares, *experts = ctx.saved_tensors
        rows = [torch.stack([(g * x).sum((1, 2), keepdim=True) for x in experts], 1) for g in grads]
        of_experts = (_add(g, column.unbind(1), grads) for g, column in zip(grads, shares.unbind(2), strict=True))
        return torch.stack(rows, 1), *of_experts


def _add(x: Tensor, shares: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """x + sum_q s_q y_q."""
    for index, (share, other) in enumerate(zip(shares, others, strict=True)):
        x = x.addcmul_(share, other) if index else torch.addcmul(x, share, other)
    return x


class Head(nn.Module):
    """Fuse the four stages with one linear, then 3x3 convolution to half the width, norm, ReLU, 1x1 convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fuse = LinearFuse([width] * 4, width, bias=True)
        self.layers = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, out, 1),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.layers(self.fuse(maps))


def mote_decoder(tasks: Mapping[str, int], channels: Sequence[int]) -> Decoder:
    """The paper's own: W_t^i (eq. 9), fuse W_t and prediction head, at width C_1."""
    width = channels[0]
    return Decoder(
        {task: [nn.Linear(c, width) for c in channels] for task in tasks},
        {task: Head(width, out) for task, out in tasks.items()},
        [width] * 4,
    )


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    odd = [c for c in backbone.channels if c % options.r]
    if odd:
        raise MethodError(f"bdta_mote: r={options.r} does not divide the {odd[0]} channels of {backbone.name}")
    encoder = TaskBypass(backbone, backbone.stem_channels, list(tasks), options)
    name = setting.decoder_name("mote")
    decoder = mote_decoder(tasks, backbone.channels) if name == "mote" else DECODERS[name](tasks, backbone.channels)
    if options.mote:
        decoder.mixer = MoTE(backbone.channels, decoder.widths, list(tasks))
    for module in (*encoder.modules(), *decoder.modules()):
        if hasattr(module, "plain"):
            module.plain = options.form == "plain"
    return MultiTaskModel(encoder, decoder, tasks)


_ROWS = {
    Options(): "Ours",
    Options(mote=False): "Ours, BDTA only",
    Options(direction="g2t"): "Ours, G2T only",
    Options(direction="t2g"): "Ours, T2G only",
}

register(
    Method(
        name="bdta_mote",
        aliases=("ours",),
        title="BDTA+MoTE (ours)",
        family="multi-task PEFT",
        citation="Yao et al., AAAI 2026",
        build=build,
        options=Options,
        rows=_ROWS.get,
    )
)
