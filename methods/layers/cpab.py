"""CPAB: diffeomorphisms of [0, 1] from continuous piecewise-affine velocity fields.

Freifeld, Hauberg, Batmanghelich, Fisher, "Transformations Based on Continuous Piecewise-Affine Velocity Fields", TPAMI
2017. The velocity is zero at both ends, theta at the N - 1 inner boundaries of N equal cells, and affine in between;
a point follows it for unit time. Inside a cell v = a x + b, so the path is known in closed form:

    x(t) = x + v(x) (e^{a t} - 1) / a,    and the cell's far boundary c is reached after log(v(c) / v(x)) / a.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def transform(theta: Tensor, x: Tensor, time: float = 1.0) -> Tensor:
    """theta (L, N - 1), points x (L, P) in [0, 1] -> where they are after `time`, (L, P).

    Increasing in x, with 0 and 1 in place; the identity at theta = 0. Differentiable in theta.
    """
    cells = theta.shape[-1] + 1
    velocity = F.pad(theta, (1, 1))  # at the N + 1 boundaries
    left_time = torch.full_like(x, time)
    cell = (x * cells).long().clamp(0, cells - 1)
    # A point never turns round, so it crosses each boundary at most once.
    for index in range(cells):
        v_low, v_high = velocity.gather(-1, cell), velocity.gather(-1, cell + 1)
        slope = (v_high - v_low) * cells
        v = v_low + (x - cell / cells) * slope
        forward = v > 0
        target = (cell + forward) / cells
        v_target = torch.where(forward, v_high, v_low)
        arrival = _time_to(v, v_target, target - x, slope)
        crosses = (arrival < left_time) & (v != 0)
        step = torch.where(crosses, 0.0, left_time)
        inside = x + v * step * _expm1_ratio(slope * step)
        x = torch.where(crosses, target, inside.clamp(0, 1))
        left_time = torch.where(crosses, left_time - arrival, 0.0)
        cell = torch.where(crosses, cell + torch.where(forward, 1, -1), cell).clamp(0, cells - 1)
        # A point that has arrived stays; asking whether all have makes a GPU wait, so not each time.
        if index % 8 == 7 and (_without_values(x) or not crosses.any()):
            break
    return x


def _without_values(x: Tensor) -> bool:
    """Whether only shapes are being worked out; eight rounds then stand for however many there are."""
    return x.is_meta or isinstance(x, FakeTensor)


def _expm1_ratio(z: Tensor) -> Tensor:
    """(e^z - 1) / z, by its series near zero. A point that crosses nothing has z > 80 only where v is zero."""
    z = z.clamp(max=80)
    small = z.abs() < 1e-3
    safe = torch.where(small, 1.0, z)
    return torch.where(small, 1 + z / 2 + z * z / 6, torch.expm1(safe) / safe)


def _time_to(v: Tensor, v_target: Tensor, distance: Tensor, slope: Tensor) -> Tensor:
    """How long from velocity v to v_target across `distance`; infinite where the target is never reached."""
    reached = v * v_target > 0
    v, v_target = torch.where(reached, v, 1.0), torch.where(reached, v_target, 1.0)
    ratio = (v_target - v) / v  # = slope * distance / v
    small = ratio.abs() < 1e-3
    safe = torch.where(small, 1.0, ratio)
    series = 1 - ratio / 2 + ratio * ratio / 3
    time = torch.where(reached, distance, 0.0) / v * torch.where(small, series, torch.log1p(safe) / safe)
    return torch.where(reached, time, torch.inf)
