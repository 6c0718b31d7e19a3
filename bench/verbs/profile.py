"""`bench profile`: seconds a batch of several methods, their steps interleaved in one process, and ratios between them.

A machine that slows down for a while slows all methods alike, and a ratio is taken within a round. Nothing is trained
to an end and no record is written: `bench run --steps 0` measures each method alone, in a process of its own.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from bench.device import Device
from bench.errors import BenchError
from bench.one_line import say
from bench.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from bench.measure.operators import Operator
    from bench.measure.profile import Clock
    from bench.train.loop import Trainer

FLOOR = "frozen backbone alone"


@dataclass
class Profile:
    """Seconds of one method's steps, a value a round; `phases` sum up to the step but for what lies between them."""

    name: str
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)  # of one more step, the most expensive first

    def ratio(self, other: Profile) -> tuple[float, float, float]:
        """Median, least and largest of this one's time over the other's, round by round."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def profile(
    methods: str,
    of: Step,
    batch_size: int,
    place: Device,
    rounds: int,
    console: Console,
    with_operators: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Profile]:
    """One profile a method, then that of the frozen backbone's forward. A method whose first step fails is left out,
    and `tell` hears of it. Raises BenchError or MethodError."""
    if with_operators:
        # Read once, when torch is imported: its profiler would announce itself on standard error.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    import torch

    from bench.measure import cuda
    from bench.measure.operators import operators
    from bench.measure.profile import CPU_CLOCK, CUDA_CLOCK, settle, synthetic_batch
    from bench.train.loop import Trainer
    from methods.backbones.load import WeightSource, full_name, load_backbone
    from methods.registry import described

    if place.name:
        torch.cuda.set_device(place.index)
    cuda.set_up(of.precision)
    trainers = {}
    for method in of.fitting(methods, functools.partial(say, console, soft_wrap=True)):
        torch.manual_seed(0)
        model = of.model(method)
        accelerator = cuda.accelerator(of.precision, bool(place.name))  # a loss scale of its own
        trainers[method.expression] = Trainer(model, of.recipe, batch_size, rounds + 1, accelerator)
    batch = synthetic_batch(of.channels, of.image_size, batch_size, accelerator.device)
    for name in list(trainers):
        try:
            settle(trainers[name], batch)
        except Exception as error:  # whatever a method's own code does, the others are measured
            del trainers[name]
            tell(f"left out: {name}: {described(error)}")
    if not trainers:
        raise BenchError("none of the methods took a step")
    accelerator = next(iter(trainers.values())).accelerator  # not of one that was left out: its model is to go
    frozen = load_backbone(full_name(of.backbone), of.image_size, WeightSource("random")).to(accelerator.device).eval()

    def forward() -> None:
        with torch.no_grad(), accelerator.autocast():
            frozen(batch["image"])

    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("rounds", total=rounds + 1)
        clock = CUDA_CLOCK if place.name else CPU_CLOCK
        found = interleave(trainers, batch, forward, clock, rounds, lambda: progress.advance(bar))
    if with_operators:
        for each in found[:-1]:
            each.operators = operators(functools.partial(trainers[each.name].step, batch, rounds), bool(place.name))
    return found


def interleave(
    trainers: Mapping[str, Trainer],
    batch: Mapping[str, Tensor],
    forward: Callable[[], None],
    clock: Clock,
    rounds: int,
    report: Callable[[], None],
) -> list[Profile]:
    """Every round one step of each trainer and one `forward`, in turn; the first round is warm-up and not kept."""
    from bench.measure.profile import seconds_by_phase, seconds_of, timed_step

    steps: dict[str, list] = {name: [] for name in trainers}
    floor = []
    for step in range(rounds + 1):
        for name, trainer in trainers.items():
            steps[name].append(timed_step(trainer, batch, step, clock))
        start = clock.now()
        forward()
        floor.append((start, clock.now()))
        report()
    clock.wait()
    found = []
    for name, marks in steps.items():
        by_phase = [seconds_by_phase(each, clock) for each in marks[1:]]
        phases = {phase: [each[phase] for each in by_phase] for phase in by_phase[0]}
        found.append(Profile(name, [seconds_of(each, clock) for each in marks[1:]], phases))
    return [*found, Profile(FLOOR, [clock.between(a, b) for a, b in floor[1:]])]


def figures(profiles: list[Profile], reference: str | None) -> pd.DataFrame:
    """A row a profile: medians in seconds, and the ratio to the reference (the first method) with its range."""
    names = [each.name for each in profiles]
    if reference is not None and reference not in names:
        raise BenchError(f"--reference {reference!r} is not among the methods: {', '.join(names)}")
    base = profiles[names.index(reference)] if reference else profiles[0]
    rows = []
    for each in profiles:
        ratio, least, most = each.ratio(base)
        row = {"method": each.name, "median": statistics.median(each.seconds)}
        row |= {"p90": pd.Series(each.seconds).quantile(0.9)}
        row |= {phase: statistics.median(values) for phase, values in each.phases.items()}
        rows.append(row | {"ratio": ratio, "least": least, "most": most, "reference": base.name})
    return pd.DataFrame(rows)


def show(table: pd.DataFrame, heading: str, rounds: int, console: Console) -> None:
    base = table["reference"].iloc[0]
    out = Table(title=escape(heading), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    seconds = [c for c in table.columns if c not in ("method", "p90", "ratio", "least", "most", "reference")]
    short = {"forward": "fwd", "backward": "bwd", "optimizer": "opt"}
    for column in ("method", *(short.get(c, c) for c in seconds), "ratio", "range"):
        out.add_column(column, justify="left" if column == "method" else "right", no_wrap=column in ("method", "range"))
    for row in table.to_dict("records"):
        times = ["–" if pd.isna(row[c]) else f"{row[c]:.3f}" for c in seconds]
        out.add_row(escape(row["method"]), *times, f"{row['ratio']:.2f}", f"{row['least']:.2f}–{row['most']:.2f}")
    console.print(out)
    console.print(
        escape(
            f"Seconds a batch, medians of {rounds} interleaved rounds; ratio: time over that of {base}, the median "
            "round's and the range. Random weights, synthetic batch."
        ),
        soft_wrap=True,
    )


def show_operators(profiles: list[Profile], most: int, on_gpu: bool, console: Console) -> None:
    """The `most` expensive operators of each method's step, and how much of the step a GPU was busy with them all."""
    for each in profiles:
        if not each.operators:
            if each.name != FLOOR:
                console.print(escape(f"{each.name}: torch's profiler saw no operator's time"), style="italic")
            continue
        total = sum(operator.seconds for operator in each.operators)
        title = f"{each.name}: where a step goes"
        if on_gpu:
            step = statistics.median(each.seconds)
            title += f"; the GPU is busy for {total:.3f} of its {step:.3f} s ({100 * total / step:.0f} %)"
        console.print(escape(title), style="italic")  # not the table's: that would be broken to its width
        out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        out.add_column("operator", overflow="fold")
        for column in ("calls", "ms", "%"):
            out.add_column(column, justify="right", no_wrap=True)
        rest = each.operators[most:]
        rows = [(operator.name, operator.calls, operator.seconds) for operator in each.operators[:most]]
        rows += [(f"{len(rest)} more", sum(o.calls for o in rest), sum(o.seconds for o in rest))] if rest else []
        for name, calls, seconds in rows:
            out.add_row(escape(name), str(calls), f"{1000 * seconds:.2f}", f"{100 * seconds / total:.1f}")
        console.print(out)
    console.print(
        "Time of each operator's own, without those that it calls, in one step more under torch's profiler"
        + (": of its kernels; for the rest of a step the GPU waits for the host." if on_gpu else "."),
        soft_wrap=True,
    )


def heading(of: Step, batch_size: int | None, place: Device) -> str:
    batch = [f"batch {batch_size}"] if batch_size else []
    return " · ".join([*of.title(), *batch, place.name or "CPU figures"])
