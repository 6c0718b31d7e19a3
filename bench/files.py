"""Files that are there whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.errors import BenchError


@contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """Where to write what becomes `path` when the block has ended well: readers see the old file or the new one, never
    half of one. Raises OSError; then nothing new is left.

    `alone`: nobody else writes it at the same time, and what a writer that was killed has left is taken away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process number: machines that share the folder may have the same ones.
    own = "" if alone else f"{uuid.uuid4().hex[:12]}."
    temporary = path.with_name(f".{path.name}.{own}tmp")
    if alone:
        temporary.unlink(missing_ok=True)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # as the user wants new files; safetensors' are their owner's alone
    try:
        yield temporary
        with suppress(OSError):  # of file systems that have no modes
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: Path, text: str) -> None:
    """Raises BenchError where the folder cannot be written."""
    try:
        with replacing(path) as temporary:
            # A file name that is not UTF-8 is told in escapes.
            temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}; choose another folder") from error
