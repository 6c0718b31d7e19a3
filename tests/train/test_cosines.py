"""The probe of the tasks' gradients: against gradients taken one at a time, and without a trace in the training."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator

from bench.data import card as cards
from bench.data.loader import DenseDataset
from bench.recipe import Augment, Optimizer, Recipe, Schedule
from bench.train.loop import Trainer, gradient_cosines, train
from bench.train.losses import LOSSES

SIZE = (32, 32)


@pytest.fixture
def dataset(tasks):
    return DenseDataset(cards.load("scenes"), "train", tuple(tasks), SIZE, limit=4, augment=Augment(), seed=3)


@pytest.fixture
def trainer(build, tasks):
    def make(expression):
        recipe = Recipe(
            title="Test", optimizer=Optimizer(name="adamw", lr=1e-3), schedule=Schedule(name="constant"), batch_size=2,
            steps=6, loss_weights=dict.fromkeys(tasks, 1.0),
        )  # fmt: skip
        model = build(expression, size=SIZE)
        torch.manual_seed(5)
        return Trainer(model, recipe, 2, 6, Accelerator(cpu=True))

    return make


def batch_of(dataset):
    return {name: torch.stack([dataset[i][name] for i in (0, 1)]) for name in dataset[0]}


def test_cosines_are_those_of_gradients_on_shared_parameters(trainer, dataset, tasks):
    runner, batch = trainer("mtlora"), batch_of(dataset)
    found = gradient_cosines(runner, batch)
    model, owners, flat = runner.plain_model, runner.plain_model.owners(), {}
    for task in tasks:
        model.zero_grad()
        model.eval()
        LOSSES[task](model(batch["image"])[task], batch[task]).backward()
        flat[task] = torch.cat(
            [
                (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
                for name, p in model.named_parameters()
                if p.requires_grad and owners[name] is None
            ]
        ).double()
    for a, b in itertools.combinations(tasks, 2):
        expected = (flat[a] @ flat[b] / (flat[a].norm() * flat[b].norm())).item()
        assert found[a, b] == pytest.approx(expected, abs=1e-5)
    assert len(found) == 6 and len({round(v, 4) for v in found.values()}) > 3


def test_methods_that_share_nothing_have_no_cosines(trainer, dataset):
    assert gradient_cosines(trainer("single_task_full"), batch_of(dataset)) == {}


@pytest.mark.parametrize("method", ["ours", "multi_task_full"])
def test_a_probe_leaves_no_trace_in_the_training(trainer, dataset, tmp_path, method):
    states = []
    for probes in (0, 3):
        runner = trainer(method)
        progress = train(runner, dataset, 2, 0, tmp_path / "c", 1e9, lambda *args: None, probes)
        states.append((progress.history, runner.plain_model.trained_state()))
    assert {len(values) for values in progress.cosines.values()} == {3} and len(progress.cosines) == 6
    (plain, before), (probed, after) = states
    assert plain == probed and all(torch.equal(before[name], tensor) for name, tensor in after.items())
