"""MTLoRA against explicit matrix products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.backbones.swin import attend, into_windows, out_of_windows
from methods.layers.lora import MultiTaskLoRALinear


def randomise(module, std=0.1):
    """Updates are zero at the start: give every low-rank factor a value."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in ("down", "up"):
            nn.init.normal_(parameter, std=std)
    return module


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return randomise(MultiTaskLoRALinear(nn.Linear(6, 4), 3, 2.5, 0.9, ("a", "b"), 2), std=1.0), nn.Linear(6, 4)


def product(x, low_rank):
    return 2.5 * x @ low_rank.down.T @ low_rank.up.T


def test_layer_without_streams(layer):
    lora, frozen = layer
    lora.eval()
    x = torch.randn(2, 5, 6)
    base = x @ frozen.weight.T + frozen.bias
    shared, streams = lora(frozen, x)
    torch.testing.assert_close(shared, base + product(x, lora.shared))
    assert set(streams) == {"a", "b"}
    for task, y in streams.items():
        torch.testing.assert_close(y, base + product(x, lora.per_task[task]))


def test_layer_with_streams(layer):
    """The base product is the shared stream's in every output, and the shared update stays out of a task's."""
    lora, frozen = layer
    lora.eval()
    x, a, b = torch.randn(3, 2, 5, 6)
    base = x @ frozen.weight.T + frozen.bias
    shared, streams = lora(frozen, x, {"a": a, "b": b})
    torch.testing.assert_close(shared, base + product(x, lora.shared))
    torch.testing.assert_close(streams["a"], base + product(a, lora.per_task["a"]))
    torch.testing.assert_close(streams["b"], base + product(b, lora.per_task["b"]))


def test_dropout_acts_on_the_shared_input_alone(layer):
    lora, frozen = layer
    x, a, b = torch.randn(3, 2, 50, 6)
    base = x @ frozen.weight.T + frozen.bias
    torch.manual_seed(1)
    shared, streams = lora(frozen, x, {"a": a, "b": b})
    _, unstarted = lora(frozen, x)
    torch.manual_seed(1)
    first, second = F.dropout(x, 0.9), F.dropout(x, 0.9)
    assert (first == 0).float().mean() > 0.8
    torch.testing.assert_close(shared, base + product(first, lora.shared))
    torch.testing.assert_close(streams["a"], base + product(a, lora.per_task["a"]))
    torch.testing.assert_close(streams["b"], base + product(b, lora.per_task["b"]))
    torch.testing.assert_close(unstarted["a"], base + product(second, lora.per_task["a"]))


@pytest.mark.parametrize("protocol", ["published", "equal"])
def test_starts_as_the_frozen_backbone(build, tasks, protocol):
    encoder = build("mtlora", protocol=protocol).eval().encoder
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features, (_, maps) = encoder(image), encoder.backbone(image)
        merged = [*(encoder.backbone.downsampling(i + 1)(m) for i, m in enumerate(maps[:3])), maps[3]]
    for ours, reference in zip(features.general, maps, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert set(features.task) == set(tasks)
    for taps in features.task.values():
        for ours, reference in zip(taps, merged if protocol == "published" else maps, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_shared_stream_is_the_backbone_with_merged_weights(build):
    encoder = randomise(build("mtlora[rank=5]").eval().encoder)
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        general = encoder(image).general
        before = encoder.backbone(image).maps
        for stage, loras in zip(encoder.backbone.layers, encoder.blocks, strict=True):
            for block, lora in zip(stage.blocks, loras, strict=True):
                linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
                for linear, update in zip(linears, (lora.qkv, lora.proj, lora.fc1, lora.fc2), strict=True):
                    linear.weight += 4.0 * update.shared.up @ update.shared.down
        merged = encoder.backbone(image).maps
    for ours, reference, untouched in zip(general, merged, before, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, untouched, rtol=1e-2, atol=1e-2)


def test_task_stream_of_a_last_block(build):
    encoder = randomise(build("mtlora[rank=5,task_rank=2]").eval().encoder)
    block, lora = encoder.backbone.layers[0].blocks[-1], encoder.blocks[0][-1]
    x = torch.randn(2, 16, 16, 24)

    def update(low_rank, z):
        return 4.0 * z @ (low_rank.up @ low_rank.down).T

    with torch.no_grad():
        shared, streams = lora(encoder.backbone, block, x)
        windows = into_windows(block, block.norm1(x))
        attended = attend(block, block.attn.qkv(windows) + update(lora.qkv.shared, windows))
        base = block.attn.proj(attended)
        x_shared = x + out_of_windows(block, base + update(lora.proj.shared, attended), (16, 16))
        base_1 = block.mlp.fc1(block.norm2(x_shared))
        hidden = F.gelu(base_1 + update(lora.fc1.shared, block.norm2(x_shared)))
        base_2 = block.mlp.fc2(hidden)
        torch.testing.assert_close(shared, x_shared + base_2 + update(lora.fc2.shared, hidden), rtol=1e-4, atol=1e-4)
        for task in ("semseg", "normals"):
            x_task = x + out_of_windows(block, base + update(lora.proj.per_task[task], attended), (16, 16))
            hidden_t = F.gelu(base_1 + update(lora.fc1.per_task[task], block.norm2(x_task)))
            expected = x_task + base_2 + update(lora.fc2.per_task[task], hidden_t)
            torch.testing.assert_close(streams[task], expected, rtol=1e-4, atol=1e-4)


def test_task_updates_only_in_last_blocks(build, tasks):
    for stage in build("mtlora").encoder.blocks:
        for index, block in enumerate(stage):
            expected = set(tasks) if index == len(stage) - 1 else set()
            assert all(set(linear.per_task) == expected for linear in (block.proj, block.fc1, block.fc2))
            assert not block.qkv.per_task


@pytest.mark.parametrize(
    ("protocol", "channels", "strides"),
    [("published", (48, 96, 192, 192), (8, 16, 32, 32)), ("equal", (24, 48, 96, 192), (4, 8, 16, 32))],
)
def test_taps(build, protocol, channels, strides):
    encoder = build("mtlora", protocol=protocol, size=(64, 96)).encoder
    features = encoder(torch.rand(1, 3, 64, 96))
    for maps in features.task.values():
        assert [tuple(m.shape[1:]) for m in maps] == [
            (c, 64 // s, 96 // s) for c, s in zip(channels, strides, strict=True)
        ]


def test_stochastic_depth_grows_to_its_maximum(build):
    rates = [lora.drop_path.drop_prob for stage in build("mtlora[drop_path=0.7]").encoder.blocks for lora in stage]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize("part", ["patch_embed", "norm", "relative_position_bias_table", "reduction"])
def test_unfrozen_extras(build, part):
    for protocol, unfrozen in (("published", True), ("equal", False)):
        frame = build("mtlora", protocol=protocol).encoder.backbone
        named = [p for name, p in frame.named_parameters() if part in name]
        assert named and all(p.requires_grad == unfrozen for p in named)
