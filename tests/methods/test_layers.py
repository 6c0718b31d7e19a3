"""Layers that methods share, each against an independent reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.layers.cpab import transform
from methods.layers.encoders import structural_copy, train_selected
from methods.layers.low_rank_filter import (
    DynamicFilter,
    StaticFilter,
    depthwise,
    grouped_convolution,
    shifted_products,
)
from methods.layers.phm import PHMLinear, kronecker_sum


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# PHM


def test_kronecker_sum_against_torch_kron():
    rule, factors = torch.randn(3, 2, 5), torch.randn(3, 4, 7)
    expected = sum(torch.kron(a, b) for a, b in zip(rule, factors, strict=True))
    torch.testing.assert_close(kronecker_sum(rule, factors), expected)


def test_phm_linear_against_torch_kron():
    layer = PHMLinear(12, 8, nn.Parameter(torch.randn(4, 4, 4)))
    nn.init.normal_(layer.bias)
    weight = sum(
        torch.kron(a, left[:, None] @ right[None])
        for a, left, right in zip(layer.rule, layer.left, layer.right, strict=True)
    )
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), x @ weight + layer.bias)
    assert torch.linalg.matrix_rank(weight) > 1


def test_phm_refuses_what_n_does_not_divide():
    with pytest.raises(ValueError, match="n=4 does not divide a layer of 12 inputs and 6 outputs"):
        PHMLinear(12, 6, nn.Parameter(torch.randn(4, 4, 4)))


# CPAB


def velocity(theta, x):
    """Linear interpolation between the boundaries of equal cells, zero at both ends."""
    cells = theta.shape[-1] + 1
    at_boundaries = F.pad(theta, (1, 1))
    cell = (x * cells).long().clamp(0, cells - 1)
    share = x * cells - cell
    return at_boundaries.gather(-1, cell) * (1 - share) + at_boundaries.gather(-1, cell + 1) * share


def integrate(theta, x, steps=4000):
    """Fourth-order Runge-Kutta."""
    h = 1 / steps
    for _ in range(steps):
        k1 = velocity(theta, x)
        k2 = velocity(theta, x + h / 2 * k1)
        k3 = velocity(theta, x + h / 2 * k2)
        k4 = velocity(theta, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize(("cells", "size"), [(2, 1.0), (4, 0.5), (16, 0.2), (64, 0.1)])
def test_cpab_against_numerical_integration(cells, size):
    theta = size * torch.randn(3, cells - 1, dtype=torch.double)
    x = torch.linspace(0, 1, 97, dtype=torch.double).expand(3, -1)
    torch.testing.assert_close(transform(theta, x), integrate(theta, x), rtol=0, atol=1e-6)
    moved = (transform(theta, x) - x).abs().max()
    assert moved > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
@pytest.mark.parametrize(("cells", "size"), [(4, 0.5), (64, 0.125)])
def test_cpab_is_increasing_with_fixed_ends(cells, size, dtype):
    theta = (size * (2 * torch.rand(5, cells - 1) - 1)).to(dtype)
    x = torch.linspace(0, 1, 200, dtype=dtype).expand(5, -1)
    y = transform(theta, x)
    assert (y.diff() >= 0).all() and (y[:, 0] == 0).all() and (y[:, -1] == 1).all()
    assert dtype == torch.float32 or (y.diff() > 0).all()


def test_cpab_is_the_identity_at_zero_and_undone_by_the_opposite_field():
    x = torch.linspace(0, 1, 50, dtype=torch.double).expand(2, -1)
    assert torch.equal(transform(torch.zeros(2, 7, dtype=torch.double), x), x)
    theta = 0.3 * torch.randn(2, 7, dtype=torch.double)
    torch.testing.assert_close(transform(-theta, transform(theta, x)), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_cpab_gradient_against_differences(size):
    theta = size * torch.randn(1, 5, dtype=torch.double)
    x = torch.rand(1, 9, dtype=torch.double)
    theta.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: transform(t, x), theta, eps=1e-7, atol=1e-5)


def test_cpab_stays_finite_for_violent_fields():
    theta = torch.zeros(1, 63)
    theta[0, ::2] = 5.0
    theta.requires_grad_()
    y = transform(theta, torch.linspace(0, 1, 129).unsqueeze(0))
    y.sum().backward()
    assert y.isfinite().all() and theta.grad.isfinite().all()


# filters


def unfolded(x, kernels):
    """(N, H, W, r) and (N, r, 9) by torch's unfold."""
    n, h, w, r = x.shape
    patches = F.unfold(x.permute(0, 3, 1, 2), 3, padding=1).view(n, r, 9, h * w)
    return (patches * kernels.unsqueeze(-1)).sum(2).view(n, r, h, w).permute(0, 2, 3, 1)


@pytest.mark.parametrize("form", [depthwise, grouped_convolution, shifted_products])
@pytest.mark.parametrize(("samples", "kernels"), [(3, 3), (3, 1), (1, 1)])
def test_depthwise_against_unfold(form, samples, kernels):
    x = torch.randn(samples, 5, 7, 4, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(kernels, 4, 9, dtype=torch.float64, requires_grad=True)
    over = torch.randn(samples, 5, 7, 4, dtype=torch.float64)
    outputs = form(x, kernels), unfolded(x, kernels)
    torch.testing.assert_close(*outputs)
    ours, theirs = (torch.autograd.grad((out * over).sum(), (x, kernels)) for out in outputs)
    torch.testing.assert_close(ours, theirs)


def test_static_filter_against_a_grouped_convolution():
    layer, x = StaticFilter(4), torch.randn(2, 5, 6, 4)
    expected = F.conv2d(x.permute(0, 3, 1, 2), layer.kernel.view(4, 1, 3, 3), layer.bias, padding=1, groups=4)
    torch.testing.assert_close(layer(x), expected.permute(0, 2, 3, 1))


def test_dynamic_filter_against_unfold():
    """Each sample has kernels of its own, of mean and deviation as learned."""
    layer, x = DynamicFilter(4), torch.randn(3, 5, 6, 4)
    kernels = []
    for sample in x:
        made = (sample.mean((0, 1)) @ layer.make.weight.T + layer.make.bias).view(4, 9)
        rows = [(row - row.mean()) / row.std() for row in made]
        kernels.append(torch.stack(rows) * layer.scale + layer.shift)
    torch.testing.assert_close(layer.kernels(x), torch.stack(kernels))
    torch.testing.assert_close(layer(x), unfolded(x, torch.stack(kernels)))
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


# structural copies


def test_structural_copy_shares_frozen_tensors_alone(tiny_swin):
    backbone = train_selected(tiny_swin(), lambda name: name.endswith("norm1.weight"))
    other = structural_copy(backbone)
    ours, theirs = dict(backbone.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys() and any(p.requires_grad for p in ours.values())
    for name, parameter in ours.items():
        assert (theirs[name] is parameter) == (not parameter.requires_grad), name
        assert theirs[name].requires_grad == parameter.requires_grad
        assert torch.equal(theirs[name], parameter)
    masks = [(a, b) for (_, a), (_, b) in zip(backbone.named_buffers(), other.named_buffers(), strict=True)]
    assert masks and all(a is b for a, b in masks)
    modules = {id(module) for module in backbone.modules()}
    assert not [module for module in other.modules() if id(module) in modules]
