"""Schedules against closed forms in high precision (mpmath) and automatic differentiation."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from polydiff.core.errors import ScheduleError
from polydiff.core.schedules import EDM, SCHEDULES, VE, VP, Cosine, Custom, RectifiedFlow, SubVP

mpmath.mp.dps = 40
_b0, _b1 = mpmath.mpf("0.1"), mpmath.mpf(20)


def _integral(t):
    return _b0 * t + (_b1 - _b0) * t**2 / 2


# alpha(t), sigma(t) written from the papers, independent of the code
CLOSED = {
    "vp": (lambda t: mpmath.exp(-_integral(t) / 2), lambda t: mpmath.sqrt(1 - mpmath.exp(-_integral(t)))),
    "sub_vp": (lambda t: mpmath.exp(-_integral(t) / 2), lambda t: 1 - mpmath.exp(-_integral(t))),
    "ve": (lambda t: mpmath.mpf(1), lambda t: mpmath.mpf(0.01) * (mpmath.mpf(50) / mpmath.mpf(0.01)) ** t),
    "edm": (lambda t: mpmath.mpf(1), lambda t: 80 * t**7),
    "cosine": (lambda t: mpmath.cos(mpmath.pi * t / 2), lambda t: mpmath.sin(mpmath.pi * t / 2)),
    "rectified_flow": (lambda t: 1 - t, lambda t: t),
}
TIMES = [1e-3, 0.01, 0.0371, 0.2, 0.5, 0.73, 0.99, 0.999]


def _close(ours, truth):
    assert abs(float(ours) - float(truth)) <= 1e-10 * abs(float(truth)), (float(ours), float(truth))


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("time", TIMES)
def test_every_function_equals_its_closed_form(name, time):
    schedule, (alpha, sigma) = SCHEDULES[name](), CLOSED[name]
    t, exact = torch.tensor(time, dtype=torch.float64), mpmath.mpf(time)
    log_snr = mpmath.log(alpha(exact) / sigma(exact))
    dalpha, dsigma = mpmath.diff(alpha, exact), mpmath.diff(sigma, exact)
    f = dalpha / alpha(exact)
    _close(schedule.alpha(t), alpha(exact))
    _close(schedule.sigma(t), sigma(exact))
    _close(schedule.dalpha(t), dalpha)
    _close(schedule.dsigma(t), dsigma)
    _close(schedule.f(t), f)
    _close(schedule.g2(t), 2 * sigma(exact) * dsigma - 2 * f * sigma(exact) ** 2)
    _close(schedule.dlog_snr(t), f - dsigma / sigma(exact))
    assert abs(float(schedule.log_snr(t) - float(log_snr))) <= 1e-10 * max(1.0, abs(float(log_snr)))
    _close(schedule.t_of_log_snr(torch.tensor(float(log_snr), dtype=torch.float64)), exact)


def test_only_the_discrete_chain_has_no_closed_form():
    """Its own tests are in test_discrete.py."""
    assert set(SCHEDULES) - set(CLOSED) == {"discrete"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives_equal_autograd_and_shapes_are_kept(name):
    schedule = SCHEDULES[name]()
    t = torch.linspace(0.01, 0.99, 30, dtype=torch.float64).reshape(2, 3, 5).requires_grad_(True)
    for function, derivative in ((schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)):
        value = function(t)
        gradient = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t.detach()), gradient, rtol=1e-10, atol=1e-14)
        assert value.shape == t.shape and value.dtype == torch.float64


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_may_be_infinite_but_never_nan(name):
    schedule = SCHEDULES[name]()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for function in (schedule.alpha, schedule.sigma, schedule.dalpha, schedule.dsigma, schedule.log_snr):
        assert not torch.isnan(function(ends)).any(), function
    assert not torch.isnan(schedule.f(ends)).any() and not torch.isnan(schedule.g2(ends)).any()
    assert float(schedule.log_snr(ends)[0]) == (pytest.approx(-math.log(0.01)) if name == "ve" else math.inf)
    if name != "ve":
        assert float(schedule.t_of_log_snr(torch.tensor(math.inf, dtype=torch.float64))) == 0.0
    if name in ("cosine", "rectified_flow"):
        assert float(schedule.alpha(ends)[1]) == 0.0 and float(schedule.log_snr(ends)[1]) == -math.inf
        assert float(schedule.t_of_log_snr(torch.tensor(-math.inf, dtype=torch.float64))) == 1.0


def test_ranges_are_those_of_the_design():
    assert [(s.t_min, s.t_max) for s in (VP(), SubVP(), Cosine(), RectifiedFlow(), VE())] == [
        (1e-3, 1.0),
        (1e-3, 1.0),
        (1e-3, 0.999),
        (1e-3, 0.999),
        (0.0, 1.0),
    ]
    assert EDM().t_min == pytest.approx((0.002 / 80) ** (1 / 7), rel=1e-15) and EDM().t_max == 1.0
    assert float(EDM().sigma(EDM().t_min)) == pytest.approx(0.002, rel=1e-12)


def test_custom_schedule_reproduces_the_cosine_one():
    custom = Custom(lambda t: torch.cos(math.pi * t / 2), lambda t: torch.sin(math.pi * t / 2))
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    for name in ("alpha", "sigma", "dalpha", "dsigma", "log_snr", "f", "g2"):
        torch.testing.assert_close(getattr(custom, name)(t), getattr(Cosine(), name)(t), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(custom.t_of_log_snr(custom.log_snr(t)), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VP(beta_min=-1),
        lambda: VP(beta_min=2, beta_max=1),
        lambda: VE(sigma_min=1, sigma_max=0.5),
        lambda: EDM(rho=0),
        lambda: EDM(sigma_max=math.inf),
        lambda: Custom(lambda t: t, lambda t: 1 - t),
    ],
)
def test_impossible_parameters_are_refused(make):
    with pytest.raises(ScheduleError):
        make()
