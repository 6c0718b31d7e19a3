"""Cells one after the other, each in a fresh process; what has been done is found again and not repeated."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError, safe_open

from bench import processes
from bench import record as records
from bench.errors import BenchError
from bench.failure import KILLED
from bench.measure import code
from bench.record import Failure, Record
from bench.run import blank_record, run_in_process
from bench.spec import Job
from bench.tuning import choose, next_rate, score, trial

GRACE_SECONDS = 120  # for a cell to finish its step and write its checkpoint after an interrupt


def finished(job: Job, retry: bool = False, fresh: bool = False, since: float = math.inf) -> Record | None:
    """The record of a cell that need not run again: any but an interrupted one, with `retry` only one that is ok, and
    with `fresh` none; these two count for records from before `since` alone (seconds of the clock), when the sweep
    began: another that shares its cells may have written later ones."""
    try:
        if job.record_path.stat().st_mtime >= since:
            retry = fresh = False
        if fresh:
            return None
        found = records.read(job.record_path)
    except (OSError, BenchError):
        return None  # none, or half a file, say: the cell runs again and replaces it
    return found if found.status == "ok" or (found.status != "interrupted" and not retry) else None


def forget_other_code(job: Job) -> None:
    """Delete the cell's checkpoint unless an interrupt left it, and this very code alone has trained so far: `--fresh`
    is for code that changed."""
    try:
        made = records.read(job.record_path)
    except BenchError:
        made = None
    codes = _checkpoint(job).get("codes")
    if made is None or made.status != "interrupted" or codes != [code.fingerprint(made.spec.method)]:
        job.checkpoint_path.unlink(missing_ok=True)


def _checkpoint(job: Job) -> dict[str, Any]:
    """What a cell's checkpoint says of itself; nothing where that cannot be read."""
    with suppress(SafetensorError, OSError, KeyError, ValueError):  # the cell says what is wrong with it
        with safe_open(job.checkpoint_path, "np") as file:
            said = json.loads((file.metadata() or {})["bench"])
            return said if isinstance(said, dict) else {}
    return {}


def other_code(made: Record) -> str:
    """Which other code than this a record comes from, in words; "" where it is this."""
    about = made.provenance
    if about is None or {about.code, *about.earlier_code} == {code.fingerprint(made.spec.method)}:
        return ""
    changed = " and changes to it" if about.dirty else ""
    return f"other code (commit {about.commit[:8]}{changed})" if about.commit else "other code"


def on_other_data(jobs: Sequence[Job]) -> str:
    """Which of these cells, new here, were run before and differ in the data alone, in words; "" for none."""
    pairs = []
    for job in jobs:
        if job.record_path.is_file():
            continue
        for path in job.record_path.parent.glob(f"*-s{job.spec.seed}.json"):
            with suppress(BenchError):
                before = records.read(path)
                alike = before.spec.model_copy(update={"data_fingerprint": job.spec.data_fingerprint})
                if alike.hash == job.spec.hash:
                    pairs.append((before, job))
    if not pairs:
        return ""
    before, now = pairs[-1]
    known = before.provenance.data_contents if before.provenance else {}
    changed = [split for split, digits in now.data_contents.items() if known.get(split, digits) != digits]
    what = f"files or ids of {' and '.join(changed)}" if changed else "the card, the ids or what is in a file"
    return (
        f"{len(pairs)} of these cells {'is' if len(pairs) == 1 else 'are'} here on other data "
        f"({before.spec.data_fingerprint[:8]}, now {now.spec.data_fingerprint[:8]}: {what} changed); "
        "tables keep them apart"
    )


def check_writable(out: Path) -> None:
    """Raise BenchError before anything runs if records cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BenchError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error


class Elsewhere(Exception):
    """Another sweep is at the cell, or at a trial that it needs."""


def run_all(jobs: Sequence[Job], console: Console, retry: bool = False, fresh: bool = False) -> list[Record]:
    """Run what is not done yet and return every cell's record. Raises KeyboardInterrupt after leaving a clean state.

    Sweeps of the same cells share them out: what another one is at comes last, and is waited for if need be.
    """
    results: dict[int, Record] = {}
    tried: dict[Path, Record] = {}  # trials of this sweep: the seeds of a cell share them
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    left = deque(enumerate(jobs))
    turned_away = 0  # since the last cell that came to an end
    began = time.time()
    with Progress(*columns, console=console, transient=False) as progress:
        cells = progress.add_task("cells", total=len(jobs), note="")
        while left:
            index, job = left.popleft()
            sweep = _Sweep(progress, console, retry, fresh, began, wait=turned_away >= len(left))
            try:
                results[index] = _run_cell(job, sweep, tried)
            except Elsewhere:
                left.append((index, job))
                turned_away += 1
                continue
            turned_away = 0
            progress.advance(cells)
    return [results[index] for index in range(len(jobs))]


@dataclass(frozen=True)
class _Sweep:
    """How a sweep shows and treats its cells; with `wait` it has nothing else to do than what another is at."""

    progress: Progress
    console: Console
    retry: bool
    fresh: bool
    began: float  # seconds of the clock
    wait: bool


def _run_cell(job: Job, sweep: _Sweep, tried: dict[Path, Record]) -> Record:
    """A cell's record, after the trials that it needs; its line is printed. Raises Elsewhere."""
    label = f"{escape(job.spec.method)} · {job.spec.backbone.split('.')[0]} · seed {job.spec.seed}"
    with only_here(job, label, sweep):
        result = finished(job, sweep.retry, sweep.fresh, sweep.began)
        verb = "kept" if result else "done"
        if result is None and job.spec.recipe.tune and job.spec.steps != 0:
            found: list[Record] = []
            while (rate := next_rate(job.spec.recipe.tune, found)) is not None:
                of_rate = trial(job, rate)
                if of_rate.record_path not in tried:
                    tried[of_rate.record_path] = _try(of_rate, label, sweep)
                found.append(tried[of_rate.record_path])
            job = job.model_copy(update={"tuned": choose(found)})
            if any(record.status == "interrupted" for record in found):  # by somebody else's signal
                result = blank_record(job)
                result.failure = Failure(kind="Interrupted", message=job.tuned.reason)
                if not (sweep.fresh and job.record_path.is_file()):  # nothing good is lost
                    result.write(job.out)
        if result is None:
            result = _run_shown(job, label, sweep)
    sweep.console.print(_summary(label, verb, result))
    return result


@contextmanager
def only_here(job: Job, label: str, sweep: _Sweep) -> Iterator[None]:
    """One sweep at a time: another that runs the same cell, or a trial that several seeds share, is waited for.

    Raises Elsewhere where the sweep does not wait.
    """
    path = job.record_path.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not sweep.wait:
                file.close()
                raise Elsewhere from None
            sweep.console.print(f"waiting   {label}: another bench run is at it")
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # its holder has taken the file away: there may be a new one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _run_shown(job: Job, label: str, sweep: _Sweep) -> Record:
    if sweep.fresh:
        forget_other_code(job)
    if job.checkpoint_path.is_file():
        sweep.console.print(f"resuming  {label}{_whence(job)}")
    line = sweep.progress.add_task(label, total=None, note="starting")
    result = _run_one(job, sweep.progress, line)
    sweep.progress.remove_task(line)
    return result


def _whence(job: Job) -> str:
    """From which step a cell goes on, and whether other code has trained so far."""
    about = _checkpoint(job)
    told = f" from step {about['step']}" if "step" in about else ""
    if about.get("codes") != [code.fingerprint(job.spec.method)]:
        commits = about.get("commits", [])
        last = None
        with suppress(BenchError):
            last = records.read(job.record_path).provenance
        changed = " and changes to it" if last and last.dirty and [last.commit] == commits[-1:] else ""
        other = f" (commit {', '.join(commit[:8] for commit in commits)}{changed})" if commits else ""
        told += f", trained by other code{other}: --fresh starts anew"
    return told


def _try(job: Job, label: str, sweep: _Sweep) -> Record:
    """A learning rate's trial, or its record from before. Raises Elsewhere."""
    label = f"{label.rpartition(' · ')[0]} · trial of lr {job.spec.recipe.optimizer.lr:g}"
    with only_here(job, label, sweep):
        found = finished(job, sweep.retry, sweep.fresh, sweep.began)
        result = _run_shown(job, label, sweep) if found is None else found
    verb = "kept" if found else "tried"
    if result.status != "ok":
        reason = f": {escape(result.failure.message)}" if result.failure else ""
        sweep.console.print(f"[red]{result.status.replace('_', ' ')}[/red]  {label}{reason}")
    else:
        value = score(result)
        told = "no score" if value is None else f"score {value:.4f} (higher is better)"
        origin = _origin(result) if found else ""
        sweep.console.print(f"{verb}  {label}: {told} on held-out training images{origin}")
    return result


def _run_one(job: Job, progress: Progress, line: TaskID) -> Record:
    job.record_path.parent.mkdir(parents=True, exist_ok=True)
    environment = processes.environment(job.spec.device_kind == "cuda", job.device_index)
    process, heard = processes.start(run_in_process, job, job.log_path, environment)
    told: set[str] = set()
    try:
        _listen(heard, told, lambda event: _show(event, progress, line))
        process.join()
    except BaseException:
        progress.update(line, note="stopping after this step")
        killed = _stop(process, heard, told)
        if "ended" not in told:
            _crashed(job, process.exitcode, "interrupted", killed).write(job.out)
        raise
    finally:
        heard.close()
    if "ended" in told:
        found = records.read(job.record_path)
        if found.status != "interrupted":  # by somebody else's signal
            job.log_path.unlink(missing_ok=True)
        return found
    crashed = _crashed(job, process.exitcode, "failed")
    crashed.write(job.out)
    return crashed


def _listen(heard: Connection, told: set[str], show: Callable[[dict], None], seconds: float | None = None) -> None:
    """Show what the cell tells until it is gone, or that time has passed in silence. `told` gets the events' names,
    "ended" as soon as its record is written: its exit code is not always to be had."""
    with suppress(EOFError):
        while heard.poll(seconds):
            event = heard.recv()
            told.add(event["event"])
            show(event)


def _stop(process: BaseProcess, heard: Connection, told: set[str]) -> bool:
    """Let the cell finish its step and write its record; whether it did not in time and was killed."""
    if process.exitcode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
    with suppress(KeyboardInterrupt):  # a second Ctrl-C: now
        _listen(heard, told, lambda event: None, GRACE_SECONDS)
        process.join(1)
    late = process.exitcode is None
    if late:
        process.kill()
        process.join()
    return late


def _crashed(job: Job, code: int, status: records.Status, by_us: bool = False) -> Record:
    """The record of a process that could not write its own; `by_us`: this one killed it."""
    record = blank_record(job)
    log = job.log_path.read_text(encoding="utf-8", errors="replace") if job.log_path.exists() else ""
    if code < 0:
        name = signal.Signals(-code).name
        why = "did not stop in time and was killed" if by_us else f"killed by {name}"
        why += f"; {KILLED}" if name == "SIGKILL" and not by_us else ""
        record.failure = Failure(kind="signal", message=why, traceback=log[-4000:])
    else:
        last = log.strip().splitlines()[-1] if log.strip() else "no message"
        record.failure = Failure(kind="exit", message=f"exit code {code}: {last}", traceback=log[-4000:])
    record.status = status
    return record


def _show(event: dict, progress: Progress, line: TaskID) -> None:
    if event["event"] == "phase":
        progress.update(line, note=event["name"], completed=0, total=None)
    elif event["event"] == "step":
        values = {"completed": event["step"], "total": event["total"]}
        if "loss" in event:
            values["note"] = f"train, loss {event['loss']:.3f}"
        progress.update(line, **values)


def _origin(kept: Record) -> str:
    """What a kept record may no longer stand for, in words."""
    other = other_code(kept)
    return f", measured by {other}: --fresh runs it again" if other else ""


def _summary(label: str, verb: str, result: Record) -> str:
    """A line of what a cell has come to, with the digits by which `bench show` finds its record."""
    name = f"[dim]({result.path(Path()).stem})[/dim]"
    if result.status != "ok":
        kept = "kept: " if verb == "kept" else ""
        other = f"by {other_code(result)}; " if verb == "kept" and other_code(result) else ""
        again = f" ({other}--retry runs it again)" if verb == "kept" else ""
        reason = f": {escape(result.failure.message)}" if result.failure else ""
        return f"[red]{kept}{result.status.replace('_', ' ')}[/red]  {label}{reason}{again} {name}"
    origin = _origin(result) if verb == "kept" else ""
    figures = f"{result.parameters.trainable / 1e6:.2f} M trainable, {result.time.median:.3f} s/batch"
    rate = f", lr {result.tuned.rate:g} of {len(result.tuned.tried)} tried" if result.tuned else ""
    return f"[green]{verb}[/green]  {label}: {figures} on {result.time.device}{rate}{origin} {name}"
