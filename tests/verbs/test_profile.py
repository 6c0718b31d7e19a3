"""`bench profile`: who runs when, what is counted, and ratios round by round."""

from __future__ import annotations

import dataclasses
import io
import re
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType
from typer.testing import CliRunner

from bench.cli import app
from bench.device import Device
from bench.errors import BenchError
from bench.measure import operators as measured
from bench.measure.operators import Operator, operators
from bench.measure.profile import Clock
from bench.step import asked
from bench.verbs import profile
from bench.verbs.profile import FLOOR, Profile
from methods import decoder_only, registry


class World:
    """A clock that steps move on; the machine is three times slower from round 2 on."""

    def __init__(self):
        self.seconds, self.order = 0.0, []
        self.clock = Clock("cpu", lambda: self.seconds, lambda a, b: b - a, lambda: None)

    def trainer(self, name, forward, backward):
        world = self

        class Trainer:
            phase = None

            def step(self, batch, step):
                slow = 3 if step >= 2 else 1
                world.order.append((step, name))
                self.phase("forward")
                world.seconds += slow * forward
                self.phase("backward")
                world.seconds += slow * backward
                self.phase("")
                world.seconds += 0.25  # between the phases and the end

        return Trainer()

    def forward(self):
        self.order.append("floor")
        self.seconds += 0.5


def test_steps_are_interleaved_and_the_first_round_is_warm_up():
    world, reports = World(), []
    trainers = {"a": world.trainer("a", 1, 2), "b": world.trainer("b", 2, 4)}
    a, b, floor = profile.interleave(trainers, {}, world.forward, world.clock, 3, lambda: reports.append(1))
    assert world.order == [x for step in range(4) for x in ((step, "a"), (step, "b"), "floor")]
    assert a.seconds == [3.25, 9.25, 9.25] and b.seconds == [6.25, 18.25, 18.25]
    assert a.phases == {"forward": [1, 3, 3], "loss": [0, 0, 0], "backward": [2, 6, 6], "optimizer": [0, 0, 0]}
    assert floor.name == FLOOR and floor.seconds == [0.5] * 3 and len(reports) == 4


def test_ratios_are_taken_within_a_round():
    """One round was ten times slower for both: the medians of the two differ by more than the ratio tells."""
    slow, fast = Profile("slow", [2.0, 20.0, 2.2]), Profile("fast", [1.0, 10.0, 1.0])
    assert slow.ratio(fast) == (2.0, 2.0, 2.2)
    table = profile.figures([slow, fast], "fast").set_index("method")
    assert table.loc["slow", ["median", "ratio", "least", "most"]].tolist() == [2.2, 2.0, 2.0, 2.2]
    assert table.loc["fast", "ratio"] == 1
    assert profile.figures([slow, fast], None)["reference"].tolist() == ["slow", "slow"]
    with pytest.raises(BenchError, match="'other' is not among the methods: slow, fast"):
        profile.figures([slow, fast], "other")


def test_the_verb(tmp_path):
    small = ("--image-size", "32", "--batch-size", "1", "--rounds", "2", "--device", "cpu")
    done = CliRunner().invoke(
        app, ["profile", "--methods", "decoder_only,ours", *small, "--save", str(tmp_path / "p.csv")]
    )
    assert done.exit_code == 0, done.output
    assert "CPU figures" in done.output and "1.00" in done.output and FLOOR in done.output
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[2].startswith("bdta_mote,") and "p90" in lines[0]
    assert "…" not in done.output  # 80 columns hold every figure


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--methods", "ourz"], "did you mean 'ours'"),
        (["--methods", "ours", "--memory", "lo"], "unknown memory 'lo' (did you mean 'low'?)"),
        (["--methods", "ours", "--device", "cuda:7"], "torch finds"),
        (["--methods", "ours", "--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a CUDA GPU"),
        (["--methods", "ours", "--image-size", "30"], "multiple of 4"),
        (["--methods", "ours", "--operators", "3", "--find-max-batch", "--memory-limit", "8GB"], "two questions"),
    ],
)
def test_bad_input_is_one_line(options, expected):
    done = CliRunner().invoke(app, ["profile", *options])
    assert done.exit_code == 2 and expected in " ".join(done.output.split()) and "Traceback" not in done.output


def test_a_method_that_fails_is_left_out_and_the_others_are_measured(monkeypatch):
    def build(*arguments):
        model = decoder_only.build(*arguments)
        model.encoder.forward = lambda image: image[:, :7] + image[..., :3]
        return model

    broken = dataclasses.replace(registry.get("decoder_only"), name="broken", build=build)
    monkeypatch.setitem(registry._METHODS, "broken", broken)
    small = ("--image-size", "32", "--batch-size", "1", "--rounds", "1", "--device", "cpu")
    done = CliRunner().invoke(app, ["profile", "--methods", "broken,decoder_only", *small])
    assert done.exit_code == 1 and "left out: broken: RuntimeError: The size of tensor" in " ".join(done.output.split())
    assert FLOOR in done.output and "Traceback" not in done.output
    done = CliRunner().invoke(app, ["profile", "--methods", "broken", *small])
    assert done.exit_code == 2 and "none of the methods took a step" in done.output


def test_a_step_is_as_long_as_its_phases_on_a_real_model():
    step = asked(
        backbone="swin_tiny", dataset="scenes", tasks=None, protocol="equal", decoder=None, recipe="bdta",
        image_size="64", precision="fp32", memory="low",
    )  # fmt: skip
    found = profile.profile("decoder_only", step, 2, Device("cpu"), 2, Console(stderr=True))
    own = found[0]
    for index, seconds in enumerate(own.seconds):
        assert sum(values[index] for values in own.phases.values()) == pytest.approx(seconds, rel=0.2)
        assert all(values[index] > 0 for values in own.phases.values())


def test_the_operators_of_a_step_are_counted_and_the_most_expensive_comes_first():
    a, b = torch.rand(400, 400), torch.rand(5)

    def step():
        for _ in range(3):
            a @ a
        (b + 1).exp()

    start = time.perf_counter()
    found = operators(step, cuda=False)
    seconds = time.perf_counter() - start
    calls = {each.name: each.calls for each in found}
    assert (calls["mm"], calls["add"], calls["exp"]) == (3, 1, 1)
    assert found[0].name == "mm" and 0 < sum(each.seconds for each in found) < seconds


def test_on_a_gpu_the_kernels_count(monkeypatch):
    """Of an operator, of none, and a range that somebody has marked, which is no kernel."""

    def event(key, device, own=0.0, kernels=0.0, count=1, marked=False):
        return SimpleNamespace(
            key=key, device_type=device, self_cpu_time_total=own, self_device_time_total=kernels, count=count,
            is_user_annotation=marked,
        )  # fmt: skip

    host, gpu = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("aten::mm", host, own=900, kernels=3e6, count=2),
        event("aten::view", host, own=5e6),
        event("aten::add", host, own=7, kernels=1e6),
        event("gemm_128x64", gpu, kernels=3e6),
        event("vectorized_add", gpu, kernels=1e6),
        event("Memset", gpu, kernels=5e5),
        event("somebody's range", gpu, kernels=9e6, marked=True),
    ]

    @contextmanager
    def profiled(activities):
        assert len(activities) == 2
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(measured, "profile", profiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = operators(lambda: None, cuda=True)
    assert found == [Operator("mm", 2, 3.0), Operator("add", 1, 1.0), Operator(measured.UNNAMED, 0, 0.5)]
    shown = Console(record=True, width=100, file=io.StringIO())
    profile.show_operators([Profile("ours", [8.0, 9.0, 9.5], operators=found)], 1, True, shown)
    text = shown.export_text()
    assert "busy for 4.500 of its 9.000 s (50 %)" in text
    assert re.search(r"mm +2 +3000.00 +66.7", text) and re.search(r"2 more +1 +1500.00 +33.3", text)


def test_the_verb_with_operators():
    small = ("--image-size", "32", "--batch-size", "1", "--rounds", "1", "--device", "cpu", "--operators", "2")
    done = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["profile", "--methods", "ours,decoder_only", *small])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("where a step goes") == 2 and "waits" not in done.stdout
    assert len(re.findall(r"^ *\d+ more +\d+", done.stdout, re.MULTILINE)) == 2


def test_a_profiler_that_saw_nothing_is_told():
    shown = Console(record=True, width=100, file=io.StringIO())
    profile.show_operators([Profile("ours", [1.0]), Profile(FLOOR, [0.5])], 3, True, shown)
    text = shown.export_text()
    assert "ours: torch's profiler saw no operator's time" in text and FLOOR not in text
