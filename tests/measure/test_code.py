"""Which code a cell is run by."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import grid, record
from bench.measure import code
from bench.resources import ROOT
from methods import registry
from methods.registry import all_methods

TREE = {
    "bench/run.py": "def run():\n    from methods.model import Model\n    import bench.deep.down\n",
    "bench/report.py": "import bench.run\n",
    "bench/deep/__init__.py": "",
    "bench/deep/down.py": "import torch\n",
    "methods/model.py": "from methods import layers\n",
    "methods/layers/__init__.py": "",
    "methods/one.py": "from methods.two import helper\nimport bench.run\n",  # a circle ends
    "methods/two.py": "helper = 1\n",
    "methods/three.py": "import methods.model\n",
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def parse(name):
        build = SimpleNamespace(__module__="methods.two" if name == "lent" else f"methods.{name}")
        return [SimpleNamespace(method=SimpleNamespace(build=build, name=name))]

    monkeypatch.setattr(code, "parse", parse)
    monkeypatch.setattr(code, "module_of", lambda method: "methods.three" if method.name == "lent" else "")
    return tmp_path


COMMON = {
    "bench/run.py",
    "bench/deep/__init__.py",
    "bench/deep/down.py",
    "methods/model.py",
    "methods/layers/__init__.py",
}


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("one", {"methods/one.py", "methods/two.py"}),
        ("three", {"methods/three.py"}),
        ("lent", {"methods/two.py", "methods/three.py"}),  # registered in one file, its function from another
    ],
)
def test_the_files_are_those_that_import_each_other(tree, method, own):
    assert {str(path.relative_to(tree)) for path in code.files(method)} == COMMON | own


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("methods/two.py", {"one"}),
        ("methods/three.py", {"three"}),
        ("bench/deep/down.py", {"one", "three"}),
        ("methods/layers/__init__.py", {"one", "three"}),
        ("bench/report.py", set()),
    ],
)
def test_a_fingerprint_changes_with_what_the_cell_is_run_by_alone(tree, edited, changed):
    before = {method: code.fingerprint(method) for method in ("one", "three")}
    (tree / edited).write_text((tree / edited).read_text() + "# edited\n")
    assert {method for method in before if code.fingerprint(method) != before[method]} == changed


@pytest.mark.parametrize("name", [*all_methods(), "peft:dora"])
def test_the_file_that_registers_a_method_is_known(name):
    text = (ROOT / Path(*registry.module_of(registry.get(name)).split(".")).with_suffix(".py")).read_text()
    assert f'"{name.partition(":")[0]}"' in text and ("register(" in text or "register_prefix(" in text)


@pytest.mark.parametrize(
    ("line", "reached"),
    [
        ("from . import two", "methods/two.py"),
        ("from .two import helper", "methods/two.py"),
        ("from .layers.deep import x", "methods/layers/deep.py"),
        ("from .layers import deep", "methods/layers/deep.py"),
    ],
)
def test_relative_imports_are_followed(tree, line, reached):
    (tree / "methods/layers/deep.py").write_text("from .. import two\n")
    (tree / "methods/three.py").write_text(f"{line}\n")
    assert {tree / reached, tree / "methods/two.py"} <= code.files("three")


def test_a_package_imports_from_itself(tree):
    (tree / "methods/layers/deep.py").write_text("")
    (tree / "methods/layers/__init__.py").write_text("from . import deep\n")
    assert tree / "methods/layers/deep.py" in code.files("three")


def test_a_new_import_is_followed(tree):
    (tree / "methods/three.py").write_text("import methods.two\n")
    assert tree / "methods/two.py" in code.files("three")


@pytest.mark.parametrize("expression", [*all_methods(), "peft:dora"])
def test_a_methods_own_file_is_among_them_and_no_other_methods(expression):
    of_all = {"choices.py", "decoder.py", "model.py", "registry.py", "__init__.py"}
    own = {path.name for path in code.files(expression) if path.parent == ROOT / "methods"} - of_all
    if expression == "peft:dora":
        assert own == {"peft_methods.py"}
    else:
        defined = Path(inspect.getsourcefile(all_methods()[expression].build)).name
        assert own == {defined} | ({"multi_task_full.py"} if expression == "single_task_full" else set())


def test_they_are_what_a_cells_process_reads(tmp_path):
    """What is left out of them would change a cell's figures unseen: a real cell, and every module that it loaded."""
    jobs = grid.jobs(
        None,
        {"methods": "mtlora", "backbone": "swin_tiny", "weights": "random", "image_size": "64", "recipe": "smoke"},
        None, "cpu", 0, tmp_path, print,
    )  # fmt: skip
    script = (
        "import multiprocessing, sys\n"
        "from bench.run import run_in_process\n"
        "from bench.spec import Job\n"
        "heard, told = multiprocessing.Pipe()\n"
        "run_in_process(Job.model_validate_json(sys.argv[1]), told)\n"
        "own = [m for name, m in sys.modules.items() if name.split('.')[0] in ('bench', 'methods')]\n"
        "print('\\n'.join(m.__file__ or '' for m in own))\n"
    )
    command = [sys.executable, "-c", script, jobs[0].model_dump_json()]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert record.read(jobs[0].record_path).status == "ok"
    loaded = {Path(line) for line in printed.splitlines() if line.startswith(str(ROOT))}
    files = code.files("mtlora")
    of_methods = {path for path in loaded - files if path.parent == ROOT / "methods"}  # the registry reads them all
    layers = {path for path in loaded - files if path.parent == ROOT / "methods" / "layers"}
    assert loaded - files == of_methods | layers and ROOT / "bench/train/loop.py" in loaded & files
    assert not any(path.name in ("model.py", "decoder.py") for path in of_methods)
