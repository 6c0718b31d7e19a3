"""Hugging Face peft on a backbone: the tuner's own modules in place of some of its linear layers."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

import methods.backbones.torchvision_import  # noqa: F401  peft imports transformers, which imports torchvision
from methods.backbones.base import Backbone
from methods.registry import MethodError, first_line, near

ATTENTION = r".*\.attn\.(qkv|q|kv)"
BLOCK = r".*\.(attn\.(qkv|q|kv|proj)|mlp\.(fc1|fc2))"
FEED_FORWARD = r".*\.mlp\.fc2"
# They have targets, but linear layers are not theirs, or they want more than a map: a task's number, a step's number.
ELSEWHERE = {"ADALORA", "ADAPTION_PROMPT", "LN_TUNING", "POLY", "TRAINABLE_TOKENS"}


def tuner_names() -> list[str]:
    """The peft methods that put modules in place of linear layers."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = ["dora"]
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {field.name for field in dataclasses.fields(config)}
        if "target_modules" in fields and kind.value not in ELSEWHERE:
            found.append(kind.value.lower())
    return sorted(found)


def tuner_config(name: str, targets: str, rank: int = 0, **values: Any) -> Any:
    """The configuration of peft method `name` on the modules that the pattern `targets` names.

    rank 0 leaves peft's default. Raises MethodError for a name that peft does not know and for one that needs more.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = tuner_names()
    if name not in known:
        raise MethodError(
            f"peft has no method {name!r} for linear layers{near(name, known)}; one of: {', '.join(known)}"
        )
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("LORA" if name == "dora" else name.upper())]
    fields = {field.name for field in dataclasses.fields(kind)}
    if name == "dora":
        values["use_dora"] = True
    if name == "ia3":
        values["feedforward_modules"] = FEED_FORWARD
    if name == "oft" and rank:
        values["oft_block_size"] = 0  # either of the two
    if rank:
        if "r" not in fields:
            raise MethodError(f"peft:{name} has no rank")
        values["r"] = rank
    try:
        return kind(target_modules=targets, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise MethodError(f"peft:{name} cannot be set up: {first_line(error)}") from error


def insert_tuner(backbone: Backbone, config: Any) -> None:
    """Put the tuner's modules into the backbone; parameters trained before stay so. Raises MethodError."""
    from peft import get_peft_model

    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    kind = config.peft_type.value.lower()
    try:
        # On the meta device, where methods are only counted, some tuners could not work out what they start from.
        first = next(backbone.parameters()).device
        device = torch.device("cpu") if first.type == "meta" else first
        with warnings.catch_warnings(), device:
            warnings.simplefilter("ignore")  # about saving and merging, which nothing here does
            get_peft_model(backbone, config)  # in place; the wrapper adds nothing that is needed here
    except Exception as error:  # forty tuners by many hands: what they raise is no closed list
        raise MethodError(f"peft's {kind} cannot run on {backbone.name}: {first_line(error)}") from error
    for parameter in trained:
        parameter.requires_grad_(True)
