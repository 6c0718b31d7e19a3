"""Label maps that are slow to derive from a dataset's files, kept outside the dataset's folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bench.errors import BenchError

VERSION = 1  # of the rules in bench.data.decode that derived maps follow


def folder() -> Path:
    """$BENCH_CACHE, else `bench` in the user's cache folder."""
    if own := os.environ.get("BENCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bench"


def cached(source: Path, rule: str, derive: Callable[[], np.ndarray]) -> np.ndarray:
    """`derive()`, a uint8 map (H, W), or what it gave for the same file before.

    The same file: its path, size and time of change. Raises BenchError where the cache cannot be written.
    """
    try:
        state = source.stat()
    except OSError as error:
        raise BenchError(f"missing file {source}") from error
    key = f"{VERSION}\n{rule}\n{source.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = folder() / "derived" / digest[:2] / f"{digest}.png"
    with contextlib.suppress(FileNotFoundError, UnidentifiedImageError, OSError, SyntaxError):
        with Image.open(path) as image:
            return np.array(image)
    labels = derive()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BenchError(
            f"cannot cache {path}: {error.strerror or error}; choose another folder with BENCH_CACHE"
        ) from error
    return labels
