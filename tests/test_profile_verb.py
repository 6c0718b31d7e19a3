"""`bench profile`: who runs when, what is counted, and ratios round by round."""

from __future__ import annotations

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import profile
from bench.cli import app
from bench.errors import BenchError
from bench.grid import Device
from bench.measure.profile import Clock
from bench.profile import FLOOR, Profile


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
    ],
)
def test_bad_input_is_one_line(options, expected):
    done = CliRunner().invoke(app, ["profile", *options])
    assert done.exit_code == 2 and expected in " ".join(done.output.split()) and "Traceback" not in done.output


def test_a_step_is_as_long_as_its_phases_on_a_real_model():
    found = profile.profile(
        "decoder_only", "swin_tiny", "scenes", None, "equal", "bdta", "64", 2, "fp32", "low", Device("cpu"), 2,
        Console(stderr=True),
    )  # fmt: skip
    own = found[0]
    for index, seconds in enumerate(own.seconds):
        assert sum(values[index] for values in own.phases.values()) == pytest.approx(seconds, rel=0.2)
        assert all(values[index] > 0 for values in own.phases.values())
