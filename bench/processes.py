"""Processes that measure: one a cell, so that nothing of one shows in another's memory, time or random state.

Importing torch and timm takes longer than many a measurement. So on Linux each process is forked from a server that has
imported them and done nothing else, as multiprocessing's forkserver does it; elsewhere each imports them anew, and so
does one whose code was changed since the server began. Variables that are read at import (of OpenMP, of torch's
allocator) are those of the first process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.resources import ROOT

METHOD = "forkserver" if sys.platform.startswith("linux") else "spawn"
# What every cell imports before its memory is measured, and none of it asks for a GPU. torchmetrics is not among it:
# only evaluation needs its hundred megabytes.
PRELOADED = [
    "accelerate",
    "bench.data.loader",
    "bench.measure.cuda",
    "bench.measure.estimate",
    "bench.measure.probe",
    "bench.measure.profile",
    "bench.run",
    "bench.train.loop",
    "bench.train.weights",
    "methods.build",
]
QUIET = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # what the server never hears: it ends with its last client
_served: dict[str, int] = {}  # the code as it was when the server began


def environment(cuda: bool, index: int) -> dict[str, str]:
    """Of a measuring process: this bench is the one it imports, and its GPU the only one it sees.

    On a CPU, idle OpenMP threads sleep instead of spinning: next to any other busy program, spinning makes a step
    about eight times slower, sleeping about twice; alone on the machine it costs some 7 %.
    """
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH"))))
    if cuda:
        visible = [part.strip() for part in found.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        found["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    else:
        found.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return found


def start(
    target: Callable[[Any, Connection], None], argument: Any, log: Path, environment: dict[str, str]
) -> tuple[BaseProcess, Connection]:
    """Begin `target(argument, connection)` in a process and session of its own; what it prints goes to `log`.

    Returns the process and the connection's end to listen at, which raises EOFError when the process is gone. Both
    `target` (by name) and `argument` are pickled. Raises OSError where the log cannot be written.
    """
    log.write_text("", encoding="utf-8")
    given = pickle.dumps((target, argument))  # read back where its failure goes to the log
    for method in _methods():
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload(PRELOADED)
        heard, told = context.Pipe(duplex=False)
        process = context.Process(target=_begin, args=(given, told, log, environment))
        try:
            with _inherited(environment):
                process.start()
            told.close()
            begun = heard.recv()
        except (EOFError, OSError):
            if process.pid is not None:  # it died at once: its exit code says how
                return process, heard
            begun = False  # the server could not import something
        except BaseException:
            if process.pid is not None:
                process.kill()
                process.join()
            raise
        finally:
            told.close()
        if begun:
            return process, heard
        heard.close()
        if process.pid is not None:
            process.join()
    raise RuntimeError("no process could be started")


def _methods() -> Iterator[str]:
    """How to start one, the next best where that did not do."""
    now = {str(path): path.stat().st_mtime_ns for part in ("bench", "methods") for path in (ROOT / part).rglob("*.py")}
    _served.update({} if _served else now)
    if now == _served:
        yield METHOD
    yield "spawn"


def _begin(given: bytes, told: Connection, log: Path, environment: dict[str, str]) -> None:
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)  # for what C libraries print as well
        os.dup2(file.fileno(), 2)
    os.setsid()  # Ctrl-C reaches the process that has started this one, and it alone
    signal.pthread_sigmask(signal.SIG_UNBLOCK, QUIET)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as they do everywhere
    target, argument = pickle.loads(given)
    begun = not _has_touched_a_gpu()
    told.send(begun)
    if begun:
        with redirect_stdout(sys.stderr):  # which holds no line back
            target(argument, told)


def _has_touched_a_gpu() -> bool:
    """Whether a library asked for one while the server imported it: CUDA works in no fork of that."""
    import torch

    opened = Path("/proc/self/fd")
    links = []
    for entry in opened.iterdir() if opened.is_dir() else ():
        with suppress(OSError):  # the listing's own
            links.append(os.readlink(entry))
    return torch.cuda._is_in_bad_fork() or any(link.startswith("/dev/nvidia") for link in links)


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """So many processes for work that needs nothing but numpy; None for fewer than two.

    They import what the work needs and nothing else. What has not begun at the end is not done.
    """
    if workers < 2:
        yield None
        return
    made = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent)
    try:
        yield made
    finally:
        made.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """For a pool's process. It leaves Ctrl-C to its parent and ends with it, however that ends: else those of a killed
    one live on, since they hold each other's pipes open."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _inherited(environment: dict[str, str]) -> Iterator[None]:
    """What is started here, a fork server among it, has this environment, no program to import and deaf ears; this
    process hears Ctrl-C a little later, when it knows what it has started."""
    resource_tracker.ensure_running()  # begun later, it would unblock the signals
    main, before, pending = sys.modules["__main__"], dict(os.environ), []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # a mask would hide them from this thread alone
            handlers[number] = signal.signal(number, lambda number, frame: pending.append(number))
    hidden = signal.pthread_sigmask(signal.SIG_BLOCK, QUIET)
    os.environ.update(environment)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        os.environ.clear()
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, hidden)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in pending:
            signal.raise_signal(number)
