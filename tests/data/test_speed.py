"""The comparison of caches: each kind does what its name says, and nothing is left behind."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from bench import cli, recipe
from bench.data import card as cards
from bench.data import speed
from bench.data.loader import DenseDataset


def test_caches_are_read_and_no_cache_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path))
    reads = []
    real = DenseDataset._read
    monkeypatch.setattr(
        DenseDataset, "_read", lambda self, name: reads.append(self.cache and self.cache.kind) or real(self, name)
    )
    seconds = speed.compare(cards.load("scenes"), None, ("semseg",), (32, 32), recipe.load("bdta"), 3)
    assert {kind: len(values) for kind, values in seconds.items()} == dict.fromkeys(
        ("none", "ram", "disk"), speed.ROUNDS
    )
    # Each reads its three samples once to fill its cache; without one they are read again every round.
    assert {kind: reads.count(kind) for kind in ("ram", "disk")} == {"ram": 3, "disk": 3}
    assert reads.count(None) == 3 * (1 + speed.ROUNDS)
    assert os.environ["BENCH_CACHE"] == str(tmp_path) and not list(tmp_path.iterdir())


def test_ratios_are_of_one_round_each(capsys):
    """A round in which the machine was twice as slow for all tells nothing about the caches."""
    from rich.console import Console

    speed.show({"none": [4.0, 8.0, 4.0], "ram": [1.0, 2.0, 1.0]}, 8, Console(width=80))
    shown = capsys.readouterr().out
    assert "2.0" in shown and "4.00" in shown and "8.0" in shown


@pytest.mark.parametrize("dataset, message", [("scenery", "unknown"), ("nyud_v2", "--data-root")])
def test_what_cannot_be_read_is_one_line(dataset, message):
    result = CliRunner().invoke(cli.app, ["data", "speed", dataset])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
