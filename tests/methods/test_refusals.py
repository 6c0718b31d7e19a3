"""What a method cannot do on a backbone or with these tasks is one clear line."""

from __future__ import annotations

import pytest
import torch

from methods.backbones.load import WeightSource, full_name, load_backbone
from methods.backbones.pvt import PVTBackbone
from methods.backbones.timm_import import timm
from methods.registry import MethodError

REFUSED = [
    ("vmt_adapter_lite[m=5]", "swin_tiny", r"m=5 does not divide 96 channels and a width of 24; \[m=4\] does"),
    ("vmt_adapter_lite[m=33]", "swin_tiny", r"m=33 does not divide 96 channels and a width of 24; \[m=24\] does"),
    ("compacter[n=5]", "swin_tiny", r"compacter on swin_tiny.*: n=5 does not divide a layer of 96 inputs"),
    ("progressive[groups=5]", "swin_tiny", r"4 tasks \(semseg, .*\) cannot be split into 5 groups"),
    ("progressive[groups=semsec+normals]", "swin_tiny", r"no task 'semsec' to group \(did you mean 'semseg'\?\)"),
    ("progressive[groups=semseg+normals]", "swin_tiny", r"must name every task once"),
    ("relative_bias", "pvt_v2_b0", r"position bias tables and cannot run on pvt_v2_b0"),
    ("vpt_deep", "pvt_v2_b0", r"Swin Transformer or a plain ViT and cannot run on pvt_v2_b0"),
    ("tadformer", "pvt_v2_b0", r"Swin Transformer or a plain ViT and cannot run on pvt_v2_b0"),
    ("mtlora_plus", "dinov2_small", r"cannot run on vit_small_patch14_dinov2"),
    ("mtlora", "vit_giant_patch14_dinov2", r"blocks of vit_giant_patch14_dinov2.* have more"),
    ("ditask", "vit_dlittle_patch16_reg1_gap_256", r"blocks of vit_dlittle.* have more"),
    ("progressive", "beit3_base_patch16_224", r"blocks of beit3_base.* have more"),
    ("lora", "tf_efficientnet_lite0", r"lora adapts the blocks of a transformer and cannot run on tf_efficientnet"),
    ("peft:ia3[rank=4]", "swin_tiny", r"peft:ia3 has no rank"),
]


@pytest.mark.parametrize(("expression", "name", "message"), REFUSED)
def test_refusals_fit_on_a_line(build, expression, name, message):
    def frame(size):
        with torch.device("meta"):
            return load_backbone(full_name(name), (112, 112), WeightSource("random"))

    with pytest.raises(MethodError, match=message) as caught:
        build(expression, backbone=frame)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(128, 160), (100, 98)])
def test_a_vit_names_the_nearest_size(size):
    with pytest.raises(MethodError, match=r"patches are 14x14; the nearest size that fits is (126x154|98x98)"):
        load_backbone(full_name("dinov2_small"), size, WeightSource("random"))


def test_polyhistor_lite_needs_whole_multiples(build):
    def frame(size):
        dims = {"embed_dims": (24, 48, 60, 96), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}
        return PVTBackbone("odd_pvt", timm.create_model("pvt_v2_b0", num_classes=0, **dims), (0, 0, 0), (1, 1, 1))

    with pytest.raises(MethodError, match="polyhistor_lite .* cannot run on odd_pvt, which has a stage of 60"):
        build("polyhistor_lite", backbone=frame)


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_small_patch16_18x2_224"])
def test_blocks_of_another_kind(name):
    with torch.device("meta"), pytest.raises(MethodError, match="has blocks of another kind") as caught:
        load_backbone(full_name(name), (64, 64), WeightSource("random"))
    assert "\n" not in str(caught.value)
