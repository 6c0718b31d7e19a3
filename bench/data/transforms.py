"""Geometry of a sample: resize, flip, rotate and zoom, images and labels together.

A sample maps names to tensors: image float (3, H, W) in [0, 1]; semseg and human_parts int64 (H, W); saliency, edge
and depth float (H, W); normals float (3, H, W). Ignored pixels are 255 (classes, saliency, edge), 0 (depth) or the
zero vector (normals). Interpolation: bilinear for image and normals (renormalised), nearest for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.data.decode import IGNORE
from bench.recipe import Augment

Sample = dict[str, Tensor]


def to_tensors(arrays: Mapping[str, np.ndarray]) -> Sample:
    """The arrays of bench.data.decode as tensors."""
    sample: Sample = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if name == "image":
            sample[name] = tensor.permute(2, 0, 1).float() / 255
        elif name == "normals":
            sample[name] = tensor.permute(2, 0, 1).float().contiguous()
        else:
            sample[name] = tensor.long() if name in ("semseg", "human_parts") else tensor.float()
    return sample


def ignore_value(name: str) -> float:
    """What marks a pixel without a label; for the image, black."""
    return 0.0 if name in ("image", "normals", "depth") else float(IGNORE)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """To (height, width); the aspect ratio is not kept, as in the MTLoRA code family."""
    if tuple(sample["image"].shape[-2:]) == size and all(tuple(x.shape[-2:]) == size for x in sample.values()):
        return sample
    out = {}
    for name, x in sample.items():
        if name == "image":
            out[name] = F.interpolate(x[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(
                0, 1
            )
        elif name == "normals":
            out[name] = _unit(F.interpolate(x[None], size, mode="bilinear", align_corners=False)[0])
        else:
            out[name] = F.interpolate(x[None, None].float(), size, mode="nearest-exact")[0, 0].to(x.dtype)
    return out


def hflip(sample: Sample) -> Sample:
    """Mirror left and right; the x component of normals changes its sign."""
    out = {name: x.flip(-1) for name, x in sample.items()}
    if "normals" in out:
        out["normals"] = out["normals"] * out["normals"].new_tensor([-1, 1, 1]).view(3, 1, 1)
    return out


def rotate_and_zoom(sample: Sample, degrees: float, zoom: float) -> Sample:
    """Turn the picture clockwise (x right, y down) about its centre and enlarge it by `zoom`; the size stays.

    Normals turn with the picture, depth is divided by the zoom. Pixels from outside are ignored (black in the image).
    """
    height, width = sample["image"].shape[-2:]
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    # Output pixel -> input pixel: the inverse rotation and zoom, in pixels, around the centre.
    ys, xs = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
    )
    source_x, source_y = (cos * xs + sin * ys) / zoom, (-sin * xs + cos * ys) / zoom
    grid = torch.stack([source_x * 2 / width, source_y * 2 / height], -1)[None].float()
    outside = (grid.abs() > 1).any(-1)[0]
    out = {}
    for name, x in sample.items():
        smooth = name in ("image", "normals")
        planes = (x if x.dim() == 3 else x[None])[None].float()
        # "border" keeps bilinear samples at the rim from mixing with zeros; what lies outside is masked below.
        moved = F.grid_sample(
            planes, grid, mode="bilinear" if smooth else "nearest", padding_mode="border", align_corners=False
        )[0]
        if name == "normals":
            nx, ny, nz = moved
            moved = _unit(torch.stack([cos * nx - sin * ny, sin * nx + cos * ny, nz]))
        if name == "depth":
            moved = moved / zoom
        moved = moved.masked_fill(outside, ignore_value(name))
        out[name] = (moved if x.dim() == 3 else moved[0]).to(x.dtype)
    return out


def augment(sample: Sample, settings: Augment, generator: torch.Generator) -> Sample:
    """Draw and apply the recipe's augmentation. The same generator state gives the same result."""
    flip, turn, zoom = torch.rand(3, generator=generator).tolist()
    if flip < settings.hflip:
        sample = hflip(sample)
    low, high = settings.scale
    if settings.rotate or (low, high) != (1.0, 1.0):
        sample = rotate_and_zoom(sample, settings.rotate * (2 * turn - 1), low + (high - low) * zoom)
    return sample


def _unit(vectors: Tensor) -> Tensor:
    """Renormalise interpolated normals; where mostly ignored pixels were mixed in, ignore the result too."""
    length = vectors.norm(dim=0, keepdim=True)
    return torch.where(length > 0.5, vectors / length.clamp_min(1e-6), torch.zeros_like(vectors))
