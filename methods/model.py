"""MultiTaskModel: an encoder that gives every task its features, and a decoder that turns them into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.backbones.base import Backbone
from methods.choices import DecoderName, Protocol

Prepare = Callable[[Iterable[Mapping[str, Tensor]]], dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """The protocol that a method is built under.

    published   decoder, feature taps and unfrozen extras of the method's own paper
    equal       one decoder on the four stage outputs; only adaptation and decoder trainable
    decoder     overrides the protocol's choice of decoder
    """

    protocol: Protocol = "published"
    decoder: DecoderName | None = None

    @property
    def equal(self) -> bool:
        return self.protocol == "equal"

    def decoder_name(self, published: str) -> str:
        """The decoder to build, given the one of the method's paper."""
        return self.decoder or ("segformer" if self.equal else published)


@dataclass
class Features:
    """What an encoder hands to the decoder.

    task      task name -> four maps (B, C_i, H_i, W_i), finest first
    general   four maps that belong to no task, for decoders with a mixer that looks at them: the frozen backbone's own,
              or those of a stream that tasks share; None where there is no such stream
    """

    task: dict[str, Sequence[Tensor]]
    general: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Ledger:
    """Trainable parameters. #TP = trainable = adaptation + backbone + decoder = shared + per_task.

    adaptation   what the method adds; backbone: pretrained parameters that it unfreezes; decoder: necks and heads.
    per_task     parameters that belong to one task alone.
    """

    total: int
    adaptation: int
    backbone: int
    decoder: int
    shared: int
    per_task: int

    @property
    def trainable(self) -> int:
        return self.adaptation + self.backbone + self.decoder


class MultiTaskModel(nn.Module):
    """image (B, 3, H, W) in [0, 1] -> {task: (B, channels, H, W)}.

    A module that belongs to one task has the task's name as a component of its path (an nn.ModuleDict or
    nn.ParameterDict keyed by task): the ledger reads that off. `independent` says that it stands for a network a task,
    each trained by itself, so that their gradients are clipped apart; decoder-only fine-tuning, one network with a
    decoder a task, does not, though its tasks share no trained parameter. `prepare` is for a method that looks at
    training data before it trains: it gets the losses by task of one batch after the other, with their graph, and
    returns what the record should keep, as JSON holds it. `backbone_factor`, for models that train the whole backbone:
    its share of the learning rate, where it is not to be the recipe's.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        tasks: Mapping[str, int],
        independent: bool = False,
        prepare: Prepare | None = None,
        backbone_factor: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.tasks = dict(tasks)
        self.independent = independent
        self.prepare = prepare
        self.backbone_factor = backbone_factor

    def forward(self, image: Tensor, upsample: bool = True) -> dict[str, Tensor]:
        """`upsample=False` gives the logits at the decoder's own resolution, for losses taken task by task."""
        logits = self.decoder(self.encoder(image))
        if not upsample:
            return logits
        return {task: upsample_logits(out, image.shape[-2:]) for task, out in logits.items()}

    def ledger(self) -> Ledger:
        """Count every distinct parameter once."""
        counts = dict.fromkeys(("adaptation", "backbone", "decoder", "shared", "per_task"), 0)
        roles, owners = self.roles(), self.owners()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                counts[roles[name]] += parameter.numel()
                counts["shared" if owners[name] is None else "per_task"] += parameter.numel()
        return Ledger(total=sum(p.numel() for p in self.parameters()), **counts)

    @torch.no_grad()
    def passes(self, image: Tensor) -> int:
        """How often an image goes through a backbone to give all tasks' outputs; image (1, 3, H, W)."""
        was_training = self.training
        backbones = [module for module in self.modules() if isinstance(module, Backbone)]
        for backbone in backbones:
            backbone.images_seen = 0
        try:
            self.eval()(image, upsample=False)
            return sum(backbone.images_seen for backbone in backbones)
        finally:
            self.train(was_training)
            for backbone in backbones:
                backbone.images_seen = None

    def roles(self) -> dict[str, str]:
        """What a parameter belongs to: "adaptation", "backbone" (it came with it) or "decoder"."""
        pretrained = self.pretrained()
        roles = {}
        for name, _ in self.named_parameters():
            # A mixer sits inside the decoder, yet is part of the method.
            in_decoder = name.startswith("decoder.") and not name.startswith("decoder.mixer.")
            roles[name] = "decoder" if in_decoder else "backbone" if name in pretrained else "adaptation"
        return roles

    def owners(self) -> dict[str, str | None]:
        """The task that a parameter belongs to, or None if tasks share it: all paths to it must name that task."""
        found: dict[nn.Parameter, set[str | None]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            task = next((part for part in name.split(".") if part in self.tasks), None)
            found.setdefault(parameter, set()).add(task)
        return {
            name: next(iter(found[parameter])) if len(found[parameter]) == 1 else None
            for name, parameter in self.named_parameters()
        }

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Trainable parameters whose gradients are clipped together."""
        groups: dict[str | None, list[nn.Parameter]] = {}
        owners = self.owners()
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(owners[name] if self.independent else None, []).append(parameter)
        return list(groups.values())

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes: trainable parameters once each, and running statistics outside frozen norms."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        left_out = {name for name, _ in self.named_parameters(remove_duplicate=False)} - trainable
        frozen_buffers = {
            f"{path}.{name}"
            for path, module in self.named_modules(remove_duplicate=False)
            if (parameters := list(module.parameters(recurse=False))) and not any(p.requires_grad for p in parameters)
            for name, _ in module.named_buffers(recurse=False)
        }
        return {name: tensor for name, tensor in self.state_dict().items() if name not in left_out | frozen_buffers}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `trained_state`. Raises ValueError for the state of another model."""
        expected = self.trained_state()
        if set(state) != set(expected) or any(state[k].shape != v.shape for k, v in expected.items()):
            odd = sorted(set(state) ^ set(expected)) or [k for k, v in expected.items() if state[k].shape != v.shape]
            raise ValueError(f"checkpoint of another model: {len(odd)} tensors do not match, e.g. {odd[0]}")
        self.load_state_dict(dict(state), strict=False)

    def trains_whole_backbone(self) -> bool:
        """Full fine-tuning: no parameter that came with the backbone is frozen."""
        pretrained = self.pretrained()
        return all(p.requires_grad for name, p in self.named_parameters() if name in pretrained)

    def pretrained(self) -> set[str]:
        """Names of the parameters that came with the backbone, in copies of it too."""
        return {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, Backbone)
            for name in module.pretrained_names
        }


def upsample_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear to (H, W), in float32."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)
