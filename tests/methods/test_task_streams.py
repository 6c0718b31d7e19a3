"""MTLoRA+, DiTASK, TADFormer and progressive adaptation, block by block from their descriptions."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.backbones.swin import attend, into_windows, out_of_windows
from methods.ditask import DeformedLinear
from methods.ditask import Options as DiTASKOptions
from methods.layers.cpab import transform
from methods.progressive import average_linkage
from tests.methods.test_conformance import small_vit


def images(count=2, size=(64, 64)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(3))


def randomise(module, std=0.1):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return module


# MTLoRA+


@torch.no_grad()
def test_mtlora_plus_adapts_the_merging(build):
    """All streams go through the frozen merging plus its low-rank update: the backbone with merged weights."""
    model = randomise(build("mtlora_plus[rank=3]", size=(60, 68))).eval()
    encoder = model.encoder
    assert not any(p.requires_grad for n, p in encoder.backbone.named_parameters() if "reduction" in n)
    general = encoder(images(size=(60, 68))).general  # odd maps are padded
    for stage in range(4):
        if stage:
            update = encoder.mergings[stage].linear.shared
            encoder.backbone.layers[stage].downsample.reduction.weight += 4.0 * update.up @ update.down
        for block, own in zip(encoder.backbone.layers[stage].blocks, encoder.blocks[stage], strict=True):
            linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            for linear, lora in zip(linears, (own.qkv, own.proj, own.fc1, own.fc2), strict=True):
                linear.weight += 4.0 * lora.shared.up @ lora.shared.down
    for ours, merged in zip(general, encoder.backbone(images(size=(60, 68))).maps, strict=True):
        torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-4)


# DiTASK


@torch.no_grad()
@pytest.mark.parametrize(("inputs", "outputs", "parts"), [(12, 36, 3), (12, 20, 1), (20, 12, 1)])
def test_deformed_weight_by_numpy(inputs, outputs, parts):
    """Every part: its singular vectors, and its spectrum read at the warped positions."""
    torch.manual_seed(0)
    frozen = nn.Linear(inputs, outputs)
    layer = DeformedLinear(frozen, DiTASKOptions(cells=5), (), parts, unused=False)
    theta = 0.4 * torch.randn(1, 4)
    length = min(inputs, outputs // parts)
    positions = transform(theta, torch.linspace(0, 1, length).unsqueeze(0))[0]
    expected = []
    for part in frozen.weight.numpy().reshape(parts, -1, inputs):
        u, s, vt = np.linalg.svd(part, full_matrices=False)
        warped = np.interp(positions.numpy() * (length - 1), np.arange(length), s)
        assert warped[0] == pytest.approx(s[0], rel=1e-4) and warped[-1] == pytest.approx(s[-1], rel=1e-4)
        expected.append((u * warped) @ vt)
    ours = layer.weight(positions)
    torch.testing.assert_close(ours, torch.from_numpy(np.concatenate(expected)).float(), rtol=1e-4, atol=1e-5)
    assert (ours - frozen.weight).abs().max() > 1e-3
    torch.testing.assert_close(layer.weight(torch.linspace(0, 1, length)), frozen.weight, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ditask_block(build, tasks):
    encoder = randomise(build("ditask[cells=6,task_cells=3]"), 0.2).eval().encoder
    block, own = encoder.backbone.layers[0].blocks[-1], encoder.blocks[0][-1]
    x = torch.randn(2, 16, 16, 24)
    shared, streams = own(encoder.backbone, block, x, encoder.context())

    def weight(layer, theta):
        points = torch.linspace(0, 1, layer.spectrum.shape[-1]).unsqueeze(0)
        return layer.weight(transform(theta.unsqueeze(0), points)[0])

    def joint(layer, linear, z):
        return z @ weight(layer, layer.theta).T + linear.bias

    attended = attend(block, joint(own.qkv, block.attn.qkv, into_windows(block, block.norm1(x))))
    x_shared = x + out_of_windows(block, joint(own.proj, block.attn.proj, attended), (16, 16))
    out = joint(own.fc2, block.mlp.fc2, F.gelu(joint(own.fc1, block.mlp.fc1, block.norm2(x_shared))))
    torch.testing.assert_close(shared, x_shared + out, rtol=1e-4, atol=1e-4)
    for task in tasks:

        def own_of_task(layer, linear, z, task=task):
            return z @ weight(layer, layer.task_theta[task]).T + linear.bias

        a = x + out_of_windows(block, own_of_task(own.proj, block.attn.proj, attended), (16, 16))
        hidden = F.gelu(own_of_task(own.fc1, block.mlp.fc1, block.norm2(a)))
        torch.testing.assert_close(streams[task], a + own_of_task(own.fc2, block.mlp.fc2, hidden), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(streams["semseg"], streams["normals"], atol=1e-3)


@torch.no_grad()
def test_ditask_starts_where_it_says(build):
    start, drawn = build("ditask").eval(), build("ditask[start=random]").eval()
    for model, moves in ((start, False), (drawn, True)):
        maps, ours = model.encoder.backbone(images()).maps, model.encoder(images()).general
        distance = max((a - b).norm() / b.norm() for a, b in zip(ours, maps, strict=True))
        assert (distance > 1e-2) == moves and (distance < 1e-5) == (not moves)


# TADFormer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tadformer_last_block(build, tasks, kind):
    """A stage's last block on 16x16 (whole windows only after padding), from the paper's description."""
    torch.manual_seed(0)
    encoder = randomise(build(f"tadformer[rank=4,filter={kind}]")).eval().encoder
    block, own = encoder.backbone.layers[0].blocks[-1], encoder.blocks[0][-1]
    x, prompts = torch.randn(2, 16, 16, 24), torch.randn(2, 4, 24)
    shared, new_prompts, streams, skips = own(encoder.backbone, block, x, prompts)

    def lora(layer, linear, z):
        return linear(z) + 4.0 * z @ layer.shared.down.T @ layer.shared.up.T

    def filtered(layer, task, z):
        """z (N, H, W, C)."""
        low = z @ layer.shared.down.T
        low = layer.filter(low) if kind == "dynamic" else layer.per_task[task](low)
        return 4.0 * low @ layer.shared.up.T

    def mlp(z):
        return lora(own.fc2, block.mlp.fc2, F.gelu(lora(own.fc1, block.mlp.fc1, block.norm2(z))))

    windows = into_windows(block, block.norm1(x))  # (2 * 9, 49, 24)
    tokens = torch.cat([block.norm1(image).expand(9, -1, -1) for image in prompts])
    qkv = lora(own.qkv, block.attn.qkv, torch.cat([tokens, windows], 1))
    attended = attend(block, qkv, 4)
    projected = lora(own.proj, block.attn.proj, attended)
    x_shared = x + out_of_windows(block, projected[:, 4:].contiguous(), (16, 16))
    torch.testing.assert_close(shared, x_shared + mlp(x_shared), rtol=1e-4, atol=1e-4)
    pooled = projected[:, :4].view(2, 9, 4, 24).mean(1)
    torch.testing.assert_close(new_prompts, prompts + mlp(pooled), rtol=1e-4, atol=1e-4)

    q, k, _ = qkv.split(24, -1)  # one head at this width
    f = attended[:, 4:]
    base_1 = block.mlp.fc1(block.norm2(x_shared))
    base_2 = block.mlp.fc2(F.gelu(lora(own.fc1, block.mlp.fc1, block.norm2(x_shared))))
    for t, task in enumerate(tasks):
        m = F.gelu((q[:, t : t + 1] @ k[:, 4:].transpose(1, 2)).transpose(1, 2)) * f
        f_t = own.norm(m + f).view(-1, 7, 7, 24)
        proj_t = block.attn.proj(f) + filtered(own.proj, task, f_t).flatten(1, 2)
        a = x + out_of_windows(block, proj_t, (16, 16))
        hidden = F.gelu(base_1 + filtered(own.fc1, task, block.norm2(a)))
        torch.testing.assert_close(streams[task], a + base_2 + filtered(own.fc2, task, hidden), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(skips[task], out_of_windows(block, m, (16, 16)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tadformer_weighs_head_by_head(build):
    """Two heads: each half of the channels has its own logits."""
    torch.manual_seed(0)
    encoder = build("tadformer[rank=4]").eval().encoder
    block, own = encoder.backbone.layers[1].blocks[-1], encoder.blocks[1][-1]
    qkv, f = torch.randn(3, 4 + 49, 3 * 48), torch.randn(3, 49, 48)
    ours = own._modulated(block, qkv, f, 4)
    q, k, _ = qkv.split(48, -1)
    for t in range(4):
        for head in (slice(0, 24), slice(24, 48)):
            logits = (q[:, t : t + 1, head] * k[:, 4:, head]).sum(-1, keepdim=True)
            torch.testing.assert_close(ours[t][..., head], F.gelu(logits) * f[..., head], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tadformer_gate_mixes_skip_and_stream(build):
    """With the gate wide open a task's map is its modulated attention, closed it is its stream."""
    encoder = build("tadformer", protocol="equal").eval().encoder
    encoder.gates.fill_(-100.0)
    closed = encoder(images()).task["semseg"]
    encoder.gates.fill_(100.0)
    wide = encoder(images()).task["semseg"]
    encoder.gates.fill_(0.0)
    for half, a, b in zip(encoder(images()).task["semseg"], wide, closed, strict=True):
        torch.testing.assert_close(half, (a + b) / 2, rtol=1e-4, atol=1e-4)


# progressive


@torch.no_grad()
def test_progressive_streams(build, tasks):
    """Every task's maps are those of the backbone with its own path of updates merged into the weights."""
    encoder = randomise(build("progressive[groups=2]", protocol="equal")).double().eval().encoder
    features = encoder(images().double()).task
    assert encoder.group_of_task.tolist() == [0, 0, 1, 1]
    original = {k: v.clone() for k, v in encoder.backbone.state_dict().items()}
    for task, group in zip(tasks, (0, 0, 1, 1), strict=True):
        path = [encoder.shared[0], encoder.shared[1], encoder.grouped[group], encoder.per_task[task]]
        encoder.backbone.load_state_dict(original)
        for stage, updates in zip(encoder.backbone.layers, path, strict=True):
            for block, own in zip(stage.blocks, updates, strict=True):
                linears = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
                for name, linear in linears.items():
                    linear.weight += 4.0 * own.updates[name].up @ own.updates[name].down
        for ours, merged in zip(features[task], encoder.backbone(images().double()).maps, strict=True):
            torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-4)


def test_progressive_groups_by_gradients(build):
    """Losses with known gradients: saliency pulls with semseg, and normals with human_parts."""
    model = build("progressive[groups=2,batches=3]")
    encoder = randomise(model.encoder)
    shared = list(encoder.shared.parameters())
    seen = []

    def losses():
        generator = torch.Generator().manual_seed(0)
        while True:
            seen.append(1)
            pulls = [[torch.randn(p.shape, generator=generator) for p in shared] for _ in range(2)]
            first, second = (sum((p * w).sum() for p, w in zip(shared, pull, strict=True)) for pull in pulls)
            yield {"semseg": first, "human_parts": second, "saliency": 3 * first + second, "normals": second - first}

    found = model.prepare(losses())
    assert len(seen) == 3
    assert found["groups"] == [["semseg", "saliency"], ["human_parts", "normals"]]
    assert encoder.group_of_task.tolist() == [0, 1, 0, 1]
    similarity = torch.tensor(found["similarity"])
    # First and second pull are as good as orthogonal; cos(a, 3a + b) = 3 / sqrt(10), cos(b, b - a) = 1 / sqrt(2).
    torch.testing.assert_close(similarity.diagonal(), torch.ones(4), rtol=0, atol=1e-5)
    assert similarity[0, 2].item() == pytest.approx(3 / 10**0.5, abs=0.02)
    assert similarity[1, 3].item() == pytest.approx(1 / 2**0.5, abs=0.02)
    assert similarity[0, 3].item() == pytest.approx(-1 / 2**0.5, abs=0.02)


def test_a_batch_without_a_tasks_label_says_nothing_of_it(build):
    """Semseg and human parts pull alike; human parts have labels in every second batch, saliency in none."""
    found = {}
    for every in (1, 2):
        model = build("progressive[groups=2,batches=4]")
        shared = list(model.encoder.shared.parameters())

        def losses(shared=shared, every=every):
            generator = torch.Generator().manual_seed(0)
            for batch in itertools.count():
                pull = [torch.randn(p.shape, generator=generator) for p in shared]
                loss = sum((p * w).sum() for p, w in zip(shared, pull, strict=True))
                labelled = batch % every == 0
                yield {"semseg": loss, "human_parts": 2 * loss * labelled, "saliency": 0 * loss, "normals": -loss}

        found[every] = model.prepare(losses())
        alike = found[every]["similarity"]
        assert [alike[0][1], alike[0][3], alike[1][1]] == pytest.approx([1, -1, 1])
        assert alike[2] == [None] * 4 and alike[0][2] is None
    assert found[1]["groups"] == found[2]["groups"] and found[2]["groups"][0][:2] == ["semseg", "human_parts"]


@pytest.mark.parametrize("size", [1e-3, 1e31])
def test_gradients_that_overflow_are_taken_of_a_smaller_loss(build, size):
    """As under fp16, whose losses are scaled: a gradient of 1e39 and more is none in single precision."""
    model = build("progressive[groups=2]")
    shared = list(model.encoder.shared.parameters())
    ones = sum(p.sum() for p in shared)
    losses = {"semseg": ones * size * 1e8, "human_parts": 3 * ones, "saliency": -ones, "normals": ones * math.inf}
    found = model.prepare([losses])
    assert found["similarity"][0][1] == pytest.approx(1) and found["similarity"][0][2] == pytest.approx(-1)
    assert found["similarity"][0][3] is None


def test_parallel_gradients_make_groups(build):
    """Rounding must not take a cosine beyond one."""
    model = build("progressive[groups=2,batches=9]")
    shared = list(model.encoder.shared.parameters())
    tasks = ("semseg", "human_parts", "saliency", "normals")

    def losses():
        generator = torch.Generator().manual_seed(0)
        while True:
            pull = [torch.rand(p.shape, generator=generator) for p in shared]
            loss = sum((p * w).sum() for p, w in zip(shared, pull, strict=True))
            yield {task: loss * (i + 1) / 3 for i, task in enumerate(tasks)}

    found = model.prepare(losses())
    assert max(max(row) for row in found["similarity"]) <= 1 and len(found["groups"]) == 2


def test_given_groups_stay(build):
    model = build("progressive[groups=semseg+normals-saliency-human_parts]")
    assert model.encoder.group_of_task.tolist() == [0, 2, 1, 0]
    shared = list(model.encoder.shared.parameters())
    tasks = ("semseg", "human_parts", "saliency", "normals")
    losses = ({t: sum(p.sum() for p in shared) * (i + 1) for i, t in enumerate(tasks)} for _ in range(9))
    assert model.prepare(losses)["groups"] == [["semseg", "normals"], ["saliency"], ["human_parts"]]


def test_groups_survive_a_checkpoint(build):
    first, second = build("progressive[groups=2]"), build("progressive[groups=2]")
    first.encoder.group_of_task.copy_(torch.tensor([0, 1, 1, 0]))
    second.load_trained_state(first.trained_state())
    assert second.encoder.group_of_task.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("way", ["written by another", "broadcast", "copied", "pickled", "moved"])
def test_groups_follow_their_buffer_however_it_changes(build, way, monkeypatch):
    """DDP and moving averages of weights write it in place; the model must run with what stands there."""
    first = randomise(build("progressive[groups=2]")).eval()
    image = torch.rand(1, 3, 64, 64)
    before = first(image)
    first.encoder.group_of_task.copy_(torch.tensor([0, 1, 1, 0]))
    expected = first(image)
    assert any((expected[task] != before[task]).any() for task in expected)
    second = randomise(build("progressive[groups=2]")).eval()
    if way == "written by another":
        second(image)
        for mine, theirs in zip(second.state_dict().values(), first.state_dict().values(), strict=True):
            mine.copy_(theirs)
    elif way == "broadcast":  # of which the buffer's version knows nothing
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        second(image)
        for mine, theirs in zip(second.state_dict().values(), first.state_dict().values(), strict=True):
            mine.data.copy_(theirs)
    elif way == "copied":
        second = copy.deepcopy(first)
    elif way == "pickled":
        second = pickle.loads(pickle.dumps(first))
    else:
        second = first.double().float()
    assert second.encoder.group_of_task.tolist() == [0, 1, 1, 0]
    for task, out in second(image).items():
        torch.testing.assert_close(out, expected[task])
    assert second.encoder.groups == [0, 1, 1, 0]


@pytest.mark.parametrize("way", ["compiled", "compiled before", "exported", "inference"])
def test_a_tracer_has_the_groups_that_were_loaded(build, way):
    torch._dynamo.reset()  # no graph of another test's model
    first = randomise(build("progressive[groups=2]")).eval()
    first.encoder.group_of_task.copy_(torch.tensor([0, 1, 1, 0]))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = first(image)
    second = randomise(build("progressive[groups=2]")).eval()
    run = second
    with torch.inference_mode() if way == "inference" else torch.no_grad():
        if way == "compiled before":
            run = torch.compile(second, backend="eager")
            run(image)
        if way == "inference":
            run = second = randomise(build("progressive[groups=2]")).eval()
        second.load_state_dict(first.state_dict())
        if way == "compiled":
            run = torch.compile(second, backend="eager", fullgraph=True)
        if way == "exported":
            run = torch.export.export(second, (image,), strict=False).module()
        for task, out in run(image).items():
            torch.testing.assert_close(out, expected[task])


@pytest.mark.parametrize(("count", "expected"), [(1, [0, 0, 0, 0, 0]), (2, [0, 0, 1, 1, 1]), (5, [0, 1, 2, 3, 4])])
def test_average_linkage(count, expected):
    similarity = torch.full((5, 5), -0.5)
    similarity[:2, :2], similarity[2:, 2:] = 0.9, 0.6
    assert average_linkage(similarity, count) == expected


def test_average_linkage_merges_by_the_mean():
    """Single linkage would join 2 to {0, 1} (0.8 to 1), complete linkage would not; on average it is nearer to 3."""
    similarity = torch.tensor([[1.0, 0.9, 0.1, 0.0], [0.9, 1.0, 0.8, 0.0], [0.1, 0.8, 1.0, 0.5], [0.0, 0.0, 0.5, 1.0]])
    assert average_linkage(similarity, 2) == [0, 0, 1, 1]


@pytest.mark.parametrize("names", [("semseg", "human_parts", "saliency"), ("saliency", "semseg", "human_parts")])
def test_tadformer_prompts_are_their_tasks(build, names):
    """A task's skip feature depends on its own prompt where it is made, whatever the order of the tasks."""
    tasks = dict.fromkeys(names, 2)
    model = build("tadformer", protocol="equal", tasks=tasks).eval()
    encoder = model.encoder
    with torch.no_grad():
        encoder.gates.fill_(100.0)  # the skip features alone
    for task in names:
        model.zero_grad()
        # One block in the first stage, so that prompts have not met yet.
        encoder.blocks[0] = encoder.blocks[0][-1:]
        encoder.backbone.layers[0].blocks = encoder.backbone.layers[0].blocks[-1:]
        encoder(images()).task[task][0].square().sum().backward()
        gradients = {t: 0.0 if p.grad is None else p.grad.norm().item() for t, p in encoder.prompts.items()}
        assert max(gradients, key=gradients.get) == task


# on a plain ViT


def vit(size=(48, 64), **changes):
    """Of five blocks in groups of 1, 1, 1, 2."""
    backbone = small_vit(size, **changes)
    for block in backbone.model.blocks:  # as if trained: at initialisation much would be too small to be missed
        nn.init.normal_(block.attn.qkv.weight, std=0.3)
        nn.init.uniform_(block.ls1.gamma, 0.3, 0.9)
        nn.init.uniform_(block.ls2.gamma, 0.3, 0.9)
    return backbone


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
def test_verbs_compose_to_timms_vit_block(changes):
    torch.manual_seed(0)
    backbone = vit(**changes).double()
    for block in backbone.model.blocks:
        x = torch.randn(2, 3 + 48, 24, dtype=torch.double, requires_grad=True)
        y, weight = x.detach().clone().requires_grad_(), torch.randn_like(x)
        z = backbone.attend(block, block.attn.qkv(backbone.into_attention(block, x)))
        z = x + backbone.out_of_attention(block, block.attn.proj(z), x)
        ours = z + backbone.out_of_mlp(block, block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(z)))))
        theirs = block(y)
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(x.grad, y.grad)


@torch.no_grad()
@pytest.mark.parametrize("protocol", ["published", "equal"])
@pytest.mark.parametrize("method", ["mtlora", "ditask", "progressive"])
def test_on_a_vit_they_start_as_the_pretrained_network(build, method, protocol):
    """Every task's maps, of whatever protocol: a ViT has nothing to merge."""
    model = build(method, protocol=protocol, backbone=vit, size=(48, 64)).eval()
    expected = model.encoder.backbone(images(size=(48, 64))).maps
    for maps in model.encoder(images(size=(48, 64))).task.values():
        assert len(maps) == 4
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mtlora_on_a_vit(build, tasks):
    """The shared stream is the ViT with the shared updates in its weights; in each group's last block a task's stream
    leaves it after the attention."""
    torch.manual_seed(0)
    model = (
        randomise(build("mtlora[rank=3,task_rank=2]", protocol="equal", backbone=vit, size=(48, 64))).double().eval()
    )
    encoder, backbone = model.encoder, model.encoder.backbone
    features = encoder(images(size=(48, 64)).double())
    own = [each for stage in encoder.blocks for each in stage]
    for block, lora in zip(backbone.model.blocks, own, strict=True):
        linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        for linear, each in zip(linears, (lora.qkv, lora.proj, lora.fc1, lora.fc2), strict=True):
            linear.weight += 4.0 * each.shared.up @ each.shared.down
    x, stage_of = backbone.embed(images(size=(48, 64)).double()), {0: 0, 1: 1, 2: 2, 4: 3}
    for index, (block, lora) in enumerate(zip(backbone.model.blocks, own, strict=True)):
        before, x = x, block(x)
        if index not in stage_of:
            assert not lora.proj.per_task
            continue
        stage = stage_of[index]
        torch.testing.assert_close(features.general[stage], backbone.output(stage, x))
        normed = block.norm1(before)
        attended = backbone.attend(block, block.attn.qkv(normed))
        shared = before + block.ls1(block.attn.proj(attended))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(shared)))
        for task in tasks:

            def task_linear(linear, each, z, base, task=task):
                """W and b on the shared stream's input, the task's update on its own."""
                frozen = linear.weight - 4.0 * each.shared.up @ each.shared.down
                return base @ frozen.T + linear.bias + 4.0 * z @ each.per_task[task].down.T @ each.per_task[task].up.T

            a = before + block.ls1(task_linear(block.attn.proj, lora.proj, attended, attended))
            h = block.mlp.act(task_linear(block.mlp.fc1, lora.fc1, block.norm2(a), block.norm2(shared)))
            expected = a + block.ls2(task_linear(block.mlp.fc2, lora.fc2, h, hidden))
            torch.testing.assert_close(features.task[task][stage], backbone.output(stage, expected))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tadformers_last_block_on_a_vit(build, tasks, kind):
    """The whole map is one window; class and register tokens pass the factors, and no filter."""
    torch.manual_seed(0)
    model = build(f"tadformer[rank=4,filter={kind}]", protocol="equal", backbone=vit, size=(48, 64))
    encoder = randomise(model).eval().encoder
    assert all(isinstance(each, nn.Identity) for each in encoder.widen)
    backbone, own = encoder.backbone, encoder.blocks[1][-1]
    block = backbone.stages[1][-1]
    x, prompts = torch.randn(2, 3 + 48, 24), torch.randn(2, 4, 24)
    shared, new_prompts, streams, skips = own(backbone, block, x, prompts)

    def lora(layer, linear, z):
        return linear(z) + 4.0 * z @ layer.shared.down.T @ layer.shared.up.T

    def filtered(layer, task, z):
        low = z @ layer.shared.down.T
        of_patches = low[:, 3:].reshape(2, 6, 8, 4)
        of_patches = layer.filter(of_patches) if kind == "dynamic" else layer.per_task[task](of_patches)
        return 4.0 * torch.cat([low[:, :3], of_patches.reshape(2, 48, 4)], 1) @ layer.shared.up.T

    def mlp(z):
        return block.ls2(lora(own.fc2, block.mlp.fc2, F.gelu(lora(own.fc1, block.mlp.fc1, block.norm2(z)))))

    qkv = lora(own.qkv, block.attn.qkv, torch.cat([block.norm1(prompts), block.norm1(x)], 1))
    q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in qkv.split(24, -1))
    attended = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    projected = lora(own.proj, block.attn.proj, attended)
    x_shared = x + block.ls1(projected[:, 4:])
    torch.testing.assert_close(shared, x_shared + mlp(x_shared), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new_prompts, prompts + mlp(projected[:, :4]), rtol=1e-4, atol=1e-4)
    f = attended[:, 4:]
    base_1 = block.mlp.fc1(block.norm2(x_shared))
    base_2 = block.mlp.fc2(F.gelu(lora(own.fc1, block.mlp.fc1, block.norm2(x_shared))))
    for t, task in enumerate(tasks):
        weights = F.gelu(q[:, :, t : t + 1] @ k[:, :, 4:].mT)  # (2, heads, 1, N)
        m = (weights.mT * f.unflatten(-1, (3, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
        a = x + block.ls1(block.attn.proj(f) + filtered(own.proj, task, own.norm(m + f)))
        hidden = F.gelu(base_1 + filtered(own.fc1, task, block.norm2(a)))
        expected = a + block.ls2(base_2 + filtered(own.fc2, task, hidden))
        torch.testing.assert_close(streams[task], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(skips[task], m, rtol=1e-4, atol=1e-4)
