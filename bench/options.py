"""What the words of an option mean, for every verb that has it and for a suite's settings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.errors import BenchError, did_you_mean

GIB = 2**30
LARGEST_SIDE = 2**14  # pixels; nobody trains on more


def one_of(option: str, value: str, choices: Sequence[str]) -> None:
    """Raises BenchError for a value that is not among the choices."""
    if value not in choices:
        raise BenchError(f"unknown {option} {value!r}{did_you_mean(value, choices)}; one of: {', '.join(choices)}")


def whole(option: str, text: str) -> int:
    """Raises BenchError for what is no whole number above zero."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*", text):
        raise BenchError(f"--{option} {text!r} is not a whole number above zero")
    return int(text)


def image_size(value: str | int) -> tuple[int, int]:
    """`448` or `HEIGHTxWIDTH` -> (height, width). Raises BenchError."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value).lower())
    if not match:
        raise BenchError(f"--image-size {value!r} is neither a number nor HEIGHTxWIDTH")
    height, width = int(match[1]), int(match[2] or match[1])
    if not 1 <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
        raise BenchError(f"--image-size {value!r}: a side has 1 to {LARGEST_SIDE} pixels")
    return height, width


def memory_size(option: str, text: str) -> int:
    """`24GB` or `24` -> bytes. GPUs are sold by 2^30 bytes whatever the label says. Raises BenchError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise BenchError(f"--{option} {text!r} is no size of a memory; e.g. 24GB")
    return int(float(match[1]) * GIB)


def seeds(text: str) -> list[int]:
    """Without doubled ones. Raises BenchError."""
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise BenchError(f"--seeds {text!r} is not a comma-separated list of whole numbers") from error
    if any(not 0 <= seed < 2**32 for seed in found):
        raise BenchError(f"--seeds {text!r}: a seed must be at least 0 and below 2^32")
    return found
