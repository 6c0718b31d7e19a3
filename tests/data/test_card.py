"""Dataset cards: what is refused and how, which ids are used, and what the fingerprint stands for."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from bench import resources
from bench.data import card as cards
from bench.data.card import Card, TaskCard
from bench.errors import BenchError
from bench.tasks import TASKS

GOOD = {
    "name": "own",
    "title": "My own data",
    "image_size": [48, 64],
    "image": "images/{id}.jpg",
    "splits": {"train": "train.txt", "val": "val.txt"},
    "tasks": {
        "semseg": {"path": "seg/{id}.png", "classes": ["floor", "wall", "lamp"]},
        "depth": {"path": "depth/{id}.npy"},
    },
}


def refusal(folder: Path, **changes) -> str:
    """The one line with which a card with these changes is refused."""
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    with pytest.raises(BenchError) as error:
        cards.load(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_good_card_loads(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(GOOD))
    card = cards.load(str(tmp_path / "own.yaml"))
    assert card.image_size == (48, 64)
    assert card.tasks["semseg"].classes == ("floor", "wall", "lamp")


@pytest.mark.parametrize("pattern", ["images/a.jpg", "images/{name}.jpg", "{id}/{other}.jpg", "images/{id.jpg", ""])
def test_an_image_pattern_has_id_and_no_other_field(tmp_path, pattern):
    assert "image: " in refusal(tmp_path, image=pattern)


@pytest.mark.parametrize("pattern", ["{id:04d}.jpg", "{id!z}.jpg"])
def test_a_pattern_that_cannot_take_a_text_id_is_refused(tmp_path, pattern):
    assert pattern in refusal(tmp_path, image=pattern)


@pytest.mark.parametrize("pattern", ["/data/{id}.jpg", "../{id}.jpg", "images/../../{id}.jpg"])
def test_a_pattern_stays_below_the_data_root(tmp_path, pattern):
    assert "below the data root" in refusal(tmp_path, image=pattern)


def test_a_tasks_pattern_is_checked_too(tmp_path):
    assert "tasks.depth.path" in refusal(tmp_path, tasks={"depth": {"path": "depth/all.npy"}})


@pytest.mark.parametrize("task", ["semseg", "human_parts"])
@pytest.mark.parametrize("classes", [[], ["all"]])
def test_a_task_with_classes_needs_two_of_them(tmp_path, task, classes):
    tasks = {task: {"path": "a/{id}.png", "classes": classes}}
    assert "at least two 'classes'" in refusal(tmp_path, tasks=tasks)


def test_labels_fit_into_a_byte_beside_the_one_for_no_label(tmp_path):
    def task(count):
        return {"tasks": {"semseg": {"path": "seg/{id}.png", "classes": [f"class {i}" for i in range(count)]}}}

    assert "256 classes; at most 255" in refusal(tmp_path, **task(256))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(GOOD | task(255)))
    assert cards.load(str(tmp_path / "own.yaml")).channels(("semseg",)) == {"semseg": 255}


def test_a_built_in_cards_name_is_taken(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"name": "scenes"}))
    with pytest.raises(BenchError, match="'scenes' is the name of a built-in card, and the given one is another"):
        cards.require_own_name(cards.load(str(path)))
    path.write_text((resources.folder("datasets") / "nyud_v2.yaml").read_text())  # a copy is none
    cards.require_own_name(cards.load(str(path)))


@pytest.mark.parametrize("size, expected", [(48, (48, 48)), ([48, 64], (48, 64))])
def test_one_number_is_a_square_as_on_the_command_line(tmp_path, size, expected):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(GOOD | {"image_size": size}))
    assert cards.load(str(tmp_path / "own.yaml")).image_size == expected


@pytest.mark.parametrize("size", [True, 16, [48], [48, 8]])
def test_sizes_that_are_none(tmp_path, size):
    assert "image_size" in refusal(tmp_path, image_size=size)


def test_an_unknown_task_is_refused_with_a_near_miss(tmp_path):
    message = refusal(tmp_path, tasks={"semsge": {"path": "a/{id}.png"}})
    assert "unknown task 'semsge' (did you mean 'semseg'?)" in message


def test_a_card_has_a_task(tmp_path):
    assert "at least one task" in refusal(tmp_path, tasks={})


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_splits_are_needed(tmp_path, split):
    other = {"train": "val", "val": "train"}[split]
    assert f"splits lacks {split}" in refusal(tmp_path, splits={other: "list.txt"})


def test_files_have_lists_of_ids_and_scenes_have_numbers(tmp_path):
    assert "splits.train must be the path" in refusal(tmp_path, splits={"train": 5, "val": "val.txt"})
    message = refusal(tmp_path, source="scenes", splits={"train": "train.txt", "val": 5})
    assert "splits.train must be a number" in message


def test_default_tasks_are_among_the_tasks(tmp_path):
    assert "default_tasks names 'edge'" in refusal(tmp_path, default_tasks=["edge"])


@pytest.mark.parametrize("scale", [0, -0.1])
def test_a_depth_scale_is_positive(tmp_path, scale):
    tasks = {"depth": {"path": "d/{id}.png", "scale": scale}}
    assert "tasks.depth.scale" in refusal(tmp_path, tasks=tasks)


def test_the_image_size_is_two_numbers(tmp_path):
    assert "image_size" in refusal(tmp_path, image_size=[48])
    assert "image_size.0" in refusal(tmp_path, image_size=[8, 64])


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", ""])
def test_a_name_is_fit_for_a_folder_of_records(tmp_path, name):
    assert re.search(r"own\.yaml:\d+: .*name", refusal(tmp_path, name=name))


def test_channels_come_from_the_task_or_from_the_classes():
    assert Card(**GOOD).channels(("depth", "semseg")) == {"depth": TASKS["depth"].channels, "semseg": 3}


def write_list(root: Path, names: list[str]) -> Path:
    (root / "train.txt").write_text("\n".join(names) + "\n")
    return root


def test_ids_are_read_in_file_order(tmp_path):
    assert cards.ids(Card(**GOOD), "train", write_list(tmp_path, ["c", "a", "b"])) == ["c", "a", "b"]


def test_scenes_of_training_and_validation_do_not_overlap():
    card = cards.load("scenes")
    train, val = cards.ids(card, "train", None), cards.ids(card, "val", None)
    assert (len(set(train)), len(set(val))) == (card.splits["train"], card.splits["val"])
    assert not set(train) & set(val)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "is empty"),
        ("a b a", "names the image 'a' twice"),
        ("a ../b", "names '../b', which leads out of the data root"),
        ("a scene/../../b", "leads out of the data root"),
        ("/etc/passwd a", "leads out of the data root"),
    ],
)
def test_an_unusable_list_is_refused_by_path(tmp_path, text, expected):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(BenchError, match=expected) as error:
        cards.ids(Card(**GOOD), "train", tmp_path)
    assert str(tmp_path / "train.txt") in str(error.value)


def test_a_list_may_start_with_a_byte_order_mark_and_name_folders(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfa/1\r\nb/2\r\n")
    assert cards.ids(Card(**GOOD), "train", tmp_path) == ["a/1", "b/2"]


def test_two_classes_of_one_name_and_a_split_outside_the_root_are_refused(tmp_path):
    twice = {"semseg": {"path": "{id}.png", "classes": ["road", "car", "road"]}}
    assert "two classes are called 'road'" in refusal(tmp_path, tasks=twice)
    outside = {"train": "../train.txt", "val": "val.txt"}
    assert "'../train.txt' must stay below the data root" in refusal(tmp_path, splits=outside)


def test_a_list_that_is_no_text_is_refused_by_path(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe1\x002")
    with pytest.raises(BenchError, match=r"train\.txt"):
        cards.ids(Card(**GOOD), "train", tmp_path)


def test_a_missing_list_names_its_path(tmp_path):
    with pytest.raises(BenchError, match="--data-root") as error:
        cards.ids(Card(**GOOD), "train", tmp_path)
    assert str(tmp_path / "train.txt") in str(error.value)


def test_check_files_names_the_first_missing_file_and_counts_the_others(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    with pytest.raises(BenchError, match="and 2 more files") as error:
        cards.check_files(Card(**GOOD), tmp_path, ["a", "b"], ("depth",))
    assert str(tmp_path / "depth" / "a.npy") in str(error.value)


def test_only_the_files_of_the_chosen_tasks_are_needed(tmp_path):
    for name in ("images/a.jpg", "depth/a.npy"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    cards.check_files(Card(**GOOD), tmp_path, ["a"], ("depth",))


def test_tasks_are_chosen_in_the_cards_order():
    card = Card(**GOOD)
    assert cards.choose_tasks(card, "depth, semseg") == ("semseg", "depth")
    assert cards.choose_tasks(card, "depth") == ("depth",)
    assert cards.choose_tasks(card, None) == ("semseg", "depth")
    assert cards.choose_tasks(Card(**GOOD | {"default_tasks": ("depth",)}), None) == ("depth",)


def test_a_tolerance_is_of_edges_alone():
    with pytest.raises(ValueError, match="'depth' has a tolerance, which is of edges alone"):
        Card(**GOOD | {"tasks": GOOD["tasks"] | {"depth": {"path": "{id}.npy", "tolerance": 0.01}}})


def test_a_card_without_a_tolerance_keeps_the_fingerprint_of_before_there_was_one():
    """Else records from then would no longer be found, nor stand in a table with new ones."""
    card = Card(**GOOD)
    said = card.model_dump(mode="json", exclude={"title", "licence", "homepage", "fetch"})
    said["tasks"] = {name: {k: v for k, v in task.items() if k != "tolerance"} for name, task in said["tasks"].items()}
    then = json.dumps([said, ["1"], ["2"], ("depth", "edge"), [], None], sort_keys=True)
    assert cards.fingerprint(card, ["1"], ["2"], ("depth", "edge")) == hashlib.sha256(then.encode()).hexdigest()[:12]


def test_the_fingerprint_changes_with_what_decides_the_data():
    card, train, val, tasks = Card(**GOOD), ["1", "2"], ["3"], ("semseg", "depth")
    base = cards.fingerprint(card, train, val, tasks)
    depth = card.tasks["depth"].model_copy(update={"scale": 0.001})
    others = {
        cards.fingerprint(card, ["1"], val, tasks),
        cards.fingerprint(card, ["2", "1"], val, tasks),
        cards.fingerprint(card, train, ["4"], tasks),
        cards.fingerprint(card, train, val, ("semseg",)),
        cards.fingerprint(card.model_copy(update={"image": "others/{id}.jpg"}), train, val, tasks),
        cards.fingerprint(card.model_copy(update={"tasks": card.tasks | {"depth": depth}}), train, val, tasks),
    }
    assert len(others) == 6 and base not in others
    digests = {"1": "a", "2": "b", "3": "c"}
    known = cards.fingerprint(card, train, val, tasks, digests)
    assert cards.fingerprint(card, train, val, tasks, digests | {"4": "d"}) == known
    for name in digests:
        assert cards.fingerprint(card, train, val, tasks, digests | {name: "e"}) != known
    assert cards.fingerprint(card.model_copy(update={"title": "Reworded"}), train, val, tasks) == base
    near, far = (
        card.model_copy(update={"tasks": card.tasks | {"edge": TaskCard(path="{id}.png", **tolerance)}})
        for tolerance in ({}, {"tolerance": 0.011})
    )
    assert cards.fingerprint(near, train, val, ("edge",)) != cards.fingerprint(far, train, val, ("edge",))
    assert cards.fingerprint(near, train, val, tasks) == cards.fingerprint(far, train, val, tasks)


def test_the_fingerprint_of_scenes_follows_the_renderers_version(monkeypatch):
    card = cards.load("scenes")
    before = cards.fingerprint(card, ["1"], ["2"], ("depth",))
    monkeypatch.setattr(cards.scenes, "VERSION", "another")
    assert cards.fingerprint(card, ["1"], ["2"], ("depth",)) != before


def test_a_misspelt_task_is_named_with_its_own_line(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text(
        "name: mine\ntitle: t\nimage_size: [64, 64]\nimage: '{id}.png'\nsplits: {train: a, val: b}\n"
        "tasks:\n  depth: {path: 'd/{id}.npy'}\n  salency: {path: 's/{id}.png'}\n"
    )
    with pytest.raises(BenchError, match=r"card\.yaml:8: tasks\.salency: .*did you mean 'saliency'"):
        cards.load(str(path))


@pytest.mark.parametrize("splits", [{"train": 0, "val": 4}, {"train": 4, "val": -1}, {"train": 10**20, "val": 4}])
def test_a_number_of_scenes_has_bounds(tmp_path, splits):
    assert "must be a number of scenes from 1 to" in refusal(tmp_path, source="scenes", splits=splits)
