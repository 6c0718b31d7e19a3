"""The wheel: what is in it, and that the installed copy works away from the source tree."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile

import pytest

from bench import resources
from bench.resources import ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
UNREACHABLE = (
    "No matching distribution found for hatchling",
    "Could not find a version that satisfies",
    "No module named pip",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a source tree")
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    done = subprocess.run(
        [*PIP, "wheel", str(ROOT), "--no-deps", *isolation, "--wheel-dir", str(folder)],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode and any(text in done.stdout + done.stderr for text in UNREACHABLE):
        pytest.skip("the build backend hatchling is neither installed nor within reach")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    "kind, place",
    [
        ("datasets", "bench/_share/datasets"),
        ("published", "bench/_share/published"),
        ("recipes", "bench/recipes"),
        ("suites", "bench/suites"),
    ],
)
def test_every_data_file_is_in_the_wheel(members, kind, place):
    files = [path.name for path in resources.folder(kind).iterdir() if path.suffix in (".yaml", ".csv")]
    assert files
    assert {f"{place}/{name}" for name in files} <= members


def test_every_module_is_in_the_wheel(members):
    modules = {str(p.relative_to(ROOT)) for package in ("bench", "methods") for p in (ROOT / package).rglob("*.py")}
    assert modules <= members


def test_nothing_else_is_at_the_top(members):
    tops = {name.split("/")[0] for name in members}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bench", "methods"}
    assert not any("test" in name.split("/")[-1] or "/tests/" in name for name in members)
    assert not any("__pycache__" in name for name in members)


def test_the_command_is_declared_and_the_licence_is_there(wheel, members):
    (entry,) = (name for name in members if name.endswith("entry_points.txt"))
    assert any(".dist-info/" in name and name.endswith("LICENSE") for name in members)
    with zipfile.ZipFile(wheel) as archive:
        assert "bench = bench.__main__:main" in archive.read(entry).decode()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run Python in an empty folder with the wheel's contents, not the source tree, on its path."""
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    command = [*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)

    def python(*args):
        environment = os.environ | {"PYTHONPATH": str(target), "COLUMNS": "200"}
        command = [sys.executable, *args]
        return subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
        ).stdout

    return target, python


def test_the_installed_copy_is_the_one_in_use(installed):
    target, python = installed
    places = python("-c", "import bench, methods; print(bench.__file__, methods.__file__)").split()
    assert places == [str(target / "bench" / "__init__.py"), str(target / "methods" / "__init__.py")]


@pytest.mark.parametrize("kind", ["datasets", "recipes", "suites"])
def test_the_installed_copy_lists_every_name(installed, kind):
    shown = installed[1]("-m", "bench", "list", kind)
    assert all(name in shown for name in resources.names(kind))


def test_the_installed_copy_knows_the_published_tables_and_no_commit(installed):
    code = (
        "from bench.measure.provenance import git_state; from bench import resources;"
        "print(len(list(resources.folder('published').glob('*.csv'))), *git_state())"
    )
    count = len(list((ROOT / "results" / "published").glob("*.csv")))
    assert count > 0 and installed[1]("-c", code).split() == [str(count), "None", "None"]


def test_the_installed_copy_makes_cells(installed):
    shown = installed[1](
        "-m", "bench", "run", "--methods", "decoder_only", "--recipe", "smoke", "--weights", "random",
        "--image-size", "32", "--device", "cpu", "--dry-run",
    )  # fmt: skip
    assert "1 cell" in shown and "decoder_only" in shown
