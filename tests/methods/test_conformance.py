"""What every registered method must do, whatever it is: a new file in methods/ is covered by being there."""

from __future__ import annotations

import re

import pytest
import torch

from methods.backbones.load import WeightSource, full_name, load_backbone
from methods.backbones.pvt import PVTBackbone
from methods.backbones.timm_import import timm
from methods.backbones.vit import ViTBackbone
from methods.model import upsample_logits
from methods.registry import MethodError, all_methods

METHODS = list(all_methods())
SIX = {"semseg": 21, "human_parts": 7, "saliency": 1, "normals": 3, "depth": 1, "edge": 1}
RUNS_ANYWHERE = {"bdta_mote", "bitfit", "decoder_only", "multi_task_full", "single_task_full"}
every_method = pytest.mark.parametrize("name", METHODS)


def images(count=2, size=(64, 64)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def frozen(model, state=True):
    """Parameters that are not trained, and the buffers of modules without a trained parameter of their own.

    `state`: also those of modules without any parameter, which may hold what a method found out before training.
    """
    tensors = {id(p): p for p in model.parameters() if not p.requires_grad}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not any(p.requires_grad for p in own) and (own or state):
            tensors |= {id(b): b for b in module.buffers(recurse=False)}
    return list(tensors.values())


def train(model):
    """Two steps, and up to eight more while a parameter still waits for its first non-zero gradient; returns those.

    What starts at zero holds back the gradient of what stands before it, and stochastic depth drops whole blocks.
    """
    waiting = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(waiting.values(), lr=0.05)
    targets = torch.Generator().manual_seed(1)
    model.train()
    for step in range(10):
        optimizer.zero_grad()
        outputs = model(images())
        torch.stack([(o * torch.randn(o.shape, generator=targets)).mean() for o in outputs.values()]).sum().backward()
        waiting = {n: p for n, p in waiting.items() if p.grad is None or not p.grad.any()}
        optimizer.step()
        if step and not waiting:
            break
    return set(waiting)


@torch.no_grad()
def predict(model, image):
    return model.eval()(image)


@every_method
@pytest.mark.parametrize("decoder", [None, "segformer", "hrnet"])
@pytest.mark.parametrize("protocol", ["published", "equal"])
def test_outputs(build, tasks, name, protocol, decoder):
    """Full resolution, a name a task, on an image that is not square."""
    outputs = predict(build(name, protocol=protocol, decoder=decoder, size=(32, 64)), images(1, (32, 64)))
    assert {task: tuple(out.shape) for task, out in outputs.items()} == {t: (1, n, 32, 64) for t, n in tasks.items()}
    assert all(out.isfinite().all() and out.std() > 0 for out in outputs.values())


@every_method
@pytest.mark.parametrize("protocol", ["published", "equal"])
def test_training(build, name, protocol):
    """Gradients reach all that counts as trained; nothing else moves; its state restores the model exactly."""
    check_training(build, name, protocol, all_methods()[name].unreached)


# Block sizes must divide the tiny Swin's widths.
@pytest.mark.parametrize("name", ["dora", "vera", "ia3[targets=block]", "oft[rank=4,targets=block]", "boft", "loha"])
@pytest.mark.parametrize("sharing", ["per_task", "shared"])
def test_training_of_peft_methods(build, name, sharing):
    bare, _, inside = name.removesuffix("]").partition("[")
    options = ",".join(filter(None, (inside, f"sharing={sharing}")))
    check_training(build, f"peft:{bare}[{options}]", "equal", {})


def check_training(build, name, protocol, excused):
    model = build(name, protocol=protocol)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model.ledger().trainable
    still = frozen(model)
    before = [tensor.clone() for tensor in still]
    waiting = train(model)
    missed = [n for n in waiting if not any(re.search(pattern, n) for pattern in excused)]
    assert not missed, (
        f"trained, yet no gradient reaches them (Method.unreached says why where that is meant): {missed}"
    )
    # An excuse that excuses nothing is out of date.
    assert all(any(re.search(pattern, n) for n in waiting) for pattern in excused)
    assert all(torch.equal(tensor, old) for tensor, old in zip(still, before, strict=True))

    state = {key: tensor.clone() for key, tensor in model.trained_state().items()}
    fresh = build(name, protocol=protocol)
    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    fresh.load_trained_state(state)
    expected, restored = predict(model, images()), predict(fresh, images())
    assert all(torch.equal(restored[task], expected[task]) for task in expected)


@every_method
def test_trained_state_holds_no_frozen_tensor(build, name):
    model = build(name)
    pointers = {tensor.data_ptr() for tensor in frozen(model, state=False)}
    assert not [key for key, tensor in model.trained_state().items() if tensor.data_ptr() in pointers]


@every_method
def test_state_of_another_method_is_refused(build, name):
    other = build(METHODS[METHODS.index(name) - 1]).trained_state()
    with pytest.raises(ValueError, match="checkpoint of another model") as caught:
        build(name).load_trained_state(other)
    assert "\n" not in str(caught.value)


@every_method
def test_same_seed_same_outputs(build, name):
    """And evaluation draws no random numbers."""
    models = [build(name, seed=seed) for seed in (0, 0, 1)]
    first, again, same, other = (predict(model, images()) for model in (models[0], *models))
    assert all(torch.equal(first[t], again[t]) and torch.equal(first[t], same[t]) for t in first)
    assert not any(torch.equal(first[t], other[t]) for t in first)


@every_method
@pytest.mark.parametrize("count", [1, 2, 6])
def test_any_number_of_tasks_and_a_batch_of_one(build, name, count):
    chosen = dict(list(SIX.items())[-count:])
    model = build(name, tasks=chosen).train()
    outputs = model(images(1))
    assert {task: out.shape[1] for task, out in outputs.items()} == chosen
    sum(out.sum() for out in outputs.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_method
def test_backbone_passes(build, name, tasks):
    """One for each task, or one for all."""
    assert build(name).passes(images(1)) in (1, len(tasks))


@every_method
def test_one_copy_of_each_frozen_tensor(build, name, tiny_swin):
    frozen_values = sum(p.numel() for p in build(name).parameters() if not p.requires_grad)
    assert frozen_values <= sum(p.numel() for p in tiny_swin().parameters())


@every_method
def test_start(build, name, tiny_swin):
    """Whoever claims so hands the backbone's own maps on before training; whoever does not, changes them."""
    model = build(name, protocol="equal").eval()
    torch.manual_seed(0)  # as `build` seeds before it makes the backbone
    backbone = tiny_swin().eval()
    with torch.no_grad():
        maps, features = backbone(images()).maps, model.encoder(images()).task
    distances = [(a - b).norm() / b.norm() for given in features.values() for a, b in zip(given, maps, strict=True)]
    assert max(distances) < 1e-5 if all_methods()[name].starts_pretrained else max(distances) > 1e-3


@every_method
def test_training_and_evaluation_differ_by_dropout_alone(build, name):
    """Features are the same in both modes once nothing is dropped, and dropping is what Dropout and DropPath do."""
    encoder = build(name).encoder
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    with torch.no_grad():
        features = [encoder.train(mode)(images()).task for mode in (True, False)]
    for task in features[0]:
        assert all(torch.equal(a, b) for a, b in zip(features[0][task], features[1][task], strict=True))


@every_method
def test_images_of_a_batch_do_not_meet(build, name):
    model = build(name)
    both, second = predict(model, images()), predict(model, images()[1:])
    for task, out in both.items():
        torch.testing.assert_close(out[1:], second[task], rtol=1e-4, atol=1e-4)


@every_method
def test_logits_at_the_decoders_resolution(build, name):
    model = build(name).eval()
    with torch.no_grad():
        full, small = model(images()), model(images(), upsample=False)
    assert all(torch.equal(upsample_logits(small[task], (64, 64)), full[task]) for task in full)


@every_method
def test_bfloat16(build, name):
    model = build(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images())
    sum(out.float().mean() for out in outputs.values()).backward()
    assert all(out.isfinite().all() for out in outputs.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    close = predict(model, images())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict(model, images())
    assert all((close[t] - rounded[t]).norm() < 0.2 * close[t].norm() for t in close)


@every_method
@pytest.mark.parametrize("pyramid", ["tf_efficientnet_lite0", "test_resnet", "test_convnext"])
def test_convolutional_pyramid(build, tasks, name, pyramid):
    """A method that needs attention says so in one line; the others run, and frozen statistics stay."""
    pyramid = full_name(pyramid)

    def open_branches(size):
        """Residual branches start with a scale of zero: random and frozen, they would let no gradient through."""
        backbone = load_backbone(pyramid, size, WeightSource("random"))
        for module in backbone.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
        return backbone

    try:
        model = build(name, backbone=open_branches)
    except MethodError as error:
        assert name not in RUNS_ANYWHERE
        assert pyramid in str(error) and "\n" not in str(error)
        return
    assert model.trains_whole_backbone() == name.endswith("_full")
    still = frozen(model)
    before = [tensor.clone() for tensor in still]
    # All four ReLUs of a router can be dead on a random network this small; everything else must be reached.
    assert all(".routers." in unreached for unreached in train(model))
    assert all(torch.equal(tensor, old) for tensor, old in zip(still, before, strict=True))
    outputs = predict(model, images())
    assert {task: tuple(out.shape) for task, out in outputs.items()} == {t: (2, n, 64, 64) for t, n in tasks.items()}


def small_vit(size, **changes):
    """Patches of 8, class and register tokens, layer scale, as DINOv2 has them."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=24, num_heads=3, depth=5, num_classes=0,
        reg_tokens=2, init_values=0.5, dynamic_img_size=True, **changes,
    )  # fmt: skip
    return ViTBackbone("small_vit", model, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), size)


def small_pvt(size):
    model = timm.create_model(
        "pvt_v2_b0", depths=(1, 1, 2, 1), embed_dims=(24, 48, 72, 96), num_heads=(1, 2, 3, 4), num_classes=0
    )
    return PVTBackbone("small_pvt", model, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@every_method
@pytest.mark.parametrize("make", [small_vit, small_pvt])
def test_other_transformers(build, tasks, name, make):
    """Runs and trains, or says in one line why not."""
    try:
        model = build(name, backbone=make, size=(48, 64))
    except MethodError as error:
        assert make.__name__ in str(error) and "\n" not in str(error)
        return
    assert model.trains_whole_backbone() == name.endswith("_full")
    outputs = model.train()(images(2, (48, 64)))
    assert {task: tuple(out.shape) for task, out in outputs.items()} == {t: (2, n, 48, 64) for t, n in tasks.items()}
    sum((out * torch.randn_like(out)).mean() for out in outputs.values()).backward()
    declared = "|".join(all_methods()[name].unreached)
    missed = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in missed if not declared or not re.search(declared, n)]
    assert not [n for n in missed if re.search(r"\.3\.0\.(proj|fc1|fc2)\.", n)]  # that holds of the last block alone
    assert model.passes(images(1, (48, 64))) in (1, len(tasks))


@every_method
def test_start_on_a_vit(build, name):
    """As on Swin, where there is no layer scale to be forgotten and no class token."""
    if not all_methods()[name].starts_pretrained:
        return
    try:
        model = build(name, protocol="equal", backbone=small_vit, size=(48, 64)).eval()
    except MethodError:
        return
    torch.manual_seed(0)
    backbone = small_vit((48, 64)).eval()
    with torch.no_grad():
        maps, features = backbone(images(2, (48, 64))).maps, model.encoder(images(2, (48, 64))).task
    distances = [(a - b).norm() / b.norm() for given in features.values() for a, b in zip(given, maps, strict=True)]
    assert max(distances) < 1e-5, f"{name} starts_pretrained, yet its maps are {max(distances):.1%} off the backbone's"


@pytest.mark.parametrize("name", sorted(RUNS_ANYWHERE))
def test_trained_state_on_a_pyramid_holds_no_frozen_tensor(build, name):
    model = build(name, backbone=lambda size: load_backbone("test_resnet", size, WeightSource("random")))
    pointers = {tensor.data_ptr() for tensor in frozen(model, state=False)}
    assert not [key for key, tensor in model.trained_state().items() if tensor.data_ptr() in pointers]
