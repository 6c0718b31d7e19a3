"""From what is asked for to cells: who overrides whom, how grids expand, and what the hash stands for."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bench import grid
from bench import recipe as recipes
from bench.errors import BenchError
from bench.resources import ROOT
from bench.spec import RunSpec, Trial
from methods.registry import MethodError, all_methods

RECIPE = {
    "title": "Mine",
    "optimizer": {"name": "sgd", "lr": 0.01},
    "schedule": {"name": "constant"},
    "batch_size": 3,
    "steps": 7,
    "loss_weights": {"semseg": 1, "depth": 1},
    "limit_train": 11,
    "limit_val": 5,
}
SMALL = {"methods": "decoder_only", "weights": "random", "image_size": 32, "recipe": "smoke"}


def jobs(suite=None, out=Path("runs"), data_root=None, **given):
    return grid.jobs(suite, given, data_root, "cpu", None, out)


def spec(**given) -> RunSpec:
    (job,) = jobs(**SMALL | given)
    return job.spec


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(RECIPE | changes))
        return str(path)

    return write


@pytest.fixture
def suite(tmp_path):
    def write(**settings):
        path = tmp_path / "a_suite.yaml"
        path.write_text(yaml.safe_dump({"title": "A suite", "settings": settings}))
        return str(path)

    return write


CARD_SIZE = (128, 128)


def test_the_image_size_is_the_cards_then_the_recipes_then_the_suites_then_the_command_lines(recipe, suite):
    base = {"methods": "decoder_only", "weights": "random", "tasks": "depth"}
    size = lambda suite=None, **given: jobs(suite, **given)[0].spec.image_size  # noqa: E731
    assert size(recipe=recipe(), **base) == CARD_SIZE
    with_size = recipe(image_size=[64, 96])
    assert size(recipe=with_size, **base) == (64, 96)
    settings = suite(recipe=with_size, image_size=32, **base)
    assert size(settings) == (32, 32)
    assert size(settings, image_size="32x64") == (32, 64)


def test_lists_of_a_suite_are_values_with_commas_between(suite):
    of_lists = suite(**SMALL | {"methods": ["ours", "lora[rank=2|4]"], "seeds": [0, 1], "tasks": ["semseg", "depth"]})
    names = [(job.spec.method, job.spec.seed, job.spec.tasks) for job in jobs(of_lists)]
    text = suite(**SMALL | {"methods": "ours,lora[rank=2|4]", "seeds": "0,1", "tasks": "semseg,depth"})
    assert names == [(job.spec.method, job.spec.seed, job.spec.tasks) for job in jobs(text)] and len(names) == 6


@pytest.mark.parametrize("key, of_recipe", [("batch_size", 3), ("steps", 7), ("limit_train", 11), ("limit_val", 5)])
def test_numbers_are_the_recipes_then_the_suites_then_the_command_lines(recipe, suite, key, of_recipe):
    base = SMALL | {"recipe": recipe(), "tasks": "depth"}
    assert getattr(spec(**base), key) == of_recipe
    settings = suite(**base, **{key: 4})
    (of_suite,), (given,) = jobs(settings), jobs(settings, **{key: 2})
    assert (getattr(of_suite.spec, key), getattr(given.spec, key)) == (4, 2)


def test_what_the_command_line_gives_replaces_a_suites_settings(suite):
    settings = suite(**SMALL | {"methods": "ours", "seeds": "0,1"})
    assert [job.spec.method for job in jobs(settings)] == ["bdta_mote"] * 2
    assert [(j.spec.method, j.spec.seed) for j in jobs(settings, methods="decoder_only", seeds="5")] == [
        ("decoder_only", 5)
    ]


def test_a_length_on_the_command_line_replaces_either_kind_of_length_in_a_suite(suite):
    lengths = lambda job: (job.spec.epochs, job.spec.steps)  # noqa: E731
    settings = suite(**SMALL, epochs=3)
    assert lengths(jobs(settings)[0]) == (3, None)
    assert lengths(jobs(settings, steps=5)[0]) == (None, 5)
    assert lengths(jobs(settings, epochs=2)[0]) == (2, None)
    assert lengths(jobs(None, **SMALL, epochs=2)[0]) == (2, None)  # the recipe says steps


def test_epochs_and_steps_exclude_each_other():
    with pytest.raises(BenchError, match="--epochs or --steps, not both"):
        jobs(**SMALL, epochs=1, steps=1)


def test_a_grid_of_options_seeds_and_backbones_expands_to_each_cell_once():
    cells = jobs(
        methods="ours[r=2|4|8]", seeds="0,1,2", backbone="swin_tiny,swin_small", image_size=32, weights="random",
        recipe="smoke",
    )  # fmt: skip
    specs = [job.spec for job in cells]
    assert len(specs) == len({(s.method, s.backbone, s.seed) for s in specs}) == 18
    assert len({job.record_path for job in cells}) == 18
    assert Counter(s.backbone.split("_patch")[0] for s in specs) == {"swin_tiny": 9, "swin_small": 9}
    assert Counter(s.seed for s in specs) == {0: 6, 1: 6, 2: 6}
    assert len({s.hash for s in specs}) == 6  # the seeds of a cell share its hash
    assert [s.seed for s in specs[:3]] == [0, 1, 2]


def test_the_same_cell_asked_for_twice_is_one():
    cells = jobs(**SMALL | {"methods": "ours,bdta_mote,decoder_only", "seeds": "1,1,0"})
    assert [(j.spec.method, j.spec.seed) for j in cells] == [
        ("bdta_mote", 1), ("bdta_mote", 0), ("decoder_only", 1), ("decoder_only", 0)
    ]  # fmt: skip


def test_two_names_of_one_backbone_are_one_cell():
    names = "swin_tiny,swin_tiny_patch4_window7_224,swin_tiny_patch4_window7_224.ms_in1k"
    assert len(jobs(**SMALL | {"backbone": names})) == 1


def test_a_backbone_may_be_named_without_its_tag():
    assert spec(backbone="tf_efficientnet_lite0").backbone == "tf_efficientnet_lite0.in1k"


def test_a_default_option_spelt_out_is_the_same_cell():
    plain, spelt = jobs(**SMALL | {"methods": "ours"}), jobs(**SMALL | {"methods": "ours[direction=both]"})
    assert plain[0].spec == spelt[0].spec


def test_a_recipe_without_a_weight_for_a_task_is_refused(recipe):
    with pytest.raises(BenchError, match="no loss weight for edge; the recipe quick has edge: 50$"):
        jobs(**SMALL | {"recipe": recipe(), "tasks": "depth,edge"})


def test_outside_is_background_only_where_there_is_one(recipe, tmp_path):
    path = recipe(augment={"border": "background", "rotate": 20}, loss_weights={"semseg": 1})
    assert jobs(**SMALL | {"recipe": path, "tasks": "semseg"})
    card = {"name": "own", "title": "Own", "source": "scenes", "image_size": [32, 32], "splits": {"train": 2, "val": 2}}
    text = yaml.safe_dump(card | {"tasks": {"semseg": {"classes": ["wall", *(f"class {i}" for i in range(20))]}}})
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(BenchError, match="class 0 of own is 'wall'; use border: ignore"):
        jobs(**SMALL | {"recipe": path, "dataset": str(tmp_path / "own.yaml")})
    path = recipe(augment={"border": "background", "hflip": 0.5}, loss_weights={"semseg": 1})  # nothing from outside
    assert jobs(**SMALL | {"recipe": path, "dataset": str(tmp_path / "own.yaml")})


@pytest.mark.parametrize(
    "key, value",
    [("batch_size", -1), ("batch_size", 0), ("limit_train", -5), ("limit_val", 0), ("steps", -5), ("epochs", 0)],
)
def test_a_number_of_a_suite_that_makes_no_sense_is_one_line(suite, key, value):
    with pytest.raises(BenchError, match=key) as error:
        jobs(suite(**SMALL, **{key: value}))
    assert "\n" not in str(error.value)


def test_efficiency_alone_needs_no_data():
    (job,) = jobs(**SMALL | {"recipe": "quick", "dataset": "nyud_v2", "steps": 0})
    assert job.spec.steps == 0 and job.spec.limit_val is None


def test_efficiency_alone_depends_on_the_number_of_outputs(tmp_path):
    """Two cards of one name whose classes differ in number are two cells: #TP and memory differ."""
    hashes = set()
    for classes in ("[a, b]", "[a, b, c]", "[d, e, f]"):
        card = tmp_path / "mine.yaml"
        card.write_text(
            "name: mine\ntitle: t\nimage_size: [64, 64]\nimage: '{id}.png'\nsplits: {train: a, val: b}\n"
            f"tasks: {{semseg: {{path: '{{id}}_s.png', classes: {classes}}}}}\n"
        )
        (job,) = jobs(**SMALL | {"dataset": str(card), "steps": 0})
        hashes.add(job.spec.hash)
    assert len(hashes) == 2


@pytest.mark.parametrize(("text", "less"), [("all", 0), ("ours, all", 0), ("all,-ours", 1)])
def test_all_leaves_out_what_a_backbone_does_not_serve(text, less):
    heard = []
    cells = grid.jobs(
        None,
        SMALL | {"methods": text, "backbone": "tf_efficientnet_lite0"},
        None,
        "cpu",
        None,
        Path("runs"),
        heard.append,
    )
    assert "mtlora" not in {job.spec.method for job in cells} and len(cells) > 1
    assert len(heard) + len(cells) == len(all_methods()) - less
    assert all("\n" not in line and "tf_efficientnet_lite0" in line for line in heard)
    assert any(line.startswith("left out: mtlora needs") for line in heard)


def test_a_named_method_is_left_out_where_another_backbone_serves_it():
    def cells(backbones):
        heard = []
        given = SMALL | {"methods": "mtlora,decoder_only", "backbone": backbones}
        found = grid.jobs(None, given, None, "cpu", None, Path("runs"), heard.append)
        return [(job.spec.method, job.spec.backbone.partition("_")[0]) for job in found], heard

    found, heard = cells("swin_tiny,tf_efficientnet_lite0")
    assert found == [("mtlora", "swin"), ("decoder_only", "swin"), ("decoder_only", "tf")]
    assert len(heard) == 1 and heard[0].startswith("left out: mtlora needs")
    for none in ("tf_efficientnet_lite0", "resnet18,tf_efficientnet_lite0"):
        with pytest.raises(MethodError, match="mtlora needs"):
            cells(none)


def test_a_limit_that_does_not_bind_is_the_same_cell():
    few, all_of_them, more = (
        jobs(**SMALL | {"recipe": "quick", "limit_val": limit})[0].spec for limit in (100, 200, 5000)
    )
    assert all_of_them.hash == more.hash != few.hash and more.limit_val is None


BASE = RunSpec(
    method="ours", backbone="swin", dataset="scenes", data_fingerprint="abc", tasks=("semseg", "depth"),
    protocol="published", decoder=None, recipe_name="smoke", recipe=recipes.load("smoke"), image_size=(32, 64),
    batch_size=2, epochs=None, steps=2, precision="fp32", weights="random", device="cpu", seed=0,
)  # fmt: skip
MATTERS = {
    "shuffled_labels": True,
    "trial": Trial(length=0.25, holdout=0.2),
    "method": "mtlora", "backbone": "vit", "dataset": "nyud_v2", "data_fingerprint": "def", "tasks": ("semseg",),
    "protocol": "equal", "decoder": "hrnet", "image_size": (64, 32), "batch_size": 3, "epochs": 2, "steps": 3,
    "precision": "bf16", "weights": "timm", "limit_train": 5, "limit_val": 5, "device": "nvidia-h200",
    "eval_size": "original", "skipped": ("a",), "memory": "low", "cudnn_benchmark": True,
}  # fmt: skip
RECIPE_MATTERS = {
    "optimizer": recipes.Optimizer(name="adamw", lr=0.5),
    "schedule": recipes.Schedule(name="linear"),
    "clip_norm": 1.0,
    "loss_weights": {"semseg": 2.0},
    "augment": recipes.Augment(rotate=20),
    "measure": recipes.Measure(steps=99),
}


@pytest.mark.parametrize("field", MATTERS)
def test_the_hash_changes_with(field):
    assert BASE.model_copy(update={field: MATTERS[field]}).hash != BASE.hash


@pytest.mark.parametrize("field", RECIPE_MATTERS)
def test_the_hash_changes_with_the_recipes(field):
    recipe = BASE.recipe.model_copy(update={field: RECIPE_MATTERS[field]})
    assert BASE.model_copy(update={"recipe": recipe}).hash != BASE.hash


def test_the_hash_leaves_out_the_seed_and_what_the_recipe_is_called():
    title = BASE.recipe.model_copy(update={"title": "Reworded", "source": "Elsewhere"})
    for update in ({"seed": 7}, {"recipe_name": "copy"}, {"recipe": title}):
        assert BASE.model_copy(update=update).hash == BASE.hash
    assert set(RunSpec.model_fields) == {*MATTERS, "recipe", "recipe_name", "seed"}


def test_a_choice_that_came_later_is_in_no_older_hash():
    assert not {"memory", "cudnn_benchmark"} & set(BASE.setting())
    assert BASE.model_copy(update={"memory": "low"}).setting()["memory"] == "low"


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_hash_is_the_same_in_another_process(hash_seed):
    code = "import sys; from bench.spec import RunSpec; print(RunSpec.model_validate_json(sys.argv[1]).hash)"
    done = subprocess.run(
        [sys.executable, "-c", code, BASE.model_dump_json()],
        env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == BASE.hash


def test_the_same_command_twice_gives_the_same_cells():
    assert [job.model_dump() for job in jobs(**SMALL)] == [job.model_dump() for job in jobs(**SMALL)]


def test_where_records_and_data_lie_is_in_no_hash(tmp_path):
    card = {
        "name": "own", "title": "Own", "image_size": [32, 32], "image": "{id}.jpg",
        "splits": {"train": "ids.txt", "val": "ids.txt"}, "tasks": {"depth": {"path": "{id}.npy"}},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(card))
    found = []
    for root in (tmp_path / "here", tmp_path / "there"):
        root.mkdir()
        (root / "ids.txt").write_text("a")
        Image.new("RGB", (8, 8)).save(root / "a.jpg")
        np.save(root / "a.npy", np.ones((8, 8), np.float32))
        given = SMALL | {"dataset": str(tmp_path / "own.yaml")}
        found += jobs(data_root=root, out=root / "runs", **given)
    here, there = found
    assert here.record_path != there.record_path and here.data_root != there.data_root
    assert here.spec == there.spec


def test_the_order_in_which_tasks_are_named_is_in_no_hash():
    assert spec(tasks="depth,semseg").hash == spec(tasks="semseg,depth").hash != spec(tasks="semseg").hash


def test_a_recipes_number_and_the_same_number_on_the_command_line_are_one_cell():
    assert spec().hash == spec(batch_size=2, steps=2, limit_train=4, limit_val=2).hash


@pytest.mark.parametrize(("scale", "refused"), [([0.75, 1.25], True), ([1.0, 1.25], False)])
def test_what_a_smaller_image_leaves_free_is_outside_too(recipe, tmp_path, scale, refused):
    path = recipe(augment={"border": "background", "scale": scale}, loss_weights={"semseg": 1})
    card = {"name": "own", "title": "Own", "source": "scenes", "image_size": [32, 32], "splits": {"train": 2, "val": 2}}
    text = yaml.safe_dump(card | {"tasks": {"semseg": {"classes": ["wall", *(f"class {i}" for i in range(20))]}}})
    (tmp_path / "own.yaml").write_text(text)
    expected = pytest.raises(BenchError, match="class 0 of own is 'wall'") if refused else nullcontext()
    with expected:
        jobs(**SMALL | {"recipe": path, "dataset": str(tmp_path / "own.yaml")})
