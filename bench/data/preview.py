"""`bench data preview`: a sheet of samples with every task drawn, as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from bench.data.card import Card
from bench.data.decode import IGNORE
from bench.data.loader import DenseDataset
from bench.errors import BenchError

UNLABELLED = (255, 255, 255)
MARGIN, HEADER = 4, 16


def sheet(dataset: DenseDataset, indices: Sequence[int]) -> Image.Image:
    """A row a sample: the image, then each task, augmented as in the first epoch. White is without a label."""
    height, width = dataset.size
    columns = ["image", *dataset.tasks]
    out = Image.new(
        "RGB", (len(columns) * (width + MARGIN), HEADER + len(indices) * (height + MARGIN + HEADER)), (40, 40, 40)
    )
    pen = ImageDraw.Draw(out)
    for column, name in enumerate(columns):
        pen.text((column * (width + MARGIN) + 2, 2), name, fill=(255, 255, 255))
    for row, index in enumerate(indices):
        sample = dataset[0, index]
        top = HEADER + row * (height + MARGIN + HEADER)
        for column, name in enumerate(columns):
            picture = draw(name, sample[name].numpy(), dataset.card)
            out.paste(Image.fromarray(picture), (column * (width + MARGIN), top))
        pen.text((2, top + height + 1), dataset.names[index], fill=(200, 200, 200))
    return out


def draw(name: str, values: np.ndarray, card: Card, near_far: tuple[float, float] | None = None) -> np.ndarray:
    """One map of a sample as uint8 (H, W, 3).

    Classes in the card's colours, or in colours of their own; saliency and edges white on black; depth from near
    (dark) to far, of the map itself or as given in metres; normals with x, y, z in -1..1 as red, green and blue.
    """
    if name == "image":
        return np.round(values.transpose(1, 2, 0) * 255).astype(np.uint8)
    if name == "normals":
        picture = np.round((values.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        return np.where(values.any(0)[..., None], picture, np.uint8(255))
    if name == "depth":
        valid = values > 0
        near, far = near_far or depth_range(values)
        shades = matplotlib.colormaps["viridis"]((values - near) / max(far - near, 1e-6))
        return np.where(valid[..., None], np.round(shades[..., :3] * 255), 255).astype(np.uint8)
    ignored = values == IGNORE
    if name in ("saliency", "edge"):
        # On black, "no label" must differ from white: grey.
        return np.where(ignored, 128, values * 255).astype(np.uint8)[..., None].repeat(3, -1)
    colours = palette(card, name)
    return np.where(ignored[..., None], np.array(UNLABELLED, np.uint8), colours[np.where(ignored, 0, values)])


def palette(card: Card, task: str) -> np.ndarray:
    """uint8 (classes, 3): the colours of a task's classes."""
    return np.array(card.tasks[task].colours or _palette(card.tasks[task].classes), np.uint8)


def depth_range(values: np.ndarray) -> tuple[float, float]:
    """Nearest and farthest labelled depth, metres."""
    valid = values > 0
    return (float(values[valid].min()), float(values[valid].max())) if valid.any() else (0.0, 1.0)


def _palette(classes: Sequence[str]) -> np.ndarray:
    """Colours well apart: the hue circle by the golden ratio, three levels of lightness; a background is black."""
    count = len(classes)
    hues = np.arange(count) * 0.61803 % 1
    levels = np.array([0.95, 0.7, 0.5])[np.arange(count) % 3]
    colours = matplotlib.colors.hsv_to_rgb(np.stack([hues, np.full(count, 0.75), levels], -1))
    colours[[name == "background" for name in classes]] = 0
    return np.round(colours * 255).astype(np.uint8)


def save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot write {path}: {error}; choose another place with --out") from error
