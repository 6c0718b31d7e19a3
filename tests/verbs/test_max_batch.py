"""`bench profile --find-max-batch`: the search, one real try that fits and one that does not, and what is refused."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from bench import recipe
from bench.cli import app
from bench.device import Device
from bench.errors import BenchError
from bench.measure import probe
from bench.measure.probe import Answer, Request
from bench.step import Step
from bench.verbs import max_batch

GIB = 2**30
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is enforced by Linux alone")


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 31, 63, 64])
def test_the_search_finds_the_last_that_fits_and_tries_none_twice(limit):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= limit

    assert max_batch.largest(fits, most=64) == limit
    assert len(tried) == len(set(tried)) <= 14 and all(1 <= n <= 64 for n in tried)


def test_nothing_beyond_the_most_is_tried():
    assert max_batch.largest(lambda n: True, most=50) == 50


STEP = Step(
    backbone="swin_tiny_patch4_window7_224", image_size=(64, 64), channels={"saliency": 1}, recipe=recipe.load("smoke")
)


def request(batch_size, method="decoder_only", cuda=False, limit=2 * GIB, **changes):
    step = STEP.model_copy(update=changes)
    return Request(method=method, step=step, batch_size=batch_size, cuda=cuda, limit=limit)


@linux
def test_a_small_batch_fits_and_a_huge_one_does_not():
    small = max_batch._ask(request(1), Device("cpu"))
    assert small.fits and 0 < small.peak < 3 * GIB and small.seconds > 0
    assert max_batch._ask(request(4096, image_size=(448, 448)), Device("cpu")) == Answer(fits=False)


@linux
def test_what_fails_for_another_reason_is_told_and_not_taken_for_memory(monkeypatch):
    with pytest.raises(BenchError, match="a batch of 3: MethodError: .*cannot run on resnet18"):
        max_batch._ask(request(3, method="mtlora", backbone="resnet18"), Device("cpu"))


@pytest.mark.parametrize(("cuda", "batch_size", "memory"), [(True, 8, True), (True, 1, False), (False, 8, False)])
def test_what_libraries_say_at_the_limit_is_memory_on_a_gpu_alone(monkeypatch, cuda, batch_size, memory):
    """And not where a single image fails: that one is always tried first."""

    def fails(*_, **__):
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr("methods.build.build_model", fails)
    monkeypatch.setattr("bench.measure.cuda.accelerator", lambda *_: None)  # there may be no GPU
    found = probe.answer(request(batch_size, cuda=cuda, limit=None))
    assert not found.fits and (found.error == "") == memory


def test_a_row_says_what_was_found_or_why_nothing(monkeypatch, tmp_path):
    def ask(request, place):
        if request.method == "mtlora":
            raise BenchError("a batch of 1: no")
        return Answer(fits=request.batch_size <= 5, peak=request.batch_size * GIB, seconds=0.5 * request.batch_size)

    monkeypatch.setattr(max_batch, "_ask", ask)
    arguments = ["profile", "--find-max-batch", "--memory-limit", "6GB", "--device", "cpu", "--methods", "ours,mtlora"]
    done = CliRunner().invoke(app, [*arguments, "--save", str(tmp_path / "found.csv")])
    assert done.exit_code == 0 and "within 6 GiB" in done.output and "mtlora: a batch of 1: no" in done.output
    ours, mtlora = pd.read_csv(tmp_path / "found.csv").to_dict("records")
    assert (ours["batch"], ours["peak"], ours["seconds"], ours["images a second"]) == (5, 5 * GIB, 2.5, 2.0)
    assert ours["tries"] == 6 and pd.isna(mtlora["batch"])  # 1, 2, 4, 8, then 6 and 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--find-max-batch"], "needs --memory-limit"),
        (["--memory-limit", "6GB"], "goes with --find-max-batch"),
        (["--find-max-batch", "--memory-limit", "much"], "--memory-limit 'much' is no size"),
    ],
)
def test_what_is_refused(arguments, message):
    done = CliRunner().invoke(app, ["profile", "--methods", "ours", "--device", "cpu", *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.split())
