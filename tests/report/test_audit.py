"""`bench audit`: what is known to be wrong in the papers is found, and what is planted too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.errors import BenchError
from bench.report import audit, published


def disagreements(found, check):
    return {(f.where, f.printed, f.recomputed) for f in found if f.check == check and f.verdict == "disagrees"}


def test_the_papers_slips_are_found():
    found = audit.findings()
    assert disagreements(found, "delta-m") == {
        ("Table 3, DiTask (swin_tiny 22k)", "3.22", "3.36"),
        ("Table 3, TADFormer (swin_tiny 22k)", "5.56", "5.52"),
        ("Table 5, Ours (swin_tiny)", "8.70", "7.84"),
        ("Table 2, Shared Relative bias (swin_tiny)", "-9.56", "-7.08"),
        ("Table 2, Shared Adapter (swin_tiny)", "-0.64", "-1.83"),
        ("Table 3, VMT-Adapter rho=8 (swin_tiny)", "3.02", "2.79"),
        ("Table 3, VMT-Adapter-Lite m=6 (swin_tiny)", "0.61", "0.40"),
    }
    assert disagreements(found, "sum") == {
        ("Table 2, Shared Low-rank adapter (swin_tiny)", "2.62", "2.65"),
        ("Table 3, VMT-Adapter rho=2 (swin_tiny)", "4.56", "4.76"),
    }
    assert ("Table 2, Shared Adapter (swin_tiny)", "4.71", "4.72") in {
        (f.where, f.printed, f.recomputed) for f in found if f.check == "sum" and f.verdict == "rounding"
    }
    other = {(where, p, r) for where, p, r in disagreements(found, "same row")}
    assert {w for w, _, _ in other} == {"Table 5, Ours (swin_tiny)"} and len(other) == 4  # all metrics, not Delta-m
    assert disagreements(found, "text") == {
        ("Section 4.4", "true", "8.7 > 6.59 > 6.64"),
        ("Section 1", "about 1", "4.11"),
        ("Section 1", "0.36", "1.45"),
        ("Section 4.2", "about 1", "1.17"),  # m = 6: parts that are not divided by m
        ("Section 4.2", "about 1", "1.59"),
    }
    assert [f.where for f in found if f.check == "twins"] == ["Table 2, Shared Adapter (swin_tiny)"]
    assert {f.printed for f in found if f.check == "heading"} == {"RMSE"}
    assert {f.where.split()[3] for f in found if f.check == "reference"} == {"swin_small", "swin_base"}


def test_what_the_abstract_claims_agrees():
    by_quote = {f.what.strip('"'): f for f in audit.findings() if f.check == "text"}
    expected = {
        "only ~30% of the parameters": "31.98",
        "~50% of the memory": "48.87",
        "~60% of the training time": "64.36",
        "a 2.05x performance improvement": "2.05",
    }
    for quote, value in expected.items():
        assert by_quote[quote].verdict == "agrees" and by_quote[quote].recomputed == value


@pytest.mark.parametrize(
    ("row", "column", "shift", "check"),
    [
        ("LoRA", "semseg", 0.2, "delta-m"),
        ("LoRA", "semseg", 0.2, "same row"),
        ("Multiple LoRA", "encoder_m", 0.02, "sum"),
        ("VMT-Adapter rho=1", "tp_m", 0.02, "sum"),
        ("Multiple Adapter", "encoder_m", -0.1, "formula"),
    ],
)
def test_a_planted_slip_is_found(monkeypatch, row, column, shift, check):
    before = {f.where for f in audit.findings() if f.check == check and f.verdict == "disagrees"}
    rows = published.load()
    rows.loc[rows["row"] == row, column] += shift
    monkeypatch.setattr(published, "load", lambda: rows.copy())
    changed = {(f.where, f.recomputed) for f in audit.findings() if f.check == check and f.verdict == "disagrees"}
    assert {where for where, _ in changed} != before or check == "formula"
    assert any(published.canonical(row) in where.lower() for where, _ in changed)


def test_a_false_claim_is_found(monkeypatch):
    claims = published.claims()
    true = claims["quote"] == "a 2.05x performance improvement"
    claims.loc[true, "printed"] = "2.06"
    monkeypatch.setattr(published, "claims", lambda: claims)
    (found,) = (f for f in audit.findings() if "2.05x" in f.what)
    assert (found.verdict, found.printed, found.recomputed) == ("disagrees", "2.06", "2.05")


def test_own_counts_are_held_to_every_table_that_prints_the_row():
    found = audit.own_counts([("lora", "LoRA"), ("mtlora", "MTLoRA")], lambda e, b: {"lora": 2.871}.get(e, 13.11))
    seen = {(f.where, f.printed, f.recomputed, f.verdict) for f in found}
    assert ("Table 1, LoRA (swin_tiny)", "2.87", "2.87", "agrees") in seen
    assert ("Table 2, Multiple LoRA (swin_tiny)", "2.87", "2.87", "agrees") in seen
    assert ("Table 2, MTLoRA (swin_small)", "13.11", "13.11", "agrees") in seen
    assert ("Table 2, MTLoRA (swin_base)", "17.76", "13.11", "disagrees") in seen


def test_arithmetic():
    assert audit._evaluate("m^3 + 2*L/(m*rho) * d^2 - 1", {"m": 3, "L": 2, "rho": 4, "d": 6}) == 27 + 12 - 1
    assert audit._evaluate("a > b > c", {"a": 3, "b": 2, "c": 2.5}) is False
    assert audit._evaluate("max(a, b) - min(a, b)", {"a": 3, "b": 2}) == 1
    for text in ("__import__('os')", "a.b", "a +", "unknown"):
        with pytest.raises(BenchError, match="no arithmetic"):
            audit._evaluate(text, {"a": 1})


def test_json_without_counts_needs_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from bench.cli import app; "
        "done = CliRunner().invoke(app, ['audit', '--no-counts', '--json']); "
        "assert 'torch' not in sys.modules; print(done.stdout); sys.exit(done.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {f["verdict"] for f in found} == {"agrees", "rounding", "disagrees", "not checked"} and len(found) > 200
