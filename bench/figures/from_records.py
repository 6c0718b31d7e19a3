"""Figures that records alone can draw. No torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.errors import BenchError
from bench.figures.style import COLOURS, LINES, MARKERS, caption, legend_below, look, panels, plain
from bench.record import Record
from bench.report import papers, published, tables
from bench.report.front import front
from bench.report.groups import Group, by_one_metric
from bench.tasks import TASKS

Drawn = Iterator[tuple[str, Figure]]  # (what the file name says besides the figure's, figure)
PHASES = {"forward": "forward", "loss": "loss", "backward": "backward", "optimizer": "optimizer step"}


@dataclass(frozen=True)
class Choice:
    """What a figure may be asked for besides its name."""

    reference: str | None = None  # Delta-m against this method
    option: str | None = None  # the option that a sweep varies
    published: bool = False  # the papers' figures beside the measured ones
    any_device: bool = False  # records of several devices in one group


@dataclass(frozen=True)
class Row:
    """A method of a group with what the tables say of it; `place` is its own in the group, for its looks."""

    place: int
    title: str
    records: list[Record]
    values: Mapping[str, Any]


def rows_of(group: Group, reference: str | None) -> list[Row]:
    against = tables.baseline(group, reference)
    found = []
    for place, records in enumerate(group.methods()):
        values = tables.measured_row(group, records, against) | tables.cost_row(group, records)
        found.append(Row(place, values[tables.METHOD], records, values))
    return found


def _left_out(group: Group, shown: Sequence[str]) -> list[str]:
    """A line on methods that have nothing to draw, and why."""
    missing = {}
    for records in group.methods():
        row = tables.measured_row(group, records, tables.Baseline("", None))
        if row[tables.METHOD] not in shown:
            missing[row[tables.METHOD]] = row[tables.STATUS] if row[tables.STATUS] != "ok" else "no figure"
    return [f"not drawn: {', '.join(f'{title} ({why})' for title, why in missing.items())}"] if missing else []


def _about(group: Group) -> list[str]:
    """Title and warnings of the group, so that a figure says what it was run on."""
    return [group.title, *(f"! {mark}" for mark in group.marks)]


def _trained(groups: Sequence[Group], reference: str | None) -> list[tuple[Group, list[Row]]]:
    """Groups with a Delta-m to show. Raises BenchError where none has one."""
    found = []
    if reference is not None:
        tables.check_reference(groups, reference)
    for group in groups:
        if reference is not None and not tables.has_reference(group, reference):
            continue
        rows = [row for row in rows_of(group, reference) if pd.notna(row.values[tables.DELTA])]
        if rows:
            found.append((group, rows))
    if not found:
        advice = f"run {tables.BASELINE} in the same setting, or name another method with --reference"
        raise BenchError(f"no record has a Delta-m: {advice}")
    return found


def pareto(groups: Sequence[Group], choice: Choice) -> Drawn:
    """Delta-m against trainable parameters, memory and time, with the front (BDTA, Fig. 1d). Across devices against
    parameters alone."""
    if choice.published and choice.reference:
        raise BenchError("--published goes without --reference: printed Δm is against the papers' single-task rows")
    trained = _trained(groups, choice.reference)
    trained = [(group, rows) for group, rows in trained if len(rows) > 1] or trained  # one point compares nothing
    if choice.published and not any(_printed(group, rows) for group, rows in trained):
        raise BenchError("no paper prints a row of these methods on these backbones: leave --published out")
    for group, rows in trained:
        cpu = group.spec.device_kind == "cpu"
        costs = {tables.TP: "trainable parameters, M"}
        if cpu and not group.any_device:
            costs |= {tables.CPU_PROCESS: "process peak, GiB (CPU)", tables.CPU_MEDIAN: "s/batch (CPU)"}
        elif not group.any_device:
            costs |= {tables.CUDA_ALLOCATED: "memory, GiB", tables.CUDA_MEDIAN: "s/batch"}
        printed = _printed(group, rows) if choice.published else []
        figure, axes = panels(len(costs), *((3.0, 2.8) if len(costs) > 1 else (7.0, 3.4)))
        for axis, (column, label) in zip(axes, costs.items(), strict=True):
            points = [(row.values[column], row.values[tables.DELTA]) for row in rows]
            for row, (x, y) in zip(rows, points, strict=True):
                colour, marker, _ = look(row.place)
                half = row.values[tables.interval(tables.DELTA)]
                axis.errorbar(x, y, yerr=None if pd.isna(half) else half, color=colour, marker=marker, ls="",
                              ms=6, capsize=2, label=row.title)  # fmt: skip
            _front(axis, points)
            # A paper's GPU is no CPU: there its memory and time have no place.
            for index, row in enumerate(printed if column == tables.TP or not cpu else []):
                x = row[{tables.TP: "tp_m"}.get(column, "memory_gb" if "memory" in column else "seconds_per_batch")]
                axis.plot(x, row["delta_m"], marker=MARKERS[index % len(MARKERS)], mfc="none", mec="#777777",
                          ls="", ms=6, label=f"{row['row']} {published.MARK}")  # fmt: skip
            axis.set_xlabel(f"{label} (log)")
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(plain)
            axis.xaxis.set_major_formatter(plain)
            axis.xaxis.set_minor_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
            axis.tick_params(axis="x", which="both", labelsize=7)
        axes[0].set_ylabel("\n".join(textwrap.wrap(_delta_label(group, choice.reference), 28)), fontsize=8)
        legend_below(figure, axes[0])
        extra = [
            f"{published.MARK} printed in the papers, of other data and another GPU: PASCAL-Context, GB, Δm over "
            "its four tasks"
        ]
        caption(figure, [*_about(group), *_left_out(group, [r.title for r in rows]), *(extra if printed else [])])
        yield group.slug, figure


def _printed(group: Group, rows: Sequence[Row]) -> list[dict[str, Any]]:
    names = {row.records[0].method.published_row for row in rows} - {None}
    return published.efficiency_rows(names, group.spec.backbone).to_dict("records")


def _delta_label(group: Group, reference: str | None) -> str:
    base = tables.baseline(group, reference)
    return f"Δm, %, against {base.title.lower()}" if reference else "Δm, % against single-task"


def _front(axis: Axes, points: Sequence[tuple[float, float]]) -> None:
    best = front([p for p in points if not any(map(pd.isna, p))])
    if len(best) > 1:
        axis.step(*zip(*best, strict=True), where="post", color="#999999", lw=1, zorder=0, label="Pareto front")


def memory(groups: Sequence[Group], choice: Choice) -> Drawn:
    """Peak memory while a training step is in each phase: measured on a GPU, else the estimate, and which is said."""
    drawn = False
    for group in groups:
        rows = [(row, *_phases(row.records)) for row in rows_of(group, None)]
        rows = [(row, phases, kind) for row, phases, kind in rows if phases]
        for kind in dict.fromkeys(kind for *_, kind in rows):
            own = [(row, phases) for row, phases, other in rows if other == kind]
            figure, (axis,) = panels(1, 6.2, 0.8 + 0.55 * len(own))
            places = np.arange(len(own))[::-1]
            for index, (phase, name) in enumerate(PHASES.items()):
                sizes = [phases.get(phase, 0) / tables.GIB for _, phases in own]
                axis.barh(places + 0.3 - 0.2 * index, sizes, 0.2, color=COLOURS[index], label=name)
            axis.set_yticks(places, ["\n".join(textwrap.wrap(row.title, 26)) for row, _ in own])
            axis.set_xlabel(f"GiB, {kind}")
            axis.grid(axis="y", visible=False)
            legend_below(figure, axis, 4)
            caption(figure, _about(group))
            drawn = True
            yield f"{group.slug}-{kind.split()[0]}", figure
    if not drawn:
        raise BenchError("no record holds memory by phase: records of a GPU measure it, all of them estimate it")


def _phases(records: Sequence[Record]) -> tuple[dict[str, int], str]:
    for record in records:
        if record.memory and record.memory.phases:
            return record.memory.phases, "measured, peak allocated"
    for record in records:
        if record.estimate and record.estimate.phases:
            return record.estimate.phases, "estimated for a CUDA GPU, not measured"
    return {}, ""


def sweep(groups: Sequence[Group], choice: Choice) -> Drawn:
    """An option's values against Delta-m (or each task's figure, where there is none) and parameters: the reduction
    factor r of ours (BDTA, Fig. 3), rho and m of VMT-Adapter. A line a backbone."""
    drawn = False
    for bundle in papers.bundles(groups):
        found: dict[tuple[str, str], dict[str, list[tuple[float, Row]]]] = {}
        for group in bundle:
            for row in rows_of(group, choice.reference):
                info = row.records[0].method
                for name, value in info.options.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool):
                        found.setdefault((info.name, name), {}).setdefault(group.spec.backbone, []).append((value, row))
        for (method, option), by_group in found.items():
            values = {value for points in by_group.values() for value, _ in points}
            if len(values) < 2 or (choice.option is not None and option != choice.option):
                continue
            drawn = True
            yield f"{method}-{option}-{bundle[0].slug}", _sweep(bundle, method, option, by_group, choice.reference)
    if not drawn:
        wanted = f"option {choice.option}" if choice.option else "an option"
        raise BenchError(f"no method was run with several values of {wanted}; e.g. bench run --suite fig3")


def _sweep(
    bundle: Sequence[Group],
    method: str,
    option: str,
    by_backbone: Mapping[str, list[tuple[float, Row]]],
    reference: str | None,
) -> Figure:
    # Where other options differ as well, a line would mix them: only rows that vary this one alone.
    alone = {backbone: _varying_alone(points, option) for backbone, points in by_backbone.items()}
    has_delta = any(pd.notna(row.values[tables.DELTA]) for points in alone.values() for _, row in points)
    tasks = bundle[0].spec.tasks
    columns = [tables.DELTA] if has_delta else [tables.headline(bundle[0], task) for task in tasks if bundle[0].trained]
    figure, axes = panels(len(columns) + 1, 2.9, 2.5)
    for axis, column in zip(axes, [*columns, tables.TP], strict=True):
        for index, (backbone, points) in enumerate(alone.items()):
            colour, marker, line = look(index)
            points = sorted((p for p in points if pd.notna(p[1].values[column])), key=lambda p: p[0])
            halves = [row.values.get(tables.interval(column), float("nan")) for _, row in points]
            axis.errorbar([v for v, _ in points], [row.values[column] for _, row in points],
                          yerr=None if all(map(pd.isna, halves)) else np.nan_to_num(halves),
                          color=colour, marker=marker, ls=line, capsize=2, label=backbone)  # fmt: skip
        values = sorted({value for points in alone.values() for value, _ in points})
        if values[0] > 0 and values[-1] >= 4 * values[0]:
            axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(f"{option} of {method}")
        axis.set_title(_delta_label(bundle[0], reference) if column == tables.DELTA else column, fontsize=8)
    gone = [row for points in alone.values() for _, row in points if has_delta and pd.isna(row.values[tables.DELTA])]
    told = ", ".join(f"{row.title} ({row.values[tables.STATUS]})" for row in gone)
    legend_below(figure, axes[0], 2)
    caption(figure, [*_about(bundle[0]), *([f"without Δm: {told}"] if gone else [])])
    return figure


def _varying_alone(points: list[tuple[float, Row]], option: str) -> list[tuple[float, Row]]:
    def rest(row: Row) -> tuple:
        return tuple((k, v) for k, v in sorted(row.records[0].method.options.items()) if k != option)

    common = pd.Series([rest(row) for _, row in points]).mode().iloc[0]
    return [(value, row) for value, row in points if rest(row) == common]


def ablation(groups: Sequence[Group], choice: Choice) -> Drawn:
    """Delta-m of each method over backbones and decoders (VMT-Adapter, Fig. 5); a figure for each set of records that
    differ in nothing else."""
    sets: dict[str, list[Group]] = {}
    apart = ("backbone", "weights", "weights_used", "decoder", "protocol")
    for group, _ in _trained(groups, choice.reference):
        common = {k: v for k, v in group.key.items() if k not in apart} | {"random": group.random}
        sets.setdefault(json.dumps(common, sort_keys=True), []).append(group)
    drawn = False
    for alike in sets.values():
        members = _trained(by_one_metric(alike), choice.reference)
        bars: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
        for group, rows in members:
            decoder = group.spec.decoder or (
                "segformer" if group.spec.protocol == "equal" else "the paper's own decoder"
            )
            for row in rows:
                if row.records[0].method.name != tables.BASELINE:
                    half = row.values[tables.interval(tables.DELTA)]
                    bars.setdefault(row.title, {})[group.spec.backbone, decoder] = (row.values[tables.DELTA], half)
        if len({key for values in bars.values() for key in values}) > 1:
            drawn = True
            yield members[0][0].slug, _bars(bars, papers.setting_of([group for group, _ in members]))
    if not drawn:
        raise BenchError("no records differ in backbone or decoder alone: there is nothing to set side by side")


def _bars(bars: Mapping[str, Mapping[tuple[str, str], tuple[float, float]]], about: str) -> Figure:
    keys = sorted({key for values in bars.values() for key in values})
    figure, (axis,) = panels(1, max(4.0, 0.5 * len(bars) * len(keys) + 1.5), 2.8)
    width = 0.8 / len(keys)
    for index, key in enumerate(keys):
        places, heights, halves = [], [], []
        for place, values in enumerate(bars.values()):
            if key in values:
                places.append(place - 0.4 + width * (index + 0.5))
                heights.append(values[key][0])
                halves.append(values[key][1])
        axis.bar(places, heights, width * 0.92, color=COLOURS[index % len(COLOURS)], label=", ".join(key),
                 yerr=None if all(map(pd.isna, halves)) else np.nan_to_num(halves), capsize=2)  # fmt: skip
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(bars)), ["\n".join(textwrap.wrap(title, 16)) for title in bars], fontsize=7)
    axis.set_ylabel("Δm, %")
    axis.grid(axis="x", visible=False)
    legend_below(figure, axis, 2)
    caption(figure, [about])
    return figure


def gradients(groups: Sequence[Group], choice: Choice) -> Drawn:
    """How the cosines of two tasks' gradients on shared parameters are spread over training (VMT-Adapter, Fig. 4)."""
    drawn = False
    for group in groups:
        found = {}
        for records in group.methods():
            values = [v for record in records for pair in record.cosines.values() for v in pair]
            if values:
                probes = max(len(pair) for record in records for pair in record.cosines.values())
                found[f"{_common_title(group, records)}, {probes} probes"] = np.array(values)
        if not found:
            continue
        drawn = True
        figure, (axis,) = panels(1, 4.6, 2.8)
        widest = max(0.05, *(np.quantile(np.abs(values), 0.99) for values in found.values()))
        bins = np.linspace(-widest, widest, 41)
        for index, (title, values) in enumerate(found.items()):
            colour, _, _ = look(index)
            line = LINES[index % len(LINES)]
            against = (values < 0).mean()
            share = np.full(len(values), 100 / len(values))
            axis.hist(values.clip(-widest, widest), bins, weights=share, histtype="step", color=colour, ls=line, lw=1.4,
                      label=f"{title}: {against:.0%} below 0")  # fmt: skip
        axis.axvline(0, color="black", lw=0.8)
        axis.set_xlabel("cosine between two tasks' gradients")
        axis.set_ylabel("% of pairs and probes")
        legend_below(figure, axis, 1)
        caption(figure, _about(group))
        yield group.slug, figure
    if not drawn:
        raise BenchError("no record holds gradient cosines: bench run --probe-gradients 100 --fresh takes them")


def similarity(groups: Sequence[Group], choice: Choice) -> Drawn:
    """Similarity of every two tasks, as progressive adaptation found it before training, and the groups it made."""
    drawn = False
    for group in groups:
        for records in group.methods():
            for record in records:
                if "similarity" not in record.preparation:
                    continue
                drawn = True
                yield f"{record.spec.hash}-s{record.spec.seed}", _similarity(group, record)
    if not drawn:
        raise BenchError("no record holds a task similarity; progressive finds one: bench run --methods progressive")


def _similarity(group: Group, record: Record) -> Figure:
    matrix = np.array(record.preparation["similarity"], dtype=float)  # NaN where no batch had labels of both
    names = [TASKS[task].title for task in record.preparation["tasks"]]
    figure, (axis,) = panels(1, 3.6, 3.2)
    heat(axis, matrix, names, names, -1, 1, "RdBu")
    members = " | ".join("+".join(TASKS[t].title for t in each) for each in record.preparation["groups"])
    axis.set_title(f"groups: {members}", fontsize=8)
    caption(figure, _about(group))
    return figure


def heat(
    axis: Axes, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], low: float, high: float, colours: str
) -> None:
    """A matrix with its figures written in."""
    axis.imshow(matrix, vmin=low, vmax=high, cmap=colours)
    axis.grid(visible=False)
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    for (row, column), value in np.ndenumerate(matrix):
        share = (value - low) / (high - low)
        dark = abs(share - 0.5) > 0.32 if colours == "RdBu" else share < 0.55
        axis.text(
            column,
            row,
            f"{round(value, 2) + 0:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )


def curves(groups: Sequence[Group], choice: Choice) -> Drawn:
    """Training losses over the steps: the weighted sum and each task's, a line a method (mean over seeds)."""
    drawn = False
    for group in groups:
        histories = [
            (place, _common_title(group, records), _history(records)) for place, records in enumerate(group.methods())
        ]
        found = [(place, title, history) for place, title, history in histories if history is not None]
        if not found:
            continue
        drawn = True
        keys = {"loss": "weighted sum"} | {f"loss/{task}": TASKS[task].title for task in group.spec.tasks}
        figure, axes = panels(len(keys), 2.6, 2.2, columns=3)
        for axis, (key, name) in zip(axes, keys.items(), strict=True):
            for place, title, history in found:
                colour, _, line = look(place)
                axis.plot(history["step"], history[key], color=colour, ls=line, lw=1.1, label=title)
            axis.set_title(name, fontsize=8)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(plain)
            axis.yaxis.set_minor_formatter(plain)
            axis.yaxis.set_minor_locator(LogLocator(subs=(1, 2, 3, 5), numticks=12))
            axis.tick_params(labelsize=7, which="both")
            axis.set_xlabel("step", fontsize=7)
        for axis in axes[::3]:
            axis.set_ylabel("training loss (log)", fontsize=7)
        legend_below(figure, axes[0])
        smooth = "training losses, means over seeds, smoothed over a twentieth of the run"
        caption(figure, [smooth, *_about(group), *_left_out(group, [title for _, title, _ in found])])
        yield group.slug, figure
    if not drawn:
        raise BenchError("no record holds a training history: all of them measured efficiency alone")


def _common_title(group: Group, records: Sequence[Record]) -> str:
    """As the tables have it: with the options where several rows have the same title."""
    return tables.measured_row(group, records, tables.Baseline("", None))[tables.METHOD]


def _history(records: Sequence[Record]) -> pd.DataFrame | None:
    """Mean over seeds by step, smoothed over a twentieth of the run: single batches are noisy."""
    frames = [pd.DataFrame(record.history) for record in records if record.history]
    if not frames:
        return None
    mean = pd.concat(frames).groupby("step").mean()
    return mean.rolling(max(1, len(mean) // 20), min_periods=1).mean().reset_index()


FIGURES: dict[str, Callable[[Sequence[Group], Choice], Drawn]] = {
    "pareto": pareto,
    "memory": memory,
    "sweep": sweep,
    "ablation": ablation,
    "gradients": gradients,
    "similarity": similarity,
    "curves": curves,
}
