"""Geometry of a sample: resize, flip, rotate and zoom, images and labels together.

A sample maps names to tensors: image float (3, H, W) in [0, 1]; semseg and human_parts int64 (H, W); saliency, edge
and depth float (H, W); normals float (3, H, W). Ignored pixels are 255 (classes, saliency, edge), 0 (depth) or the
zero vector (normals). Interpolation: bilinear for image and normals (renormalised), nearest for the rest. A packed
sample is the same with an image of 0..255 and labels in the types they were decoded to: what a cache keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.decode import IGNORE
from bench.recipe import Augment

VERSION = 1  # of `resize`, whose results are cached
Sample = dict[str, Tensor]
Border = Literal["ignore", "background"]
Draw = Callable[[], float]  # uniform in [0, 1)


def pack(arrays: Mapping[str, np.ndarray]) -> Sample:
    """The arrays of bench.data.decode as small tensors: the image uint8 (3, H, W), normals float (3, H, W), the rest as
    decoded (H, W)."""
    sample: Sample = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        sample[name] = tensor.permute(2, 0, 1).contiguous() if tensor.dim() == 3 else tensor
    return sample


def unpack(sample: Sample) -> Sample:
    """A packed sample in the types above."""
    out = {}
    for name, x in sample.items():
        if name == "image":
            out[name] = x.float() / 255
        else:
            out[name] = x.long() if name in ("semseg", "human_parts") else x.float()
    return out


def ignore_value(name: str) -> float:
    """What marks a pixel without a label; for the image, black."""
    return 0.0 if name in ("image", "normals", "depth") else float(IGNORE)


def outside_value(name: str, border: Border) -> float:
    """What a pixel from outside the picture gets."""
    return ignore_value(name) if border == "ignore" else 0.0


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """To (height, width), packed or not; the aspect ratio is not kept, as in the MTLoRA code family."""
    out = {}
    for name, x in sample.items():
        if tuple(x.shape[-2:]) == size:
            out[name] = x
        elif name == "image":
            y = F.interpolate(x[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
            out[name] = y.clamp(0, 1) if y.is_floating_point() else y
        elif name == "normals":
            out[name] = _unit(F.interpolate(x[None].float(), size, mode="bilinear", align_corners=False)[0])
        else:
            out[name] = F.interpolate(x[None, None].float(), size, mode="nearest-exact")[0, 0].to(x.dtype)
    return out


def hflip(sample: Sample) -> Sample:
    """Mirror left and right; the x component of normals changes its sign."""
    out = {name: x.flip(-1) for name, x in sample.items()}
    if "normals" in out:
        out["normals"] = out["normals"] * out["normals"].new_tensor([-1, 1, 1]).view(3, 1, 1)
    return out


def rotate_and_zoom(
    sample: Sample, degrees: float, zoom: float, border: Border = "ignore", frame: tuple[int, int] | None = None
) -> Sample:
    """Turn the picture clockwise (x right, y down) about its centre and enlarge it by `zoom`; the size stays.

    Normals turn with the picture, depth is divided by the zoom. Pixels from outside are ignored (black in the image),
    or are background with `border="background"`; normals and depth have no background. `frame` is the (height, width)
    that the picture had before it was squashed to its size: it turns as it would have turned then.
    """
    height, width = sample["image"].shape[-2:]
    frame_height, frame_width = frame or (height, width)
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    # Output place -> input place: the inverse rotation and zoom around the centre, in pixels of the frame.
    ys = ((torch.arange(height) + 0.5) / height - 0.5)[:, None] * frame_height
    xs = ((torch.arange(width) + 0.5) / width - 0.5)[None, :] * frame_width
    source_x, source_y = (cos * xs + sin * ys) / zoom, (-sin * xs + cos * ys) / zoom
    grid = torch.stack([source_x * 2 / frame_width, source_y * 2 / frame_height], -1)[None]
    outside = (grid.abs() > 1).any(-1)[0]
    out = {}
    for name, x in sample.items():
        mode = "bilinear" if name in ("image", "normals") else "nearest"
        planes = (x if x.dim() == 3 else x[None])[None].float()
        # "border" keeps bilinear samples at the rim from mixing with zeros; what lies outside is masked below.
        moved = F.grid_sample(planes, grid, mode=mode, padding_mode="border", align_corners=False)[0]
        if name == "normals":
            nx, ny = moved[0].clone(), moved[1].clone()
            moved[0], moved[1] = cos * nx - sin * ny, sin * nx + cos * ny
            moved = _unit(moved)
        if name == "depth":
            moved /= zoom
        moved.masked_fill_(outside, outside_value(name, border))
        out[name] = (moved if x.dim() == 3 else moved[0]).to(x.dtype)
    return out


def rescale(sample: Sample, factor: float) -> Sample:
    """Enlarge the picture, its size follows; depth is divided by the factor."""
    height, width = sample["image"].shape[-2:]
    out = resize(sample, (max(round(height * factor), 1), max(round(width * factor), 1)))
    return out | {"depth": out["depth"] / factor} if "depth" in out else out


def crop(sample: Sample, top: int, left: int, size: tuple[int, int], border: Border = "ignore") -> Sample:
    """Cut out (height, width) = size from row `top` and column `left`; what is missing at the end is padded."""
    out = {}
    for name, x in sample.items():
        cut = x[..., top : top + size[0], left : left + size[1]]
        missing = (0, size[1] - cut.shape[-1], 0, size[0] - cut.shape[-2])
        out[name] = F.pad(cut, missing, value=outside_value(name, border))
    return out


def random_crop(sample: Sample, size: tuple[int, int], max_class: float, border: Border, draw: Draw) -> Sample:
    """A cut-out in which no class of semseg covers more than `max_class` of what is labelled, if ten tries find one."""
    height, width = sample["image"].shape[-2:]
    out = sample
    for _ in range(10):
        top, left = (int(draw() * (max(full - part, 0) + 1)) for full, part in zip((height, width), size, strict=True))
        out = crop(sample, top, left, size, border)
        if "semseg" not in out:
            break
        labels = out["semseg"][out["semseg"] != IGNORE]
        if labels.numel() and labels.bincount().max() <= max_class * labels.numel():
            break
    return out


def photometric(image: Tensor, draw: Draw) -> Tensor:
    """Brightness, contrast, saturation and hue of an image (3, H, W) in [0, 1], each changed half of the time."""
    import methods.backbones.torchvision_import  # noqa: F401  isort: skip
    from torchvision.transforms.v2 import functional as v2

    if draw() < 0.5:
        image = (image + (2 * draw() - 1) * 32 / 255).clamp(0, 1)
    for change in (v2.adjust_contrast, v2.adjust_saturation):
        if draw() < 0.5:
            image = change(image, 0.5 + draw())
    return v2.adjust_hue(image, (2 * draw() - 1) * 18 / 360) if draw() < 0.5 else image


def augment(
    sample: Sample,
    settings: Augment,
    generator: torch.Generator,
    size: tuple[int, int],
    frame: tuple[int, int] | None = None,
) -> Sample:
    """Draw and apply the recipe's augmentation; the result has the training size where the recipe crops.

    The same generator state gives the same result. `frame` as in `rotate_and_zoom`.
    """
    flip, turn, zoom = torch.rand(3, generator=generator).tolist()
    if flip < settings.hflip:
        sample = hflip(sample)
    turned, zoomed = settings.rotate * (2 * turn - 1), settings.zoom(zoom)
    if (turned, zoomed) != (0.0, 1.0):
        sample = rotate_and_zoom(sample, turned, zoomed, settings.border, frame)

    def draw() -> float:
        return torch.rand((), generator=generator).item()

    if settings.crop_scale is not None:
        low, high = settings.crop_scale
        sample = rescale(sample, low + (high - low) * draw())
        sample = random_crop(sample, size, settings.crop_max_class, settings.border, draw)
    if settings.photometric:
        sample = sample | {"image": photometric(sample["image"], draw)}
    return sample


def _unit(vectors: Tensor) -> Tensor:
    """Renormalise interpolated normals; where mostly ignored pixels were mixed in, ignore the result too."""
    x, y, z = vectors
    length = (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_()  # a norm over the first dimension is thirty times slower
    return vectors * ((length > 0.5) / length.clamp_min(1e-6))
