"""BDTA+MoTE: equations 1-11 written out, what may not flow where, and deformable attention by brute force."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.backbones.base import Pyramid
from methods.bdta_mote import BDTA, MoTE, Options
from methods.layers.deformable_attention import ConvFFN, DeformableAttention


def randomise(module, std=0.3):
    """Leave the identities and zeros of the start behind."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return module


# Deformable attention


def pixel(plane, row, column):
    inside = 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]
    return plane[row, column] if inside else torch.zeros(plane.shape[2])


def bilinear(plane, y, x):
    """plane (H, W, c) at pixel coordinates where 0 is the centre of the first pixel; zero outside."""
    top, left = math.floor(float(y.detach())), math.floor(float(x.detach()))
    dy, dx = y - top, x - left
    return (
        pixel(plane, top, left) * (1 - dy) * (1 - dx)
        + pixel(plane, top, left + 1) * (1 - dy) * dx
        + pixel(plane, top + 1, left) * dy * (1 - dx)
        + pixel(plane, top + 1, left + 1) * dy * dx
    )


def brute_force(attention, query, source):
    heads, points = attention.heads, attention.points
    (batch, rows, columns, dim), (maps, height, width, _) = query.shape, source.shape
    value = attention.value(source)
    out = torch.zeros(maps, rows, columns, dim)
    for n, i, j, m in product(range(maps), range(rows), range(columns), range(heads)):
        q, own = query[n % batch, i, j], slice(m * dim // heads, (m + 1) * dim // heads)
        offsets = attention.offsets(q)[m * points * 2 : (m + 1) * points * 2]
        weights = attention.weights(q)[m * points : (m + 1) * points].softmax(0)
        for p in range(points):
            x = (j + 0.5) / columns * width + offsets[2 * p] - 0.5
            y = (i + 0.5) / rows * height + offsets[2 * p + 1] - 0.5
            out[n, i, j, own] += weights[p] * bilinear(value[n, :, :, own], y, x)
    return attention.output(out)


@pytest.mark.parametrize(
    ("queries", "sources"),
    [((2, 3, 5, 6), (2, 3, 5, 6)), ((1, 4, 2, 6), (1, 3, 5, 6)), ((2, 2, 3, 6), (6, 3, 4, 6))],
    ids=["own map", "map of another size", "same queries, three sets of maps"],
)
def test_deformable_attention_by_brute_force(queries, sources):
    torch.manual_seed(0)
    attention = randomise(DeformableAttention(6, heads=3, points=2), 0.5)
    query, source = torch.randn(queries, requires_grad=True), torch.randn(sources, requires_grad=True)
    ours, theirs = attention(query, source), brute_force(attention, query, source)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    inputs, weight = [query, source, *attention.parameters()], torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_points_far_outside_give_the_output_bias_and_the_value_at_the_rim_fades():
    attention = DeformableAttention(4, heads=1, points=1)
    nn.init.normal_(attention.output.bias)
    query, source = torch.randn(1, 3, 3, 4), torch.randn(1, 3, 3, 4)
    with torch.no_grad():
        attention.offsets.bias.copy_(torch.tensor([100.0, 0.0]))
        assert torch.equal(attention(query, source), attention.output.bias.expand(1, 3, 3, 4))
        attention.offsets.bias.copy_(torch.tensor([0.5, 0.0]))
        last = attention.output(attention.value(source[:, :, 2]) / 2)
        torch.testing.assert_close(attention(query, source)[:, :, 2], last)


def test_initial_offsets_point_in_even_directions():
    attention = DeformableAttention(8, heads=8, points=3)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    expected = torch.tensor([[(k * x, k * y) for k in (1, 2, 3)] for x, y in directions]).float()
    torch.testing.assert_close(attention.offsets.bias.view(8, 3, 2), expected)
    assert not attention.offsets.weight.any()
    # Six heads: at 60 degrees (1/2, sqrt(3)/2) is scaled until its longer side is one pixel.
    bias = DeformableAttention(6, heads=6).offsets.bias.view(6, 4, 2)
    torch.testing.assert_close(bias[1], torch.tensor([[k / math.sqrt(3), k] for k in (1.0, 2.0, 3.0, 4.0)]))


def test_initially_every_point_weighs_the_same():
    attention = DeformableAttention(6, heads=3, points=4)
    _, weights = attention.locate(torch.randn(2, 3, 3, 6), torch.Size((3, 3)))
    torch.testing.assert_close(weights, torch.full((2, 3, 3, 3, 4), 0.25))


@pytest.mark.parametrize(("d", "m", "p"), [(24, 6, 4), (12, 4, 2)])
def test_parameter_counts_of_the_layers(d, m, p):
    count = sum(x.numel() for x in DeformableAttention(d, m, p).parameters())
    assert count == (d + 1) * 2 * m * p + (d + 1) * m * p + 2 * (d + 1) * d
    count = sum(x.numel() for x in ConvFFN(d, d // 4).parameters())
    assert count == (d + 1) * (d // 4) + 10 * (d // 4) + (d // 4 + 1) * d


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="4 heads do not divide 6 channels"):
        DeformableAttention(6, heads=4)


# The task branch


def injection(module, k, query, source):
    """Equations 4-5 or 6-7 for task k on (B, H, W, d) maps."""
    adapter = list(module.adapters.values())[k]
    adapted = F.gelu(source @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
    adapted = adapted + source
    x = query + module.attention(F.layer_norm(query, query.shape[-1:], module.norm_query.weight, module.norm_query.bias,
                                              1e-6), module.norm_source(adapted))  # fmt: skip
    return x + module.ffn(module.norm_ffn(x))


@pytest.mark.parametrize("shared_start", [True, False], ids=["stem", "later stage"])
@pytest.mark.parametrize("direction", ["both", "g2t", "t2g"])
def test_stage_by_its_equations(direction, shared_start):
    torch.manual_seed(0)
    bdta = randomise(BDTA(12, ("semseg", "depth", "edge"), Options(r=2, direction=direction)))
    general, task = torch.randn(2, 4, 5, 12), torch.randn(1 if shared_start else 3, 2, 4, 5, 12)
    adapted = bdta(general, task)
    assert adapted.shape == (3, 2, 4, 5, 12)
    f = bdta.project_general(general)
    for k in range(3):
        a = bdta.project_task(task[0 if shared_start else k])
        if direction == "both":
            g2t = injection(bdta.g2t, k, a, f)
            mixed = g2t + injection(bdta.t2g, k, f, g2t)
        elif direction == "g2t":
            mixed = injection(bdta.g2t, k, a, f)
        else:
            mixed = a + injection(bdta.t2g, k, f, a)
        torch.testing.assert_close(adapted[k], bdta.project_out(mixed), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("direction", ["both", "t2g"])
@pytest.mark.parametrize("r", [1, 4])
def test_starts_from_the_projected_general_features(r, direction):
    """An orthonormal projection loses nothing at r=1, and leaves a share of 1/r of an isotropic signal at r=4."""
    torch.manual_seed(0)
    bdta = BDTA(64, ["a", "b"], Options(r=r, direction=direction))
    general, task = torch.randn(2, 8, 8, 64), torch.randn(1, 2, 8, 8, 64)
    out = bdta(general, task)
    projector = bdta.project_general.weight.T @ bdta.project_general.weight
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(out, (general @ projector).expand(2, -1, -1, -1, -1))
    if r == 1:
        torch.testing.assert_close(out[0], general, rtol=1e-5, atol=1e-5)
    else:
        assert out[0].var() / general.var() == pytest.approx(1 / r, rel=0.1)


def test_a_direction_left_out_has_no_parameters(build):
    names = {d: [n for n, _ in build(f"ours[direction={d}]").named_parameters()] for d in ("g2t", "t2g")}
    assert not any(".t2g." in name for name in names["g2t"]) and any(".g2t." in name for name in names["g2t"])
    assert not any(".g2t." in name for name in names["t2g"]) and any(".t2g." in name for name in names["t2g"])


def test_task_branch_starts_from_the_patch_embedding_and_goes_through_the_frozen_merging(build, tasks):
    encoder = randomise(build("ours").encoder)
    image, seen = torch.rand(2, 3, 64, 64), []
    for transition in encoder.transitions:
        transition.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    features = encoder(image)
    torch.testing.assert_close(seen[0][0], encoder.backbone.embed(image)[None])
    assert torch.equal(seen[0][0], seen[0][1])
    for stage in (1, 2, 3):
        before, after = seen[stage]
        for k, task in enumerate(tasks):
            assert torch.equal(before[k], features.task[task][stage - 1].permute(0, 2, 3, 1))
            torch.testing.assert_close(after[k], encoder.backbone.layers[stage].downsample(before[k]))


def test_main_branch_saves_nothing_for_backward(build):
    encoder = build("ours").encoder
    image = torch.rand(1, 3, 64, 64, requires_grad=True)  # else nothing frozen would save anything anyway
    with torch.no_grad():
        given = encoder.backbone(image)
    assert all(f.grad_fn is None for f in encoder(image).general)

    def saved():
        count, size = 0, 0

        def pack(tensor):
            nonlocal count, size
            count, size = count + 1, size + tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(image)
        return count, size

    running = saved()
    encoder.backbone.forward = lambda image: Pyramid(given.stem, given.maps)
    assert running == saved() and running[0] > 0


def test_no_gradient_enters_the_backbone(build, tasks):
    model = build("ours")
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    sum(out.sum() for out in model(image).values()).backward()
    assert image.grad is None
    assert all(p.grad is None for p in model.encoder.backbone.parameters())


# Mixture of task experts


def perturb(model, task):
    owners = model.owners()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and owners[name] == task:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_tasks_meet_only_through_gamma(build, tasks, gamma):
    model = build("ours").eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for stage in model.decoder.mixer.gamma:
            for task in tasks:
                assert not stage[task].any()
                stage[task].fill_(gamma)
        before = model(image)
        # The gate and gamma of other tasks stay: what changes is the expert alone.
        perturb(model, "human_parts")
        after = model(image)
    for task in tasks:
        if task == "human_parts" or gamma:
            assert not torch.allclose(before[task], after[task], atol=1e-4)
        else:
            assert torch.equal(before[task], after[task])


def test_mixing_by_its_equation():
    torch.manual_seed(0)
    names, widths, sizes = ("semseg", "depth", "edge"), (4, 6), ((3, 5), (2, 2))
    mote = randomise(MoTE((8, 16), widths, names), 1.0)
    gates = [torch.rand(2, 3, 3), torch.rand(2, 3, 3)]
    mote.gates = lambda general: gates
    maps = {t: [torch.randn(2, *s, w) for s, w in zip(sizes, widths, strict=True)] for t in names}
    mixed = mote(maps, [])
    for t, task in enumerate(names):
        for i in range(2):
            for b in range(2):
                blend = sum(gates[i][b, t, q] * maps[other][i][b] for q, other in enumerate(names))
                expected = maps[task][i][b] + mote.gamma[i][task] * blend
                torch.testing.assert_close(mixed[task][i][b], expected)


@pytest.mark.parametrize("plain", [False, True])
def test_gates_in_evaluation_are_the_softmax_of_pooled_scores(plain):
    torch.manual_seed(0)
    mote = randomise(MoTE((8, 16), (4, 4), ("semseg", "depth", "edge"))).eval()
    mote.plain = plain
    general = [torch.randn(2, 8, 5, 3), torch.randn(2, 16, 3, 2)]
    first, second = mote.gates(general), mote.gates(general)
    for i, x in enumerate(general):
        assert first[i].shape == (2, 3, 3) and torch.equal(first[i], second[i])
        torch.testing.assert_close(first[i].sum(-1), torch.ones(2, 3))
        for t, router in enumerate(mote.routers[i].values()):
            up, _, down = router.score
            for b in range(2):
                pixels = x[b].flatten(1).T
                scores = ((pixels @ up.weight.T + up.bias).clamp_min(0) @ down.weight.T + down.bias).mean(0)
                torch.testing.assert_close(first[i][b, t], scores.exp() / scores.exp().sum())


@pytest.mark.parametrize("plain", [False, True])
def test_noise_in_training_alone(plain):
    torch.manual_seed(0)
    names = ("semseg", "depth", "edge")
    mote = randomise(MoTE((16,), (4,), names), 1.0)
    mote.plain = plain
    general = [torch.randn(2, 16, 4, 4)]
    (first,), (second,) = mote.gates(general), mote.gates(general)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 3))
    torch.manual_seed(1)
    (noisy,) = mote.gates(general)
    torch.manual_seed(1)
    noise = torch.randn(3, 2, 3)
    x = general[0].permute(0, 2, 3, 1)
    for t, router in enumerate(mote.routers[0].values()):
        spread = (1 + router.noise(x).mean((1, 2)).exp()).log()
        scores = router.score(x).mean((1, 2)) + noise[t] * spread
        torch.testing.assert_close(noisy[:, t], scores.softmax(-1))


def test_without_routing_there_is_no_mixer(build):
    assert build("ours[mote=off]").decoder.mixer is None
    assert build("ours").decoder.mixer is not None


def test_rank_must_divide_the_channels(build):
    with pytest.raises(ValueError, match=r"r=5 does not divide the 24 channels of tiny_swin"):
        build("ours[r=5]")


@pytest.mark.parametrize("r", [1, 2, 8, 24])
def test_any_divisor_runs(build, r):
    out = build(f"ours[r={r}]", tasks={"semseg": 5}, size=(32, 32))(torch.rand(1, 3, 32, 32))
    assert out["semseg"].shape == (1, 5, 32, 32)


@pytest.mark.parametrize("protocol", ["published", "equal"])
@pytest.mark.parametrize("options", ["", ",direction=t2g", ",mote=off"])
def test_the_plain_form_is_the_same_function(build, tasks, protocol, options):
    """Outputs and gradients of the exact rewritings, with routing noise, against the form without any of them.

    In double precision: in single, how far rounding takes them apart depends on the processor."""
    found = []
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    for form in ("fast", "plain"):
        model = build(f"ours[form={form}{options}]", protocol=protocol).double()
        torch.manual_seed(2)
        randomise(model, 0.1)
        model.train()
        out = model(image)
        sum((logits**2).mean() for logits in out.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((out, gradients, model))
    (fast, of_fast, fast_model), (plain, of_plain, plain_model) = found
    flags = [[m.plain for m in model.modules() if hasattr(m, "plain")] for model in (fast_model, plain_model)]
    assert len(flags[0]) >= 9 and not any(flags[0]) and all(flags[1])
    assert of_fast.keys() == of_plain.keys() and of_fast
    for mine, other in ((fast, plain), (of_fast, of_plain)):
        scale = max(each.abs().max().item() for each in other.values())
        for name, value in mine.items():
            # Some are zero but for rounding: biases before a batch norm.
            largest = max(other[name].abs().max().item(), 1e-2 * scale)
            torch.testing.assert_close(value, other[name], rtol=1e-7, atol=1e-8 * largest)
