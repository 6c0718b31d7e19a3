"""LoRA: low-rank updates of the attention's input projections, on Hugging Face peft.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Rank 4 on the merged query, key and
value projection of every block (4 * 4C parameters, as many as rank 4 on query and value apart); alpha = 8 and no
dropout are peft's defaults. The published count holds another 2C a block, the norm before it, which is trained with it;
under `equal` it stays frozen. Starts at the pretrained function.
Count (Swin-T)  18 C a block: per task 2,866,976 (published 2.87 M); shared 2,628,512 (published 2.68 M, not derived).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from methods.backbones.base import Backbone
from methods.layers.encoders import Sharing, require_blocks, selected_encoder, with_decoder
from methods.layers.peft_layers import ATTENTION, insert_tuner, tuner_config
from methods.model import MultiTaskModel, Setting
from methods.registry import Method, at_least_one, probability, register


@dataclass(frozen=True)
class Options:
    """`sharing`: a set of parameters and a pass of the backbone for each task (`per_task`), or one for all
    (`shared`). `rank` of an update, which counts `alpha` / `rank` times. `dropout`: on its input."""

    sharing: Sharing = "per_task"
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least_one(rank=self.rank)
        probability(dropout=self.dropout)


def build(backbone: Backbone, tasks: Mapping[str, int], options: Options, setting: Setting) -> MultiTaskModel:
    backbone = require_blocks("lora", backbone)

    def trained(name: str) -> bool:
        return not setting.equal and ".norm1." in name

    def insert(frozen: Backbone) -> None:
        config = tuner_config("lora", ATTENTION, options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout)
        insert_tuner(frozen, config)

    encoder = selected_encoder(backbone, tasks, options.sharing, trained, insert)
    return with_decoder(encoder, backbone, tasks, setting, independent=options.sharing == "per_task")


register(
    Method(
        name="lora",
        title="LoRA",
        family="single-task PEFT",
        citation="Hu et al., ICLR 2022",
        build=build,
        starts_pretrained=True,
        options=Options,
        rows={Options(): "LoRA", Options(sharing="shared"): "Shared LoRA"}.get,
    )
)
