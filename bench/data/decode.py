"""Files to arrays: every label format that a card can name. Errors name the file.

Encodings of the arrays, (H, W) unless said:
    image        uint8 (H, W, 3)
    semseg, human_parts   uint8 0..n-1, 255 = ignore
    saliency, edge        uint8 {0, 1}, 255 = ignore
    depth        float32 metres, 0 = ignore
    normals      float32 (H, W, 3) unit vectors in the camera frame (x right, y down), zero vector = ignore
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from bench.data import derived
from bench.data.card import Keep, TaskCard
from bench.errors import BenchError, first_line

IGNORE = 255
ORIENTATION = ExifTags.Base.Orientation
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip


def read_image(path: Path, upright: bool = False) -> np.ndarray:
    """uint8 (H, W, 3). `upright`: turned as a camera's tag says; the labels of data sets lie on the pixels as stored.

    Raises BenchError for a file that is missing, truncated or no image."""
    return _read_raster(path, "RGB", upright)


def read_label(
    task: str, card: TaskCard, path: Path, root: Path = Path(), name: str = "", size: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """Decode one label map by its suffix (.npy, .mat, anything else as an image) and the card's rule.

    `root` and `name` (the id) find a second file that the card names; `size` (height, width) is the image's, for a
    label that has no size of its own.
    """
    if card.rule == "pascal_parts":
        labels = _parts(path, card, size)
        return np.full(size, IGNORE, np.uint8) if card.ignore_empty and not labels.any() else labels
    if card.rule == "boundaries":
        return derived.cached([path], "boundaries", lambda: boundaries(_read_array(path, card.key, None)))
    raw = _read_array(path, card.key, "RGB" if task == "normals" else None)
    if task == "normals":
        normals = _normals(raw, path)
        return normals if card.keep is None else _kept(normals, card.keep, root / card.keep.path.format(id=name))
    if raw.ndim != 2:
        raise BenchError(f"{path}: expected one channel for {task}, found shape {raw.shape}")
    if task == "depth":
        depth = raw.astype(np.float32) * card.scale
        return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
    if task in ("saliency", "edge"):
        return _binary(raw, card, path)
    labels = _classes(raw, card, path)
    return np.full(labels.shape, IGNORE, np.uint8) if card.ignore_empty and not labels.any() else labels


def _read_array(path: Path, key: str, mode: str | None) -> np.ndarray:
    if path.suffix == ".mat":
        raw = _read_mat(path, key)
    else:
        raw = _read_npy(path) if path.suffix == ".npy" else _read_raster(path, mode)
    if raw.dtype.kind not in "biuf":
        raise BenchError(f"{path}: expected real numbers, found values of type {raw.dtype}")
    return raw


def _read_mat(path: Path, key: str) -> np.ndarray:
    """One variable of a MATLAB file (version 7 or older)."""
    from scipy.io import loadmat

    if not key:
        raise BenchError(f"{path}: a .mat file holds several variables; name one in the card with key")
    if not path.is_file():  # scipy then says something of file-like objects
        raise BenchError(f"missing file {path}")
    try:
        held = loadmat(path)
    except Exception as error:  # a damaged file makes scipy and zlib raise all kinds of errors
        raise BenchError(f"cannot read MATLAB file {path}: {first_line(error)}") from error
    if key not in held:
        names = ", ".join(name for name in held if not name.startswith("__")) or "nothing"
        raise BenchError(f"{path} has no variable {key!r}; it holds {names}")
    return held[key]


def boundaries(classes: np.ndarray) -> np.ndarray:
    """uint8 (H, W): 1 where the Laplacian of a class map is not zero, thinned to a pixel's width.

    The family's edge labels (Maninis et al., ASTMT, CVPR 2019): 3x3 Laplacian, mirrored at the rim.
    """
    from scipy.ndimage import laplace
    from skimage.morphology import thin

    return thin(laplace(classes.astype(np.float64), mode="mirror") != 0).astype(np.uint8)


def _parts(path: Path, card: TaskCard, size: tuple[int, int]) -> np.ndarray:
    """The parts of all persons in a PASCAL-Part annotation, painted in order (Chen et al., CVPR 2014).

    anno.objects(i): class, class_ind (15 = person), mask, parts(j): part_name, mask. An image without a person that has
    parts gives background, in the image's size.
    """
    rule = json.dumps({"parts": card.parts, "classes": card.classes}, sort_keys=True)
    label_of = {part: card.classes.index(name) for name, parts in card.parts.items() for part in parts}

    def derive() -> np.ndarray:
        try:
            objects = _read_mat(path, card.key or "anno")[0, 0]["objects"]
            labels = None
            for person in objects.flat:
                if person["class_ind"].item() != PERSON or not person["parts"].size:
                    continue
                if labels is None:
                    labels = np.zeros(person["mask"].shape, np.uint8)
                for part in person["parts"].flat:
                    labels[part["mask"].astype(bool)] = _part_label(str(part["part_name"].item()), label_of, path)
        except (ValueError, IndexError, TypeError) as error:
            raise BenchError(f"{path} is not a PASCAL-Part annotation: {first_line(error)}") from error
        return np.zeros((0, 0), np.uint8) if labels is None else labels

    labels = derived.cached([path], rule, lambda: _or_a_dot(derive()))
    return np.zeros(size, np.uint8) if labels.shape == (1, 1) else labels


PERSON = 15  # class_ind of persons in PASCAL-Part


def _or_a_dot(labels: np.ndarray) -> np.ndarray:
    """An image file cannot be empty: one pixel stands for a map without a size."""
    return labels if labels.size else np.zeros((1, 1), np.uint8)


def _part_label(part: str, label_of: Mapping[str, int], path: Path) -> int:
    if part not in label_of:
        raise BenchError(f"{path}: the card gives no class to the part {part!r}")
    return label_of[part]


def _kept(normals: np.ndarray, keep: Keep, path: Path) -> np.ndarray:
    """Normals where the class map of `keep` has one of its values, zero elsewhere."""
    classes = _read_array(path, keep.key, None)
    if classes.shape != normals.shape[:2]:
        raise BenchError(f"{path}: class map is {classes.shape}, its normals {normals.shape[:2]} (height, width)")
    return normals * np.isin(classes, keep.values)[..., None]


def _read_raster(path: Path, mode: str | None, upright: bool = False) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image.load()
            # Not by ImageOps.exif_transpose, which writes the tags back and stops at a damaged one.
            if upright and (turn := TURNS.get(image.getexif().get(ORIENTATION))) is not None:
                image = image.transpose(turn)
            if mode and image.mode.startswith(("I", "F")):  # Pillow would cut its values off at 255
                raise ValueError(f"its values are wider than 8 bits (mode {image.mode}); save it with 8 bits a channel")
            # A palette image's values are its indices: only images proper are converted.
            return np.array(image.convert(mode) if mode else image)
    except FileNotFoundError as error:
        raise BenchError(f"missing file {path}") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise all kinds of errors
        if path.is_file() and path.stat().st_size == 0:
            raise BenchError(f"cannot decode image {path}: the file is empty") from error
        reason = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise BenchError(f"cannot decode image {path}: {reason}") from error


def _read_npy(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds several arrays, as .npz does")
        return found
    except FileNotFoundError as error:
        raise BenchError(f"missing file {path}") from error
    except Exception as error:  # a damaged header is parsed as Python, and fails in all its ways
        reason = "no .npy array, or one of Python objects" if "pickle" in str(error) else first_line(error)
        raise BenchError(f"cannot read array {path}: {reason}") from error


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
    if card.threshold is not None:
        full = 255 if np.issubdtype(raw.dtype, np.integer) else 1
        return np.where(ignored, IGNORE, raw > card.threshold * full).astype(np.uint8)
    if not np.isfinite(top) or labelled.min(initial=0) < 0 or top > 255 or 1 < top < 128:
        raise BenchError(f"{path}: expected a mask of 0 and 1, or of 0..255")
    if set(np.unique(labelled).tolist()) in ({1, 255}, {0, 1, 255}):
        raise BenchError(f"{path}: a mask of 0, 1 and 255; if 255 means 'no label', the card must say ignore: [255]")
    return np.where(ignored, IGNORE, raw > (127 if top > 1 else 0.5)).astype(np.uint8)


def _normals(raw: np.ndarray, path: Path) -> np.ndarray:
    if raw.ndim != 3 or raw.shape[2] != 3:
        raise BenchError(f"{path}: expected normals of shape (H, W, 3), found {raw.shape}")
    # Vectors of whole numbers are stored as integers by MATLAB.
    if raw.dtype.kind in "iu" and raw.dtype != np.uint8 and ((raw > 1) | (raw < -1)).any():
        raise BenchError(f"{path}: normals are colours in uint8 or vectors in floating point, not {raw.dtype}")
    vectors = raw.astype(np.float32)
    if raw.dtype == np.uint8:
        vectors = vectors * (2 / 255) - 1
        vectors[(raw == 0).all(-1)] = 0  # black marks pixels without a normal
    vectors[~np.isfinite(vectors).all(-1)] = 0
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 0.1, vectors / np.maximum(length, 1e-6), 0).astype(np.float32)
