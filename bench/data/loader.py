"""From a dataset card to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bench.data import card as cards
from bench.data import decode, scenes, subset, transforms
from bench.data.card import Card
from bench.data.samples import Kind, SampleCache
from bench.errors import BenchError
from bench.recipe import Augment

Key = tuple[int, int]  # (epoch, index): what an augmented sample depends on, besides the seed


class DenseDataset(Dataset):
    """Samples of one split at `size`; with `augment`, sample (epoch, i) depends on seed, epoch and i alone.

    With `original_labels` the image alone has that size, and the labels keep their own. `skipped` ids are left out;
    `names` are ids to take whatever split, limit and skipped say. `cache` keeps decoded and resized samples
    (bench.data.samples). Resizing comes first, and augmentation turns and zooms as if it had come last, as in the
    MTLoRA code family; where a recipe crops, it does come last. With `shuffled_labels` every image has the labels of
    another one, the same one in every epoch: a control from which nothing can be learnt of the images.
    """

    def __init__(
        self,
        card: Card,
        split: Literal["train", "val"],
        tasks: tuple[str, ...],
        size: tuple[int, int],
        root: Path | None = None,
        limit: int | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        original_labels: bool = False,
        skipped: Sequence[str] = (),
        cache: Kind = "none",
        names: Sequence[str] | None = None,
        shuffled_labels: bool = False,
    ) -> None:
        self.original_labels = original_labels
        self.card, self.tasks, self.size, self.root = card, tasks, size, root
        self.names = subset.ids(card, split, root, limit, tasks, skipped) if names is None else list(names)
        cards.check_files(card, root, self.names, tasks)
        self.augment, self.seed = augment, seed
        self.label_of = list(range(len(self.names)))
        if shuffled_labels:
            if len(self.names) < 2:
                raise BenchError(f"{card.name}: labels cannot be shuffled among {len(self.names)} image")
            cycle = torch.randperm(len(self.names), generator=seeded(seed, 0, 0, 1)).tolist()
            self.label_of = [after for _, after in sorted(zip(cycle, cycle[1:] + cycle[:1], strict=True))]
        crops = augment is not None and augment.crop_scale is not None
        self.resized = "" if crops else "image" if original_labels else "all"
        self.cache = None if cache == "none" else SampleCache(cache, card, root, tasks, size, self.resized)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | Key) -> transforms.Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        packed = dict(self._packed(self.names[index]))
        if self.label_of[index] != index:
            other = self._packed(self.names[self.label_of[index]])
            labels = {key: value for key, value in other.items() if key not in ("image", "frame")}
            packed |= transforms.resize(labels, packed["image"].shape[-2:])
        frame = tuple(packed.pop("frame").tolist())
        sample = transforms.unpack(packed)
        if self.augment is None:
            return sample
        sample = transforms.augment(sample, self.augment, seeded(self.seed, epoch, index), self.size, frame)
        return transforms.resize(sample, self.size)

    def _packed(self, name: str) -> transforms.Sample:
        if self.cache is None:
            return self._prepare(name)
        packed = self.cache.get(name)
        if packed is None:
            packed = self._prepare(name)
            self.cache.put(name, packed)
        return packed

    def _prepare(self, name: str) -> transforms.Sample:
        """A packed sample, resized as far as augmentation allows; `frame` is the (height, width) before that."""
        packed = transforms.pack(self._read(name))
        frame = torch.tensor(packed["image"].shape[-2:])
        ready = packed if self.resized == "all" else {"image": packed["image"]} if self.resized else {}
        return packed | transforms.resize(ready, self.size) | {"frame": frame}

    def _read(self, name: str) -> dict:
        wanted = ("image", *self.tasks)
        if self.card.source == "scenes":
            scene = scenes.render(self.card.seed, int(name), self.size)
            return {key: scene[key] for key in wanted}
        root = cards.require_root(self.card, self.root)
        arrays = {"image": decode.read_image(root / self.card.image.format(id=name))}
        for task in self.tasks:
            path = cards.locate(root, self.card.tasks[task].path, name)
            arrays[task] = decode.read_label(task, self.card.tasks[task], path, root, name, arrays["image"].shape[:2])
            if arrays[task].shape[:2] != arrays["image"].shape[:2]:
                raise BenchError(
                    f"{path}: label is {arrays[task].shape[:2]}, its image {arrays['image'].shape[:2]} (height, width)"
                )
        return arrays


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all of the numbers; zeros at their end make no difference."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Whole batches of an epoch; a set smaller than a batch is one smaller batch."""
    return max(1, samples // batch_size)


class ShuffledBatches(Sampler[list[Key]]):
    """Batches `start`..`stop - 1` of an endless shuffled stream. Batch s is the same wherever the stream starts."""

    def __init__(self, samples: int, batch_size: int, start: int, stop: int, seed: int) -> None:
        self.samples, self.batch_size, self.start, self.stop, self.seed = samples, batch_size, start, stop, seed

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = steps_per_epoch(self.samples, self.batch_size)
        order, order_of = [], -1
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_of:
                order, order_of = torch.randperm(self.samples, generator=seeded(self.seed, epoch)).tolist(), epoch
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(epoch, index) for index in chosen]


def training_batches(
    dataset: DenseDataset, batch_size: int, start: int, stop: int, workers: int, pin: bool
) -> DataLoader:
    sampler = ShuffledBatches(len(dataset), batch_size, start, stop, dataset.seed)
    # A generator of its own: else the loader draws from torch's, and a resumed run no longer repeats the whole one.
    own = torch.Generator().manual_seed(dataset.seed)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pin, generator=own)


def validation_batches(dataset: DenseDataset, batch_size: int, workers: int, pin: bool) -> DataLoader:
    """In order, the last batch possibly smaller. Labels of original size come as a list, one an image."""
    collate = _images_stacked if dataset.original_labels else None
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pin, collate_fn=collate)


def _images_stacked(samples: list[transforms.Sample]) -> dict[str, Any]:
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    return batch | {"image": torch.stack(batch["image"])}


def labelled_parts(labels: Tensor | list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Which images of a batch have one label tensor (n, ...): all of them, or each its own."""
    if isinstance(labels, Tensor):
        yield slice(None), labels
    else:
        for index, label in enumerate(labels):
            yield slice(index, index + 1), label.unsqueeze(0)
