"""A trained cell used again: `bench predict` and `bench export`, and every way in which that can be refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bench import recipe as recipes
from bench import record as records
from bench.cli import app
from bench.data import card as cards
from bench.data import decode
from bench.errors import BenchError
from bench.spec import trained_weights
from bench.train.loop import Trainer
from bench.train.weights import digest, load_trained, save_trained
from bench.verbs import export, predict, trained
from methods.backbones.load import WeightSource, load_backbone
from methods.model import Setting
from methods.registry import parse
from tests.report.records import make

SIZE = (64, 96)
FIGURES = {"semseg": 10.0, "saliency": 20.0, "normals": 30.0}


def on_resnet(method, seed=0, size=SIZE):
    torch.manual_seed(seed)
    card = cards.load("scenes")
    backbone = load_backbone("resnet18.a1_in1k", size, WeightSource("random"))
    (configured,) = parse(method)
    return configured.build(backbone, card.channels(tuple(FIGURES)), Setting("equal", None))


@pytest.fixture
def cell(tmp_path):
    """(method) -> the record of such a cell, its weights beside it, and the model that they are of."""

    def write(method="decoder_only", **changes):
        model = on_resnet(method)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        spec = {"backbone": "resnet18.a1_in1k", "weights": "random", "image_size": SIZE, "protocol": "equal"} | changes
        path = make(tmp_path / "runs", method, FIGURES, **spec)
        record = json.loads(path.read_text())
        record["trained_sha256"] = save_trained(model, trained_weights(path), SIZE)
        path.write_text(json.dumps(record))
        return path, model.eval()

    return write


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "room.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    return path


def test_a_loaded_model_answers_as_the_trained_one(cell, tmp_path):
    path, model = cell("ours[r=2]")
    batch = torch.rand(2, 3, *SIZE)
    for name in (str(path), path.stem[:5]):
        loaded = trained.load(name, tmp_path / "runs", None, None).model
        with torch.no_grad():
            for task, out in model(batch).items():
                torch.testing.assert_close(loaded(batch)[task], out)


def test_pictures_and_arrays_have_the_images_size_and_the_tasks_meaning(cell, image, tmp_path, monkeypatch):
    path, model = cell()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["predict", str(image), "--record", str(path), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "semseg uint8 class number" in done.output and "depth" not in done.output
    out = tmp_path / "predictions" / path.stem  # of this record alone
    arrays = np.load(out / "room.npz")
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "semseg": ("uint8", (50, 70)), "saliency": ("float32", (50, 70)), "normals": ("float32", (50, 70, 3)),
    }  # fmt: skip
    with torch.no_grad():
        small = predict.network_input(np.array(Image.open(image)), SIZE)
        logits = model(small[None])
        large = torch.nn.functional.interpolate(logits["semseg"], (50, 70), mode="bilinear", align_corners=False)
    assert (arrays["semseg"] == large[0].argmax(0).numpy()).mean() > 0.999
    np.testing.assert_allclose(np.linalg.norm(arrays["normals"], axis=-1), 1, atol=1e-5)
    assert 0 <= arrays["saliency"].min() and arrays["saliency"].max() <= 1
    for task in FIGURES:
        assert Image.open(out / f"room_{task}.png").size == (70, 50)
    assert Image.open(out / "room.png").width > 4 * 70


@pytest.mark.parametrize("wrong", ["missing", "changed", "other model", "damaged"])
def test_weights_that_are_not_the_records_are_refused(cell, tmp_path, wrong):
    path, _ = cell()
    weights = trained_weights(path)
    expected = {"missing": "no trained weights", "changed": "SHA-256 differs", "other model": "checkpoint of another",
                "damaged": "cannot load"}[wrong]  # fmt: skip
    if wrong == "missing":
        weights.unlink()
    elif wrong == "changed":
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    else:
        if wrong == "damaged":
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            save_trained(on_resnet("ours"), weights, SIZE)
        record = json.loads(path.read_text()) | {"trained_sha256": digest(weights)}
        path.write_text(json.dumps(record))
    with pytest.raises(BenchError, match=expected):
        trained.load(str(path), tmp_path, None, None)


def test_weights_are_of_no_use_to_other_code(cell, tmp_path, monkeypatch):
    """What a method's file computes may change, and its parameters stay."""
    path, _ = cell("ours")
    trained.load(str(path), tmp_path, None, None)
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x.double()).float())  # rounded otherwise
    trained.load(str(path), tmp_path, None, None)
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: x * torch.sigmoid(1.702 * x))
    with pytest.raises(BenchError, match=r"otherwise than when it was trained \(.* by 0.\d%.*its code"):
        trained.load(str(path), tmp_path, None, None)


@pytest.mark.parametrize("method", ["ours", "vpt_deep", "mtlora"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_was_trained_in_any_precision_loads(tmp_path, build, method, precision):
    """Accelerate wraps the model's forward; dropout and the mode that the model was left in change nothing."""
    AcceleratorState._reset_state()
    trainer = Trainer(
        build(method, size=SIZE), recipes.load("quick"), 2, 3, Accelerator(mixed_precision=precision, cpu=True)
    )
    AcceleratorState._reset_state()
    trainer.model.train()
    path = tmp_path / "a.trained.safetensors"
    sha256 = save_trained(trainer.plain_model, path, SIZE)
    assert trainer.model.training
    fresh = build(method, size=SIZE).eval()
    load_trained(fresh, path, sha256)
    assert not fresh.training


def test_a_model_without_finite_answers_is_kept_without_them(tmp_path):
    model = on_resnet("decoder_only")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    path = tmp_path / "a.trained.safetensors"
    load_trained(on_resnet("decoder_only"), path, save_trained(model, path, SIZE))


def test_a_card_of_ones_own_must_be_named(cell, tmp_path):
    path, _ = cell(dataset="street")
    with pytest.raises(BenchError, match="data set street is a card of your own: name its file with --dataset"):
        trained.load(str(path), tmp_path, None, None)


def test_the_card_of_an_export_tells_of_changes_beyond_the_commit(cell, tmp_path):
    path, _ = cell()
    record = json.loads(path.read_text())
    record["provenance"] |= {"commit": "a" * 40, "dirty": True}
    path.write_text(json.dumps(record))
    loaded = trained.load(str(path), tmp_path, None, None)
    assert f"commit {'a' * 40} and changes to it" in export.model_card(loaded, {"semseg": 0.0}, "one image")


def test_weights_from_before_answers_were_kept_still_load(cell, tmp_path):
    path, model = cell()
    weights = trained_weights(path)
    save_file(load_file(weights), weights)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trained_sha256": digest(weights)}))
    trained.load(str(path), tmp_path, None, None)


def test_cells_without_a_trained_model_say_so(tmp_path):
    path = make(tmp_path, "ours", FIGURES, steps=0, epochs=None)
    with pytest.raises(BenchError, match="was not trained"):
        trained.load(str(path), tmp_path, None, None)
    path = make(tmp_path, "ours", FIGURES, status="diverged", metrics={})
    with pytest.raises(BenchError, match="has the status diverged"):
        trained.load(str(path), tmp_path, None, None)


def test_the_backbones_file_must_be_the_one_that_was_used(cell, tmp_path):
    weights = tmp_path / "w.safetensors"
    torch.manual_seed(0)  # those that `cell` builds on
    save_file(load_backbone("resnet18.a1_in1k", SIZE, WeightSource("random")).model.state_dict(), weights)
    path, _ = cell(weights=f"file:{digest(weights)}")
    with pytest.raises(BenchError, match="came from a file .* name it with --weights"):
        trained.load(str(path), tmp_path, None, None)
    other = tmp_path / "o.safetensors"
    save_file({"a": torch.ones(1)}, other)
    with pytest.raises(BenchError, match="is not the backbone's checkpoint"):
        trained.load(str(path), tmp_path, other, None)
    assert trained.load(str(path), tmp_path, weights, None).record.spec.weights.startswith("file:")
    path, _ = cell()
    with pytest.raises(BenchError, match="leave --weights out"):
        trained.load(str(path), tmp_path, weights, None)


def test_what_is_no_image_stops_before_anything_is_written(cell, image, tmp_path):
    path, _ = cell()
    text = tmp_path / "text.png"
    text.write_text("no image")
    done = CliRunner().invoke(
        app,
        ["predict", str(image), str(text), "--record", str(path), "--device", "cpu", "--out", str(tmp_path / "out")],
    )
    assert done.exit_code == 2 and "text.png" in done.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "folder", "complaint"),
    [
        (["room.png"], ".", "room.png itself would be overwritten; name another folder"),
        (["room.jpg", "room.png"], "out", "would both write room.npz"),
        (["room.jpg", "room_semseg.jpg"], "out", "would both write room_semseg.png"),
        (["room.PNG"], ".", "room.PNG itself would be overwritten"),
        (["room.jpg", "room.jpg"], "out", "room.jpg is named twice"),
    ],
)
def test_no_picture_overwrites_another(cell, tmp_path, monkeypatch, names, folder, complaint):
    path, _ = cell()
    for name in names:
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    done = CliRunner().invoke(app, ["predict", *names, "--record", str(path), "--device", "cpu", "--out", folder])
    assert done.exit_code == 2 and complaint in " ".join(done.output.split())
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert not (tmp_path / "out").exists()


def test_a_photo_is_turned_as_its_camera_was(cell, tmp_path):
    path, _ = cell()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    tag = Image.Exif()
    tag[0x0112] = 6  # shown turned by a quarter, clockwise
    image.save(tmp_path / "held.png", exif=tag)
    out = tmp_path / "out"
    arguments = ["predict", str(tmp_path / "held.png"), "--record", str(path), "--device", "cpu", "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert np.load(out / "held.npz")["semseg"].shape == (40, 30)
    shown = np.array(Image.open(out / "held.png"))[-40:, :30]
    np.testing.assert_array_equal(shown, np.rot90(np.array(image), -1))
    assert decode.read_image(tmp_path / "held.png").shape == (30, 40, 3)  # as labels of a data set lie on it


@pytest.mark.parametrize("method", ["decoder_only", "ours"])
def test_an_exported_model_answers_alone_as_pytorch_does(cell, image, tmp_path, method):
    path, model = cell(method)
    out = tmp_path / "export"
    done = CliRunner().invoke(app, ["export", "--record", str(path), "--image", str(image), "--out", str(out)])
    assert done.exit_code == 0, done.output
    batch = torch.rand(1, 3, *SIZE)
    program = torch.export.load(out / "model.pt2").module()
    for task, logits in model(batch).items():
        torch.testing.assert_close(program(batch)[task], logits, rtol=1e-3, atol=1e-4)
    rebuilt = on_resnet(method)
    load_trained(rebuilt, out / "record.trained.safetensors", records.read(out / "record.json").trained_sha256)
    card = (out / "README.md").read_text()
    assert "RANDOM weights" in card and "(1, 3, 64, 96)" in card and "10 %" in card and "Classes of semseg:" in card


def test_an_export_of_another_cell_is_not_overwritten(cell, image, tmp_path):
    def run(path, out):
        return CliRunner().invoke(app, ["export", "--record", str(path), "--image", str(image), "--out", str(out)])

    (first, _), (second, _) = cell(), cell("ours")
    out = tmp_path / "export"
    for _ in range(2):  # the same one again is no other
        assert run(first, out).exit_code == 0
    before = (out / "model.pt2").read_bytes()
    done = run(second, out)
    assert done.exit_code == 2 and f"holds another cell (decoder_only, {first.stem})" in " ".join(done.stderr.split())
    assert (out / "model.pt2").read_bytes() == before
    (out / "record.json").write_text("{}")
    assert run(first, out).exit_code == 2
    assert run(second, tmp_path / "other").exit_code == 0


def test_an_export_overwrites_nothing_that_is_not_its_own(cell, tmp_path):
    path, _ = cell()

    def run(out):
        return CliRunner().invoke(app, ["export", "--record", str(path), "--out", str(out)])

    mine = tmp_path / "mine" / "README.md"
    mine.parent.mkdir()
    mine.write_text("MINE")
    before = path.read_bytes()
    alias = tmp_path / "alias"
    alias.mkdir()
    (alias / "record.json").symlink_to(path)
    for out, expected in (
        (mine.parent, "has a README.md that no export made"),
        (mine, "cannot write to"),
        (alias, "the folder that the record lies in"),
    ):
        done = run(out)
        assert done.exit_code == 2 and expected in " ".join(done.output.split()), done.output
    assert mine.read_text() == "MINE" and path.read_bytes() == before


def test_an_export_that_answers_differently_is_refused(cell):
    _, model = cell()

    class Off(torch.nn.Module):
        def forward(self, image):
            return {task: out + 0.01 * out.abs().max() for task, out in model(image).items()}

    with pytest.raises(BenchError, match="differs from PyTorch's: semseg by 1.0e-02"):
        export.check(model, Off(), torch.rand(1, 3, *SIZE))


def test_a_model_that_cannot_be_exported_costs_one_line(cell, image, tmp_path, monkeypatch):
    """torch prints the whole graph of a model that it cannot trace, or a warning for every branch."""
    path, _ = cell()

    def cannot(*args, **kwargs):
        print("graph():")
        print("a thousand lines of it", file=sys.stderr)
        raise RuntimeError("data-dependent branch\nof a kind")

    monkeypatch.setattr(torch.export, "export", cannot)
    out = tmp_path / "export"
    done = CliRunner().invoke(app, ["export", "--record", str(path), "--image", str(image), "--out", str(out)])
    assert done.exit_code == 2 and "graph()" not in done.output and "thousand" not in done.output
    (line,) = done.stderr.strip().splitlines()
    assert "decoder_only cannot be exported" in line and "data-dependent branch" in line


def test_weights_whose_model_has_no_finite_answer_any_more_are_refused(cell, tmp_path, monkeypatch):
    path, _ = cell("ours")
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: x * float("nan"))
    with pytest.raises(BenchError, match="otherwise than when it was trained"):
        trained.load(str(path), tmp_path, None, None)
