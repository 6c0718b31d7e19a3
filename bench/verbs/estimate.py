"""`bench estimate`: what a training step will need on a CUDA GPU, as a table; see bench.measure.estimate."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from bench import options, step
from bench.data import card as cards
from bench.data.card import Card
from bench.errors import BenchError
from bench.files import write_atomically
from bench.measure.provenance import git_state
from bench.options import GIB, one_of, whole
from bench.record import read
from bench.report.groups import collect
from bench.step import Step
from bench.verbs import count
from methods.choices import MemoryUse

if TYPE_CHECKING:
    from bench.measure.estimate import Estimate
    from methods.registry import Configured

METHOD, REASON, PEAK, BATCH, LARGEST = "method", "reason", "peak", "batch_size", "largest_batch"
SETTING = ("backbone", "image_size", "memory", "tasks", BATCH)  # columns that are shown where they differ
BYTES = {"weights": "weights", "forward": "fwd", "loss": "loss", "backward": "bwd", "optimizer": "opt", PEAK: "peak"}
OPERATIONS = {"flops_forward": "fwd", "flops_backward": "bwd"}


def table(
    methods: str,
    backbones: str,
    *,
    dataset: str,
    tasks: str | None,
    task_counts: str | None,
    image_sizes: str,
    batch_sizes: str,
    memory: str,
    losses_together: bool,
    gpu: str | None,
    tell: Callable[[str], None] = lambda line: None,
    **other: Any,
) -> pd.DataFrame:
    """A row a method, backbone, image size, number of tasks, batch size and memory use; bytes and operations of a step.

    `task_counts` takes the first so many of the card's tasks. `other`: protocol, decoder, recipe and precision.
    `reason` says why a row has no figures. With `gpu`, `fits` and the largest batch. Raises BenchError or MethodError.
    """
    uses = [use.strip() for use in memory.split(",")]
    for use in uses:
        one_of("memory", use, get_args(MemoryUse))
    limit = options.memory_size("gpu", gpu) if gpu else None
    sizes = [options.image_size(size.strip()) for size in image_sizes.split(",")]
    batches = [whole("batch-size", text) for text in batch_sizes.split(",")]
    one = step.asked(
        backbone="", dataset=dataset, tasks=None, image_size=image_sizes.split(",")[0].strip(), memory=uses[0], **other
    )
    card = cards.load(dataset)
    channels = [card.channels(chosen) for chosen in _task_lists(card, tasks, task_counts)]

    from bench.fitting import fitting
    from methods.backbones.load import full_name
    from methods.registry import MethodError, asks_for_all

    frames = [full_name(name.strip()) for name in backbones.split(",")]
    widest, told = max(channels, key=len), set()

    def once(line: str) -> None:
        if line not in told:
            tell(line)
        told.add(line)

    combinations = []
    for size in sizes:  # before the minutes of work
        try:
            able = fitting(methods, frames, size, widest, one.setting, once)
        except (BenchError, MethodError) as error:
            if not asks_for_all(methods) or (size == sizes[-1] and not combinations):
                raise
            once(f"left out: {error}")
            continue
        for backbone, chosen in able.items():
            for method, use, outputs in itertools.product(chosen, uses, channels):
                changes = {"backbone": backbone, "image_size": size, "memory": use, "channels": outputs}
                combinations += [(method, one.model_copy(update=changes), batch) for batch in batches]
    rows = []
    for method, each, batch in track(combinations, "estimating", transient=True, console=Console(stderr=True)):
        height, width = each.image_size
        row = {"backbone": each.backbone, METHOD: method.expression, "image_size": f"{height}x{width}"}
        row |= {"memory": each.memory, "tasks": len(each.channels), BATCH: batch, "precision": each.precision}
        row |= {"protocol": each.protocol, "decoder": each.decoder}
        run = functools.partial(_estimate, method, each, losses_together)
        try:
            found = run(batch)
            row |= {"trainable": found.trainable, "weights": found.weights, **found.phases, PEAK: found.peak}
            row |= {"flops_forward": found.forward, "flops_backward": found.backward}
            if limit is not None:
                row |= {"fits": found.peak <= limit, LARGEST: _largest(run, limit, batch)}
        except (BenchError, MethodError) as error:
            row |= {REASON: str(error)}
        rows.append(row)
    return pd.DataFrame(rows)


def _estimate(method: Configured, of: Step, losses_together: bool, batch: int) -> Estimate:
    from bench.measure.estimate import estimate

    build = functools.partial(of.model, method)
    return estimate(build, of.image_size, of.recipe, batch, of.precision, losses_together=losses_together)


def fill(folder: Path, dataset: str | None, tell: Callable[[str], None]) -> int:
    """Add the estimate to every record under `folder` that was measured without one (`bench run --no-estimate`), and
    return how many there were.

    `dataset`: the card of records whose own is a file. `tell` hears of each. Raises BenchError in one line.
    """
    from bench.run import estimated

    filled = 0
    own = cards.load(dataset) if dataset else None
    everything, problems = collect(folder)
    for problem in problems:
        tell(f"left out: {problem}")
    for item in everything:
        spec, label = item.record.spec, f"{item.record.spec.method} on {item.record.spec.backbone}"
        if item.record.estimate is not None or item.record.parameters is None:
            continue
        try:
            card = own if own is not None and own.name == spec.dataset else cards.load(spec.dataset)
        except BenchError as error:
            tell(f"left out: {label}: {error}; name a card of your own with --dataset")
            continue
        found = estimated(spec, card.channels(spec.tasks))
        if found.peak is None:
            tell(f"left out: {label}: {found.reason}")
            continue
        found.commit = git_state()[0]
        record = read(item.path)  # as it is by now
        record.estimate = found
        write_atomically(item.path, record.text())
        tell(f"estimated {label}")
        filled += 1
    return filled


def _largest(run: Callable[[int], Estimate], limit: int, batch: int) -> int:
    from bench.measure.estimate import largest_batch

    return largest_batch(lambda images: run(images).peak, limit, batch)


def _task_lists(card: Card, tasks: str | None, counts: str | None) -> list[tuple[str, ...]]:
    if counts is None:
        return [cards.choose_tasks(card, tasks)]
    if tasks is not None:
        raise BenchError("give --tasks or --task-counts, not both")
    lists = [tuple(card.tasks)[: whole("task-counts", text)] for text in counts.split(",")]
    if any(len(chosen) != int(text) for chosen, text in zip(lists, counts.split(","), strict=True)):
        raise BenchError(f"--task-counts {counts}: dataset {card.name} has {len(card.tasks)} tasks")
    return lists


def cells(found: pd.DataFrame) -> pd.DataFrame:
    """The table as text: what differs between rows, GiB and 1e9 operations."""
    out = pd.DataFrame({METHOD: found[METHOD]})
    for column in SETTING:
        if found[column].nunique() > 1:
            out[column.replace("_", " ")] = found[column].astype(str)
    for column, title in BYTES.items():
        if column in found:
            out[title] = [_number(value, GIB, 2) for value in found[column]]
    for column, title in OPERATIONS.items():
        if column in found and LARGEST not in found:  # one question at a time: 80 columns do not hold both
            out[f"GFLOP {title}"] = [_number(value, 1e9, 0) for value in found[column]]
    if LARGEST in found:
        out["fits"] = ["–" if pd.isna(value) else "yes" if value else "no" for value in found["fits"]]
        out["largest batch"] = [_number(value, 1, 0) for value in found[LARGEST]]
    return out


def _number(value: float, unit: float, digits: int) -> str:
    return "–" if pd.isna(value) else f"{value / unit:.{digits}f}"


def title(found: pd.DataFrame) -> str:
    first = found.iloc[0]
    common = [str(first[column]) for column in ("backbone", "image_size") if found[column].nunique() == 1]
    common += [f"batch {first[BATCH]}"] if found[BATCH].nunique() == 1 else []
    common += [f"{first['tasks']} tasks"] if found["tasks"].nunique() == 1 else []
    common += ["activation checkpointing"] if set(found["memory"]) == {"low"} else []
    common += [first["precision"], f"protocol {first['protocol']}"]
    common += [f"decoder {first['decoder']}"] if first["decoder"] else []
    return " · ".join(["ESTIMATED, not measured", *common])


def notes(found: pd.DataFrame) -> list[str]:
    out = [
        "Memory in GiB: weights and buffers, the peak of live tensors while a full training step is in each phase (in "
        "CUDA's blocks of 512 bytes), and the highest. Not in it: workspaces inside kernels, fragmentation, the CUDA "
        "context."
    ]
    if LARGEST not in found:
        out[0] += " GFLOP of one step: matrix products, convolutions and attention."
    if REASON in found:
        out += [f"{row[METHOD]}: {row[REASON]}" for row in found.to_dict("records") if pd.notna(row[REASON])]
    return out


def show(found: pd.DataFrame, console: Console) -> None:
    """A table a backbone."""
    for _, rows in found.groupby("backbone", sort=False):
        written = cells(rows)
        if _width(written) > console.width:
            written = written[[column for column in written if not column.startswith("GFLOP")]]
        console.print(escape(title(rows)), style="italic", highlight=False)
        out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for column in written:
            if column == METHOD:
                out.add_column(column, overflow="fold", min_width=min(14, written[METHOD].str.len().max()))
            else:
                out.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in written.itertuples(index=False):
            out.add_row(*(escape(cell) for cell in row))
        console.print(out)
    for note in notes(found):
        console.print(escape(note), soft_wrap=True)


def _width(written: pd.DataFrame) -> int:
    """Characters that the table needs at least; the methods' names and headers may be broken."""
    needed = {c: max(map(len, [*c.split(" "), *written[c]])) for c in written}
    return sum(needed.values()) - needed[METHOD] + min(14, needed[METHOD]) + 2 * len(needed)


def markdown(found: pd.DataFrame) -> str:
    return "\n".join([title(found), "", count.markdown(cells(found)), "", *notes(found)])
