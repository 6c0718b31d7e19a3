"""Whether every image of a run can be used, and what its files hold: found before the first step, not the last."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.data import derived
from bench.data.card import Card, files_of
from bench.data.check import inspect, inspect_all
from bench.errors import BenchError
from bench.files import write_atomically

FEW = 32  # images that are read faster than processes start


@dataclass(frozen=True)
class Seen:
    """`contents`: id -> digest of the bytes of its image and labels; `bad`: id -> what is wrong with them, for those
    that cannot be used."""

    contents: dict[str, str]
    bad: dict[str, str]


def examine(
    card: Card, root: Path, names: Sequence[str], tasks: Sequence[str], workers: int, tell: Callable[[str], None]
) -> Seen:
    """Read every file of these images once: where all are good, that is kept in the cache folder as long as no file
    changes.

    `tell` hears of slow reading. A missing file is a problem like any other. Raises BenchError where labels cannot be
    derived for want of a cache folder.
    """
    kept = derived.folder() / "read" / f"{_digest(card, root, names, tasks)}.json"
    with contextlib.suppress(OSError, ValueError):
        return Seen(json.loads(kept.read_text(encoding="utf-8")), {})
    if len(names) > FEW:
        tell(f"reading {len(names)} images and their labels once, to see that all can be used")
        found = dict(inspect_all(card, root, names, tasks, workers))
    else:
        found = {name: inspect(card, root, name, tasks) for name in names}
    bad = {name: sample.problems[0] for name, sample in found.items() if sample.problems}
    cacheless = next((problem for problem in bad.values() if problem.startswith("cannot cache")), None)
    if cacheless is not None:  # no fault of the image's
        raise BenchError(cacheless)
    contents = {name: sample.contents for name, sample in found.items()}
    if not bad:  # a disk's or a network's fault may pass: what is bad is read again next time
        with contextlib.suppress(BenchError):
            write_atomically(kept, json.dumps(contents))
    return Seen(contents, bad)


def _digest(card: Card, root: Path, names: Sequence[str], tasks: Sequence[str]) -> str:
    rules = card.model_dump(mode="json", include={"image", "tasks"})
    files = [file for name in names for file in files_of(card, root, name, tasks)]
    states = [derived.state(file) if file.is_file() else str(file) for file in files]
    text = json.dumps([derived.VERSION, rules, list(tasks), list(names), states], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
