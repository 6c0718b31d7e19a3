"""The Swin verbs and backbone against timm's own forward."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from methods.backbones.swin import SwinBackbone, attend, into_windows, out_of_windows
from methods.backbones.timm_import import timm

SIZES = [(64, 96), (112, 112), (60, 100), (128, 64)]


def compose(block, x):
    windows = into_windows(block, block.norm1(x))
    x = x + out_of_windows(block, block.attn.proj(attend(block, block.attn.qkv(windows))), x.shape[1:3])
    return x + block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x))))


def grown(backbone):
    """Weights of a trained network's order of magnitude: at initialisation a wrong bias or mask would hide."""
    for block in sum(map(list, backbone.stages), []):
        torch.nn.init.normal_(block.attn.relative_position_bias_table, std=2.0)
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return backbone


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_verbs_compose_to_timms_block(tiny_swin, size):
    torch.manual_seed(0)
    backbone = grown(tiny_swin(size)).double()
    resolutions = {}
    for stage in backbone.layers:
        for block in stage.blocks:
            note = functools.partial(lambda b, norm, args: resolutions.__setitem__(b, args[0].shape), block)
            block.norm1.register_forward_pre_hook(note)
    backbone(torch.rand(2, 3, *size).double())
    assert len(resolutions) == 8 and any(any(block.shift_size) for block in resolutions)
    for block, shape in resolutions.items():
        x = torch.randn(shape, dtype=torch.double, requires_grad=True)
        y, weight = x.detach().clone().requires_grad_(), torch.randn_like(x)
        ours, theirs = compose(block, x), block(y)
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("size", [*SIZES, (116, 132), (36, 32)], ids=str)
def test_mask_and_shift_follow_the_map(tiny_swin, size):
    """A mask has a row for every window; shifted are the odd blocks, along the sides longer than the window."""
    backbone = tiny_swin(size)
    seen = []
    for stage in backbone.layers:
        for i, block in enumerate(stage.blocks):
            hook = functools.partial(lambda b, i, norm, args: seen.append((b, i, args[0].shape[1:3])), block, i)
            block.norm1.register_forward_pre_hook(hook)
    backbone(torch.rand(1, 3, *size))
    assert len(seen) == 8
    for block, index, sides in seen:
        assert block.window_size == (7, 7)
        assert tuple(block.shift_size) == tuple(3 if index % 2 and side > 7 else 0 for side in sides)
        if any(block.shift_size):
            assert len(block.attn_mask) == -(-sides[0] // 7) * -(-sides[1] // 7)
        else:
            assert block.attn_mask is None


def test_windows_round_trip(tiny_swin):
    for block in tiny_swin((60, 100)).layers[0].blocks:
        x = torch.randn(2, 15, 25, 5)
        windows = into_windows(block, x)
        assert windows.shape == (2 * 3 * 4, 49, 5)
        assert torch.equal(out_of_windows(block, windows, (15, 25)), x)


@pytest.mark.parametrize("size", [(224, 224), (224, 256)], ids=str)
def test_forward_equals_timms(size):
    torch.manual_seed(0)
    settings = {"embed_dim": 24, "num_heads": (1, 2, 3, 6), "num_classes": 0, "drop_path_rate": 0.0, "img_size": size}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **settings).eval()
    model = timm.create_model("swin_tiny_patch4_window7_224", always_partition=True, **settings)
    model.load_state_dict(theirs.state_dict())
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    backbone = SwinBackbone("tiny", model, mean, std).eval()
    image = torch.rand(1, 3, *size)
    normalised = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        stem, maps = backbone(image)
        expected = theirs.forward_intermediates(normalised, intermediates_only=True)
        embedded = theirs.patch_embed(normalised).permute(0, 3, 1, 2)
    torch.testing.assert_close(stem, embedded, rtol=1e-5, atol=1e-5)
    assert len(maps) == len(expected) == 4
    for ours, reference, channels, stride in zip(maps, expected, backbone.channels, backbone.strides, strict=True):
        assert ours.shape == (1, channels, size[0] // stride, size[1] // stride)
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_downsampling_leads_from_stage_to_stage(tiny_swin):
    backbone = tiny_swin()
    _, maps = backbone(torch.rand(1, 3, 64, 64))
    for stage in (1, 2, 3):
        merged = backbone.downsampling(stage)(maps[stage - 1])
        for block in backbone.layers[stage].blocks:
            merged = block(merged.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(merged, maps[stage])


@pytest.mark.parametrize(
    "method", ["relative_bias", "relative_bias[sharing=shared]", "mtlora", "ditask", "tadformer", "multi_task_full"]
)
def test_where_a_bias_is_trained_attention_sees_that_a_gradient_is_wanted(method, build, monkeypatch):
    """CUDA's fused attention keeps what its backward needs only where a query, key or value wants a gradient."""
    model = build(method).train()
    seen, attention = [], F.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, **rest):
        if attn_mask is not None and attn_mask.requires_grad:
            seen.append(query.requires_grad or key.requires_grad or value.requires_grad)
        return attention(query, key, value, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    sum(out.square().mean() for out in model(torch.rand(2, 3, 64, 64)).values()).backward()
    tables = [p for name, p in model.named_parameters() if "relative_position_bias_table" in name and p.requires_grad]
    assert seen and all(seen) and tables and all(table.grad is not None for table in tables)
