"""What `bench run` can be asked for, and suites: such settings under a name."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bench import yamlfile

Positive = Annotated[int, Field(gt=0)]
# Options of `bench run` that no suite has.
OF_ONE_RUN = (
    "cache", "data-root", "device", "dry-run", "estimate", "no-estimate", "fresh", "keep-weights", "no-keep-weights",
    "out", "probe-gradients", "retry", "shared-gpu", "workers",
)  # fmt: skip


class Settings(BaseModel):
    """What a run is asked for. The same keys as the options of `bench run`, and as a suite's settings."""

    model_config = ConfigDict(extra="forbid")

    methods: str = ""
    backbone: str = "swin_tiny"
    dataset: str = "scenes"
    tasks: str | None = None
    protocol: str = "published"
    decoder: str | None = None
    recipe: str = "quick"
    image_size: str | int | None = None
    batch_size: Positive | None = None
    epochs: Positive | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    precision: str = "fp32"
    memory: str = "default"
    cudnn_benchmark: bool = False
    seeds: str | int = "0"
    weights: str = "auto"
    limit_train: Positive | None = None
    limit_val: Positive | None = None
    eval_size: str = "network"
    skip_bad: bool = False
    shuffle_labels: bool = False

    @field_validator("methods", "backbone", "tasks", "seeds", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A YAML list says the same as its values with commas between."""
        return ",".join(map(str, value)) if isinstance(value, list) else value

    @staticmethod
    def elsewhere(key: str) -> str:
        """Where an option of `bench run` belongs that is no setting; "" for what is no option."""
        option = key.replace("_", "-")
        return f"is of one machine or one run: give --{option} to `bench run`" if option in OF_ONE_RUN else ""


class Suite(BaseModel):
    """A named grid of cells: settings of `bench run`, some of which may be several values."""

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str = ""  # paper and table that it reruns
    settings: Settings


def load_suite(name: str) -> Suite:
    return yamlfile.load(yamlfile.find("suites", name), Suite)
