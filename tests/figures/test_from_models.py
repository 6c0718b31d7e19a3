"""Figures of trained models: gates, features and predictions, against what the model itself says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from bench.data import card as cards
from bench.errors import BenchError
from bench.figures import from_models
from bench.record import read
from bench.verbs.trained import Trained
from methods.backbones.load import WeightSource, load_backbone
from methods.model import Setting
from methods.registry import parse
from tests.report.records import make

SIZE = (64, 96)
TASKS = {"semseg": 10.0, "saliency": 20.0, "normals": 30.0}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def cell(tmp_path):
    def make_cell(method):
        torch.manual_seed(0)
        card = cards.load("scenes")
        backbone = load_backbone("resnet18.a1_in1k", SIZE, WeightSource("random"))
        (configured,) = parse(method)
        model = configured.build(backbone, card.channels(tuple(TASKS)), Setting("equal", None))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
        path = make(
            tmp_path, method, TASKS, backbone="resnet18.a1_in1k", weights="random", image_size=SIZE, limit_val=3
        )
        return Trained(path, read(path), card, model.eval(), WeightSource("random"))

    return make_cell


def test_gates_are_averaged_over_images(cell):
    ours = cell("ours")
    samples = from_models.validation(ours, None, 3)
    found = from_models.mean_gates(ours, samples)
    batch = torch.stack([samples[i]["image"] for i in range(3)])
    with torch.no_grad():
        expected = [g.mean(0).numpy() for g in ours.model.decoder.mixer.gates(ours.model.encoder(batch).general)]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
        np.testing.assert_allclose(mine.sum(1), 1, atol=1e-6)
    figure = from_models.gates(ours, None, 1)
    assert len(figure.axes) == 4 and figure.axes[0].texts[0].get_text() == f"{found[0][0, 0]:.2f}"


def test_methods_without_gates_say_so(cell):
    with pytest.raises(BenchError, match="decoder_only has no gates"):
        from_models.gates(cell("decoder_only"), None, 1)


def test_one_colour_means_one_thing_in_all_maps_of_a_stage():
    rng = torch.Generator().manual_seed(0)
    one = torch.randn(8, 5, 6, generator=rng)
    same, scaled, other = from_models.principal([one, 7 * one + 3, torch.randn(8, 5, 6, generator=rng)])
    assert np.array_equal(same, scaled) and not np.array_equal(same, other) and same.shape == (5, 6, 3)
    assert from_models.principal([torch.randn(2, 4, 4)])[0].shape == (4, 4, 3)  # fewer channels than colours


def test_predictions_stand_below_image_and_truth(cell):
    ours, other = cell("ours"), cell("decoder_only")
    figure = from_models.predictions([ours, other], None, 2)
    assert len(figure.axes) == 2 * 3 * 4
    sample = from_models.validation(ours, None, 2)[0]
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, np.round(sample["image"].numpy().transpose(1, 2, 0) * 255).astype(np.uint8))
    with torch.no_grad():
        classes = other.model(sample["image"][None])["semseg"][0].argmax(0).numpy()
    drawn = figure.axes[2 * 4 + 1].images[0].get_array()  # second row of predictions, first task
    for value in np.unique(classes):
        assert len(np.unique(drawn[classes == value].reshape(-1, 3), axis=0)) == 1


def test_records_of_other_tasks_are_no_one_picture(cell):
    ours, other = cell("ours"), cell("decoder_only")
    spec = other.record.spec.model_copy(update={"tasks": ("semseg",)})
    other.record.spec = spec
    with pytest.raises(BenchError, match="different tasks"):
        from_models.predictions([ours, other], None, 1)


@pytest.mark.parametrize("method", ["ours", "single_task_full", "multi_task_full"])
def test_features_have_a_column_a_task_and_a_row_a_stage(cell, monkeypatch, method):
    """The first column is of the backbone as it was, whatever the method has made of its own."""
    seen = []
    principal = from_models.principal
    monkeypatch.setattr(from_models, "principal", lambda maps: seen.append(maps) or principal(maps))
    trained = cell(method)
    figure = from_models.features(trained, None, 1)
    assert len([axis for axis in figure.axes if axis.images]) == 4 * 4 + 1
    torch.manual_seed(0)
    frozen = load_backbone("resnet18.a1_in1k", SIZE, WeightSource("random")).eval()
    with torch.no_grad():
        expected = frozen(from_models.validation(trained, None, 1)[0]["image"][None]).maps
    for (first, *_), stage in zip(seen, expected, strict=True):
        torch.testing.assert_close(first, stage[0])
