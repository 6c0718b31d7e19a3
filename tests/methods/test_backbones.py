"""Backbones by name: what is loaded, from where, and what is refused."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from methods.backbones import load
from methods.backbones.load import WeightSource, full_name, load_backbone, resolve_weights
from methods.backbones.timm_import import timm
from methods.registry import MethodError

SWIN = "swin_tiny_patch4_window7_224.ms_in1k"
RANDOM = WeightSource("random")


def one_line(caught):
    return "\n" not in str(caught.value)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swin_tiny", SWIN),
        ("swin_base_22k", "swin_base_patch4_window7_224.ms_in22k"),
        ("swin_tiny_patch4_window7_224", SWIN),
        (SWIN, SWIN),
        ("swin_tiny_patch4_window7_224.ms_in22k", "swin_tiny_patch4_window7_224.ms_in22k"),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"),
        ("test_convnext", "test_convnext.r160_in1k"),
    ],
)
def test_full_names(name, expected):
    assert full_name(name) == expected


@pytest.mark.parametrize("name", ["swin_tiny", "resnet10t", "davit_large", "convnext_atto_rms"])
def test_a_full_name_is_its_own_full_name(name):
    """With pretrained weights, and without any (the last two)."""
    assert full_name(full_name(name)) == full_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tinny", r"unknown backbone 'swin_tinny' \(did you mean 'swin_tiny'\?\)"),
        ("tf_efficientnet_lit0", r"did you mean 'tf_efficientnet_lite0'\?"),
        ("qqqqqq", r"unknown backbone 'qqqqqq'; `bench list backbones`"),
        ("tf_efficientnet_lite0.nope", r"tf_efficientnet_lite0'? has no pretrained tag 'nope'; known: .*lite0\.in1k"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(MethodError, match=message) as caught:
        full_name(name)
    assert one_line(caught)


# Where weights come from


def test_random_needs_nothing(monkeypatch):
    monkeypatch.setattr(load, "pretrained_reachable", lambda name: pytest.fail("asked"))
    assert resolve_weights("random", SWIN) == RANDOM


@pytest.mark.parametrize(("reachable", "source"), [(True, "timm"), (False, "random")])
def test_auto_takes_what_can_be_had(monkeypatch, reachable, source):
    monkeypatch.setattr(load, "pretrained_reachable", lambda name: reachable)
    assert resolve_weights("auto", SWIN) == WeightSource(source)


def test_timms_weights_out_of_reach(monkeypatch):
    monkeypatch.setattr(load, "pretrained_reachable", lambda name: False)
    with pytest.raises(MethodError, match=f"timm's weights for {SWIN} cannot be reached") as caught:
        resolve_weights("timm", SWIN)
    assert one_line(caught)


def test_offline_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("went online"))
    assert not load.pretrained_reachable(SWIN)


def test_a_file_is_known_by_its_hash(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"anything")
    expected = WeightSource("file", path, hashlib.sha256(b"anything").hexdigest())
    assert resolve_weights(str(path), SWIN) == expected


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MethodError, match="no weights file .*absent.pth") as caught:
        resolve_weights(str(tmp_path / "absent.pth"), SWIN)
    assert one_line(caught)


# Local checkpoints


def test_swin_checkpoint(tmp_path):
    """A whole classifier's checkpoint: its head and last norm are passed over."""
    torch.manual_seed(0)
    whole = timm.create_model(SWIN, pretrained=False).eval()
    save_file(whole.state_dict(), tmp_path / "swin.safetensors")
    backbone = load_backbone(SWIN, (224, 224), WeightSource("file", tmp_path / "swin.safetensors")).eval()
    image = torch.rand(1, 3, 224, 224)
    config = timm.get_pretrained_cfg(SWIN)
    normalised = (image - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    with torch.no_grad():
        expected = whole.forward_intermediates(normalised, intermediates_only=True)
        for ours, theirs in zip(backbone(image).maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def convnext():
    torch.manual_seed(0)
    return timm.create_model("test_convnext", pretrained=False).eval()


@pytest.mark.parametrize("form", ["weights.safetensors", "plain.pth", "model.pth", "state_dict.pth"])
def test_pyramid_checkpoint(tmp_path, convnext, form):
    path, state = tmp_path / form, convnext.state_dict()
    if form == "weights.safetensors":
        save_file(state, path)
    else:
        torch.save(state if form == "plain.pth" else {form.removesuffix(".pth"): state, "epoch": 3}, path)
    backbone = load_backbone(full_name("test_convnext"), (64, 64), WeightSource("file", path)).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = backbone(image).maps
        expected = convnext.forward_intermediates(backbone.normalise(image), intermediates_only=True)[-4:]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_of_another_model_are_refused(tmp_path, convnext):
    path = tmp_path / "convnext.safetensors"
    save_file(convnext.state_dict(), path)
    with pytest.raises(MethodError, match="does not hold the weights of resnet10t.c3_in1k") as caught:
        load_backbone("resnet10t.c3_in1k", (64, 64), WeightSource("file", path))
    assert one_line(caught)


@pytest.mark.parametrize(
    ("shallow", "deep"),
    [("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"), ("test_vit", "test_vit")],
)
def test_weights_of_a_deeper_model_are_refused(tmp_path, shallow, deep):
    """Every tensor of the shallow one is in them; a classifier's head and a buffer too many are no reason."""
    state = timm.create_model(deep, **({"depth": 8} if shallow == deep else {})).state_dict()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "deep.safetensors")
    size = (64, 64) if "swin" in shallow else (160, 160)
    with pytest.raises(MethodError, match="of a model with more layers") as caught:
        load_backbone(full_name(shallow), size, WeightSource("file", tmp_path / "deep.safetensors"))
    assert one_line(caught)
    own = timm.create_model(shallow).state_dict() | {"layers.0.blocks.1.attn_mask": torch.zeros(1)}
    if "vit" in shallow:
        del own["layers.0.blocks.1.attn_mask"]
    save_file({key: tensor.contiguous() for key, tensor in own.items()}, tmp_path / "own.safetensors")
    load_backbone(full_name(shallow), size, WeightSource("file", tmp_path / "own.safetensors"))


def test_weights_of_another_width_are_refused(tmp_path, convnext):
    state = convnext.state_dict()
    state["stem.0.weight"] = torch.zeros(5, 3, 4, 4)
    torch.save(state, tmp_path / "wide.pth")
    message = "0 of .* tensors are missing and 1 differ in shape .it has another shape for stem_0.weight"
    with pytest.raises(MethodError, match=message) as caught:
        load_backbone(full_name("test_convnext"), (64, 64), WeightSource("file", tmp_path / "wide.pth"))
    assert one_line(caught)


@pytest.mark.parametrize("name", ["garbage.pth", "garbage.safetensors", "tensor.pth", "epoch.pth"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name):
    path = tmp_path / name
    if name.startswith("garbage"):
        path.write_bytes(b"neither a zip nor a header" * 9)
    else:
        torch.save(torch.zeros(3) if name == "tensor.pth" else {"epoch": 3, "arch": "convnext"}, path)
    with pytest.raises(MethodError, match=name) as caught:
        load_backbone(full_name("test_convnext"), (64, 64), WeightSource("file", path))
    assert one_line(caught)


# What is built


@pytest.mark.parametrize("name", [SWIN, "tf_efficientnet_lite0.in1k"])
@pytest.mark.parametrize("size", [(30, 64), (64, 33), (64, 34), (28, 28), (0, 64)], ids=str)
def test_image_sizes_refused(name, size):
    with pytest.raises(MethodError, match=rf"{name} cannot take images of {size[0]}x{size[1]}") as caught:
        load_backbone(name, size, RANDOM)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("name", "mean"), [("tf_efficientnet_lite0.in1k", (0.5, 0.5, 0.5)), ("resnet10t.c3_in1k", (0.485, 0.456, 0.406))]
)
def test_images_are_normalised_as_the_network_wants_them(name, mean):
    backbone, seen = load_backbone(name, (64, 64), RANDOM), []
    config = timm.get_pretrained_cfg(name)
    assert tuple(config.mean) == mean
    backbone.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.rand(2, 3, 64, 64)
    backbone(image)
    for c in range(3):
        torch.testing.assert_close(seen[0][:, c], (image[:, c] - config.mean[c]) / config.std[c])


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_resnet", "test_convnext", "test_mambaout"])
def test_pyramids_tell_the_truth_about_their_maps(name):
    """test_mambaout's first map is (B, 16, 24, 16) with channels last: its sizes alone do not tell the axis."""
    backbone = load_backbone(full_name(name), (64, 96), RANDOM)
    stem, maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    assert backbone.stem_channels == (maps[0] if stem is None else stem).shape[1]
    assert backbone.pretrained_names == {parameter for parameter, _ in backbone.named_parameters()}
    for stage in (1, 2, 3):
        layer = backbone.downsampling(stage)
        assert layer is None or layer(maps[stage - 1]).shape == maps[stage].shape


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "crossvit_9_240"])
def test_what_gives_no_pyramid_is_refused_in_one_line(name):
    name = full_name(name)
    with pytest.raises(MethodError, match=rf"backbone {name} (cannot|gives maps at strides)") as caught:
        load_backbone(name, (160, 160), RANDOM)
    assert one_line(caught)


def test_frozen_batch_norms_keep_to_their_statistics():
    backbone = load_backbone(full_name("test_resnet"), (64, 64), RANDOM).freeze().train()
    assert backbone.training
    assert not any(m.training for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    backbone.model.bn1.requires_grad_(True)
    assert backbone.train().model.bn1.training and not backbone.eval().model.bn1.training
