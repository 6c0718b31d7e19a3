"""Backbones by name: short names, timm names, and where their weights come from."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from methods.backbones.base import Backbone
from methods.backbones.pvt import PVTBackbone
from methods.backbones.pyramid import PyramidBackbone
from methods.backbones.swin import SwinBackbone
from methods.backbones.timm_import import timm
from methods.backbones.vit import ViTBackbone
from methods.registry import MethodError, first_line, near

SHORT_NAMES = {
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in1k",
    "swin_tiny_22k": "swin_tiny_patch4_window7_224.ms_in22k",
    "swin_small_22k": "swin_small_patch4_window7_224.ms_in22k",
    "swin_base_22k": "swin_base_patch4_window7_224.ms_in22k",
    "dinov2_small": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_base": "vit_base_patch14_dinov2.lvd142m",
    "pvt_v2_b0": "pvt_v2_b0.in1k",
    "pvt_v2_b2": "pvt_v2_b2.in1k",
}


@dataclass(frozen=True)
class WeightSource:
    """Where a backbone's weights come from; `sha256` is of the file, where there is one."""

    source: Literal["timm", "file", "random"]
    path: Path | None = None
    sha256: str = ""


def full_name(name: str) -> str:
    """A short name or a timm model name (tag optional) -> the full timm name with its tag.

    Raises MethodError with a near miss for a name that timm does not know.
    """
    name = SHORT_NAMES.get(name, name)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*SHORT_NAMES, *timm.list_models()]
        raise MethodError(f"unknown backbone {name!r}{near(name, known)}; `bench list backbones` shows the short names")
    tagged = [known for known in timm.list_pretrained(f"{architecture}.*") if known.partition(".")[0] == architecture]
    if tag and name not in tagged:
        raise MethodError(
            f"backbone {architecture} has no pretrained tag {tag!r}; known: {', '.join(tagged) or 'none'}"
        )
    config = timm.get_pretrained_cfg(name)
    full = f"{architecture}.{config.tag}" if config is not None else architecture
    return full if full in tagged else architecture


def pretrained_reachable(name: str, timeout: float = 5.0) -> bool:
    """Whether timm's pretrained weights of a full name lie in the local cache or the model hub answers for them.

    One request with a short timeout: the hub client's own retries take most of a minute where there is no network.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return False
    repository = config.hf_hub_id
    if repository and isinstance(try_to_load_from_cache(repository, "model.safetensors"), str):
        return True
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    address = hf_hub_url(repository, "model.safetensors") if repository else config.url
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status < 400
    except (urllib.error.URLError, OSError, ValueError):
        return False


def resolve_weights(choice: str, backbone: str) -> WeightSource:
    """`auto` | `timm` | `random` | a path -> what will be loaded. Raises MethodError for an unusable choice."""
    if choice == "random":
        return WeightSource("random")
    if choice == "auto":
        return WeightSource("timm" if pretrained_reachable(backbone) else "random")
    if choice == "timm":
        if not pretrained_reachable(backbone):
            raise MethodError(
                f"timm's weights for {backbone} cannot be reached (no cached copy, and the model hub does not answer); "
                "give a local file with --weights PATH, or use --weights random for efficiency figures alone"
            )
        return WeightSource("timm")
    path = Path(choice).expanduser()
    if not path.is_file():
        raise MethodError(f"no weights file {path}; --weights takes auto, timm, random or a path to a checkpoint")
    return WeightSource("file", path, hashlib.sha256(path.read_bytes()).hexdigest())


def load_backbone(name: str, image_size: tuple[int, int], weights: WeightSource) -> Backbone:
    """Build a backbone by its full timm name for images of (height, width).

    Stochastic depth is off: a method that wants it brings its own.
    Raises MethodError for a size that the network cannot take and for weights of another model.
    """
    config = timm.get_pretrained_cfg(name)
    mean, std = (config.mean, config.std) if config is not None else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pretrained = weights.source == "timm"
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if family in ("vision_transformer", "deit"):
        model = _create(name, weights, pretrained, dynamic_img_size=True)
        return ViTBackbone(name, model, mean, std, image_size)
    _check_size(name, image_size)
    if family == "swin_transformer":
        # Whole 7x7 windows at every size: else timm shrinks the windows of small maps, and with them the bias
        # tables, so that the parameter count would depend on the image size.
        size = {"img_size": image_size, "always_partition": True, "drop_path_rate": 0.0}
        return SwinBackbone(name, _create(name, weights, pretrained, **size), mean, std)
    if family == "pvt_v2":
        return PVTBackbone(name, _create(name, weights, pretrained), mean, std)
    try:
        model = timm.create_model(name, pretrained=pretrained, features_only=True)
    except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
        raise MethodError(f"backbone {name} cannot serve as a feature pyramid: {first_line(error)}") from error
    if weights.path:
        _load_file(model, weights.path, name)
    try:
        return PyramidBackbone(name, model, mean, std, image_size)
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, MethodError):
            raise
        raise MethodError(
            f"backbone {name} cannot take images of {image_size[0]}x{image_size[1]}: {first_line(error)}"
        ) from error


def _create(name: str, weights: WeightSource, pretrained: bool, **options: Any) -> nn.Module:
    model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    if weights.path:
        _load_file(model, weights.path, name, whole=True)
    return model


def _check_size(name: str, size: tuple[int, int]) -> None:
    if min(size) < 32 or any(side % 4 for side in size):
        raise MethodError(
            f"backbone {name} cannot take images of {size[0]}x{size[1]}; "
            "each side must be at least 32 and a multiple of 4"
        )


def _load_file(model: nn.Module, path: Path, name: str, whole: bool = False) -> None:
    """Load a timm checkpoint (safetensors, or a weights-only .pth) and refuse one of another model. `whole` says that
    the model has all its layers, as a feature extractor has not."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state.get("state_dict", state))
    except Exception as error:  # safetensors, unpickling and OS errors share no base class
        raise MethodError(
            f"cannot read weights from {path}: no checkpoint of tensors alone ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise MethodError(f"{path} is not a checkpoint of tensors by name")
    # Counters of batch norm decide nothing in evaluation, and some exporters change their shape.
    wanted = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    # A feature extractor flattens its top-level modules (stages.0 -> stages_0).
    state = {_flattened(key, wanted): tensor for key, tensor in state.items()}
    if whole:
        _refuse_more(model, state, path, name)
    missing = [k for k in wanted if k not in state]
    wrong = [k for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    if missing or wrong:
        example = f"lacks {missing[0]}" if missing else f"has another shape for {wrong[0]}"
        raise MethodError(
            f"{path} does not hold the weights of {name}: {len(missing)} of {len(wanted)} tensors are missing and "
            f"{len(wrong)} differ in shape (it {example})"
        )
    model.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)


def _refuse_more(model: nn.Module, state: dict[str, torch.Tensor], path: Path, name: str) -> None:
    """Layers of a part that the model has, but fewer of: its weights are those of a deeper one. A part that it lacks, a
    classifier's head, and buffers of other versions are no such."""
    modules = {module for module, _ in model.named_modules()}
    parts = {module.partition(".")[0] for module in modules}
    more = [key for key in state if key.partition(".")[0] in parts and key.rpartition(".")[0] not in modules]
    if more:
        raise MethodError(
            f"{path} does not hold the weights of {name} but of a model with more layers: {len(more)} of its "
            f"{len(state)} tensors have no place (e.g. {more[0]})"
        )


def _flattened(key: str, wanted: dict[str, torch.Tensor]) -> str:
    if key in wanted:
        return key
    top, _, rest = key.partition(".")
    second, _, tail = rest.partition(".")
    return f"{top}_{second}.{tail}" if f"{top}_{second}.{tail}" in wanted else key
