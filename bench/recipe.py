"""A recipe says how to train: optimizer, schedule, augmentation, loss weights, how long. A YAML file each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bench import yamlfile
from bench.errors import did_you_mean
from bench.tasks import TASKS

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(Strict):
    """`backbone_factor`: where the whole backbone is trained, its parameters learn at this share of the rate (DETR,
    Carion et al., 2020, has 0.1): one rate rarely suits both them and a decoder that starts from nothing. Methods that
    train a part of it, biases say, are not concerned; they want the rate of what is new. What suits one backbone need
    not suit another: the methods concerned have an option of this name that goes before.

    `adaptation_factor`: the same for what a method adds, and for the part of the backbone that it unfreezes: all that
    is trained outside the decoder, but for a backbone trained whole. It may exceed 1."""

    name: Literal["adamw", "adam", "sgd"]
    lr: Positive | None = None  # None where the recipe tunes it
    backbone_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    adaptation_factor: Positive = 1.0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    momentum: Fraction = 0.9  # sgd only
    base_batch_size: Annotated[int, Field(gt=0)] | None = None  # lr is quoted at this batch size and scales with it
    decay_one_dimensional: bool = True  # False exempts biases, norms and gates from weight decay


class Schedule(Strict):
    """Learning rate as a function of the step. Fractions are of the base rate; `warmup` of the whole run."""

    name: Literal["constant", "linear", "cosine", "poly"]
    warmup: Fraction = 0.0
    warmup_start: Fraction = 0.0
    final: Fraction = 0.0
    power: Positive = 0.9  # poly only


class Augment(Strict):
    """Training augmentation; every figure is drawn uniformly from its range, for each image and epoch anew.

    rotate, scale   degrees to either side and zoom about the centre, the size stays (the MTLoRA family; `scales` lists
                    zooms to choose from instead, as that family does on NYUD); what comes from outside is black in the
                    image and has no label with `border: ignore`, or counts as background with `border: background`, as
                    in the family's code
    crop_scale      instead of squashing an image to the training size: enlarge it by a factor of this range, then cut
                    out (or pad to) the training size, again while one class covers more than `crop_max_class` of the
                    cut-out, ten times at most (the TIT set-up)
    photometric     brightness by 32/255, contrast and saturation by 0.5 to 1.5, hue by 18 degrees; each half the time
    """

    hflip: Fraction = 0.5
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    scales: tuple[Positive, ...] = ()
    border: Literal["ignore", "background"] = "ignore"
    crop_scale: tuple[Positive, Positive] | None = None
    crop_max_class: Fraction = 0.75
    photometric: bool = False

    @model_validator(mode="after")
    def _one_zoom(self) -> Augment:
        if self.scales and self.scale != (1.0, 1.0):
            raise ValueError("give scale, a range, or scales, a list to choose from, not both")
        return self

    def zoom(self, draw: float) -> float:
        """The zoom that a uniform draw in [0, 1) stands for."""
        if self.scales:
            return self.scales[int(draw * len(self.scales))]
        low, high = self.scale
        return low + (high - low) * draw


class Measure(Strict):
    """How many full training steps the efficiency figures rest on."""

    warmup: Annotated[int, Field(ge=0)] = 3
    steps: Annotated[int, Field(ge=1)] = 10


class Tuning(Strict):
    """Learning rates that every method tries before it trains, each in a trial of its own: the same number of trials
    of the same length for all. A trial trains on the training split less its share `holdout` and is scored on that
    share; the validation split is not looked at. The rate with the best score is trained with. Where that is the
    smallest or the largest, up to `extend` rates beyond it are tried as well, one after the other."""

    rates: Annotated[tuple[Positive, ...], Field(min_length=2)]
    extend: Annotated[int, Field(ge=0)] = 0
    length: Annotated[float, Field(gt=0, le=1)] = 0.25  # of the run's steps
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the training images in use

    @field_validator("rates", mode="before")
    @classmethod
    def _several(cls, rates: Any) -> Any:
        if isinstance(rates, list) and len(rates) == 1:
            raise ValueError(f"one rate is nothing to choose from; write optimizer: {{lr: {rates[0]}}} and no tune")
        return rates

    @model_validator(mode="after")
    def _rates_differ(self) -> Tuning:
        if len(set(self.rates)) < len(self.rates):
            raise ValueError("a rate stands in rates twice")
        return self


class Recipe(Strict):
    title: str
    source: str = ""  # paper and section that the settings come from
    optimizer: Optimizer
    schedule: Schedule
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=0)] | None = None
    tune: Tuning | None = None
    clip_norm: Positive | None = None
    loss_weights: dict[str, Positive]
    augment: Augment = Augment()
    measure: Measure = Measure()
    image_size: yamlfile.ImageSize | None = None  # else the dataset card's
    limit_train: Annotated[int, Field(gt=0)] | None = None
    limit_val: Annotated[int, Field(gt=0)] | None = None

    @field_validator("loss_weights")
    @classmethod
    def _known(cls, weights: dict[str, float]) -> dict[str, float]:
        if odd := set(weights) - set(TASKS):
            raise ValueError(f"no task is called {min(odd)!r}{did_you_mean(min(odd), TASKS)}")
        return weights

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self

    @model_validator(mode="after")
    def _one_rate(self) -> Recipe:
        if (self.optimizer.lr is None) == (self.tune is None):
            raise ValueError("give exactly one of optimizer.lr and tune")
        return self

    def with_rate(self, rate: float) -> Recipe:
        """The same with this learning rate, and nothing left to tune."""
        return self.model_copy(update={"optimizer": self.optimizer.model_copy(update={"lr": rate}), "tune": None})

    @property
    def rates(self) -> str:
        """Its learning rate, or those that it tries, in words."""
        if self.tune is None:
            return f"{self.optimizer.lr:g}"
        more = f" (and up to {self.tune.extend} beyond)" if self.tune.extend else ""
        return " or ".join(f"{rate:g}" for rate in self.tune.rates) + more

    def untuned(self) -> Recipe:
        """For measuring steps whose outcome does not matter: a recipe that tunes with its middle rate."""
        return self.with_rate(sorted(self.tune.rates)[len(self.tune.rates) // 2]) if self.tune else self


def load(name: str) -> Recipe:
    """A built-in recipe by name, or a YAML file by path."""
    return yamlfile.load(yamlfile.find("recipes", name), Recipe)
