"""A method on a backbone by their names, as one model: for every measurement here, and for training loops elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import get_args

from torch import nn

from methods.backbones.load import full_name, load_backbone, resolve_weights
from methods.choices import DecoderName, MemoryUse, Protocol
from methods.layers.checkpointing import checkpoint_activations
from methods.model import MultiTaskModel, Setting
from methods.registry import Configured, MethodError, near, parse


def build_model(
    method: str | Configured,
    backbone: str,
    tasks: Mapping[str, int],
    image_size: tuple[int, int] = (224, 224),
    weights: str = "auto",
    protocol: Protocol = "published",
    decoder: DecoderName | None = None,
    memory: MemoryUse = "default",
) -> MultiTaskModel:
    """image (B, 3, H, W) in [0, 1] -> {task: logits (B, channels, H, W)}, with only what the method trains unfrozen.

    method     an expression of one method, as `bench run --methods` takes it: "mtlora[rank=16]"
    backbone   a short name (`bench list backbones`) or timm's own
    tasks      task name -> output channels; names are the caller's, but not those of the model's parts
    image_size (height, width)
    weights    of the backbone: "timm", "random", the path of a timm checkpoint, or "auto": timm's where they can be
               reached, else random ones, with a warning
    memory     "low": activation checkpointing

    The model stands in training mode, on the CPU, and takes images of `image_size`. One whose `prepare` is not None
    (progressive adaptation) wants it called before it trains, under DDP with the same batches on every rank.
    `clip_groups` is for clipping, `trained_state` and `load_trained_state` for checkpoints: these hold what is trained
    and belong to a model of the same expression and backbone weights, and of the same tasks in the same order, which
    names and shapes cannot fully tell. Some methods have parameters that no loss reaches (`Method.unreached`); for them
    DDP needs `find_unused_parameters=True`.

    Raises MethodError in one line for what is unknown or cannot be built.
    """
    if isinstance(method, str):
        found = parse(method)
        if len(found) > 1:
            raise MethodError(f"{method!r} is {len(found)} methods; build_model makes one")
        (method,) = found
    for given, known in ((protocol, Protocol), (decoder or "segformer", DecoderName), (memory, MemoryUse)):
        if given not in get_args(known):
            raise MethodError(f"{given!r} is none of {', '.join(get_args(known))}{near(given, get_args(known))}")
    if isinstance(image_size, int) or len(image_size) != 2:
        raise MethodError(f"image_size is (height, width), not {image_size!r}")
    odd = [task for task in tasks if not task.isidentifier() or hasattr(nn.ModuleDict, task)]
    if not tasks or odd or any(count < 1 for count in tasks.values()):
        raise MethodError(
            f"tasks map names, which are Python identifiers, to numbers of output channels: {dict(tasks)}"
        )
    name = full_name(backbone)
    source = resolve_weights(weights, name)
    if weights == "auto" and source.source == "random":
        warnings.warn(f"random weights for {name}: timm's pretrained ones cannot be reached", stacklevel=2)
    model = method.try_build(load_backbone(name, image_size, source), tasks, Setting(protocol, decoder))
    keyed = (nn.ModuleDict, nn.ParameterDict)
    parts = {part for m in model.modules() if not isinstance(m, keyed) for part in (*m._modules, *m._parameters)}
    if parts & set(tasks):  # a parameter is a task's own where its path has the task's name
        raise MethodError(f"a part of the model is called {min(parts & set(tasks))!r}: give the task another name")
    if memory == "low":
        checkpoint_activations(model)
    return model
