"""`bench data speed`: samples a second from one loader process, by cache, side by side."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.data import card as cards
from bench.data import derived
from bench.data.card import Card
from bench.data.loader import DenseDataset
from bench.data.samples import Kind
from bench.data.subset import evenly_spaced
from bench.errors import BenchError
from bench.recipe import Recipe

ROUNDS = 7


def compare(
    card: Card, root: Path | None, tasks: tuple[str, ...], size: tuple[int, int], recipe: Recipe, count: int
) -> dict[str, list[float]]:
    """Cache -> seconds that `count` training samples take, a round each; the caches are filled beforehand.

    The rounds of the caches are interleaved: a machine that is busy for a while harms all alike.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    before = os.environ.get("BENCH_CACHE")
    try:
        derived.folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=derived.folder()) as folder:  # the disk that a run would use
            os.environ["BENCH_CACHE"] = folder
            names = evenly_spaced(cards.ids(card, "train", root), count)
            sets = {
                kind: DenseDataset(card, "train", tasks, size, root, augment=recipe.augment, cache=kind, names=names)
                for kind in get_args(Kind)
            }
            seconds: dict[str, list[float]] = {kind: [] for kind in sets}
            for epoch in track(range(-1, ROUNDS), "rounds", transient=True):
                for kind, samples in sets.items():
                    started = time.perf_counter()
                    for index in range(len(samples)):
                        samples[max(epoch, 0), index]
                    if epoch >= 0:
                        seconds[kind].append(time.perf_counter() - started)
    except OSError as error:
        raise BenchError(f"cannot write to {derived.folder()}: {error}; choose another with BENCH_CACHE") from error
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("BENCH_CACHE", None)
        if before is not None:
            os.environ["BENCH_CACHE"] = before
    return seconds


def show(seconds: dict[str, list[float]], count: int, console: Console) -> None:
    table = Table()
    for column in ("cache", "samples a second", "against none"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for kind, values in seconds.items():
        ratios = [none / value for none, value in zip(seconds["none"], values, strict=True)]
        table.add_row(kind, f"{count / statistics.median(values):.1f}", f"{statistics.median(ratios):.2f}")
    console.print(table)
    console.print(f"one process, medians of {ROUNDS} rounds; a training run multiplies this by --workers")
