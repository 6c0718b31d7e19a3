"""What an exception means for a cell: out of memory, diverged, interrupted, or a failure of another kind."""

from __future__ import annotations

import traceback

from bench.errors import BenchError, first_line
from bench.record import Failure, Status
from methods.registry import MethodError, place

KILLED = "the system kills so when memory runs out"


def classify(error: BaseException) -> tuple[Status, Failure]:
    """An exception as a record's status and failure."""
    text = str(error).strip()
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Failure(
            kind=kind, message="interrupted; the same command goes on from the last checkpoint"
        )
    trace = "".join(traceback.format_exception(error))
    memory = kind == "OutOfMemoryError" or isinstance(error, MemoryError)
    # The last two are cuBLAS's and cuDNN's.
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    if memory or (isinstance(error, RuntimeError) and any(sign in text for sign in signs)):
        return "out_of_memory", Failure(
            kind=kind, message=first_line(error) if text else "out of memory", traceback=trace
        )
    if kind == "DivergedError":
        return "diverged", Failure(kind=kind, message=text)
    if isinstance(error, (BenchError, MethodError)):
        # From a loader's worker process the message comes after that process's traceback.
        own = text.rpartition("bench.errors.BenchError: ")[2] if text.startswith("Caught BenchError in") else text
        return "failed", Failure(kind=kind, message=" ".join(own.split()) or kind)
    message = first_line(error)
    if kind == "BrokenProcessPool":
        message = f"a process that scores edges was killed; {KILLED}"
    return "failed", Failure(kind=kind, message=message + place(error), traceback=trace)
