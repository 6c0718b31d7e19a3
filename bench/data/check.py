"""`bench data check`: every file of a dataset read once, before an epoch is wasted on it."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.data import card as cards
from bench.data import decode
from bench.data.card import Card
from bench.errors import BenchError
from bench.processes import end_with_parent
from bench.tasks import TASKS


@dataclass
class Sample:
    """What one image and its labels hold. `problems` are lines that name a file."""

    problems: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    labelled: dict[str, int] = field(default_factory=dict)  # task -> pixels with a label
    classes: dict[str, dict[int, int]] = field(default_factory=dict)  # task -> class -> pixels
    depths: tuple[float, float, float] | None = None  # least, median and largest, in metres
    contents: str = ""  # digest of all its files' bytes


@dataclass
class Summary:
    """A split, all samples together."""

    images: int = 0
    contents: list[str] = field(default_factory=list)  # of its samples, in order
    problems: list[str] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: int = 0
    labelled: Counter[str] = field(default_factory=Counter)
    unlabelled_images: Counter[str] = field(default_factory=Counter)
    classes: dict[str, Counter[int]] = field(default_factory=dict)
    depths: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.images += 1
        self.contents.append(sample.contents)
        self.problems += sample.problems
        if sample.size:
            self.sizes[sample.size] += 1
            self.pixels += sample.size[0] * sample.size[1]
        self.depths += [sample.depths] if sample.depths else []
        for task, pixels in sample.labelled.items():
            self.labelled[task] += pixels
            self.unlabelled_images[task] += pixels == 0
        for task, counts in sample.classes.items():
            self.classes.setdefault(task, Counter()).update(counts)


def inspect(card: Card, root: Path, name: str, tasks: Sequence[str]) -> Sample:
    """Read one image and its labels; whatever is wrong becomes a line."""
    found = Sample()
    unread = []
    try:
        found.contents = _digest(cards.files_of(card, root, name, tasks))
    except OSError as error:
        unread.append(f"{error.filename}: {error.strerror}")
    try:
        image = decode.read_image(root / card.image.format(id=name))
        found.size = image.shape[:2]
    except BenchError as error:
        found.problems.append(str(error))
    for task in tasks:
        path = cards.locate(root, card.tasks[task].path, name)
        try:
            label = decode.read_label(task, card.tasks[task], path, root, name, found.size or (1, 1))
        except BenchError as error:
            found.problems.append(str(error))
            continue
        if not found.size:
            continue  # its area, which shares are taken of, is not known
        if label.shape[:2] != found.size:
            found.problems.append(f"{path}: label is {label.shape[:2]}, its image {found.size} (height, width)")
            continue
        valid = label.any(-1) if task == "normals" else label > 0 if task == "depth" else label != decode.IGNORE
        found.labelled[task] = int(valid.sum())
        if task == "depth" and valid.any():
            values = label[valid]
            found.depths = float(values.min()), float(np.median(values)), float(values.max())
        if TASKS[task].channels is None or task in ("saliency", "edge"):
            values, counts = np.unique(label[valid], return_counts=True)
            found.classes[task] = dict(zip(values.tolist(), counts.tolist(), strict=True))
    found.problems = found.problems or unread  # as a rule the same, in better words
    return found


def digits(contents: Iterable[str]) -> str:
    """What a split is told from others by: sixteen hex digits of its samples' digests, in order."""
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:16]


def _digest(files: Sequence[Path]) -> str:
    """Of their bytes, in this order. Raises OSError."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def inspect_all(
    card: Card, root: Path, names: Sequence[str], tasks: Sequence[str], workers: int
) -> Iterator[tuple[str, Sample]]:
    """`inspect` for every id, in order, in so many processes."""
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        samples = pool.map(functools.partial(inspect, card, root, tasks=tuple(tasks)), names, chunksize=8)
        yield from zip(names, samples, strict=True)


def check(card: Card, root: Path, tasks: Sequence[str], console: Console, workers: int) -> bool:
    """Read both splits in so many processes, print a summary; whether training would go well.

    Raises BenchError where there is no list of ids, or nothing to read.
    """
    if card.source != "files":
        raise BenchError(f"dataset {card.name} is rendered by bench itself: there are no files to check")
    splits = {split: cards.ids(card, split, root) for split in ("train", "val")}
    both = set(splits["train"]) & set(splits["val"])
    summaries = {split: Summary() for split in splits}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        for split, names in splits.items():
            bar = progress.add_task(split, total=len(names))
            for _, sample in inspect_all(card, root, names, tasks, workers):
                summaries[split].add(sample)
                progress.advance(bar)
    for split, summary in summaries.items():
        _print(card, split, summary, tasks, console)
    if both:
        console.print(f"[yellow]in both splits: {len(both)} of the images[/yellow], e.g. {escape(min(both))}")
    problems = [line for summary in summaries.values() for line in summary.problems]
    for line in problems[:SHOWN]:
        console.print(f"[red]bad[/red] {escape(line)}", soft_wrap=True)
    if len(problems) > SHOWN:
        console.print(f"[red]and {len(problems) - SHOWN} more[/red]")
    console.print(
        "training would stop here; --skip-bad does without such images"
        if problems
        else "all files are readable and fit the card"
    )
    return not problems


SHOWN = 20


def _print(card: Card, split: str, summary: Summary, tasks: Sequence[str], console: Console) -> None:
    sizes = ", ".join(f"{h}x{w} ({n})" for (h, w), n in summary.sizes.most_common(3))
    more = f" and {len(summary.sizes) - 3} more sizes" if len(summary.sizes) > 3 else ""
    console.print(f"\n[bold]{split}[/bold]: {summary.images} images, {sizes or 'none readable'}{more}")
    if not summary.problems:
        told = "the same digits wherever the files of these images, in this order, are the same"
        console.print(f"contents {digits(summary.contents)}: {told}", highlight=False)
    table = Table()
    for column in ("task", "labelled pixels", "images without a label", "values"):
        table.add_column(column, justify="left" if column in ("task", "values") else "right", overflow="fold")
    for task in tasks:
        share = summary.labelled[task] / summary.pixels if summary.pixels else 0
        table.add_row(
            task, f"{100 * share:.1f} %", str(summary.unlabelled_images[task]), _histogram(card, task, summary)
        )
    console.print(table)


def _histogram(card: Card, task: str, summary: Summary) -> str:
    if task == "depth" and summary.depths:
        least, middle, most = zip(*summary.depths, strict=True)
        return f"{min(least):.2f} to {max(most):.2f} m, {np.median(middle):.2f} m in the middle"
    counts = summary.classes.get(task)
    if not counts:
        return ""
    names = card.tasks[task].classes or ("off", "on")
    total = sum(counts.values())
    shares = ", ".join(f"{escape(names[value])} {100 * n / total:.1f} %" for value, n in counts.most_common(6))
    absent = [name for value, name in enumerate(names) if not counts[value]]
    return shares + (
        f"; {len(absent)} of {len(names)} classes never: {escape(', '.join(absent[:6]))}{', ...' * (len(absent) > 6)}"
        if absent
        else ""
    )
