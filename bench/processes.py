"""Processes that measure: one a cell, so that nothing of one shows in another's memory, time or random state.

Importing torch and timm takes longer than many a measurement. So on Linux each process is forked from a server that has
imported them and done nothing else; elsewhere each imports them anew.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
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
    "bench.measure.models",
    "bench.measure.probe",
    "bench.measure.profile",
    "bench.run",
    "bench.train.loop",
    "bench.train.trained",
    "methods.backbones.load",
]


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
    `target` (by name) and `argument` are pickled.
    """
    log.unlink(missing_ok=True)
    for method in (METHOD, "spawn"):
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload(PRELOADED)
        heard, told = context.Pipe(duplex=False)
        process = context.Process(target=_begin, args=(target, argument, told, log, environment))
        with _inherited(environment):
            process.start()
        told.close()
        try:
            begun = heard.recv()
        except EOFError:  # it died at once: its exit code says how
            break
        except BaseException:
            process.kill()
            process.join()
            raise
        if begun:
            break
        process.join()  # a library has asked for a GPU while it was imported, and CUDA works in no fork of that
    return process, heard


def _begin(
    target: Callable[[Any, Connection], None], argument: Any, told: Connection, log: Path, environment: dict[str, str]
) -> None:
    os.setsid()  # Ctrl-C reaches the process that has started this one, and it alone
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as they do everywhere
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)  # for what C libraries print as well
        os.dup2(file.fileno(), 2)
    import torch

    begun = not torch.cuda._is_in_bad_fork()
    told.send(begun)
    if begun:
        with redirect_stdout(sys.stderr):  # which holds no line back
            target(argument, told)


@contextmanager
def _inherited(environment: dict[str, str]) -> Iterator[None]:
    """What is started here, a fork server among it, has this environment and hears no Ctrl-C; this process hears it a
    little later. So the server finds this bench, and does not die with a traceback of its own while it imports."""
    resource_tracker.ensure_running()  # begun later, it would unblock the signal
    before = dict(os.environ)
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.environ.clear()
        os.environ.update(before)
