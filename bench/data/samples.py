"""Decoded samples kept in memory or on disk, so that an image is decoded once and not once an epoch.

What is kept is what the files hold, before augmentation and resizing: a run gives the same figures with and without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bench.data import derived, scenes
from bench.data.card import Card, files_of
from bench.errors import BenchError

Kind = Literal["none", "ram", "disk"]
Arrays = dict[str, np.ndarray]


class SampleCache:
    """Arrays of bench.data.decode by what they were decoded from.

    `ram` is a dictionary of this process (each loader process has its own); `disk` are memory-mapped files in the cache
    folder, shared by all processes and later runs.
    """

    def __init__(self, kind: Kind, card: Card, root: Path | None, tasks: Sequence[str], size: tuple[int, int]) -> None:
        self.kind, self.card, self.root, self.tasks = kind, card, root, tuple(tasks)
        rules = card.model_dump(mode="json", include={"name", "source", "seed", "image", "tasks"})
        # Scenes are rendered at the size that is asked for; files have their own.
        drawn = (size, scenes.VERSION) if card.source == "scenes" else None
        self.common = json.dumps([derived.VERSION, rules, self.tasks, drawn], sort_keys=True)
        self.held: dict[str, Arrays] = {}

    def get(self, name: str) -> Arrays | None:
        if self.kind == "ram":
            return self.held.get(name)
        with contextlib.suppress(FileNotFoundError, SafetensorError, OSError):
            return load_file(self.path(name))
        return None

    def put(self, name: str, arrays: Arrays) -> None:
        """Raises BenchError where the cache cannot be written."""
        if self.kind == "ram":
            self.held[name] = arrays
            return
        path = self.path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise BenchError(f"cannot cache {path}: {error}; choose another folder with BENCH_CACHE") from error

    def path(self, name: str) -> Path:
        """By the card's rules and the path, size and time of change of every file of the sample."""
        files = []
        if self.card.source == "files":
            for file in files_of(self.card, self.root, name, self.tasks):
                state = file.stat()
                files.append((str(file.resolve()), state.st_size, state.st_mtime_ns))
        digest = hashlib.sha256(json.dumps([self.common, name, files]).encode()).hexdigest()[:24]
        return derived.folder() / "samples" / digest[:2] / f"{digest}.safetensors"
