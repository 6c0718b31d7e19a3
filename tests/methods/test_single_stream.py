"""Methods that adapt blocks in place: placement, sharing, prompts, generated weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import bitfit
from methods.backbones.load import WeightSource, full_name, load_backbone
from methods.backbones.timm_import import timm
from methods.model import Setting
from methods.registry import MethodError, all_methods, parse
from methods.vpt import prompted_block


def images(count=2):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def randomise(module, std=0.1):
    """Leave the zeros of the start behind."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn_like(parameter))
    return module


def explicit(backbone, image, after_attention=None, after_mlp=None, parallel=None):
    """timm's own modules, block by block; the adapters are plain functions on the sub-layers' outputs."""
    x, maps, index = backbone.embed(image), [], 0
    for stage in backbone.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            branch = block._attn(block.norm1(x))
            x = x + (after_attention[index](branch) if after_attention else branch)
            side = parallel[index](x) if parallel else 0
            branch = block.mlp(block.norm2(x))
            x = x + (after_mlp[index](branch) if after_mlp else branch) + side
            index += 1
        maps.append(x.permute(0, 3, 1, 2))
    return maps


def assert_maps(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("expression", ["adapter", "compacter", "compacter_pp", "low_rank_adapter", "vl_adapter"])
def test_adapters_by_their_equation(build, tasks, expression):
    encoder = randomise(build(expression)).eval().encoder
    features = encoder(images()).task
    for task in tasks:
        own = encoder.per_task[task]

        def equation(adapter):
            return lambda x: x + adapter.up(F.gelu(adapter.down(adapter.norm(x))))

        attention = [equation(a) for a in own.attention] if own.attention else None
        assert_maps(
            features[task], explicit(encoder.backbone, images(), attention, [equation(a) for a in own.feed_forward])
        )
    assert (encoder.per_task["semseg"].attention is not None) == (expression == "compacter")
    assert not torch.allclose(features["semseg"][3], features["normals"][3], atol=1e-3)


def test_compacter_shares_one_rule_among_a_tasks_layers(build):
    encoder = build("compacter").encoder
    rules = {task: {id(m.rule) for m in own.modules() if hasattr(m, "rule")} for task, own in encoder.per_task.items()}
    assert all(len(r) == 1 for r in rules.values()) and len(set.union(*rules.values())) == 4


def test_vl_adapter_shares_all_but_the_norms(build):
    model = build("vl_adapter")
    owners = model.owners()
    names = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith("encoder.")]
    assert names and all((owners[n] is not None) == (".norm." in n) for n in names)


@torch.no_grad()
@pytest.mark.parametrize("method", ["adapter", "low_rank_adapter", "lora", "bitfit", "relative_bias", "peft:ia3"])
def test_shared_gives_every_task_the_same_maps(build, method):
    model = randomise(build(f"{method}[sharing=shared]")).eval()
    assert model.passes(images(1)) == 1 and not model.independent
    features = model.encoder(images()).task
    assert all(torch.equal(a, b) for t in features.values() for a, b in zip(t, features["semseg"], strict=True))
    apart = randomise(build(method)).eval()
    assert apart.passes(images(1)) == 4 and apart.independent
    features = apart.encoder(images()).task
    assert not torch.allclose(features["semseg"][3], features["normals"][3], atol=1e-3)


@torch.no_grad()
def test_lora_is_a_rank_four_update_of_the_merged_projection(build, tiny_swin):
    torch.manual_seed(0)
    plain = tiny_swin()
    model = randomise(build("lora", protocol="equal")).eval()
    for task, adapted in model.encoder.backbones.items():
        reference = copy.deepcopy(plain)
        pairs = zip(sum(map(list, reference.stages), []), sum(map(list, adapted.stages), []), strict=True)
        for block, tuned in pairs:
            a, b = tuned.attn.qkv.lora_A["default"].weight, tuned.attn.qkv.lora_B["default"].weight
            assert torch.linalg.matrix_rank(b @ a) == 4
            block.attn.qkv.weight += 8 / 4 * b @ a
        assert_maps(model.encoder(images()).task[task], reference(images()).maps)


def test_bitfit_trains_biases_and_tables(build):
    model = build("bitfit")
    names = {
        n.partition("backbones.")[2].partition(".")[2] for n, p in model.encoder.named_parameters() if p.requires_grad
    }
    assert all("bias" in n for n in names) and any("relative_position_bias_table" in n for n in names)
    expected = {n for n, _ in model.encoder.backbones["semseg"].named_parameters() if "bias" in n}
    assert names == expected


@torch.no_grad()
@pytest.mark.parametrize("expression", ["vmt_adapter", "vmt_adapter[s=0.2,rho=2]", "vmt_adapter_lite"])
def test_vmt_adapter_by_its_equations(build, tasks, expression):
    """Eq. 3-5: the generic part joins the stream, the specific parts of a stage's blocks go to the decoder."""
    encoder = randomise(build(expression)).eval().encoder
    backbone, s, features = encoder.backbone, encoder.s, encoder(images()).task
    kept = {}

    def parallel(index):
        def run(x):
            kept[index] = encoder.cross_task[index](x)
            return (1 - s) * kept[index]

        return run

    generic = explicit(backbone, images(), parallel=[parallel(i) for i in range(8)])
    for task in tasks:
        for stage in range(4):
            blocks = (2 * stage, 2 * stage + 1)
            specific = sum(
                encoder.extract[task][i].alpha * (s * kept[i]) + encoder.extract[task][i].gamma for i in blocks
            )
            torch.testing.assert_close(
                features[task][stage], generic[stage] + specific.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4
            )


@torch.no_grad()
def test_lite_shares_its_matrices_between_down_and_up(build):
    f = randomise(build("vmt_adapter_lite")).encoder.cross_task[0]
    down = sum(torch.kron(a, b) for a, b in zip(f.shared, f.down, strict=True))
    up = sum(torch.kron(a, b) for a, b in zip(f.shared, f.up, strict=True))
    x = torch.randn(2, 3, 3, 24)
    torch.testing.assert_close(f(x), F.relu(x @ down + f.down_bias) @ up + f.up_bias, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hyperformer_against_explicitly_generated_weights(build, tasks):
    encoder = randomise(build("hyperformer"), 0.02).eval().encoder
    features = encoder(images()).task

    def adapter(generator, embedding):
        w = {n: (linear.weight @ embedding + linear.bias) for n, linear in generator.linears.items()}
        width = len(w["down_bias"])

        def run(x):
            hidden = F.gelu(x @ w["down"].view(width, -1).T + w["down_bias"], approximate="tanh")
            out = hidden @ w["up"].view(-1, width).T + w["up_bias"]
            normed = (out - out.mean(-1, keepdim=True)) / (out.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return x + normed * w["norm"] + w["norm_bias"]

        return run

    for task in tasks:
        codes = [encoder.embed(torch.cat([encoder.task_embeddings[task], b])) for b in encoder.block_embeddings]
        attention, mlp = (
            [adapter(generators[i // 2], code) for i, code in enumerate(codes)]
            for generators in (encoder.attention, encoder.feed_forward)
        )
        assert_maps(features[task], explicit(encoder.backbone, images(), attention, mlp))


@torch.no_grad()
@pytest.mark.parametrize("expression", ["polyhistor", "polyhistor_lite"])
def test_polyhistor_against_explicitly_generated_weights(build, tasks, expression):
    encoder = randomise(build(expression), 0.05).double().eval().encoder
    features = encoder(images().double()).task

    def product(network, embedding):
        (inputs, k), (_, outputs) = network.shapes
        return (network.p.weight @ embedding).view(inputs, k) @ (network.q.weight @ embedding).view(k, outputs)

    for task in tasks:
        e = encoder.embeddings[task]
        if expression == "polyhistor":
            downs, ups = ([product(n, e) for n in networks] for networks in (encoder.down, encoder.up))
        else:
            downs = [torch.kron(s, product(encoder.down, e)) for s in encoder.scale_down]
            ups = [torch.kron(s, product(encoder.up, e)) for s in encoder.scale_up]

        def adapter(own, down, up):
            return lambda x: x + F.gelu(own.norm(x) @ down + own.down_bias) @ up + own.up_bias

        mlp = [adapter(*parts) for parts in zip(encoder.own[task], downs, ups, strict=True)]
        assert_maps(features[task], explicit(encoder.backbone, images().double(), after_mlp=mlp))


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_prompted_block_against_whole_sequences(tiny_swin, shifted):
    """Window by window: attention over prompts and patches together, no bias or mask where a prompt takes part."""
    torch.manual_seed(0)
    backbone = tiny_swin((112, 112))
    block = backbone.layers[0].blocks[int(shifted)]
    nn.init.normal_(block.attn.relative_position_bias_table)
    x, prompts = torch.randn(2, 28, 28, 24), torch.randn(2, 3, 24)
    ours, ours_prompts = prompted_block(block, x, prompts)

    shift = 3 if shifted else 0
    normed = torch.roll(block.norm1(x), (-shift, -shift), (1, 2))
    bias = block.attn._get_rel_pos_bias()[0]
    out, means = torch.zeros_like(x), []
    for image in range(2):
        outputs = []
        for window in range(16):
            row, column = divmod(window, 4)
            rows, columns = slice(7 * row, 7 * row + 7), slice(7 * column, 7 * column + 7)
            tokens = torch.cat([block.norm1(prompts[image]), normed[image, rows, columns].reshape(49, 24)])
            q, k, v = (tokens @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(24, -1)
            logits = q @ k.T / 24**0.5
            logits[3:, 3:] += bias[0]
            if shifted:
                logits[3:, 3:] += block.attn_mask[window]
            attended = block.attn.proj(logits.softmax(-1) @ v)
            out[image, rows, columns] = attended[3:].view(7, 7, 24)
            outputs.append(attended[:3])
        means.append(torch.stack(outputs).mean(0))
    x = x + torch.roll(out, (shift, shift), (1, 2))
    prompts = prompts + torch.stack(means)
    torch.testing.assert_close(ours, x + block.mlp(block.norm2(x)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours_prompts, prompts + block.mlp(block.norm2(prompts)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
def test_prompts_of_different_images_do_not_meet(build, method):
    """Two images in a batch give what each gives alone."""
    model = build(f"{method}[prompts=3]").eval()
    together, first, second = (model(x) for x in (images(), images()[:1], images()[1:]))
    for task, out in together.items():
        torch.testing.assert_close(out, torch.cat([first[task], second[task]]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prompts_on_a_plain_vit(build):
    """Shallow prompts are tokens like any other: timm's own blocks on the longer sequence."""

    def frame(size):
        return load_backbone(full_name("test_vit"), (160, 160), WeightSource("random"))

    encoder = build("vpt_shallow[prompts=4]", backbone=frame).eval().encoder
    image = torch.rand(2, 3, 160, 160)
    backbone = encoder.backbone
    x = backbone.embed(image)
    for task, prompts in encoder.prompts.items():
        sequence = torch.cat([x[:, :1], prompts[0].expand(2, -1, -1), x[:, 1:]], 1)
        for block in backbone.model.blocks:
            sequence = block(sequence)
        last = backbone.model.norm(torch.cat([sequence[:, :1], sequence[:, 5:]], 1))[:, 1:]
        expected = last.transpose(1, 2).unflatten(2, backbone.grid)
        torch.testing.assert_close(encoder(image).task[task][3], expected, rtol=1e-4, atol=1e-4)


# BitFit


@pytest.mark.parametrize("kind", [nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNorm2d])
def test_a_bias_added_apart_changes_nothing(kind):
    norm = randomise(kind(6)).double()
    norm.weight.requires_grad_(False)
    parent = nn.ModuleDict({"norm": copy.deepcopy(norm)})
    bitfit.separate_biases(parent)
    assert type(parent["norm"]) is bitfit.LayerNorm
    assert {name: p.requires_grad for name, p in parent.named_parameters()} == {"norm.weight": False, "norm.bias": True}
    generator = torch.Generator().manual_seed(0)
    x, over = torch.randn(2, 2, 6, 4, 6, generator=generator, dtype=torch.float64)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    out, expected = parent["norm"](ours), norm(theirs)
    torch.testing.assert_close(out, expected)
    for each in (out, expected):
        (each * over).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(parent["norm"].bias.grad, norm.bias.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert parent.float()["norm"](x.bfloat16()).dtype == norm.float()(x.bfloat16()).dtype


@pytest.mark.parametrize("expression", [*all_methods(), "bitfit[sharing=shared]"])
@pytest.mark.parametrize("name", ["swin", "vit", "convnext"])
def test_no_layer_norm_wants_a_gradient_of_its_bias_alone(tasks, expression, name):
    """torch 2.11 fails there on CUDA, with many tokens."""
    kinds = {"swin": "swin_tiny_patch4_window7_224", "vit": "vit_tiny_patch16_224", "convnext": "convnext_atto"}
    (configured,) = parse(expression)
    with torch.device("meta"):
        backbone = load_backbone(kinds[name], (64, 64), WeightSource("random"))
        try:
            model = configured.build(backbone, tasks, Setting("equal"))
        except MethodError:
            pytest.skip("not on this backbone")
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm) and module.weight is not None]
    assert not [norm for norm in norms if norm.bias.requires_grad and not norm.weight.requires_grad]
