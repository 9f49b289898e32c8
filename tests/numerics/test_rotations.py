"""Rotations against the matrix exponential, finite differences, planted faults and Haar's measure."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core import rotations
from polydiff.core.errors import DataError
from polydiff.core.noise import Noise

ANGLES = [0.0, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 3.0, *(math.pi - gap for gap in (0.02, 0.009, 1e-3, 1e-4, 1e-7, 0.0))]


def tangents(angle: float, n: int = 500, dtype=torch.float64):
    axis = Noise(1, [0]).draw(0, "axis", torch.empty(1, n, 3, dtype=torch.float64))[0]
    corners = torch.eye(3, dtype=torch.float64)
    axis = torch.cat([corners, -corners, axis])
    return (angle * axis / axis.norm(dim=-1, keepdim=True)).to(dtype)


def hat(u):
    x, y, z = u.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


@pytest.mark.parametrize("angle", [*ANGLES, 5.0, 40.0])
def test_exp_is_the_matrix_exponential(angle):
    u = tangents(angle)
    torch.testing.assert_close(rotations.exp(u), torch.linalg.matrix_exp(hat(u)), rtol=0, atol=1e-13)
    rotations.check_rotations(rotations.exp(u), tolerance=1e-14)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3.5e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("angle", ANGLES)
def test_log_inverts_exp_at_every_angle(angle, dtype, bound):
    u = tangents(angle)
    r = rotations.exp(u).to(dtype)
    back = rotations.log(r)
    assert back.dtype == dtype and rotations.exp(back).dtype == dtype
    assert float((rotations.exp(back) - r).norm(dim=(-2, -1)).max()) <= bound
    assert float((rotations.angle(r).double() - angle).abs().max()) <= bound
    if angle < math.pi - 1e-3:
        torch.testing.assert_close(back.double(), u, rtol=0, atol=2 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_everywhere(dtype):
    u = torch.cat([tangents(angle, 20) for angle in (*ANGLES, 1e-30, 1e-200)]).to(dtype).requires_grad_()
    r = rotations.exp(u)
    leaf = r.detach().requires_grad_()
    back = rotations.log(leaf)
    weight = torch.arange(1.0, 10, dtype=dtype).reshape(3, 3)
    for value, x in (((r * weight).sum(), u), ((back * weight[0]).sum(), leaf), (rotations.angle(leaf).sum(), leaf)):
        gradient = torch.autograd.grad(value, x, retain_graph=True)[0]
        assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) < 100


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.7, 2.5, math.pi - 1e-3])
def test_gradients_are_those_of_finite_differences(angle):
    u, direction, step = tangents(angle, 6), tangents(1.0, 12)[-12:], 1e-6
    r, weight = rotations.exp(u), torch.arange(1.0, 10, dtype=torch.float64).reshape(3, 3)

    def slope(function, x, velocity, weight):
        x = x.clone().requires_grad_()
        return (torch.autograd.grad((function(x) * weight).sum(), x)[0] * velocity).flatten(1).sum(1)

    ends = [rotations.exp(u + sign * step * direction) for sign in (1, -1)]
    finite = ((ends[0] - ends[1]) * weight).sum((1, 2)) / (2 * step)
    torch.testing.assert_close(slope(rotations.exp, u, direction, weight), finite, rtol=0, atol=1e-8)
    ends = [rotations.log(rotations.retract(r, sign * step * direction)) for sign in (1, -1)]
    finite = ((ends[0] - ends[1]) * weight[0]).sum(1) / (2 * step)
    velocity = rotations.compose(r, hat(direction))
    torch.testing.assert_close(slope(rotations.log, r, velocity, weight[0]), finite, rtol=1e-5, atol=1e-7)


def test_quaternions_are_unit_positive_and_a_double_cover():
    q = Noise(2, [0]).draw(0, "q", torch.empty(1, 300, 4, dtype=torch.float64))[0]
    r = rotations.from_quaternion(q)
    unit = q / q.norm(dim=-1, keepdim=True)
    unit = torch.where(unit[:, :1] < 0, -unit, unit)
    torch.testing.assert_close(rotations.to_quaternion(r), unit, rtol=0, atol=1e-14)
    torch.testing.assert_close(rotations.from_quaternion(-3 * q), r, rtol=0, atol=1e-14)
    x, y = (rotations.from_quaternion(part) for part in (q[:150], q[150:]))
    torch.testing.assert_close(rotations.compose(x, y), x @ y, rtol=0, atol=1e-14)


def test_tangents_are_in_the_body_frame():
    """A step about the rotated object's own axis: R Exp(u), not Exp(u) R."""
    origin, u = rotations.exp(tangents(2.0, 50)), tangents(0.8, 50).flip(0)
    there = rotations.retract(origin, u)
    torch.testing.assert_close(there, origin @ torch.linalg.matrix_exp(hat(u)), rtol=0, atol=1e-14)
    torch.testing.assert_close(rotations.tangent(origin, there), u, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotations.relative(origin, there), rotations.exp(u), rtol=0, atol=1e-14)
    turn = rotations.exp(tangents(1.3, 1)[-1])  # a global rotation moves no tangent
    torch.testing.assert_close(rotations.tangent(turn @ origin, turn @ there), u, rtol=0, atol=1e-13)


def test_a_long_walk_in_float32_stays_on_the_group():
    r, u = rotations.exp(tangents(1.0, 10, torch.float32)), tangents(0.3, 10, torch.float32)
    for _ in range(1000):
        r = rotations.retract(r, u)
    rotations.check_rotations(r, tolerance=1e-6)


def test_uniform_draws_are_haar_and_belong_to_items():
    from scipy.stats import kstest

    like, noise = torch.empty(4, 1000, 3, 3, dtype=torch.float64), Noise(5, range(4))
    r = rotations.uniform(like, noise)
    rotations.check_rotations(r, tolerance=1e-14)
    turned = rotations.compose(rotations.exp(tangents(1.0, 1)[-1]), r)  # of any frame the angle has (w - sin w)/pi
    for draws in (r, turned):
        angle = rotations.angle(draws).flatten()
        assert kstest(((angle - angle.sin()) / math.pi).numpy(), "uniform").pvalue > 0.01
        assert kstest(0.5 + 0.5 * draws[..., 2, 0].flatten().numpy(), "uniform").pvalue > 0.01
    assert torch.equal(rotations.uniform(like[2:3], Noise(5, [2])), r[2:3])
    mask = torch.arange(1000) < torch.tensor([[1000], [10], [3], [0]])
    padded = rotations.uniform(like, noise, mask)
    assert torch.equal(padded[~mask], torch.eye(3, dtype=torch.float64).expand(int((~mask).sum()), 3, 3))
    assert padded[1, :10].shape == (10, 3, 3) and not torch.equal(padded[1, 0], padded[1, 11])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda r: r[1, 2].mul_(1.001), r"frames: matrix \[1, 2\] of \(2, 4\) is no rotation, \|R\^T R - I\| = 0.002"),
        (lambda r: r[0, 3, :, 0].neg_(), r"matrix \[0, 3\] .* it reflects: its determinant is -1"),
        (lambda r: r[1, 0, 2, 2].fill_(math.nan), r"matrix \[1, 0\] .* = nan"),
    ],
)
def test_what_is_no_rotation_is_named_with_its_index(fault, message):
    r = rotations.exp(tangents(1.0, 2).reshape(2, 4, 3))
    assert rotations.check_rotations(r) is r
    fault(r)
    with pytest.raises(DataError, match=message):
        rotations.check_rotations(r, "frames")


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(3, 3, dtype=torch.int64)])
def test_other_shapes_and_types_are_refused(wrong):
    with pytest.raises(DataError, match="matrices"):
        rotations.check_rotations(wrong)
