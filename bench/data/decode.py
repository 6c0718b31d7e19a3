"""Files to arrays: every label format that a card can name. Errors name the file.

Encodings of the arrays, (H, W) unless said:
    image        uint8 (H, W, 3)
    semseg, human_parts   uint8 0..n-1, 255 = ignore
    saliency, edge        uint8 {0, 1}, 255 = ignore
    depth        float32 metres, 0 = ignore
    normals      float32 (H, W, 3) unit vectors in the camera frame (x right, y down), zero vector = ignore
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bench.data.card import TaskCard
from bench.errors import BenchError

IGNORE = 255


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3). Raises BenchError for a file that is missing, truncated or no image."""
    return _read_raster(path, "RGB")


def read_label(task: str, card: TaskCard, path: Path) -> np.ndarray:
    """Decode one label map by its suffix: .npy as stored, anything else as an image."""
    raw = _read_npy(path) if path.suffix == ".npy" else _read_raster(path, "RGB" if task == "normals" else None)
    if task == "normals":
        return _normals(raw, path)
    if raw.ndim != 2:
        raise BenchError(f"{path}: expected one channel for {task}, found shape {raw.shape}")
    if task == "depth":
        depth = raw.astype(np.float32) * card.scale
        return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
    if task in ("saliency", "edge"):
        return _binary(raw, card, path)
    return _classes(raw, card, path)


def _read_raster(path: Path, mode: str | None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image.load()
            # A palette image's values are its indices: only images proper are converted.
            return np.array(image.convert(mode) if mode else image)
    except FileNotFoundError as error:
        raise BenchError(f"missing file {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BenchError(f"cannot decode image {path}: {error}") from error


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise BenchError(f"missing file {path}") from error
    except (OSError, ValueError, EOFError) as error:
        raise BenchError(f"cannot read array {path}: {error}") from error


def _classes(raw: np.ndarray, card: TaskCard, path: Path) -> np.ndarray:
    if not np.issubdtype(raw.dtype, np.integer):
        raise BenchError(f"{path}: class labels must be integers, found {raw.dtype}")
    ignore = (IGNORE,) if card.ignore is None else card.ignore
    ignored = np.isin(raw, ignore)
    labels = raw.astype(np.int64) - card.subtract
    wrong = ~ignored & ((labels < 0) | (labels >= len(card.classes)))
    if wrong.any():
        value = int(raw[wrong][0])
        low, high = card.subtract, card.subtract + len(card.classes) - 1
        raise BenchError(f"{path}: label value {value} is outside {low}..{high} and not in ignore {list(ignore)}")
    return np.where(ignored, IGNORE, labels).astype(np.uint8)


def _binary(raw: np.ndarray, card: TaskCard, path: Path) -> np.ndarray:
    ignored = np.isin(raw, card.ignore or ())
    labelled = raw[~ignored]
    top = labelled.max(initial=0)
    if not np.isfinite(top) or labelled.min(initial=0) < 0 or top > 255 or 1 < top < 128:
        raise BenchError(f"{path}: expected a mask of 0 and 1, or of 0..255")
    if set(np.unique(labelled).tolist()) in ({1, 255}, {0, 1, 255}):
        raise BenchError(f"{path}: a mask of 0, 1 and 255; if 255 means 'no label', the card must say ignore: [255]")
    return np.where(ignored, IGNORE, raw > (127 if top > 1 else 0.5)).astype(np.uint8)


def _normals(raw: np.ndarray, path: Path) -> np.ndarray:
    if raw.ndim != 3 or raw.shape[2] != 3:
        raise BenchError(f"{path}: expected normals of shape (H, W, 3), found {raw.shape}")
    vectors = raw.astype(np.float32)
    if raw.dtype == np.uint8:
        vectors = vectors * (2 / 255) - 1
        vectors[(raw == 0).all(-1)] = 0  # black marks pixels without a normal
    vectors[~np.isfinite(vectors).all(-1)] = 0
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 0.1, vectors / np.maximum(length, 1e-6), 0).astype(np.float32)
