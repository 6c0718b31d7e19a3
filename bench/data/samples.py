"""Decoded and resized samples kept in memory or on disk, so that this is done once and not once an epoch.

What is kept is what augmentation starts from, so a run gives the same figures with and without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.data import derived, scenes, transforms
from bench.data.card import Card, files_of
from bench.errors import BenchError
from bench.files import replacing

Kind = Literal["none", "ram", "disk"]
Packed = dict[str, Tensor]


class SampleCache:
    """Packed samples by what they were made from.

    `ram` is a dictionary of this process (each loader process has its own); `disk` are memory-mapped files in the cache
    folder, shared by all processes and later runs.
    """

    def __init__(
        self, kind: Kind, card: Card, root: Path | None, tasks: Sequence[str], size: tuple[int, int], resized: str
    ) -> None:
        """`resized` says what has been brought to (height, width) = size."""
        self.kind, self.card, self.root, self.tasks = kind, card, root, tuple(tasks)
        rules = card.model_dump(mode="json", include={"name", "source", "seed", "image", "tasks"})
        # Scenes are rendered at the size that is asked for; files have their own.
        drawn = scenes.VERSION if card.source == "scenes" else None
        made = (resized, size) if resized or drawn else None
        self.common = json.dumps([derived.VERSION, transforms.VERSION, rules, self.tasks, drawn, made], sort_keys=True)
        self.held: dict[str, Packed] = {}

    def get(self, name: str) -> Packed | None:
        if self.kind == "ram":
            return self.held.get(name)
        with contextlib.suppress(FileNotFoundError, SafetensorError, OSError):
            return load_file(self.path(name))
        return None

    def put(self, name: str, sample: Packed) -> None:
        """Raises BenchError where the cache cannot be written."""
        if self.kind == "ram":
            self.held[name] = sample
            return
        path = self.path(name)
        try:
            with replacing(path) as temporary:
                save_file(sample, temporary)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise BenchError(
                f"cannot cache {path}: {reason}; choose another folder with BENCH_CACHE and --retry"
            ) from error

    def path(self, name: str) -> Path:
        """By the card's rules and the path, size and time of change of every file of the sample."""
        files = []
        if self.card.source == "files":
            for file in files_of(self.card, self.root, name, self.tasks):
                files.append(derived.state(file))
        digest = hashlib.sha256(json.dumps([self.common, name, files]).encode()).hexdigest()[:24]
        return derived.folder() / "samples" / digest[:2] / f"{digest}.safetensors"
