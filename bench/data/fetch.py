"""`bench data fetch`: a dataset's archive from the address on its card, checked and unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bench.data.card import Card
from bench.errors import BenchError, first_line

CHUNK = 1 << 20


def fetch(card: Card, folder: Path, console: Console) -> Path:
    """Download, verify and unpack below `folder`; where the data root then is.

    An interrupted download is taken up where it stopped. Raises BenchError, with the manual step where the card has no
    address.
    """
    if card.source != "files":
        raise BenchError(f"dataset {card.name} is rendered by bench itself: there is nothing to fetch")
    if card.fetch is None or not card.fetch.url:
        manual = card.fetch.manual if card.fetch else "see its homepage"
        raise BenchError(f"{card.name} cannot be fetched: {manual} ({card.homepage or 'no homepage on the card'})")
    if not hasattr(tarfile, "data_filter"):
        raise BenchError("unpacking safely needs Python 3.11.4 or newer; unpack the archive by hand")
    root = folder / card.fetch.folder
    if root.exists():
        raise BenchError(f"{root} is there already; delete it, or run with --data-root {root}")
    console.print(f"{card.title}\nlicence: {escape(card.licence or 'none stated')}  {card.homepage}", soft_wrap=True)
    archive = folder / Path(card.fetch.url).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.is_file():
            download(card.fetch.url, archive, console)
        digest = sha256(archive)
        if card.fetch.sha256 and digest != card.fetch.sha256:
            raise BenchError(
                f"{archive} has SHA-256 {digest}, not the card's {card.fetch.sha256}; delete it and try again"
            )
        archive.with_name(f"{archive.name}.sha256").write_text(f"{digest}  {archive.name}\n", encoding="utf-8")
        unpack(archive, folder, card.fetch.folder)
    except OSError as error:
        raise BenchError(f"cannot write below {folder}: {error.strerror or error}") from error
    known = "as the card says" if card.fetch.sha256 else "the card knows none: compare it with a colleague's"
    console.print(f"SHA-256 {digest} ({known})", soft_wrap=True)
    return root


def download(url: str, target: Path, console: Console) -> None:
    """To `target`, by way of a partial file that a second call goes on from. Raises BenchError."""
    part = target.with_name(f"{target.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    columns = TextColumn(target.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    try:
        with urllib.request.urlopen(request, timeout=60) as answer, Progress(*columns, console=console) as progress:
            resumed = start > 0 and answer.status == 206
            length = answer.headers.get("Content-Length")
            done = start if resumed else 0
            total = done + int(length) if length else None
            bar = progress.add_task("", total=total, completed=done)
            with part.open("ab" if resumed else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    done += len(chunk)
                    progress.update(bar, completed=done)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # asked for more of a file that is whole
            raise BenchError(f"{url} answers {error.code} {error.reason}; is the address still right?") from error
        total = done = start
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise BenchError(
            f"cannot reach {url}: {reason}; the same command goes on where this one stopped, or with the archive "
            f"downloaded by other means to {target}"
        ) from error
    if total is not None and done < total:
        raise BenchError(f"{url} broke off after {done} of {total} bytes; the same command goes on from there")
    os.replace(part, target)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path, expected: str) -> None:
    """The archive's folder `expected` to folder/expected, whole or not at all. Raises BenchError for an archive that is
    damaged, reaches outside or holds something else."""
    staging = folder / f".{archive.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tarfile.open(archive) as held:
            held.extractall(staging, filter="data")
        if not (staging / expected).is_dir():
            found = ", ".join(sorted(path.name for path in staging.iterdir())[:5]) or "nothing"
            raise BenchError(f"{archive} has no folder {expected}; it holds {found}")
        os.replace(staging / expected, folder / expected)
    except tarfile.FilterError as error:
        raise BenchError(f"{archive} is not unpacked, do not trust it: {error}") from error
    except (tarfile.TarError, EOFError) as error:
        reason = first_line(error).rstrip(":")
        raise BenchError(f"{archive} is damaged or no tar archive ({reason}); delete it and fetch it again") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(staging)
