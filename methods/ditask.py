"""DiTASK: multi-task fine-tuning with diffeomorphic transformations of the singular values.

Paper: Mantri et al., "DiTASK: Multi-Task Fine-Tuning with Diffeomorphic Transformations", CVPR 2025.

Every frozen weight W = U diag(S) V^T becomes U diag(S') V^T. As in the released code, S' warps the index axis of the
spectrum: S'_i is S read, by linear interpolation, at phi_theta(i / (p - 1)), with phi_theta a CPAB diffeomorphism of
[0, 1] (the paper writes S' = f(S)); the ends of the spectrum never change, and query, key and value are three matrices
with one theta. A joint theta of `cells` cells on qkv, proj, fc1 and fc2 of every block; task thetas of `task_cells`
cells on proj, fc1 and fc2 of the last block of each stage, where y_t = W'_t z_t + b with z_t the task's own stream.
Dropout acts on the shared input. Streams, taps, extras (merging linears too) and decoder are MTLoRA's, on a plain ViT
as well.

The released code also allocates task thetas on every qkv and throws their outputs away: they are kept as parameters, as
they are in the published count, and computed nowhere. The joint thetas of the last block's proj, fc1 and fc2 reach no
output either. It draws theta at random, which changes the spectra by 9 to 25 % before training; here theta starts at
zero, the pretrained function, and `start=random` draws it so.
Count   Swin-T 3,549,482, S 3,595,418, B 5,075,208: exact.

Made cheaper than released, the same function: MTLoRA's attention, one CPAB integration a step for all thetas of as
many cells, nothing computed of the qkv outputs that are thrown away. What remains is the method's own: every W' is made
anew in each step, about as many operations as the layer spends on p tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone, OpenTransformer
from methods.layers.cpab import transform
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
from methods.registry import Method, probability, register


@dataclass(frozen=True)
class Options:
    """`cells`, `task_cells`: of the joint and of the tasks' CPAB transformations. `dropout`: on the shared input.
    `drop_path`: stochastic depth's rate at the last block, rising from 0. `start`: theta at zero, the pretrained
    function (`identity`), or drawn (`random`)."""

    cells: int = 64
    task_cells: int = 4
    dropout: float = 0.05
    drop_path: float = 0.2
    start: Literal["identity", "random"] = "identity"

    def __post_init__(self) -> None:
        if self.cells < 2 or self.task_cells < 2:
            raise ValueError(f"cells and task_cells must be at least 2, not {self.cells} and {self.task_cells}")
        probability(dropout=self.dropout, drop_path=self.drop_path)


class DeformedLinear(nn.Module):
    """A frozen linear with transformed singular values; `parts` is 3 for a merged query, key and value projection."""

    def __init__(self, frozen: nn.Linear, options: Options, tasks: tuple[str, ...], parts: int, unused: bool) -> None:
        super().__init__()

        def theta(cells: int) -> nn.Parameter:
            bound = 1 / math.sqrt(cells - 1) if options.start == "random" else 0.0
            return nn.Parameter(torch.empty(cells - 1).uniform_(-bound, bound))

        self.theta = theta(options.cells)
        self.task_theta = nn.ParameterDict({task: theta(options.task_cells) for task in tasks})
        self.used = () if unused else tasks
        self.dropout = nn.Dropout(options.dropout)
        # Frozen, so decomposed once: (parts, out / parts, p), (parts, p) and (parts, p, in).
        left, spectrum, right = torch.linalg.svd(frozen.weight.detach().unflatten(0, (parts, -1)), full_matrices=False)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("spectrum", spectrum, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def weight(self, positions: Tensor) -> Tensor:
        """W' (out, in) from where the p indices of the spectrum, as shares of its length, are read (>= p,)."""
        last = self.spectrum.shape[-1] - 1
        at = positions[: last + 1] * last
        low = at.detach().long().clamp(0, max(last - 1, 0))
        share = at - low
        deformed = self.spectrum[:, low] * (1 - share) + self.spectrum[:, (low + 1).clamp(max=last)] * share
        return ((self.left * deformed.unsqueeze(1)) @ self.right).flatten(0, 1)

    def forward(
        self,
        positions: Mapping[str | None, Tensor],
        frozen: nn.Linear,
        x: Tensor,
        streams: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`positions` holds the joint transformation under None and a task's under its name."""
        dropped = self.dropout(x)
        outputs = {
            task: F.linear(streams[task] if streams else dropped, self.weight(positions[task]), frozen.bias)
            for task in self.used
        }
        return F.linear(dropped, self.weight(positions[None]), frozen.bias), outputs


Positions = dict[DeformedLinear, dict[str | None, Tensor]]


class DiTASKBlock(TaskBlock):
    def linears(self, context: Positions) -> tuple[Callable, ...]:
        return tuple(functools.partial(linear, context[linear]) for linear in (self.qkv, self.proj, self.fc1, self.fc2))


class DiTASKEncoder(TaskStreamEncoder):
    def __init__(
        self,
        backbone: OpenTransformer,
        blocks: list[list[nn.Module]],
        mergings: list[Merging],
        taps_after_merging: bool,
    ) -> None:
        super().__init__(backbone, blocks, mergings, taps_after_merging)
        self._by_cells: dict[int, list[tuple[DeformedLinear, str | None]]] = {}
        for module in self.modules():
            if isinstance(module, DeformedLinear):
                self._by_cells.setdefault(len(module.theta) + 1, []).append((module, None))
                for task in module.used:
                    self._by_cells.setdefault(len(module.task_theta[task]) + 1, []).append((module, task))
        for cells, entries in self._by_cells.items():
            lengths = [module.spectrum.shape[-1] for module, _ in entries]
            shares = [torch.arange(max(lengths)) / max(length - 1, 1) for length in lengths]
            self.register_buffer(f"points_{cells}", torch.stack(shares).clamp(max=1), persistent=False)

    def context(self) -> Positions:
        """All transformations of a step, in one call for each number of cells."""
        found: Positions = {}
        for cells, entries in self._by_cells.items():
            theta = torch.stack([m.theta if task is None else m.task_theta[task] for m, task in entries]).float()
            warped = transform(theta, self.get_buffer(f"points_{cells}"))
            for (module, task), positions in zip(entries, warped, strict=True):
                found.setdefault(module, {})[task] = positions
        return found


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_open("ditask", backbone)
    freeze_but_extras(backbone, setting, reductions=True)
    rates = stochastic_depth(backbone, options.drop_path)
    blocks = []
    for stage in backbone.stages:
        blocks.append([])
        for block in stage:

            def deformed(frozen: nn.Linear, of_tasks: tuple[str, ...], block: nn.Module = block) -> DeformedLinear:
                if frozen is block.attn.qkv:
                    return DeformedLinear(frozen, options, tuple(tasks), parts=3, unused=True)
                return DeformedLinear(frozen, options, of_tasks, parts=1, unused=False)

            of_tasks = tuple(tasks) if block is stage[-1] else ()
            blocks[-1].append(DiTASKBlock(block, deformed, of_tasks, next(rates)))
    mergings = [Merging() for _ in backbone.stages]
    encoder = DiTASKEncoder(backbone, blocks, mergings, taps_after_merging(backbone, setting))
    return with_family_decoder(encoder, backbone, tasks, setting)


register(
    Method(
        name="ditask",
        title="DiTASK",
        family="multi-task PEFT",
        citation="Mantri et al., CVPR 2025",
        build=build,
        starts_pretrained=True,
        unreached={
            r"\.qkv\.task_theta\.": "allocated in the released code, their outputs thrown away",
            r"blocks\.3\.\d+\.(proj|fc1|fc2)\.theta": "nothing reads the shared stream after the last block",
        },
        options=Options,
        rows={Options(): "DiTask"}.get,
    )
)
