"""Activation checkpointing changes memory, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.backbones.base import TransformerBackbone
from methods.backbones.load import WeightSource, full_name, load_backbone
from methods.layers.checkpointing import checkpoint_activations
from methods.model import Setting
from methods.registry import all_methods, parse


def step(model):
    """Outputs and gradients of a training step with its dropout and its noise; the same draws every time."""
    model.train()
    torch.manual_seed(1)
    outputs = model(torch.rand(2, 3, 64, 64))
    sum((out * torch.randn_like(out)).mean() for out in outputs.values()).backward()
    return outputs


@pytest.mark.parametrize("name", list(all_methods()))
def test_figures_are_the_same_for_every_method(build, name):
    plain = build(name)
    low = copy.deepcopy(plain)
    checkpoint_activations(low)
    expected, found = step(plain), step(low)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=0, atol=0)
    for (path, one), other in zip(plain.named_parameters(), low.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), path
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-7, msg=path)
    state = low.state_dict()  # the running statistics of batch norms too
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)) for _ in range(3)
        )

    def forward(self, x):
        for unit in self.units:
            x = unit(x)
        return x


def kept(model, x):
    """Bytes that backward holds on to, input, weights and statistics left out."""
    own = {t.untyped_storage().data_ptr() for t in [x, *model.parameters(), *model.buffers()]}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    return sum(size for size, _ in seen.values()), out


def test_only_the_inputs_of_units_are_kept():
    x = torch.randn(4, 8, 16, 16)
    plain = Net().train()
    low = copy.deepcopy(plain)
    checkpoint_activations(low)
    assert kept(plain, x)[0] > 3 * 3 * x.nbytes
    assert kept(low, x)[0] == 2 * x.nbytes  # of the second and the third unit; that of the first is x
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), low.eval()(x))


def test_two_steps_leave_the_same_running_statistics():
    plain = Net().train()
    low = copy.deepcopy(plain)
    checkpoint_activations(low)
    for model in (plain, low):
        torch.manual_seed(3)
        for _ in range(2):
            model(torch.randn(4, 8, 6, 6)).sum().backward()
    assert plain.units[0][1].num_batches_tracked == low.units[0][1].num_batches_tracked == 2
    assert low.units[0][1].momentum == 0.1
    for one, other in zip(plain.buffers(), low.buffers(), strict=True):
        assert torch.equal(one, other)


def test_a_unit_inside_a_unit_is_recomputed_once():
    calls = []

    class Leaf(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    class Nest(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([Leaf(4, 4), Leaf(4, 4)])

        def forward(self, x):
            return self.inner[1](self.inner[0](x).relu())

    model = nn.Module()
    model.outer = nn.ModuleList([Nest()])
    checkpoint_activations(model)
    model.outer[0](torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "tf_efficientnet_lite0"])
def test_convolutional_backbones_that_are_trained(name, tasks):
    """Some are containers with a forward of their own, some overwrite their inputs."""
    (configured,) = parse("multi_task_full")
    torch.manual_seed(0)
    plain = configured.build(load_backbone(full_name(name), (64, 64), WeightSource("random")), tasks, Setting("equal"))
    low = copy.deepcopy(plain)
    checkpoint_activations(low)
    step(plain)
    step(low)
    for (path, one), other in zip(plain.named_parameters(), low.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=path)
    state = low.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


def test_several_backwards_through_one_graph():
    plain = Net().train()
    low = copy.deepcopy(plain)
    checkpoint_activations(low)
    found = []
    for model in (plain, low):
        torch.manual_seed(3)
        out = model(torch.randn(4, 8, 6, 6))
        weights = [p for p in model.parameters() if p.dim() > 1]
        found.append([torch.autograd.grad(out[:, c].sum(), weights, retain_graph=True) for c in range(3)])
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a)
    assert plain.units[0][1].num_batches_tracked == low.units[0][1].num_batches_tracked == 1


def test_a_backbone_a_task_is_no_unit_as_a_whole(build):
    from methods.layers.checkpointing import _units

    units = list(_units(build("lora")))
    assert units and not any(isinstance(part, TransformerBackbone) for unit in units for part in unit.modules())


class Noisy(nn.Module):
    """A unit that draws random numbers and takes tensors in several places."""

    def forward(self, x, others, *, scale):
        return scale * (F.dropout(x, 0.5) + sum(others.values()))


def test_random_numbers_are_those_of_the_forward_and_none_are_used_up():
    found = []
    for low in (False, True):
        model = nn.Module()
        model.parts = nn.ModuleList([Noisy()])
        if low:
            checkpoint_activations(model)
        torch.manual_seed(3)
        x, a, scale = (torch.full((50,), value, requires_grad=True) for value in (2.0, 3.0, 7.0))
        out = model.parts[0](x, {"a": a}, scale=scale)
        between = torch.rand(3)
        out.sum().backward()
        found.append([out.detach(), x.grad, a.grad, scale.grad, between, torch.rand(3)])
    assert {0.0, 14.0} == set(found[0][1].tolist())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_an_argument_that_was_overwritten_meanwhile_is_no_wrong_gradient():
    model = nn.Module()
    model.parts = nn.ModuleList([Noisy()])
    checkpoint_activations(model)
    x, y = torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True).clone()
    out = model.parts[0](y, {}, scale=x)
    with torch.no_grad():
        y.mul_(10)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()
