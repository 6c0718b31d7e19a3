"""Which images a limit keeps: the same ones every time, whatever the seed, and of every class some."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from bench.data import card as cards
from bench.data import decode, derived
from bench.data.card import Card
from bench.errors import BenchError
from bench.tasks import TASKS


def ids(
    card: Card,
    split: Literal["train", "val"],
    root: Path | None,
    limit: int | None,
    tasks: Sequence[str],
    without: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """At most `limit` ids of a split, in file order, none of `without`.

    Where one of the tasks has classes, by `balanced` (the first such task decides; all its labels are read, once);
    otherwise, and for rendered scenes, whose classes are drawn evenly, evenly spaced. `tell` hears of slow reading.
    Raises BenchError for a missing, empty or repeated list.
    """
    left_out = set(without)
    names = [name for name in cards.ids(card, split, root) if name not in left_out]
    if limit is None or limit >= len(names):
        return names
    task = next((task for task in tasks if TASKS[task].channels is None), None)
    if card.source == "scenes" or task is None:
        return evenly_spaced(names, limit)
    chosen = set(balanced(names, _presence(card, cards.require_root(card, root), names, task, tell), limit))
    return [name for name in names if name in chosen]


def binding(card: Card, split: Literal["train", "val"], root: Path | None, limit: int | None) -> int | None:
    """The limit, or None where the split has no more images: then the same images are the same cell."""
    return limit if limit is not None and limit < len(cards.ids(card, split, root)) else None


def evenly_spaced(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names, or all where there are no more."""
    return [names[i * len(names) // count] for i in range(count)] if count < len(names) else list(names)


def balanced(names: Sequence[str], presence: np.ndarray, limit: int) -> list[str]:
    """`limit` names, chosen one by one: the next always holds the class that the chosen ones hold least often.

    presence (names, classes) says which image holds which class. Among classes held equally often the rarest of all
    comes first; among the images with it, a hash of the id decides. So a larger limit only adds images.
    """
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    presence = presence.astype(bool)[order]
    left = np.ones(len(order), bool)
    held = np.zeros(presence.shape[1], int)
    total = presence.sum(0)
    chosen = []
    while len(chosen) < limit:
        wanted = presence & left[:, None]
        classes = np.flatnonzero(wanted.any(0))
        column = left if not len(classes) else wanted[:, min(classes, key=lambda c: (held[c], total[c], c))]
        index = int(np.argmax(column))
        left[index] = False
        held += presence[index]
        chosen.append(names[order[index]])
    return chosen


def _presence(card: Card, root: Path, names: Sequence[str], task: str, tell: Callable[[str], None]) -> np.ndarray:
    """uint8 (names, classes). A label that cannot be read holds no class: it is complained about if it is chosen."""
    spec = card.tasks[task]
    paths = [cards.locate(root, spec.path, name) for name in names]

    def derive() -> np.ndarray:
        tell(f"reading {len(names)} {task} labels once, to limit the images evenly over the classes")
        found = np.zeros((len(names), len(spec.classes)), np.uint8)
        for row, name, path in zip(found, names, paths, strict=True):
            try:
                label = decode.read_label(task, spec, path, root, name)
            except BenchError:
                continue
            row[np.unique(label[label != decode.IGNORE])] = 1
        return found

    # The rows are of the names, in this order, those without a file too.
    rows = hashlib.sha256(
        json.dumps([(name, path.is_file()) for name, path in zip(names, paths, strict=True)]).encode()
    )
    rule = f"presence of {task} in {spec.model_dump_json()}, rows {rows.hexdigest()}"
    return derived.cached([path for path in paths if path.is_file()], rule, derive, must_keep=False)
