"""Label maps that are slow to derive from a dataset's files, kept outside the dataset's folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bench.errors import BenchError
from bench.files import replacing

VERSION = 1  # of the rules in bench.data.decode that derived maps follow


def folder() -> Path:
    """$BENCH_CACHE, else `bench` in the user's cache folder."""
    if own := os.environ.get("BENCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bench"


def state(path: Path) -> tuple[str, int, int, int]:
    """What a file is known by: its path, its size, when it was written and when it was put there, which no archive and
    no copy sets back. Raises BenchError."""
    try:
        found = path.stat()
    except OSError as error:
        raise BenchError(f"missing file {path}") from error
    return str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def cached(sources: Sequence[Path], rule: str, derive: Callable[[], np.ndarray], must_keep: bool = True) -> np.ndarray:
    """`derive()`, a uint8 map (H, W), or what it gave for the same files before.

    Raises BenchError for a missing file, and with `must_keep` where the cache cannot be written.
    """
    key = json.dumps([VERSION, rule, *(state(source) for source in sources)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = folder() / "derived" / digest[:2] / f"{digest}.png"
    with contextlib.suppress(FileNotFoundError, UnidentifiedImageError, OSError, SyntaxError):
        with Image.open(path) as image:
            return np.array(image)
    labels = derive()
    try:
        with replacing(path) as temporary:
            Image.fromarray(labels).save(temporary, "PNG")
    except OSError as error:
        if not must_keep:
            return labels
        raise BenchError(
            f"cannot cache {path}: {error.strerror or error}; choose another folder with BENCH_CACHE and --retry"
        ) from error
    return labels
