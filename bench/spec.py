"""RunSpec names one cell of a comparison completely; its content hash is how a finished cell is found again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bench.recipe import Recipe
from bench.tasks import TASKS
from methods.choices import DecoderName, MemoryUse, Protocol

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
EvalSize = Literal["network", "original"]  # where metrics are computed: the size the network sees, or the labels' own


class Trial(BaseModel):
    """Of a learning rate, on the training split alone; see bench.recipe.Tuning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: float  # of the run's steps
    holdout: float  # of the training images


# Of a recipe, what the spec itself has: an option may have overridden it.
SETTLED = {"batch_size", "epochs", "steps", "image_size", "limit_train", "limit_val"}


class RunSpec(BaseModel):
    """Everything that decides a cell's figures, and nothing else: no paths, no progress settings.

    `steps == 0` asks for parameters, memory and time only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str  # canonical expression, e.g. "bdta_mote[r=2]"
    backbone: str  # full timm name
    dataset: str
    data_fingerprint: str  # of the card, the ids and their contents; for efficiency alone, of the output channels
    tasks: tuple[str, ...]
    protocol: Protocol
    decoder: DecoderName | None  # None = the protocol's own
    recipe_name: str
    recipe: Recipe
    image_size: tuple[int, int]  # (height, width)
    batch_size: Annotated[int, Field(gt=0)]
    epochs: int | None
    steps: int | None
    precision: Precision
    memory: MemoryUse = "default"
    cudnn_benchmark: bool = False  # let cuDNN try out its convolution algorithms, which may take more workspace
    weights: str  # "timm", "random" or "file:<sha256>"
    limit_train: int | None = None
    limit_val: int | None = None
    eval_size: EvalSize = "network"
    shuffled_labels: bool = False  # every training image has the labels of another: nothing can be learnt of the image
    trial: Trial | None = None
    skipped: tuple[str, ...] = ()  # ids of unreadable images that the run does without
    device: str  # "cpu", or the GPU's name as a slug
    seed: int

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if odd := set(tasks) - set(TASKS):
            raise ValueError(f"no task is called {min(odd)!r}")
        return tasks

    @property
    def hash(self) -> str:
        """Twelve hex digits of the content. The seed is left out, so that the seeds of a cell sit side by side."""
        content = self.setting() | {"method": self.method}
        if self.recipe.tune and self.recipe.tune.extend:
            content["extend"] = self.recipe.tune.extend
        content = json.dumps(content, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def setting(self) -> dict[str, Any]:
        """What two cells must share to be compared: all but method and seed. A recipe counts by what it does: its
        name and prose decide nothing, nor does what the spec itself settles (its batch size, length and limits). How
        far learning rates may be extended matters only to a choice at their edge, and that reports mark."""
        setting = self.model_dump(
            mode="json",
            exclude={"method": True, "seed": True, "recipe_name": True, "recipe": {"title", "source"} | SETTLED},
        )
        recipe = setting["recipe"]
        later = (
            (setting, {"memory": "default", "cudnn_benchmark": False, "shuffled_labels": False, "trial": None}),
            (recipe, {"tune": None}),
            (recipe["optimizer"], {"backbone_factor": 1.0, "adaptation_factor": 1.0}),
        )
        for part, defaults in later:
            for name, default in defaults.items():
                if part[name] == default:  # as in records from before there was a choice
                    del part[name]
        if "tune" in recipe:
            del recipe["tune"]["extend"]
        return setting

    def relative_path(self) -> PurePosixPath:
        return PurePosixPath(self.device, self.dataset, self.backbone, self.method, f"{self.hash}-s{self.seed}.json")

    @property
    def device_kind(self) -> Literal["cpu", "cuda"]:
        return "cpu" if self.device == "cpu" else "cuda"


class Tried(BaseModel):
    """A learning rate and how its trial went."""

    model_config = ConfigDict(extra="forbid")

    rate: float
    status: str  # of the trial's record
    message: str = ""  # of its failure
    score: float | None = None  # see bench.tuning.score; None where the trial failed
    figures: dict[str, float | None] = {}  # task -> headline figure on the images held out
    metrics: dict[str, str] = {}  # task -> metric key of that figure
    commits: tuple[str, ...] = ()  # of the code that it ran with; several where it was interrupted


class Tuned(BaseModel):
    """The learning rate that a method trains with, and what it was chosen from."""

    model_config = ConfigDict(extra="forbid")

    rate: float | None  # None where no trial came to a score, or one failed for reasons that are not its rate's
    tried: tuple[Tried, ...]
    reason: str = ""  # why there is no rate


class Job(BaseModel):
    """A RunSpec and where its inputs and outputs lie on this machine."""

    spec: RunSpec
    out: Path
    card: str  # card name or path
    data_root: Path | None = None
    data_contents: dict[str, str] = {}  # split -> digits of its files, where there are any
    weights_path: Path | None = None
    device_index: int = 0
    device_name: str = ""
    workers: int = 0
    cache: Literal["none", "ram", "disk"] = "none"  # of decoded samples; changes no figure
    checkpoint_seconds: float = 60.0
    tuned: Tuned | None = None  # what the trials of a recipe that tunes have shown
    keep_weights: bool = True  # what training changed, beside the record
    probes: int = 0  # how often in all to compare the tasks' gradients
    estimate: bool = True  # predict the cell's memory beside what is measured

    @property
    def record_path(self) -> Path:
        return self.out / self.spec.relative_path()

    @property
    def checkpoint_path(self) -> Path:
        return self.record_path.with_suffix(".safetensors")

    @property
    def trained_path(self) -> Path:
        return trained_weights(self.record_path)

    @property
    def log_path(self) -> Path:
        return self.record_path.with_suffix(".log")


def trained_weights(record: Path) -> Path:
    """Where the trained part of a record's model lies."""
    return record.with_suffix(".trained.safetensors")
