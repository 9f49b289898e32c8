"""Schedules of rotations against the published formulas in high precision."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from polydiff.core.errors import ScheduleError
from polydiff.core.rotation_schedules import LogLinear, Quadratic

PUBLISHED = {
    LogLinear: lambda t: mpmath.log(t * mpmath.exp(mpmath.mpf("1.5")) + (1 - t) * mpmath.exp(mpmath.mpf("0.1"))),
    Quadratic: lambda t: mpmath.mpf("0.02") + mpmath.mpf("1.5") * t + t**2 / 2,
}


@pytest.mark.parametrize("schedule", PUBLISHED)
@pytest.mark.parametrize("time", [0.0, 1e-3, 0.2, 0.5, 0.73, 1.0])
def test_every_function_equals_its_closed_form(schedule, time):
    sigma, ours, t = PUBLISHED[schedule], schedule(), torch.tensor(time, dtype=torch.float64)
    with mpmath.workdps(40):
        exact = mpmath.mpf(time)
        value, slope = sigma(exact), mpmath.diff(sigma, exact)
        expected = [1, value, 0, slope, -mpmath.log(value), 0, 2 * value * slope, -slope / value]
    names = ("alpha", "sigma", "dalpha", "dsigma", "log_snr", "f", "g2", "dlog_snr")
    for name, truth in zip(names, expected, strict=True):
        assert float(getattr(ours, name)(t)) == pytest.approx(float(truth), rel=1e-13, abs=1e-15), name
    assert float(ours.t_of_log_snr(ours.log_snr(t))) == pytest.approx(time, abs=1e-15, rel=1e-13)
    assert (ours.t_min, ours.t_max) == (0.0, 1.0)


@pytest.mark.parametrize("schedule", [LogLinear(0.02, 2.5), Quadratic(0.02, 2.5, 0.6)])
def test_other_parameters_reach_their_ends_and_keep_shapes(schedule):
    t = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    sigma = schedule.sigma(t)
    assert sigma[0, 0].item() == pytest.approx(0.02) and sigma[-1, -1].item() == pytest.approx(2.5)
    torch.testing.assert_close(schedule.dsigma(t).detach(), torch.autograd.grad(sigma.sum(), t)[0])
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogLinear(sigma_min=0),
        lambda: LogLinear(sigma_max=0.05),
        lambda: LogLinear(sigma_max=math.inf),
        lambda: Quadratic(sigma_min=3),
        lambda: Quadratic(bend=0),
        lambda: Quadratic(bend=1.0),
    ],
)
def test_impossible_parameters_are_refused(make):
    with pytest.raises(ScheduleError):
        make()
