"""A trained cell as a model again: from its record, the weights beside it, and the backbone's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench import record as records
from bench import resources
from bench.data import card as cards
from bench.data.card import Card
from bench.errors import BenchError
from bench.record import Record
from bench.report.show import resolve
from bench.spec import RunSpec, trained_weights

if TYPE_CHECKING:
    from methods.backbones.base import Backbone
    from methods.backbones.load import WeightSource
    from methods.model import MultiTaskModel


@dataclass(frozen=True)
class Trained:
    """`model` is in evaluation mode, on the CPU; `source`: where its backbone's weights come from."""

    path: Path
    record: Record
    card: Card
    model: MultiTaskModel
    source: WeightSource

    def backbone(self) -> Backbone:
        """As it was before a method touched it; in evaluation mode."""
        return _backbone(self.record.spec, self.source).eval()


def load(name: str, folder: Path, weights: Path | None, dataset: str | None) -> Trained:
    """The model of a record, named by its file or the beginning of its hash under `folder`.

    `weights`: the backbone's checkpoint, where the record's came from a file; `dataset`: the card, where it is no
    built-in one. Raises BenchError or MethodError in one line.
    """
    path = resolve(name, folder)
    record = records.read(path)
    spec = record.spec
    if spec.steps == 0 or record.status != "ok":
        state = "was not trained" if spec.steps == 0 else f"has the status {record.status.replace('_', ' ')}"
        raise BenchError(f"{path}: this cell {state}: it has no trained model")
    if dataset is None and spec.dataset not in resources.names("datasets"):
        raise BenchError(f"the record's data set {spec.dataset} is a card of your own: name its file with --dataset")
    card = cards.load(dataset or spec.dataset)
    if card.name != spec.dataset:
        raise BenchError(f"--dataset is the card {card.name}, and the record's is {spec.dataset}")
    channels = card.channels(cards.choose_tasks(card, ",".join(spec.tasks)))

    from bench.train.weights import load_trained
    from methods.backbones.load import WeightSource, resolve_weights
    from methods.model import Setting
    from methods.registry import parse

    if spec.weights.startswith("file:"):
        if weights is None:
            raise BenchError(
                f"the backbone's weights came from a file (SHA-256 {spec.weights[5:17]}...): name it with --weights"
            )
        if not weights.is_file():
            raise BenchError(f"--weights {weights}: no such file")
        source = resolve_weights(str(weights), spec.backbone)
        if source.sha256 != spec.weights.removeprefix("file:"):
            raise BenchError(f"{weights} is not the backbone's checkpoint that the record names (SHA-256 differs)")
    else:
        if weights is not None:
            raise BenchError(f"the record's backbone weights are {spec.weights}: leave --weights out")
        source = WeightSource("random") if spec.weights == "random" else resolve_weights("timm", spec.backbone)
    (configured,) = parse(spec.method)
    model = configured.build(_backbone(spec, source), channels, Setting(spec.protocol, spec.decoder))
    load_trained(model, trained_weights(path), record.trained_sha256)
    return Trained(path, record, card, model.eval(), source)


def _backbone(spec: RunSpec, source: WeightSource) -> Backbone:
    import torch

    from methods.backbones.load import load_backbone

    torch.manual_seed(spec.seed)  # as the run did it: random backbone weights are those of the seed
    return load_backbone(spec.backbone, spec.image_size, source)
