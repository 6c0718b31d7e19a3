"""YAML with a schema: every complaint names the file, the line and the key."""

from __future__ import annotations

import itertools
import re

import pytest
import yaml

from bench import recipe as recipes
from bench import resources, suite, yamlfile
from bench.data import card as cards
from bench.data.card import Card
from bench.errors import BenchError
from bench.recipe import Recipe

RECIPE = """\
title: A recipe
optimizer:
  name: adamw
  lr: 0.1
schedule: {name: cosine}
batch_size: 2
steps: 3
loss_weights:
  depth: 1
augment:
  scale: [0.5, 2]
"""

CARD = """\
name: own
title: Own
image_size: [32, 32]
image: "{id}.jpg"
splits:
  train: train.txt
  val: val.txt
tasks:
  depth:
    path: "{id}.npy"
    scale: 2
"""


def complaint(folder, text, model=Recipe):
    """What stands after the file's path."""
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BenchError) as error:
        yamlfile.load(path, model)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


def test_the_examples_load(tmp_path):
    for text, model in ((RECIPE, Recipe), (CARD, Card)):
        (tmp_path / "a.yaml").write_text(text)
        assert yamlfile.load(tmp_path / "a.yaml", model).title


@pytest.mark.parametrize(
    "old, new, line, key, meant",
    [
        ("batch_size:", "batchsize:", 6, "batchsize", "batch_size"),
        ("  lr:", "  learning_rat:", 4, "optimizer.learning_rat", None),
        ("  name: adamw", "  nmae: adamw", 3, "optimizer.nmae", "name"),
        ("  scale:", "  scal:", 11, "augment.scal", "scale"),
        ("augment:", "augmnet:", 10, "augmnet", "augment"),
    ],
)
def test_a_misspelt_key_of_a_recipe(tmp_path, old, new, line, key, meant):
    message = complaint(tmp_path, RECIPE.replace(old, new))
    # What the misspelling leaves out may be missing as well; the misspelt key is what helps.
    assert re.match(rf":{line}: unknown key '{key}'", message), message
    assert meant is None or f"(did you mean '{meant}'?)" in message


def test_a_misspelt_key_below_a_task_of_a_card(tmp_path):
    message = complaint(tmp_path, CARD.replace("    scale:", "    scal:"), Card)
    assert message.startswith(":11: unknown key 'tasks.depth.scal' (did you mean 'scale'?); expected one of: path,")


def test_a_misspelt_key_of_a_suites_settings(tmp_path):
    text = "title: A suite\nsettings:\n  methods: ours\n  backbon: swin_tiny\n"
    message = complaint(tmp_path, text, suite.Suite)
    assert message.startswith(":4: unknown key 'settings.backbon' (did you mean 'backbone'?)")


@pytest.mark.parametrize(
    "old, new, line, key",
    [
        ("lr: 0.1", "lr: fast", 4, "optimizer.lr"),
        ("lr: 0.1", "lr: -1", 4, "optimizer.lr"),
        ("name: adamw", "name: adamax", 3, "optimizer.name"),
        ("batch_size: 2", "batch_size: two", 6, "batch_size"),
        ("batch_size: 2", "batch_size: 0", 6, "batch_size"),
        ("depth: 1", "depth: [1]", 9, "loss_weights.depth"),
        ("scale: [0.5, 2]", "scale: [0.5, -2]", 11, "augment.scale.1"),
        ("scale: [0.5, 2]", "scale: 2", 11, "augment.scale"),
        ("schedule: {name: cosine}", "schedule: cosine", 5, "schedule"),
    ],
)
def test_a_wrong_value_names_its_line_and_key(tmp_path, old, new, line, key):
    assert complaint(tmp_path, RECIPE.replace(old, new)).startswith(f":{line}: {key}")


@pytest.mark.parametrize(
    "old, new, line, key",
    [
        ('image: "{id}.jpg"', 'image: "{idd}.jpg"', 4, "image: "),
        ('    path: "{id}.npy"', '    path: "depth.npy"', 10, "tasks.depth.path: "),
        ("  train: train.txt\n", "", 5, "splits lacks train"),
        ("  val: val.txt", "  val: 3", 7, "splits.val must be"),
        ("image_size: [32, 32]", "image_size: [32]", 3, "image_size: too few values"),
    ],
)
def test_what_only_the_whole_card_shows_names_its_line_too(tmp_path, old, new, line, key):
    assert complaint(tmp_path, CARD.replace(old, new), Card).startswith(f":{line}: {key}")


@pytest.mark.parametrize("key", ["data_root", "data-root", "device", "keep_weights"])
def test_a_suite_is_of_no_machine(tmp_path, key):
    message = complaint(tmp_path, f"title: A suite\nsettings:\n  methods: ours\n  {key}: x\n", suite.Suite)
    assert message == f":4: settings.{key}: is of one machine or one run: give --{key.replace('_', '-')} to `bench run`"


def test_a_learning_rate_without_a_point_is_still_a_number(tmp_path):
    (tmp_path / "a.yaml").write_text(RECIPE.replace("lr: 0.1", "lr: 4e-4"))  # YAML 1.1 reads this as text
    assert yamlfile.load(tmp_path / "a.yaml", Recipe).optimizer.lr == 4e-4


def test_a_missing_key(tmp_path):
    assert "missing key 'schedule'" in complaint(tmp_path, RECIPE.replace("schedule: {name: cosine}\n", ""))
    assert "exactly one of optimizer.lr and tune" in complaint(tmp_path, RECIPE.replace("  lr: 0.1\n", ""))
    assert "missing key 'title'" in complaint(tmp_path, RECIPE.replace("title: A recipe\n", ""))


@pytest.mark.parametrize("text", [RECIPE.replace("steps: 3", ""), RECIPE + "epochs: 2\n"])
def test_a_recipe_has_one_length(tmp_path, text):
    assert "exactly one of epochs and steps" in complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just text\n", "7\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    assert "expected a mapping" in complaint(tmp_path, text)


@pytest.mark.parametrize("text, line", [("title: a\nsteps: [1, 2\nb: c\n", 3), ("a: b\n\tc: d\n", 2), ("a: b: c\n", 1)])
def test_invalid_yaml_names_the_line(tmp_path, text, line):
    assert complaint(tmp_path, text).startswith(f":{line}: not valid YAML: ")


def test_a_pattern_without_quotes_inside_braces(tmp_path):
    said = complaint(tmp_path, "title: a\ntasks:\n  depth: {path: depth/{id}.npy}\n")
    assert said.startswith(":3: not valid YAML: ") and said.endswith("text with braces in it must be quoted")


def test_several_documents_and_bytes_that_are_no_text(tmp_path):
    assert "not valid YAML" in complaint(tmp_path, RECIPE + "---\n" + RECIPE)
    (tmp_path / "b.yaml").write_bytes(b"title: \xff\xfe")
    with pytest.raises(BenchError, match=r"cannot read .*b\.yaml"):
        yamlfile.load(tmp_path / "b.yaml", Recipe)


@pytest.mark.parametrize("key, line", [("batch_size: 4", 12), ("  scale: [1, 1]", 12)])
def test_a_key_that_stands_twice_is_refused(tmp_path, key, line):
    message = complaint(tmp_path, f"{RECIPE}{key}\n")
    assert message.startswith(f":{line}: ") and key.split(":")[0].strip() in message


def test_no_python_object_is_ever_built(tmp_path):
    assert "not valid YAML" in complaint(tmp_path, "title: !!python/object/apply:os.getcwd []\n")


@pytest.mark.parametrize("kind", ["datasets", "recipes", "suites"])
def test_find_knows_names_and_paths(tmp_path, kind):
    name = resources.names(kind)[0]
    assert yamlfile.find(kind, name) == resources.folder(kind) / f"{name}.yaml"
    (tmp_path / "own.yml").touch()
    assert yamlfile.find(kind, str(tmp_path / "own.yml")) == tmp_path / "own.yml"
    with pytest.raises(BenchError, match=f"unknown {kind[:-1]} '{name}x' .did you mean '{name}'"):
        yamlfile.find(kind, f"{name}x")
    with pytest.raises(BenchError, match="no such file: .*none.yaml"):
        yamlfile.find(kind, str(tmp_path / "none.yaml"))


LOADERS = {"datasets": cards.load, "recipes": recipes.load, "suites": suite.load_suite}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in LOADERS for name in resources.names(kind)])
def test_every_shipped_file_loads_and_has_a_title(kind, name):
    assert LOADERS[kind](name).title


def test_there_are_files_of_every_kind():
    assert {"scenes", "nyud_v2"} <= set(resources.names("datasets"))
    assert {"smoke", "quick", "bdta", "mtlora", "vmt"} <= set(resources.names("recipes"))
    assert {"smoke", "table1", "table2"} <= set(resources.names("suites"))


@pytest.mark.parametrize("name", resources.names("datasets"))
def test_a_shipped_cards_name_is_its_files_name(name):
    assert yaml.safe_load((resources.folder("datasets") / f"{name}.yaml").read_text())["name"] == name


@pytest.mark.parametrize("name", resources.names("suites"))
def test_a_shipped_suites_settings_name_things_that_exist(name):
    settings = suite.load_suite(name).settings
    assert settings.recipe in resources.names("recipes") and settings.dataset in resources.names("datasets")


@pytest.mark.parametrize(
    "value", ["2024-02-30", "!!int abc", "!!bool abc", "!!timestamp abc", "&x [*x]", "[" * 3000, "9" * 5000]
)
def test_what_python_cannot_make_of_a_value_is_one_line(tmp_path, value):
    message = complaint(tmp_path, RECIPE.replace("A recipe", value))
    assert "\n" not in message and len(message) < 400


def test_aliases_of_aliases_are_looked_at_once(tmp_path):
    """Else nine to the power of their number."""
    lines = ["a: &a [x]"] + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghijkl")]
    assert "unknown key 'a'" in complaint(tmp_path, RECIPE + "\n".join(lines))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr: 0.1", "lr: .inf"),
        ("depth: 1", "depth: .inf"),
        ("depth: 1", "depht: 1"),
        ("lr: 0.1", "lr: 0.1, betas: [1, 1]"),
    ],
)
def test_values_that_train_nothing_are_refused(tmp_path, old, new):
    text = RECIPE.replace(old, new.replace(", ", "\n  ", 1) if "betas" in new else new)
    assert text != RECIPE and complaint(tmp_path, text)
