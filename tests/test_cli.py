"""The command line as a user meets it: what is wrong is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from bench import grid, resources, run
from bench.cli import app
from bench.data import card as cards
from bench.data.loader import DenseDataset
from bench.data.subset import evenly_spaced
from bench.data.verify import Seen
from bench.record import scan
from bench.resources import ROOT
from bench.suite import load_suite
from bench.verbs import listing
from methods.registry import all_methods, parse

SMALL = ("--recipe", "smoke", "--image-size", "32", "--weights", "random", "--device", "cpu")
LITE = "tf_efficientnet_lite0.in1k"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Cells that share two cores with other tests are far quicker on one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def bench(*args: str | Path):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(arg) for arg in args])


def process(*args: str | Path, options=(), folder: Path) -> subprocess.CompletedProcess:
    """`bench ARGS` in a process of its own, in another working directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    command = [sys.executable, *options, "-m", "bench", *map(str, args)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test works in an empty folder, so that whatever is written by mistake is seen."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*args: str | Path) -> str:
    """The one line on standard error of a command that is refused."""
    before = sorted(Path().rglob("*"))
    result = bench(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert sorted(Path().rglob("*")) == before
    return result.stderr.strip()


RUN_REFUSALS = {
    "methods": ("our", "unknown method 'our' (did you mean 'ours'?)"),
    "backbone": ("swin_tyny", "unknown backbone 'swin_tyny' (did you mean 'swin_tiny'?)"),
    "dataset": ("sceens", "unknown dataset 'sceens' (did you mean 'scenes'?)"),
    "recipe": ("smok", "unknown recipe 'smok' (did you mean 'smoke'?)"),
    "suite": ("tabel1", "unknown suite 'tabel1' (did you mean 'table1'?)"),
    "protocol": ("equl", "unknown protocol 'equl' (did you mean 'equal'?)"),
    "decoder": ("segfromer", "unknown decoder 'segfromer' (did you mean 'segformer'?)"),
    "precision": ("bf61", "unknown precision 'bf61' (did you mean 'bf16'?)"),
    "tasks": ("semsge", "no task 'semsge' (did you mean 'semseg'?)"),
    "seeds": ("x", "--seeds 'x' is not a comma-separated list of whole numbers"),
    "image-size": ("abc", "--image-size 'abc' is neither a number nor HEIGHTxWIDTH"),
    "device": ("tpu", "unknown device 'tpu'; expected auto, cpu, cuda or cuda:N"),
    "weights": ("none.pth", "no weights file none.pth"),
}


@pytest.mark.parametrize("option", RUN_REFUSALS)
def test_an_unknown_value_is_refused_with_what_was_meant(option):
    value, expected = RUN_REFUSALS[option]
    given = {"methods": "decoder_only", "weights": "random", "device": "cpu"} | {option: value}
    message = refusal("run", *(part for name, text in given.items() for part in (f"--{name}", text)))
    assert expected in message


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("ours[rr=2]", "no option 'rr' (did you mean 'r'?)"),
        ("ours[r=two]", "'two' is not a valid int"),
        ("ours[direction=t2]", "'t2' is not one of both, g2t, t2g (did you mean 't2g'?)"),
        ("ours[mote=maybe]", "'maybe' is neither on nor off"),
        ("ours[r=2|x]", "'x' is not a valid int"),
        ("ours[r]", "needs a value, e.g. r="),
        ("ours[r=2", "unbalanced brackets"),
        ("ours(r=2)", "cannot read method expression"),
        ("decoder_only[r=2]", "no option 'r'"),
        (",", "no method given"),
        ("", "no method given"),
    ],
)
def test_a_bad_method_expression(expression, expected):
    assert expected in refusal("run", "--methods", expression, *SMALL)


@pytest.mark.parametrize("rank", ["0", "-1"])
def test_an_option_value_that_no_method_can_have(rank):
    assert "bdta_mote" in refusal("run", "--methods", f"ours[r={rank}]", *SMALL)


def test_no_method():
    assert "no method given; e.g. --methods" in refusal("run")


@pytest.mark.parametrize("size", ["30", "33", "64x30", "16"])
@pytest.mark.parametrize("backbone", ["swin_tiny", LITE])
def test_an_image_size_that_the_backbone_cannot_take(size, backbone):
    message = refusal("run", "--methods", "decoder_only", "--backbone", backbone, *SMALL, "--image-size", size)
    assert "cannot take images of" in message and backbone in message


@pytest.mark.parametrize("size", ["0", "64x0", "99999999"])
@pytest.mark.parametrize(
    "verb", [["run", "--methods", "ours"], ["data", "preview", "scenes"], ["data", "speed", "scenes"]]
)
def test_an_image_size_that_nothing_can_have(size, verb):
    assert "a side has 1 to 16384 pixels" in refusal(*verb, "--image-size", size)


def test_a_method_that_needs_another_backbone():
    message = refusal("run", "--methods", "decoder_only,mtlora", "--backbone", LITE, *SMALL)
    assert "mtlora" in message and LITE in message and "Swin" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there():
    message = refusal("run", "--methods", "decoder_only", "--weights", "random", "--device", "cuda")
    assert "no CUDA device" in message and "--device cpu" in message


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_precision_that_a_cpu_lacks(precision):
    message = refusal("run", "--methods", "decoder_only", *SMALL, "--precision", precision)
    assert f"--precision {precision} needs a CUDA GPU" in message


def test_epochs_and_steps():
    assert "not both" in refusal("run", "--methods", "decoder_only", *SMALL, "--epochs", "1", "--steps", "1")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", bytes(100)], ids=["empty", "text", "zeros"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_that_are_no_checkpoint(content, name):
    Path(name).write_bytes(content)
    message = refusal("run", "--methods", "decoder_only", "--backbone", LITE, *SMALL, "--weights", name)
    assert message.startswith(f"error: cannot read weights from {name}")
    assert "arbitrary code" not in message  # no advice to load it without care


@pytest.mark.parametrize("state", [[1, 2], {"epoch": 3}, {"conv_stem.weight": 3}, {"model": None}, torch.zeros(2)])
def test_weights_in_a_checkpoint_that_holds_something_else(state):
    torch.save(state, "weights.pth")
    message = refusal("run", "--methods", "decoder_only", "--backbone", LITE, *SMALL, "--weights", "weights.pth")
    assert "weights.pth" in message


def test_weights_of_another_model():
    save_file({"layers.0.weight": torch.zeros(3, 3), "conv_stem.weight": torch.zeros(7)}, "other.safetensors")
    message = refusal("run", "--methods", "decoder_only", "--backbone", LITE, *SMALL, "--weights", "other.safetensors")
    assert f"other.safetensors does not hold the weights of {LITE}" in message


CARD = {
    "name": "own",
    "title": "My own",
    "image_size": [32, 32],
    "image": "{id}.jpg",
    "splits": {"train": "train.txt", "val": "val.txt"},
    "tasks": {"semseg": {"path": "{id}-seg.png", "classes": ["floor", "wall"]}},
}
OWN = ("run", "--methods", "decoder_only", "--backbone", LITE, *SMALL, "--dataset", "own.yaml")


@pytest.fixture
def own(empty_folder):
    """A card, and four images of 40 x 36 pixels with their labels under data/."""
    data = empty_folder / "data"
    data.mkdir()
    (empty_folder / "own.yaml").write_text(yaml.safe_dump(CARD))
    noise = np.random.default_rng(0).integers(0, 255, (4, 36, 40, 3), dtype=np.uint8)
    for name, pixels in zip("abcd", noise, strict=True):
        Image.fromarray(pixels).save(data / f"{name}.jpg")
        Image.fromarray((pixels[..., 0] > 127).astype(np.uint8)).save(data / f"{name}-seg.png")
    (data / "train.txt").write_text("a\nb\n")
    (data / "val.txt").write_text("c\nd\n")
    return data


def test_a_card_with_a_misspelt_key(own):
    text = Path("own.yaml").read_text().replace("title:", "homepgae: here\ntitle:")
    Path("own.yaml").write_text(text)
    line = text.splitlines().index("homepgae: here") + 1
    expected = f"own.yaml:{line}: unknown key 'homepgae' (did you mean 'homepage'?)"
    assert expected in refusal(*OWN, "--data-root", own)


def test_data_that_is_not_where_it_is_said_to_be(own):
    assert "--data-root FOLDER" in refusal(*OWN)
    assert "no such data folder: nowhere" in refusal(*OWN, "--data-root", "nowhere")
    assert "no such data folder: own.yaml" in refusal(*OWN, "--data-root", "own.yaml")


@pytest.mark.parametrize("name", ["train.txt", "val.txt", "a.jpg", "b-seg.png", "d.jpg"])
def test_a_missing_file_is_named_before_anything_runs(own, name):
    (own / name).unlink()
    assert str(own / name) in refusal(*OWN, "--data-root", own)


def another_size(path):
    Image.new("L", (40, 35)).save(path)


def out_of_range(path):
    Image.fromarray(np.full((36, 40), 2, np.uint8)).save(path)


BROKEN = {
    "a.jpg": (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot decode image"),
    "a-seg.png": (lambda path: path.write_bytes(b""), "cannot decode image"),
    "b-seg.png": (out_of_range, "label value 2 is outside 0..1"),
    "c-seg.png": (another_size, "label is (35, 40), its image (36, 40)"),
    "d.jpg": (lambda path: path.write_bytes(b""), "cannot decode image"),
}


def test_skip_bad_does_without_the_broken_images_and_says_which(own):
    """One of two training and one of two validation images are left."""
    BROKEN["a-seg.png"][0](own / "a-seg.png")
    (own / "d.jpg").unlink()
    done = bench(*OWN, "--data-root", own, "--skip-bad", "--out", "out")
    assert done.exit_code == 0, done.output
    (found,) = scan(Path("out"))
    assert found.record.status == "ok" and found.record.spec.skipped == ("a", "d")
    assert "skipped a: cannot decode image" in done.output and "skipped d: missing file" in done.output
    healthy = own.parent / "healthy"
    shutil.copytree(own, healthy)
    (healthy / "train.txt").write_text("b")
    (healthy / "val.txt").write_text("c")
    assert bench(*OWN, "--data-root", healthy, "--out", "other").exit_code == 0
    (same,) = scan(Path("other"))
    assert same.record.metrics == found.record.metrics


def test_the_constant_saliency_is_the_better_of_all_and_nothing(own):
    """Of the validation images one has no object and one has it on a quarter: nothing everywhere is right on one of
    them, everything everywhere on a quarter of the other."""
    masks = {name: np.zeros((36, 40), np.uint8) for name in "abcd"}
    for name in "abd":
        masks[name][:18, :20] = 1
    for name, mask in masks.items():
        Image.fromarray(mask).save(own / f"{name}-sal.png")
    Path("own.yaml").write_text(yaml.safe_dump(CARD | {"tasks": {"saliency": {"path": "{id}-sal.png"}}}))
    done = bench(*OWN, "--data-root", own, "--out", "out")
    assert done.exit_code == 0, done.output
    (found,) = scan(Path("out"))
    assert found.record.floor["saliency"]["max_mIoU"] == pytest.approx(50, abs=0.5)
    assert found.record.floor_map["saliency"]["max_mIoU"] > 40  # places on the object's edge are neither


def test_predictions_without_an_image_are_scored_once_for_all_cells_on_the_same_data(own, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))

    def floors(*changes):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert bench(*OWN, "--data-root", own, "--out", out, *changes).exit_code == 0
        (found,) = scan(out)
        return found.record.floor, found.record.floor_map

    first = floors()
    (kept,) = (tmp_path / "cache" / "floors").iterdir()
    assert json.loads(kept.read_text()) == list(first)
    known = [{"semseg": {"mIoU": 12.5}}, {"semseg": {"mIoU": 25.0}}]
    kept.write_text(json.dumps(known))
    assert list(floors("--seeds", "1")) == list(floors("--steps", "1")) == known
    for change in (("--image-size", "64"), ("--eval-size", "original"), ("--limit-train", "1")):
        assert list(floors(*change)) != known
    label = np.array(Image.open(own / "a-seg.png"))
    Image.fromarray(1 - label).save(own / "a-seg.png")
    assert list(floors()) != known
    for broken in ("[]", "half of"):
        kept.write_text(broken)
        Image.fromarray(label).save(own / "a-seg.png")
        assert floors("--seeds", "2") == first and json.loads(kept.read_text()) == list(first)


def test_skip_bad_without_an_image_left(own):
    for name in "ab":
        (own / f"{name}.jpg").write_bytes(b"")
    done = bench(*OWN, "--data-root", own, "--skip-bad")
    assert done.exit_code == 2 and "error: own: every train image is unreadable" in done.stderr


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_before_anything_runs(own, name):
    breaks, expected = BROKEN[name]
    breaks(own / name)
    line = refusal(*OWN, "--data-root", own)
    assert str(own / name) in line and expected in line and "--skip-bad" in line
    assert not Path("runs").exists()
    assert refusal(*OWN, "--data-root", own) == line  # remembered, not forgotten
    assert refusal(*OWN, "--data-root", own, "--dry-run") == line


@pytest.mark.parametrize(
    "wrong, expected",
    [(("--weights", "nowhere.safetensors"), "nowhere.safetensors"), (("--methods", "mtlora"), "mtlora")],
)
def test_what_is_wrong_with_weights_and_methods_is_said_before_images_are_read(own, wrong, expected):
    """Reading all images of a real dataset takes minutes."""
    BROKEN["d.jpg"][0](own / "d.jpg")
    line = refusal(*OWN, "--data-root", own, *wrong)
    assert expected in line and "d.jpg" not in line


def test_all_that_is_broken_is_counted(own):
    for name, (breaks, _) in BROKEN.items():
        breaks(own / name)
    assert "(and 3 more: `bench data check` lists them)" in refusal(*OWN, "--data-root", own)


def test_skip_bad_puts_another_image_in_the_place_of_a_bad_one(own):
    (own / "a.jpg").write_bytes(b"")
    given = {"methods": "decoder_only", "backbone": LITE, "recipe": "smoke", "image_size": 32, "weights": "random"}
    given |= {"dataset": "own.yaml", "limit_train": 1, "skip_bad": True}
    Image.fromarray(np.zeros((36, 40), np.uint8)).save(own / "b-seg.png")  # without the rarer class: the second choice
    (job,) = grid.jobs(None, given, own, "cpu", 0, Path("runs"))
    data = DenseDataset(cards.load("own.yaml"), "train", ("semseg",), (32, 32), own, 1, skipped=job.spec.skipped)
    assert job.spec.skipped == ("a",) and data.names == ["b"]


def test_a_cell_is_known_by_what_is_in_its_files(own, tmp_path):
    """A corrected label of the same size makes another cell; files written anew or elsewhere do not."""
    run, file = (*OWN, "--steps", "1", "--data-root"), own / "b-seg.png"
    label = np.array(Image.open(file))

    def write(value):
        label[0, 0] = value
        Image.fromarray(label).save(file, compress_level=0)
        return file.stat().st_size

    size = write(0)
    assert "done" in bench(*run, own).stdout
    (made,) = (found.record for found in scan(Path("runs")))
    printed = re.findall(r"contents (\w{16}):", bench("data", "check", "own.yaml", "--data-root", own).stdout)
    assert made.provenance.data_contents == dict(zip(("train", "val"), printed, strict=True))
    later = time.time() + 60
    os.utime(file, (later, later))
    copy = shutil.copytree(own, tmp_path / "copy", ignore=shutil.ignore_patterns("runs", "copy"))
    for folder in (own, copy):
        assert "kept" in bench(*run, folder).stdout
    before = file.stat()
    assert write(1) == size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as archives and some copies set it back
    told = "1 of these cells is here on other data"
    warned = bench(*run, own, "--dry-run").stderr
    assert told in warned and "files or ids of train changed" in warned
    assert told not in bench(*run, own, "--dry-run", "--eval-size", "original").stderr  # a new one anyway
    assert "done" in bench(*run, own).stdout and "kept" in (again := bench(*run, own)).stdout
    assert told not in again.stderr
    assert len(list(scan(Path("runs")))) == 2


def test_what_is_trained_and_validated_on_is_warned_about(own):
    (own / "val.txt").write_text("c a")
    done = bench(*OWN, "--data-root", own, "--dry-run")
    assert done.exit_code == 0 and "1 of 2 validation images are trained on too, e.g. a" in done.stderr


def test_a_batch_larger_than_the_set_is_warned_about(own):
    assert "batches are of all 2 training images, not of 9" in bench(
        *OWN, "--data-root", own, "--dry-run", "--batch-size", "9"
    ).stderr  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_breaks_while_it_runs_makes_a_failed_cell_that_names_it_in_one_line(own, name):
    breaks, expected = BROKEN[name]
    given = {"methods": "decoder_only", "backbone": LITE, "recipe": "smoke", "image_size": 32, "weights": "random"}
    (job,) = grid.jobs(None, given | {"dataset": "own.yaml"}, own, "cpu", 0, Path("runs"))
    breaks(own / name)
    with pytest.raises(run.BenchError) as error:
        run.run_cell(job, run.blank_record(job), lambda event, **values: None)
    status, failure = run.classify(error.value)
    assert status == "failed" and "\n" not in failure.message
    assert str(own / name) in failure.message and expected in failure.message


def test_cells_that_meet_a_broken_file_fail_one_by_one_and_are_recorded(own, monkeypatch):
    # It breaks after all have been read.
    monkeypatch.setattr(grid, "examine", lambda _, __, names, *___: Seen(dict.fromkeys(names, ""), {}))
    (own / "b.jpg").write_bytes((own / "b.jpg").read_bytes()[:500])
    result = bench(*OWN, "--data-root", own, "--seeds", "0,1", "--out", "kept")
    assert result.exit_code == 1
    assert result.stderr == ""
    assert " ".join(result.stdout.split()).count(f"cannot decode image {own / 'b.jpg'}") == 2
    assert "0 of 2 cells ok; `bench report kept`" in result.stdout
    found = list(scan(Path("kept")))
    assert [item.record.spec.seed for item in found] == [0, 1]
    for item in found:
        record = item.record
        assert record.status == "failed" and record.time is not None and not record.metrics
        assert str(own / "b.jpg") in record.failure.message and "\n" not in record.failure.message
    assert bench("report", "kept").exit_code == 0
    shown = bench("show", found[0].path)
    assert shown.exit_code == 0 and str(own / "b.jpg") in "".join(shown.stdout.split())


def test_an_out_folder_that_cannot_be_written():
    Path("file").touch()
    message = refusal("run", "--methods", "decoder_only", "--backbone", LITE, *SMALL, "--out", "file/runs")
    assert "cannot write to" in message and "--out" in message


@pytest.mark.parametrize(
    "args, expected",
    [
        (("list", "nonsense"), "one of: methods, backbones, datasets, recipes, suites"),
        (("list", "method"), "cannot list 'method' (did you mean 'methods'?)"),
        (("show", "0123abcd"), "no record whose hash begins with '0123abcd'"),
        (("show", "none.json"), "no such file: none.json"),
        (("report", "none"), "no folder none; make some with: bench run"),
        (("report", "."), "no record in .; make some with: bench run"),
    ],
)
def test_nothing_to_show(args, expected):
    assert expected in refusal(*args)


def test_a_refusal_in_a_real_process_has_no_traceback(tmp_path):
    done = process("run", "--methods", "our", *SMALL, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown method 'our' (did you mean 'ours'?); `bench list methods` shows all\n"
    assert not list(tmp_path.iterdir())


def test_an_interrupt_before_anything_has_begun_has_no_traceback():
    code = (
        "import signal, sys\n"
        "from bench.__main__ import main\n"
        "class Slow:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'typer': signal.raise_signal(signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=resources.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("args", [("--help",), ("run", "--help"), ("list", "suites"), ("list", "recipes")])
def test_torch_is_not_imported_for(args, tmp_path):
    done = process(*args, options=("-X", "importtime"), folder=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported and not imported & {"torch", "timm"}


def test_a_report_is_made_without_torch(tmp_path):
    given = {"methods": "decoder_only", "backbone": LITE, "weights": "random", "recipe": "smoke", "image_size": 32}
    (job,) = grid.jobs(None, given, None, "cpu", 0, Path("runs"))
    run.blank_record(job).write(tmp_path / "runs")
    done = process("report", options=("-X", "importtime"), folder=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0 and "Decoder-only" in done.stdout
    assert "pandas" in imported and not imported & {"torch", "timm"}


@pytest.mark.parametrize(
    "what, expected",
    [
        ("methods", ["bdta_mote", "ours", "mtlora", "single_task_full", "direction=both"]),
        ("backbones", ["swin_tiny", "swin_base_patch4_window7_224.ms_in22k"]),
        ("datasets", ["scenes", "nyud_v2", "--data-root"]),
        ("recipes", ["smoke", "bdta", "300 epochs", "2 steps"]),
        ("suites", ["table1", "ours[r=2|4|8|16]"]),
    ],
)
def test_list(what, expected):
    result = bench("list", what)
    assert result.exit_code == 0 and result.stderr == ""
    assert all(text in result.stdout for text in expected), result.stdout


@pytest.mark.parametrize("name", ["ours", "vmt_adapter_lite", "peft:dora", "mtlora_plus"])
def test_what_a_method_does_and_its_options_mean(name):
    """Its file says it: the paper, and each option by its name."""
    result = bench("list", name)
    assert result.exit_code == 0 and result.stderr == "" and result.stdout.startswith(f"{name} · ")
    (configured,) = parse(name)
    options = [field.name for field in dataclasses.fields(configured.method.options)]
    assert options and all(f"`{option}`" in result.stdout for option in options)
    assert "Paper: " in result.stdout or name.startswith("peft:")


@pytest.mark.parametrize("name", ["ours:foo", "peft:nonsense"])
def test_what_is_no_method_is_refused(name):
    result = bench("list", name)
    assert result.exit_code == 2 and not result.stdout and len(result.stderr.strip().splitlines()) == 1


def test_every_option_of_a_papers_method_is_described():
    for method in all_methods().values():
        said = " ".join(listing._said(method.options))
        for field in dataclasses.fields(method.options) if method.citation else ():
            assert f"`{field.name}`" in said, (method.name, field.name)


def test_a_dry_run_prints_the_cells_and_writes_nothing():
    result = bench("run", "--methods", "ours[r=2|4]", "--seeds", "0,1", *SMALL, "--dry-run", "--out", "kept")
    assert result.exit_code == 0, result.output
    assert "4 cells" in result.stdout
    assert result.stdout.count("bdta_mote[r=2]") == 2 and result.stdout.count("new") == 4
    assert not list(Path().iterdir())


def test_a_dry_run_tells_what_was_begun():
    args = ("run", "--methods", "ours", *SMALL, "--dry-run", "--out", "kept")
    (job,) = grid.jobs(
        None,
        {"methods": "ours", "recipe": "smoke", "image_size": 32, "weights": "random"},
        None,
        "cpu",
        None,
        Path("kept"),
    )
    job.checkpoint_path.parent.mkdir(parents=True)
    job.checkpoint_path.write_bytes(b"")
    assert "begun" in bench(*args).stdout


@pytest.mark.parametrize("suite", resources.names("suites"))
def test_every_suite_runs_dry(suite):
    scenes = () if load_suite(suite).settings.dataset == "scenes" else ("--dataset", "scenes")  # no files are needed
    result = bench("run", "--suite", suite, "--weights", "random", "--device", "cpu", "--dry-run", *scenes)
    assert result.exit_code == 0, result.output
    assert int(result.stdout.split()[0]) > 0 and "cells" in result.stdout
    assert not list(Path().iterdir())


def test_no_steps_is_a_length():
    """0 means efficiency alone, and is not the same as nothing given."""
    done = bench(
        "run", "--methods", "decoder_only", "--backbone", LITE, "--weights", "random", "--steps", "0", "--dry-run"
    )
    assert done.exit_code == 0 and "length 0 steps" in " ".join(done.stdout.split())


def floors_of(job):
    """The predictions without an image of a cell, as its own process scores them."""
    cell = run._Cell(job)
    train, val, _ = run._split(cell)
    return run._floors(cell, train, val, iter, None)


def a_cell(own):
    given = {"methods": "decoder_only", "backbone": LITE, "recipe": "smoke", "image_size": 32, "weights": "random"}
    (job,) = grid.jobs(None, given | {"dataset": "own.yaml"}, own, "cpu", 0, Path("runs"))
    return job


def test_predictions_without_an_image_are_scored_anew_by_other_code(own, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    first = floors_of(a_cell(own))
    (kept,) = (tmp_path / "cache" / "floors").iterdir()
    kept.write_text(json.dumps([{"semseg": {"mIoU": 12.5}}, {"semseg": {"mIoU": 25.0}}]))
    assert floors_of(a_cell(own)) != first
    monkeypatch.setattr(run.code, "of", lambda module: "another")
    assert floors_of(a_cell(own)) == first


def test_predictions_without_an_image_are_fitted_on_some_training_images(own, tmp_path, monkeypatch):
    """Of two with opposite labels, the one: the other would make it a tie, which the first class wins."""
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "FLOOR_SAMPLES", 1)
    (one,) = evenly_spaced(["a", "b"], 1)
    for name in "abcd":
        Image.fromarray(np.full((36, 40), name == one, np.uint8)).save(own / f"{name}-seg.png")
    constant, place = floors_of(a_cell(own))
    assert constant["semseg"]["mIoU"] == place["semseg"]["mIoU"] == 0


def test_a_cache_folder_that_cannot_be_written_costs_no_cell(own, monkeypatch):
    """What has been trained is not lost for a file that spares time."""
    monkeypatch.setenv("BENCH_CACHE", str(own / "train.txt"))
    done = bench(*OWN, "--data-root", own, "--out", "out")
    assert done.exit_code == 0, done.output
    (found,) = scan(Path("out"))
    assert found.record.floor["semseg"]["mIoU"] > 0 and found.record.edge_tolerance is None
