"""The one error that reaches a user as a single line instead of a traceback."""

from __future__ import annotations

from methods.registry import first_line
from methods.registry import near as did_you_mean

__all__ = ["BenchError", "did_you_mean", "first_line"]


class BenchError(Exception):
    """Something the user can put right. The message is one line: what was wrong, and what to do."""
