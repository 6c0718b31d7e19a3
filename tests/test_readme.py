"""What the README prints works as printed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import methods
from bench import recipe as recipes
from bench.data import card as cards
from methods import registry
from methods.backbones.load import WeightSource, load_backbone
from methods.model import Setting

README = Path(__file__).parent.parent / "README.md"


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder of methods that holds the README's file and nothing else, beside the project's own."""
    (code,) = (block for block in python_blocks() if "register(" in block)
    (tmp_path / "scale_shift.py").write_text(code, encoding="utf-8")
    registry.all_methods()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    yield
    sys.modules.pop("methods.scale_shift", None)


def test_example_method_is_found_built_and_trained(newcomer):
    with_shift, without = registry.parse("scale_shift[shift=on|off]")
    backbone = load_backbone("tf_efficientnet_lite0.in1k", (64, 64), WeightSource("random"))
    channels = sum(backbone.channels)
    tasks = {"semseg": 4, "depth": 1}
    model = with_shift.build(backbone, tasks, Setting("equal"))
    assert model.ledger().adaptation == 2 * 2 * channels
    assert without.build(backbone, tasks, Setting("equal")).ledger().adaptation == 2 * channels
    outputs = model(torch.rand(2, 3, 64, 64))
    assert {task: tuple(out.shape) for task, out in outputs.items()} == {
        "semseg": (2, 4, 64, 64),
        "depth": (2, 1, 64, 64),
    }
    sum(out.square().mean() for out in outputs.values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_example_method_passes_the_conformance_tests(newcomer, build, tasks, tiny_swin):
    """As `pytest tests/methods/test_conformance.py -k scale_shift` would run them, were the file in methods/."""
    path = README.parent / "tests" / "methods" / "test_conformance.py"
    spec = importlib.util.spec_from_file_location("conformance_of_the_readme", path)
    conformance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conformance)
    assert "scale_shift" in conformance.METHODS
    for protocol in ("published", "equal"):
        conformance.test_outputs(build, tasks, "scale_shift", protocol, None)
        conformance.test_training(build, "scale_shift", protocol)
    for test in ("same_seed_same_outputs", "bfloat16", "images_of_a_batch_do_not_meet"):
        getattr(conformance, f"test_{test}")(build, "scale_shift")
    conformance.test_start(build, "scale_shift", tiny_swin)
    conformance.test_backbone_passes(build, "scale_shift", tasks)


def test_lines_for_python(monkeypatch):
    (code,) = (block for block in python_blocks() if "build_model(" in block)
    monkeypatch.chdir(README.parent)
    found = {}
    exec(code, found)
    said = dict(re.findall(r'"(\w+)": (\([\d, ]+\))', code.partition("->")[2]))
    assert {task: str(tuple(out.shape)) for task, out in found["logits"].items()} == said
    trainable = found["model"].ledger().trainable
    assert trainable == sum(p.numel() for p in found["model"].parameters() if p.requires_grad)
    assert not found["records"].empty


def test_card_of_the_readme_loads(tmp_path):
    (text,) = re.findall(r"    name: street\n(?:    .*\n)+", README.read_text(encoding="utf-8"))
    (tmp_path / "street.yaml").write_text(text.replace("    ", "", 1).replace("\n    ", "\n"), encoding="utf-8")
    card = cards.load(str(tmp_path / "street.yaml"))
    assert card.channels(tuple(card.tasks)) == {"semseg": 4, "depth": 1}


def test_recipe_of_the_readme_loads(tmp_path):
    (text,) = re.findall(r"    title: Half the epochs\n(?:    .*\n)+", README.read_text(encoding="utf-8"))
    (tmp_path / "mine.yaml").write_text(re.sub(r"^    ", "", text, flags=re.MULTILINE), encoding="utf-8")
    recipe = recipes.load(str(tmp_path / "mine.yaml"))
    assert recipe.epochs == 40 and recipe.measure.steps == 20
    named = set(re.findall(r"`(\w+_factor)`", README.read_text(encoding="utf-8")))
    assert len(named) == 2 and named <= set(recipes.Optimizer.model_fields)
    (tune,) = re.findall(r"`tune: (\{.*\})`", README.read_text(encoding="utf-8"))
    assert yaml.safe_load(tune) == recipes.load("nyud_extended").tune.model_dump(mode="json")


def test_commands_of_the_readme_exist():
    """Every option that the README, or one of a folder, gives to a verb is one of its own."""
    pages = [README, *(README.parent / part / "README.md" for part in ("datasets", "results"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for verb in (
        "run",
        "report",
        "show",
        "list",
        "count",
        "audit",
        "compare",
        "figure",
        "predict",
        "export",
        "profile",
    ):
        command = [sys.executable, "-m", "bench", verb, "--help"]
        plain = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
        help_text = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=README.parent, env=plain
        ).stdout
        used = {option for line in re.findall(rf"bench {verb} (.*)", text) for option in re.findall(r"--[a-z-]+", line)}
        missing = {option for option in used if option not in help_text}
        assert not missing, f"bench {verb} has no {missing}"


def test_counts_of_the_readme_are_those_of_the_command():
    """Every row of the table of methods; a method that was added needs none."""
    from bench.verbs import count

    rows = re.findall(r"^\| ([\w\[\]=,:]+) \| (\d) \|(.*)\|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    methods_in_table = ",".join(row[0] for row in rows)
    papers = {name for name, method in registry.all_methods().items() if method.rows(method.options())}
    assert papers <= {c.method.name for c in registry.parse(methods_in_table)}
    printed = count.markdown(count.counts(methods_in_table, "swin_tiny", "scenes", None, (224, 224))).splitlines()[2:]
    assert [f"| {name} | {passes} |{rest}|" for name, passes, rest in rows] == printed
