"""What a backbone cannot serve: left out or refused by one rule, whichever verb asks."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bench import grid
from bench.data import card as cards
from bench.device import Device
from bench.fitting import fitting
from bench.step import asked
from bench.verbs import count, estimate, max_batch, profile
from methods.model import Setting
from methods.registry import MethodError, all_methods

SWIN, RESNET = "swin_tiny_patch4_window7_224.ms_in1k", "resnet18.a1_in1k"
CHANNELS = cards.load("scenes").channels(("semseg", "depth"))

STEP = {
    "dataset": "scenes", "tasks": "semseg", "protocol": "published", "decoder": None, "recipe": "smoke",
    "precision": "fp32",
}  # fmt: skip
ONE = {"task_counts": None, "batch_sizes": "1", "losses_together": False, "gpu": None}


def of(methods, backbones, size=(64, 64)):
    heard = []
    found = fitting(methods, backbones, size, CHANNELS, Setting("published"), heard.append)
    return {name: [method.expression for method in able] for name, able in found.items()}, heard


def test_a_named_method_stays_where_a_backbone_serves_it():
    found, heard = of("mtlora,bitfit", [SWIN, RESNET, SWIN])
    assert found == {SWIN: ["mtlora", "bitfit"], RESNET: ["bitfit"]}
    assert len(heard) == 1 and heard[0].startswith("left out: mtlora needs")
    assert of("mtlora", [SWIN, RESNET])[0] == {SWIN: ["mtlora"]}
    with pytest.raises(MethodError, match="mtlora needs"):
        of("mtlora,bitfit", [RESNET])


def test_a_backbone_that_cannot_have_the_size_is_refused_but_where_all_were_asked_for():
    vit = "vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(MethodError, match="64"):
        of("bitfit", [RESNET, vit])
    found, heard = of("all,-ditask", [RESNET, vit])
    assert list(found) == [RESNET] and any("64" in line and "vit_small" in line for line in heard)
    with pytest.raises(MethodError, match="64"):
        of("all", [vit])


@pytest.mark.parametrize(("methods", "backbones"), [("mtlora", "swin_tiny,resnet18"), ("mtlora,bitfit", "resnet18")])
def test_every_verb_has_the_same_rule(methods, backbones):
    def cells(tell):
        given = {"methods": methods, "backbone": backbones, "recipe": "smoke", "image_size": 64, "weights": "random"}
        jobs = grid.jobs(None, given | {"tasks": "semseg,normals"}, None, "cpu", 0, Path("runs"), tell)
        return [(job.spec.method, job.spec.backbone) for job in jobs]

    def counted(tell):
        table = count.counts(methods, backbones, "scenes", "semseg,normals", (64, 64), tell)
        return list(zip(table["method"], table["backbone"], strict=True))

    def estimated(tell):
        table = estimate.table(
            methods,
            backbones,
            **STEP | {"tasks": "semseg,normals"},
            image_sizes="64",
            memory="default",
            **ONE,
            tell=tell,
        )
        return list(zip(table["method"], table["backbone"], strict=True))

    outcomes = []
    for verb in (cells, counted, estimated):
        heard = []
        try:
            outcomes.append((verb(heard.append), heard))
        except MethodError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert isinstance(outcomes[0], str) == (backbones == "resnet18")


def test_a_size_that_no_backbone_takes_costs_no_other_size():
    heard = []
    few = "all," + ",".join(f"-{name}" for name in all_methods() if name not in ("bitfit", "decoder_only"))

    def table(methods, sizes):
        return estimate.table(
            methods, "vit_small_patch14_dinov2", **STEP, image_sizes=sizes, memory="default", **ONE, tell=heard.append
        )

    found = table(few, "56,100")
    assert set(found["image_size"]) == {"56x56"} and len(heard) == 1 and "100x100" in heard[0]
    for sizes, methods in (("100", few), ("100,101", few), ("56,100", "bitfit")):
        with pytest.raises(MethodError, match="cannot take images of 10"):
            table(methods, sizes)


def test_what_is_timed_or_fitted_on_one_backbone_too(capsys, monkeypatch):
    console = Console()
    monkeypatch.setattr(max_batch, "_ask", lambda request, place: pytest.fail(request.method))
    step = asked(backbone="resnet18", **STEP | {"tasks": "semseg,normals"}, image_size="64", memory="default")
    few = "all,-single_task_full,-multi_task_full,-decoder_only,-ours"
    found = profile.profile(few, step, 1, Device("cpu"), 1, console)
    assert [each.name for each in found][:-1] == ["bitfit"]
    assert any(line.startswith("left out: mtlora needs") for line in capsys.readouterr().out.splitlines())
    with pytest.raises(MethodError, match="mtlora needs"):
        max_batch.table("mtlora", step, Device("cpu"), 2**30, console)
