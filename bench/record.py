"""A Record is what one cell leaves behind: a JSON file that a person can read, diff and merge.

Written atomically, found again by the content hash of its spec. No torch here: reports read records without it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.errors import BenchError
from bench.files import write_atomically
from bench.spec import RunSpec, Tuned

SCHEMA = 1
REPORT = "report.json"  # what `bench report` writes among the records is none
Status = Literal["ok", "out_of_memory", "diverged", "failed", "interrupted"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MethodInfo(Part):
    """What the registry says of the cell's method, copied so that reports need no registry."""

    name: str
    aliases: tuple[str, ...] = ()
    title: str
    family: str
    citation: str = ""
    options: dict[str, Any] = {}  # all of them, defaults too: a later version may have others
    published_row: str | None = None  # the row of the papers' tables that these options stand for


class Failure(Part):
    kind: str  # exception class or "signal"
    message: str
    traceback: str = ""


class Weights(Part):
    """Where the frozen backbone's weights came from."""

    source: Literal["timm", "file", "random"]
    name: str = ""  # timm tag or file name
    sha256: str = ""  # of the file, where there is one


class GPUState(Part):
    """By NVML, at one moment; None for what the GPU does not tell."""

    temperature: int | None = None  # degrees Celsius
    watts: float | None = None
    clock: int | None = None  # of the multiprocessors, MHz
    clock_limit: int | None = None
    memory_clock: int | None = None
    throttled: list[str] = []  # why it runs slower than it could
    process_bytes: int | None = None  # of the cell's process: allocator, CUDA context and all
    others: int = 0  # other processes that compute on it


class Provenance(Part):
    """What the row was run on."""

    device: Literal["cpu", "cuda"]
    device_name: str  # GPU or CPU model
    driver: str | None = None
    cuda: str | None = None
    cores: int
    memory_gib: float
    threads: int | None = None  # of torch's own operators
    load_before: float | None = None  # runnable processes in the minute before the cell; its own do not count
    platform: str
    python: str
    packages: dict[str, str]
    commit: str | None = None
    dirty: bool | None = None
    code: str | None = None  # of the files that this cell is run by: bench.measure.code
    earlier_commits: list[str] = []  # other code that trained a part of it, before an interrupt
    earlier_code: list[str] = []
    data_fingerprint: str = ""
    data_contents: dict[str, str] = {}  # split -> digits of the files in use, by `bench.data.check.digits`
    weights: Weights | None = None
    gpu_before: GPUState | None = None  # before the steps that are measured
    gpu_after: GPUState | None = None
    started: str = ""  # ISO 8601, UTC
    seconds: float | None = None  # of the process that wrote the record, the last one of a resumed cell

    @property
    def busy(self) -> bool:
        """Whether others kept this CPU busy: its times say little. One above the cores, because the cell before in the
        same sweep is still in the average."""
        return self.device == "cpu" and (self.load_before or 0) > self.cores + 1

    def commits(self) -> list[str]:
        """Of all code that had a part in it."""
        return [*self.earlier_commits, *([self.commit] if self.commit else [])]


class Parameters(Part):
    """The trainable-parameter ledger. #TP = trainable = adaptation + backbone + decoder = shared + per_task."""

    total: int
    trainable: int
    adaptation: int
    backbone: int
    decoder: int
    shared: int
    per_task: int
    passes: int | None = None  # of the backbone, for one image


class Memory(Part):
    """Peaks of a full training step, in bytes; evaluation is never in them, `evaluation` is its own.

    On CUDA the allocator's peaks; on a CPU only the process's resident set, which holds everything.
    """

    device: Literal["cpu", "cuda"]
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    weights_allocated: int | None = None
    process_peak: int | None = None
    phases: dict[str, int] = {}  # CUDA: peak allocated while the step was in each phase
    evaluation: int | None = None  # CUDA: peak allocated by a batch's predictions, next to the trained model's state


class Time(Part):
    """Seconds a batch of full training steps, warm-up excluded; every sample kept.

    `phases` are the parts of the samples: forward, loss (upsampling, losses and their backward to the logits),
    backward, optimizer (clipping and step). `floor`: the forward of the frozen backbone alone, without gradients, in
    the same process; what no method with that backbone can be faster than. `queued`: what the GPU still had to do when
    the host had given it the last step; next to nothing where the GPU is the one that waits.
    """

    device: Literal["cpu", "cuda"]
    warmup: int
    samples: list[float] = Field(min_length=1)
    batch_size: int
    phases: dict[str, list[float]] = {}
    floor: list[float] = []
    matmul_rate: float | None = None  # operations a second of a large matrix product, in the same process and precision
    queued: float | None = None  # CUDA, without a loss scale

    @property
    def host_bound(self) -> bool:
        """Whether the samples are the host's time rather than the GPU's: less than a twentieth of a step was queued."""
        return self.queued is not None and self.queued < self.median / 20

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


class Estimated(Part):
    """What bench.measure.estimate predicts for a CUDA GPU; bytes, and operations of one step. Never a measurement."""

    peak: int | None = None
    weights: int | None = None
    phases: dict[str, int] = {}
    holders: dict[str, int] = {}  # the ten largest at the peak
    forward: int | None = None
    backward: int | None = None
    evaluation: int | None = None  # bytes
    reason: str = ""  # why there is none
    commit: str | None = None  # of the code that made it, where that was later than the record


class Record(Part):
    schema_version: int = Field(SCHEMA, alias="schema")
    status: Status
    spec: RunSpec
    method: MethodInfo
    failure: Failure | None = None
    provenance: Provenance | None = None
    parameters: Parameters | None = None
    memory: Memory | None = None
    time: Time | None = None
    estimate: Estimated | None = None
    metrics: dict[str, dict[str, float | None]] = {}  # task -> metric key -> value; None where nothing was valid
    edge_tolerance: float | None = None  # share of the diagonal within which odsF counts an edge
    per_class: dict[str, dict[str, float | None]] = {}  # task -> class name -> IoU in percent; None where absent
    floor: dict[str, dict[str, float | None]] = {}  # the same metrics of the best constant prediction
    floor_map: dict[str, dict[str, float | None]] = {}  # of the best prediction that knows the place, not the image
    tuned: Tuned | None = None  # the learning rate, where the recipe tunes it
    preparation: dict[str, Any] = {}  # what the method found out from training data before it trained
    trained_sha256: str = ""  # of the trained weights beside the record, where they were kept
    cosines: dict[str, list[float]] = {}  # "task,task" -> cosine of their gradients on shared parameters, as probed
    loader_wait: float | None = None  # seconds the training loop waited for data, in all
    history: list[dict[str, float]] = []  # step, loss, lr, loss of each task

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    def path(self, out: Path) -> Path:
        return out / self.spec.relative_path()

    def write(self, out: Path) -> Path:
        """Write atomically under `out`: readers see the old file or the new one, never half of one."""
        path = self.path(out)
        write_atomically(path, self.text())
        return path

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n"


def read(path: Path) -> Record:
    """Read one record. Raises BenchError in one line for a file that is no (whole) record of this schema."""
    try:
        if path.exists() and not path.is_file():
            raise BenchError(f"{path} is no file; take it out of the folder")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BenchError(
            f"{path} is no JSON, or half of it ({error}); if it was a record, delete it and run its cell again"
        ) from error
    version = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BenchError(f"{path} is not a bench record (no 'schema' number); take it out of the folder")
    if version > SCHEMA:
        raise BenchError(f"{path} has schema {version}, newer than this program's {SCHEMA}; update bench")
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BenchError(f"{path} is not a valid record: {where}: {first['msg']}") from error


@dataclass(frozen=True)
class Found:
    """A record and the file it came from."""

    path: Path
    record: Record


def scan(folder: Path) -> Iterator[Found | BenchError]:
    """Every record under `folder`, in path order; an unreadable file is yielded as its error, never fatal."""
    for path in sorted(folder.rglob("*.json")):
        if path.name == REPORT:
            continue
        try:
            yield Found(path, read(path))
        except BenchError as error:
            yield error
