"""Trainable parameters against the papers' tables and against counts worked out by hand."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from methods.backbones.load import WeightSource, full_name, load_backbone
from methods.model import Setting
from methods.registry import all_methods, parse

TASKS = {"semseg": 21, "human_parts": 7, "saliency": 1, "normals": 3}

# expression, backbone, exact #TP, published millions, tolerance of the latter
ROWS = [
    ("single_task_full", "swin_tiny", 112_620_296, 112.62, 0.001),
    ("multi_task_full", "swin_tiny", 30_058_202, 30.06, 0.001),
    ("decoder_only", "swin_tiny", 2_549_024, 2.55, 0.001),
    ("mtlora", "swin_tiny", 8_344_634, 8.34, 0.005),
    ("mtlora", "swin_small", 13_105_994, 13.11, 0.005),
    ("mtlora", "swin_base", 17_758_136, 17.76, 0.005),
    ("mtlora[rank=32]", "swin_tiny", 6_083_642, 6.08, 0.005),
    ("mtlora[rank=16]", "swin_tiny", 4_953_146, 4.95, 0.005),
    ("ours", "swin_tiny", 2_362_108, 2.36, 0.005),
    ("ours", "swin_small", 2_362_108, 2.36, 0.005),
    ("ours", "swin_base", 4_142_064, 4.13, 0.005),
    ("ours[mote=off]", "swin_tiny", 1_965_164, 1.96, 0.005),
    ("ours[direction=g2t]", "swin_tiny", 2_109_550, 2.11, 0.005),
    ("ours[direction=t2g]", "swin_tiny", 2_109_550, 2.11, 0.005),
]


@lru_cache
def model(expression, backbone="swin_tiny", protocol="published", decoder=None):
    """At 448x448, on the meta device: shapes without storage."""
    (configured,) = parse(expression)
    with torch.device("meta"):
        frame = load_backbone(full_name(backbone), (448, 448), WeightSource("random"))
        return configured.build(frame, TASKS, Setting(protocol, decoder))


@pytest.mark.parametrize(("expression", "backbone", "exact", "millions", "tolerance"), ROWS)
def test_published_counts(expression, backbone, exact, millions, tolerance):
    trainable = model(expression, backbone).ledger().trainable
    assert trainable == exact
    assert trainable / 1e6 == pytest.approx(millions, rel=tolerance)


@pytest.mark.parametrize("protocol", ["published", "equal"])
@pytest.mark.parametrize("expression", sorted({row[0] for row in ROWS} | set(all_methods())))
def test_the_two_splits_add_up(expression, protocol):
    built = model(expression, protocol=protocol)
    ledger = built.ledger()
    distinct = {id(p): p for p in built.parameters() if p.requires_grad}
    assert ledger.adaptation + ledger.backbone + ledger.decoder == ledger.trainable
    assert ledger.shared + ledger.per_task == ledger.trainable
    assert ledger.trainable == sum(p.numel() for p in distinct.values()) <= ledger.total


def test_parts_by_hand():
    body, decoder = 27_517_818, 2_549_024
    single, multi, frozen, mtlora, ours = (
        model(name).ledger() for name in ("single_task_full", "multi_task_full", "decoder_only", "mtlora", "ours")
    )
    assert (single.backbone, single.decoder, single.shared) == (4 * body, decoder, 0)
    # One set of output norms for all tasks: three sets fewer of 2 * (96 + 192 + 384 + 768).
    assert (multi.backbone, multi.decoder) == (body, decoder - 3 * 2 * 1440)
    assert (frozen.total, frozen.per_task) == (body + decoder, decoder)
    # Low-rank updates, unfrozen extras, HRNet heads; the task's own low-rank updates and heads.
    assert (mtlora.adaptation, mtlora.backbone, mtlora.decoder) == (4_521_984 + 276_480, 1_599_546, 1_946_624)
    assert mtlora.per_task == 276_480 + 1_946_624
    # Four task linears a stage, fuse and heads; what is left is the bypass and the routing.
    assert ours.decoder == 554_496 + 147_840 + 168_032
    assert ours.adaptation - model("ours[mote=off]").ledger().adaptation == 396_944


@pytest.mark.parametrize("name", all_methods())
def test_equal_terms(name):
    """The same decoder for all, and no pretrained parameter trained but by full fine-tuning."""
    ledger = model(name, protocol="equal").ledger()
    assert ledger.decoder == 2_549_024
    assert (ledger.backbone > 0) == name.endswith("_full")


@pytest.mark.parametrize("name", all_methods())
def test_hrnet_on_equal_taps(name):
    """Necks C -> w without bias, 270 -> 1080 with bias, norm, 1080 -> n with bias."""
    necks = sum(c * w for c, w in zip((96, 192, 384, 768), (18, 36, 72, 144), strict=True))
    heads = sum(270 * 1080 + 1080 + 2 * 1080 + 1080 * n + n for n in TASKS.values())
    assert model(name, protocol="equal", decoder="hrnet").ledger().decoder == 4 * necks + heads
