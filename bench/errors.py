"""The one error that reaches a user as a single line instead of a traceback."""

from __future__ import annotations

from methods.registry import near as did_you_mean

__all__ = ["BenchError", "did_you_mean", "first_line"]


class BenchError(Exception):
    """Something the user can put right. The message is one line: what was wrong, and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
