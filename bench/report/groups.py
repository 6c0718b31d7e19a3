"""Which records may stand in one table: those that are equal in everything but method and seed."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.record import Found, Record, scan
from bench.report import published
from bench.spec import RunSpec
from bench.tasks import TASKS, Metric, headline

FAMILIES = ("fine-tuning", "single-task PEFT", "multi-task PEFT")


def collect(folder: Path) -> tuple[list[Found], list[str]]:
    """Every record under a folder but those of learning rates' trials, which are in the records that they were for; and
    a line for each JSON file that could not be read as one.

    Raises BenchError where there is no folder or no record.
    """
    advice = "make some with: bench run --methods ours,mtlora --backbone swin_tiny"
    if not folder.is_dir():
        raise BenchError(f"no folder {folder}; {advice}")
    everything = list(scan(folder))
    records = [item for item in everything if isinstance(item, Found)]
    found = [item for item in records if item.record.spec.trial is None]
    problems = [" ".join(str(item).split()) for item in everything if isinstance(item, BenchError)]
    if not found:
        if records:
            raise BenchError(
                f"{folder} has only trials of learning rates ({len(records)}); the same `bench run` goes on from them"
            )
        unreadable = f" ({len(problems)} unreadable, the first: {problems[0]})" if problems else ""
        raise BenchError(f"no record in {folder}{unreadable}; {advice}")
    return found, problems


@dataclass(frozen=True)
class Group:
    """Records that may stand in one table: equal in everything but method and seed.

    `key` is what they have in common, `title` the same for people, `marks` the warnings that go with every table. Where
    `any_device`, records of several devices may be among them, and accuracy is all that compares.
    """

    key: Mapping[str, Any]
    title: str
    slug: str
    marks: tuple[str, ...]
    found: tuple[Found, ...]
    any_device: bool = False
    shared: Mapping[str, Metric] | None = None  # task -> metric, where other groups stand beside this one

    @property
    def spec(self) -> RunSpec:
        """The first record's; method and seed are its own, the rest is common to all."""
        return self.found[0].record.spec

    @property
    def random(self) -> bool:
        return self.key["weights_used"] == "random"

    @property
    def trained(self) -> bool:
        return self.spec.steps != 0

    @functools.cached_property
    def headlines(self) -> Mapping[str, Metric]:
        """Task -> the one metric of it that stands in this group's tables."""
        return self.shared or {task: headline(task, _figures_of(self.found, task)) for task in self.spec.tasks}

    def methods(self) -> list[list[Record]]:
        """The records of each method (its seeds), by family and then title."""
        by_method: dict[str, list[Record]] = {}
        for item in self.found:
            by_method.setdefault(item.record.spec.method, []).append(item.record)
        return sorted(by_method.values(), key=lambda records: _order(records[0]))


def _figures_of(found: Iterable[Found], task: str) -> list[Mapping[str, float | None]]:
    """A task's figures, metric key -> value, in each good record that has some."""
    figures = (item.record.metrics.get(task) for item in found if item.record.status == "ok")
    return [each for each in figures if each]


def _told_by(found: Sequence[Found], tasks: Iterable[str]) -> list[str]:
    """A mark for each task that has another metric than its headline because some of the records lack that one."""
    marks = []
    for task in tasks:
        figures, wanted = _figures_of(found, task), TASKS[task].headline
        without = sum(wanted.key not in each for each in figures)
        if 0 < without < len(figures):
            lacking = f"{without} of {len(figures)} records have no {wanted.title}"
            marks.append(f"{TASKS[task].title} is told by {headline(task, figures).title}: {lacking}")
    return marks


def by_one_metric(members: Sequence[Group]) -> list[Group]:
    """Groups that are shown side by side: each task is told by one metric, which all of their records have."""
    found = [item for group in members for item in group.found]
    tasks = list(dict.fromkeys(task for group in members for task in group.spec.tasks))
    own = {mark for group in members for mark in _told_by(group.found, tasks)}
    marks = _told_by(found, tasks)
    shared = {task: headline(task, _figures_of(found, task)) for task in tasks}
    return [
        replace(group, shared=shared, marks=(*(mark for mark in group.marks if mark not in own), *marks))
        for group in members
    ]


def flat(setting: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in setting.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


COVERED = {"device": "device_used", "weights": "weights_used"}  # what was asked for, told by what was used


def differences(one: Group, other: Group) -> list[str]:
    """What keeps two groups apart, in words, this one's value first."""
    return settings_apart(one.key, other.key)


def settings_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two settings differ, in words, the first one's value first."""
    mine, theirs = flat(one), flat(other)
    keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    told = [key for key in keys if COVERED.get(key) not in keys]
    return [f"{key} {_short(mine.get(key))}, not {_short(theirs.get(key))}" for key in told]


def _short(value: Any) -> str:
    if isinstance(value, list) and value:
        return "x".join(map(str, value)) if all(isinstance(v, int) for v in value) else ", ".join(map(str, value))
    return "none" if value is None or value == [] else str(value)


@dataclass(frozen=True)
class Mixture:
    """Groups that one table shall hold all the same: `labels` say what sets each apart, in their order."""

    groups: tuple[Group, ...]
    labels: tuple[str, ...]
    title: str
    slug: str
    marks: tuple[str, ...]


def mixtures(apart: Sequence[Group]) -> list[Mixture]:
    """One for the groups of the same tasks and kind of device. Figures stay those of each group: its own baseline, its
    own seeds; nothing is averaged across settings."""
    buckets: dict[tuple, list[Group]] = {}
    for group in apart:
        buckets.setdefault((group.spec.tasks, group.spec.device_kind), []).append(group)
    made = []
    for (tasks, kind), alike in buckets.items():
        members = by_one_metric(alike)
        settings = [flat(group.key) for group in members]
        keys = sorted({key for setting in settings for key in setting})
        varying = [key for key in keys if len({json.dumps(setting.get(key)) for setting in settings}) > 1]
        told = [key for key in varying if COVERED.get(key) not in varying]
        labels = [
            ", ".join(f"{key.rpartition('.')[2]} {_short(setting.get(key))}" for key in told) for setting in settings
        ]
        marks = [f"MIXED, NOT COMPARABLE: rows differ in {', '.join(varying)}"] if varying else []
        own = dict.fromkeys(mark for group in members for mark in group.marks)
        # What sets rows apart in software may do so between groups as well as within one.
        drift = _drift([item for group in members for item in group.found])
        marks += [*drift, *(mark for mark in own if mark not in drift and not mark.startswith("rows "))]
        title = " · ".join([f"{len(members)} settings mixed", ", ".join(tasks), kind]) if varying else members[0].title
        slug = f"mixed-{kind}-{'-'.join(tasks)}" if varying else members[0].slug
        made.append(Mixture(tuple(members), tuple(labels), title, slug, tuple(marks)))
    return made


def _order(record: Record) -> tuple[int, str, str]:
    family = record.method.family
    rank = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
    return rank, record.method.title.lower(), record.spec.method


def groups(found: Iterable[Found], any_device: bool = False) -> list[Group]:
    """Split records into those that may be compared, ordered by title.

    With `any_device` the trained ones alone, whatever they ran on: between devices accuracy differs as it does between
    seeds, by how rounding takes training apart. Raises BenchError where there is none.
    """
    buckets: dict[str, list[Found]] = {}
    for item in found:
        setting = item.record.spec.setting()
        if any_device:
            del setting["device"]
            if item.record.spec.steps == 0:
                continue
        buckets.setdefault(json.dumps(setting, sort_keys=True), []).append(item)
    if not buckets:
        raise BenchError("no record was trained: --any-device compares accuracy alone, leave it out")
    made = [
        _group(setting, place, members, any_device)
        for setting, items in buckets.items()
        for place, members in _by_place(items, any_device).items()
    ]
    # Settings may differ in what no title spells out (an option of the recipe, say): then the slug tells them apart.
    titles = Counter(group.title for group in made)
    named = [
        replace(group, title=f"{group.title} · setting {group.slug[-6:]}") if titles[group.title] > 1 else group
        for group in made
    ]
    return sorted(map(functools.partial(_dated, among=named), named), key=lambda group: group.title)


def _dated(group: Group, among: Sequence[Group]) -> Group:
    """With a mark where the same settings were run later on other data: a label was corrected since, say."""

    def last(of: Group) -> str:
        good = (item.record for item in of.found if item.record.status == "ok")
        return max((record.provenance.started for record in good if record.provenance), default="")

    alike = [other for other in among if {**other.key, "data_fingerprint": group.spec.data_fingerprint} == group.key]
    newest = max(alike, key=last)
    if last(newest) <= last(group):
        return group
    mark = f"OLDER DATA: the same settings were run later on data {newest.spec.data_fingerprint[:8]}"
    return replace(group, marks=(mark, *group.marks))


Place = tuple[str | None, str | None]  # device and weights as found by the run itself; None where it died before
ANY = "any device"


def _place(record: Record) -> Place:
    seen = record.provenance
    if seen is None:
        return None, None
    cores = f", {seen.cores} cores" if seen.device == "cpu" else ""
    return f"{seen.device} ({seen.device_name}{cores})", weights_of(record) if seen.weights else None


def _anywhere(record: Record) -> Place:
    return ANY, _place(record)[1]


def weights_of(record: Record) -> str:
    """The weights that the run used, by its own account; by its spec's where it died before it loaded any."""
    used = record.provenance and record.provenance.weights
    return f"{used.source} {used.sha256[:12]}".strip() if used else record.spec.weights


def _by_place(items: Sequence[Found], any_device: bool) -> dict[Place, list[Found]]:
    """Split by device and weights. A cell that died before it knew them joins the one place it can belong to."""
    place_of = _anywhere if any_device else _place
    complete = {place for place in map(place_of, (item.record for item in items)) if None not in place}
    places: dict[Place, list[Found]] = {}
    for item in items:
        mine = place_of(item.record)
        fitting = [p for p in complete if all(a in (None, b) for a, b in zip(mine, p, strict=True))]
        places.setdefault(fitting[0] if len(fitting) == 1 else mine, []).append(item)
    return places


def _group(setting: str, place: Place, members: Sequence[Found], any_device: bool) -> Group:
    spec = members[0].record.spec
    device, weights = place[0] or spec.device, place[1] or spec.weights
    if any_device:
        devices = sorted({where for item in members if (where := _place(item.record)[0])})
        device = " and ".join(devices) or device
    key = json.loads(setting) | ({} if any_device else {"device_used": device}) | {"weights_used": weights}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:6]
    short = published.short_backbone(spec.backbone)
    kept, marks = _one_each(members)
    rates: dict[str, set[float | None]] = {}
    for item in kept:
        if item.record.tuned:
            rates.setdefault(item.record.spec.method, set()).add(item.record.tuned.rate)
    marks += [
        f"seeds of {method} were trained at different learning rates: {', '.join(f'{r:g}' for r in sorted(found))}"
        for method, values in rates.items() if len(found := values - {None}) > 1
    ]  # fmt: skip
    extended = {item.record.spec.recipe.tune.extend for item in kept if item.record.spec.recipe.tune}
    if len(extended) > 1:
        marks.append(
            "rows were not tuned alike: where the best rate was at the edge, some tried others beyond it, some did not"
        )
    marks += _told_by(kept, spec.tasks)
    if weights == "random":
        marks.insert(0, "RANDOM BACKBONE WEIGHTS, nothing was pretrained: accuracy and Delta-m do not rank the methods")
    if any_device and len(devices) > 1:
        marks.insert(0, f"rows ran on {len(devices)} devices: their accuracy compares, as that of seeds does")
    return Group(
        key=key,
        title=_title(members, device, weights),
        slug=re.sub(r"[^\w-]", "_", f"{spec.dataset}-{short}-{spec.protocol}-{digest}"),
        marks=(*marks, *_drift(kept, times=not any_device)),
        found=tuple(kept),
        any_device=any_device,
    )


def _title(members: Sequence[Found], device: str, weights: str) -> str:
    spec = members[0].record.spec
    length = f"{spec.epochs} epochs" if spec.steps is None else f"{spec.steps} steps" if spec.steps else "not trained"
    by_lines = headline("edge", _figures_of(members, "edge")).key == "ods_f"
    tolerances = sorted({t for item in members if by_lines and (t := item.record.edge_tolerance) is not None})
    whole = bool(spec.steps != 0 and spec.limit_train and spec.limit_train < spec.batch_size)
    return " · ".join(filter(None, (
        spec.dataset,
        f"data {spec.data_fingerprint[:8]}" if spec.data_fingerprint else "",
        ", ".join(spec.tasks),
        spec.backbone,
        f"protocol {spec.protocol}",
        f"decoder {spec.decoder}" if spec.decoder else "",
        f"recipe {' = '.join(sorted({item.record.spec.recipe_name for item in members}))}",
        length,
        f"train limited to {spec.limit_train}" if spec.limit_train else "",
        f"val limited to {spec.limit_val}" if spec.limit_val else "",
        "SHUFFLED LABELS" if spec.shuffled_labels else "",
        f"{len(spec.skipped)} unusable images skipped" if spec.skipped else "",
        f"{spec.image_size[0]}x{spec.image_size[1]}",
        ", ".join(_reach(spec, tolerance) for tolerance in tolerances),
        "evaluated at original size" if spec.eval_size == "original" else "",
        f"batch {spec.batch_size}" + (f" (trained on all {spec.limit_train} images at once)" if whole else ""),
        spec.precision,
        "cudnn.benchmark" if spec.cudnn_benchmark else "",
        "activation checkpointing" if spec.memory == "low" else "",
        "RANDOM backbone weights" if weights == "random" else f"{weights} weights",
        device,
    )))  # fmt: skip


def _reach(spec: RunSpec, tolerance: float) -> str:
    """How far from a true edge odsF counts one as found, in pixels where all labels have one size."""
    share = f"{100 * tolerance:g} % of the diagonal"
    if spec.eval_size == "original":
        return f"odsF within {share}"
    pixels = tolerance * math.hypot(*spec.image_size)
    return f"odsF within {share}, {pixels:.1f} pixels{' (NO TOLERANCE: less than one)' if pixels < 1 else ''}"


def _one_each(members: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """One record a method and seed: a cell found twice (merged folders) counts once, the latest good run of it."""
    cells: dict[tuple[str, int], list[Found]] = {}
    for item in members:
        cells.setdefault((item.record.spec.method, item.record.spec.seed), []).append(item)

    def rank(item: Found) -> tuple[bool, str]:
        seen = item.record.provenance
        return item.record.status == "ok", seen.started if seen else ""

    twice = {cell: len(copies) for cell, copies in cells.items() if len(copies) > 1}
    marks = [f"{n} records of {method}, seed {seed}: the latest good one counts" for (method, seed), n in twice.items()]
    return [max(copies, key=rank) for copies in cells.values()], marks


def _drift(found: Sequence[Found], times: bool = True) -> list[str]:
    """Warnings for records that ran on different software, which does not keep them apart; and for their times."""
    seen = [item.record.provenance for item in found if item.record.provenance]
    torch = sorted({p.packages["torch"] for p in seen if "torch" in p.packages})
    busy = dict.fromkeys(
        f"{item.record.spec.method} (load {p.load_before:.1f} on {p.cores} cores)"
        for item in found
        if (p := item.record.provenance) and p.busy
    )
    tried = [each for item in found if item.record.tuned for each in item.record.tuned.tried]
    commits = sorted({c[:10] for made in (*(p.commits() for p in seen), *(t.commits for t in tried)) for c in made})
    codes: dict[str, set[str]] = {}  # method -> code; that of another method differs anyway
    for item in found:
        if (p := item.record.provenance) and p.code:
            codes.setdefault(item.record.method.name, set()).update((p.code, *p.earlier_code))
    changed = [name for name, each in codes.items() if len(each) > 1]
    in_parts = [
        f"{item.record.spec.method} (seed {item.record.spec.seed})"
        for item in found
        if item.record.provenance and item.record.provenance.earlier_code
    ]
    threads: dict[int, dict[str, None]] = {}  # number of them -> methods
    for item in found:
        if (p := item.record.provenance) and p.device == "cpu" and p.threads:
            threads.setdefault(p.threads, {})[item.record.spec.method] = None
    each = "; ".join(f"{number} in {', '.join(threads[number])}" for number in sorted(threads))
    states = [state for p in seen for state in (p.gpu_before, p.gpu_after) if state]
    slow = sorted({reason for state in states for reason in state.throttled})
    of_times = [
        *([f"time measured with different numbers of threads: {each}"] if len(threads) > 1 else []),
        *([f"time measured on a busy machine: {', '.join(busy)}"] if busy else []),
        *([f"the GPU was slowed down while some rows were measured: {', '.join(slow)}"] if slow else []),
        *(["other processes were on the GPU of some rows"] if any(state.others for state in states) else []),
    ]
    return [
        *([f"rows ran on different torch versions: {', '.join(torch)}"] if len(torch) > 1 else []),
        *([f"rows come from different commits: {', '.join(commits)}"] if len(commits) > 1 else []),
        *(
            [f"rows or seeds of {', '.join(changed)} come from different code: --fresh runs them anew"]
            if changed
            else []
        ),
        *([f"rows were trained in part by other code, before an interrupt: {', '.join(in_parts)}"] if in_parts else []),
        *(of_times if times else []),
        *(["some rows come from a working tree with uncommitted changes"] if any(p.dirty for p in seen) else []),
    ]
