"""`bench profile --find-max-batch`: the largest batch that trains, found by trying, a try a process of its own."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from bench import processes
from bench.device import Device
from bench.errors import BenchError
from bench.one_line import say
from bench.options import GIB
from bench.step import Step

if TYPE_CHECKING:
    from bench.measure.probe import Answer, Request

MOST = 4096  # images; nobody trains with more


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest n up to `most` with fits(n), 0 where one does not; by doubling, then halving the gap."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def table(methods: str, of: Step, place: Device, limit: int | None, console: Console) -> pd.DataFrame:
    """A row a method: the largest batch, its peak in bytes and seconds a step, or the reason why there is none.

    `limit` in bytes. Raises BenchError or MethodError.
    """
    if not place.name and limit is None:
        raise BenchError("--find-max-batch on a CPU needs --memory-limit, e.g. 8GB: a machine that swaps never refuses")
    if not place.name and not sys.platform.startswith("linux"):
        raise BenchError("--memory-limit on a CPU needs Linux, whose kernel enforces it; use a GPU")

    from bench.measure.probe import Request

    able = of.fitting(methods, lambda line: say(console, line, soft_wrap=True))
    rows = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
        line = progress.add_task("")
        for method in able:
            answers: dict[int, Answer] = {}

            def fits(batch: int, expression: str = method.expression, answers: dict[int, Answer] = answers) -> bool:
                progress.update(line, description=escape(f"{expression}: a batch of {batch}"))
                request = Request(method=expression, step=of, batch_size=batch, cuda=bool(place.name), limit=limit)
                answers[batch] = _ask(request, place)
                return answers[batch].fits

            row = {"method": method.expression, "tries": 0}
            try:
                best = largest(fits)
                row |= {"batch": best, "tries": len(answers)}
                row |= {"peak": answers[best].peak, "seconds": answers[best].seconds} if best else {}
                row |= {"images a second": best / answers[best].seconds} if best else {}
            except BenchError as error:
                had_fit = max((batch for batch, answer in answers.items() if answer.fits), default=None)
                found = f"; a batch of {had_fit} had fit" if had_fit else ""
                row |= {"reason": f"{error}{found}", "tries": len(answers)}
            rows.append(row)
    columns = ["method", "batch", "peak", "seconds", "images a second", "tries", "reason"]
    return pd.DataFrame(rows, columns=columns)


def _ask(request: Request, place: Device) -> Answer:
    """Raises BenchError for a failure that is not one of memory."""
    from bench.measure.probe import Answer, reply

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process, heard = processes.start(reply, request, log, processes.environment(bool(place.name), place.index))
        try:
            answer = heard.recv()
        except EOFError:
            answer = None
        except BaseException:
            process.kill()
            raise
        finally:
            process.join()
            heard.close()
        if answer is None and process.exitcode == -signal.SIGKILL:  # so the system kills when memory runs out
            return Answer(fits=False)
        if answer is None:
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"a batch of {request.batch_size} ended with code {process.exitcode}: {last}")
    if answer.error:
        raise BenchError(f"a batch of {request.batch_size}: {answer.error}")
    return answer


def show(found: pd.DataFrame, heading: str, place: Device, limit: int | None, console: Console) -> None:
    out = Table(title=escape(heading), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("method", overflow="fold")
    for column in ("largest batch", "peak GiB", "s/batch", "images/s"):
        out.add_column(column, justify="right")
    for row in found.to_dict("records"):
        cells = [
            "–" if pd.isna(value) else f"{value / unit:.{digits}f}"
            for value, unit, digits in (
                (row["batch"], 1, 0), (row["peak"], GIB, 2), (row["seconds"], 1, 3), (row["images a second"], 1, 1)
            )
        ]  # fmt: skip
        out.add_row(escape(row["method"]), *cells)
    console.print(out)
    what = f"allocated on {place.name}" if place.name else "resident, of the whole process on a CPU"
    bound = f" within {limit / GIB:g} GiB" if limit else ""
    console.print(
        f"The largest batch of which two training steps ran{bound}, each try in a fresh process. Peak: {what}; time: "
        "of the last step, a single sample. Random weights, synthetic batch.",
        soft_wrap=True,
    )
    for row in found.to_dict("records"):
        if pd.notna(row["reason"]):
            console.print(escape(f"{row['method']}: {row['reason']}"), soft_wrap=True)
