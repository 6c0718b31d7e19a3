"""HyperFormer: adapters whose weights a hyper-network makes for each task and block.

Paper: Karimi Mahabadi, Ruder, Dehghani, Henderson, "Parameter-efficient Multi-task Fine-tuning for Transformers via
Shared Hypernetworks", ACL 2021. One pass a task.

A task's and a block's embedding (64 each, N(0, 1)) go through a two-layer MLP (128, ReLU) and a LayerNorm to a vector
of 64; linear generators N(0, 0.01^2) make from it W_down, b_down, W_up, b_up and the scale and shift of the LayerNorm
that ends the adapter: x + LN(W_up GELU(W_down x + b_down) + b_up) on the outputs of attention and feed-forward network.
As in the paper (not its ++ variant), each of the two has generators of its own, shared by the blocks. The released code
trains the model's own norms as well; here they stay frozen.

Our reading on a pyramid: blocks of the same width share their generators, so a set a stage. The published count,
75.32 M from the Polyhistor table, could not be derived; the reduction of 3 comes nearest to it.
Count (Swin-T)  71,090,144.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone, TransformerBackbone
from methods.layers.adapter import bottleneck_width
from methods.layers.encoders import require_blocks, with_decoder
from methods.model import Features, MultiTaskModel, Setting
from methods.registry import Method, at_least_one, register


@dataclass(frozen=True)
class Options:
    """`reduction`: adapters are C / `reduction` wide. `embedding`: length of a task's and of a block's embedding."""

    reduction: int = 3
    embedding: int = 64

    def __post_init__(self) -> None:
        at_least_one(reduction=self.reduction, embedding=self.embedding)


class AdapterGenerator(nn.Module):
    """Embedding (k) -> an adapter on (..., C)."""

    def __init__(self, embedding: int, channels: int, width: int) -> None:
        super().__init__()
        self.shapes = {
            "down": (width, channels), "down_bias": (width,), "up": (channels, width), "up_bias": (channels,),
            "norm": (channels,), "norm_bias": (channels,),
        }  # fmt: skip
        self.linears = nn.ModuleDict(
            {name: nn.Linear(embedding, torch.Size(shape).numel()) for name, shape in self.shapes.items()}
        )
        for linear in self.linears.values():
            nn.init.normal_(linear.weight, std=1e-2)
            nn.init.zeros_(linear.bias)

    def forward(self, embeddings: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """embeddings (n, k) -> n adapters, generated together."""
        made = {name: self.linears[name](embeddings) for name in self.shapes}
        return [
            self._adapter({name: made[name][i].view(self.shapes[name]) for name in made})
            for i in range(len(embeddings))
        ]

    @staticmethod
    def _adapter(w: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def adapter(x: Tensor) -> Tensor:
            hidden = F.gelu(F.linear(x, w["down"], w["down_bias"]), approximate="tanh")
            out = F.linear(hidden, w["up"], w["up_bias"])
            return x + F.layer_norm(out, out.shape[-1:], w["norm"], w["norm_bias"])

        return adapter


class HyperFormerEncoder(nn.Module):
    def __init__(self, backbone: TransformerBackbone, tasks: Mapping[str, int], options: Options) -> None:
        super().__init__()
        self.backbone = backbone.freeze()
        k = options.embedding
        self.task_embeddings = nn.ParameterDict({task: torch.randn(k) for task in tasks})
        self.block_embeddings = nn.ParameterList(torch.randn(k) for _ in backbone.widths())
        self.embed = nn.Sequential(nn.Linear(2 * k, 128), nn.ReLU(), nn.Linear(128, k), nn.LayerNorm(k, eps=1e-6))

        def generators() -> nn.ModuleList:
            """One a stage."""
            return nn.ModuleList(
                AdapterGenerator(k, c, bottleneck_width(c, options.reduction)) for c in backbone.channels
            )

        self.attention, self.feed_forward = generators(), generators()
        self.depths = [len(blocks) for blocks in backbone.stages]

    def forward(self, image: Tensor) -> Features:
        tasks = list(self.task_embeddings)
        blocks = torch.stack(list(self.block_embeddings))
        pairs = [torch.cat([e.expand_as(blocks), blocks], 1) for e in self.task_embeddings.values()]
        by_stage = self.embed(torch.stack(pairs)).split(self.depths, 1)  # (K, blocks of the stage, k)

        def adapters(generators: nn.ModuleList) -> dict[str, list[Callable[[Tensor], Tensor]]]:
            """Of every task, one a block."""
            found: dict[str, list[Callable[[Tensor], Tensor]]] = {task: [] for task in tasks}
            for generator, embeddings in zip(generators, by_stage, strict=True):
                made = iter(generator(embeddings.flatten(0, 1)))
                for task in tasks:
                    found[task] += [next(made) for _ in range(embeddings.shape[1])]
            return found

        attention, feed_forward = adapters(self.attention), adapters(self.feed_forward)
        return Features({task: self.backbone(image, attention[task], feed_forward[task]).maps for task in tasks})


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_blocks("hyperformer", backbone)
    return with_decoder(HyperFormerEncoder(backbone, tasks, options), backbone, tasks, setting)


register(
    Method(
        name="hyperformer",
        title="HyperFormer",
        family="multi-task PEFT",
        citation="Karimi Mahabadi et al., ACL 2021",
        build=build,
        options=Options,
        rows={Options(): "HyperFormer"}.get,
    )
)
