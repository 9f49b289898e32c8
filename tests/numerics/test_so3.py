"""Processes on SO(3): marginals, conversions, masks, and what they refuse."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from polydiff.core import rotations
from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, DataError, ScheduleError
from polydiff.core.noise import Noise
from polydiff.core.processes import SO3Flow, SO3Process
from polydiff.core.processes.igso3 import igso3_cdf
from polydiff.core.processes.so3 import igso3_log_density, igso3_score
from polydiff.core.rotation_schedules import Exponential, LogLinear
from polydiff.core.sampling import sample
from polydiff.core.schedules import EDM, VE, VP, as_time
from tests.numerics.exact_rotations import F64, kolmogorov, normal, rotation

PROCESS, FLOW = SO3Process(VE(0.02, 2.5)), SO3Flow(10.0)
BOTH = pytest.mark.parametrize("process", [PROCESS, FLOW, SO3Process(LogLinear()), SO3Flow()], ids=repr)


def angle_between(first, second):
    return rotations.angle(rotations.relative(first, second))


@BOTH
@pytest.mark.parametrize("field", ["score", "velocity", "x0"])
def test_conversions_against_a_derivation_of_their_own(process, field):
    """The velocity of one point's path is that of its states at fixed noise; the score is the density's gradient."""
    x0, t, z = rotation(4, 2, seed=1), 0.3, normal(4, 2, 3, seed=2)
    x_t = process.perturb(x0, t, z)
    prediction = Prediction(process, x_t, as_time(t), x0=x0)
    sigma = float(process.schedule.sigma(as_time(t)))
    if field == "x0":
        back = prediction.replace(prediction.velocity, "velocity")
        bound = 1e-13 if isinstance(process, SO3Flow) else 0.3 * sigma**2 * math.pi
        assert float(angle_between(back.x0, x0).max()) < bound
        torch.testing.assert_close(back.field("velocity"), prediction.velocity)
    elif field == "velocity":
        ends = [process.perturb(x0, t + step, z) for step in (-1e-5, 1e-5)]
        slope = (process.tangent(x_t, ends[1]) - process.tangent(x_t, ends[0])) / 2e-5
        torch.testing.assert_close(process.rate(x_t, as_time(t), prediction), slope, rtol=1e-6, atol=1e-7)
    elif isinstance(process, SO3Process):
        log = lambda u: igso3_log_density(angle_between(x0, process.retract(x_t, u)), sigma)
        slope = torch.stack([(log(u) - log(-u)) / 2e-5 for u in 1e-5 * torch.eye(3, dtype=F64)], -1)
        torch.testing.assert_close(prediction.score, slope, rtol=1e-5, atol=1e-5)
        again = Prediction(process, x_t, as_time(t), score=prediction.score)
        torch.testing.assert_close(again.velocity, prediction.velocity)
        # Tweedie: as near as sigma^2 / 12 of the way while sigma is small
        omega = process.tangent(x0, x_t)
        near = angle_between(again.x0, x0) <= (sigma**2 / 10 + 1e-9) * omega.norm(dim=-1)
        assert sigma > 0.2 or bool(near.all())
    else:
        with pytest.raises(ConfigError, match="SO3Flow has no score"):
            _ = prediction.score


def test_the_velocity_of_brownian_motion_carries_the_angles_of_a_point():
    """Angles at equal probability move with the velocity: a check of its sign and factor without the code's own."""
    t, step, x0 = 0.6, 1e-5, rotation(5, 1)
    z = normal(5, 1, 3)
    x_t = PROCESS.perturb(x0, t, z)  # perturb sends equal z to equal probability
    moved = [PROCESS.perturb(x0, t + d, z) for d in (-step, step)]
    slope = PROCESS.tangent(*moved) / (2 * step)
    torch.testing.assert_close(Prediction(PROCESS, x_t, as_time(t), x0=x0).velocity, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_perturbed_angles_follow_igso3(t):
    x0 = rotation(4000, 1)
    x_t = PROCESS.perturb(x0, torch.full((4000,), t, dtype=F64), normal(4000, 1, 3, seed=5))
    sigma = float(PROCESS.schedule.sigma(as_time(t)))
    assert kolmogorov(igso3_cdf(angle_between(x0, x_t), sigma)) < 1.63 / math.sqrt(4000)


def test_renoised_states_are_as_if_noised_at_once():
    x0 = rotation(4000, 1)
    x_s = PROCESS.perturb(x0, 0.7, normal(4000, 1, 3, seed=5))
    x_t = PROCESS.renoise(x_s, 0.7, as_time(0.85), normal(4000, 1, 3, seed=6))
    sigma = float(PROCESS.schedule.sigma(as_time(0.85)))
    assert kolmogorov(igso3_cdf(angle_between(x0, x_t), sigma)) < 1.63 / math.sqrt(4000)
    assert kolmogorov(igso3_cdf(angle_between(x0, x_s), sigma)) > 0.1
    assert torch.equal(PROCESS.renoise(x_s, 0.7, 0.7, normal(4000, 1, 3)), x_s)
    with pytest.raises(ScheduleError, match="before s"):
        PROCESS.renoise(x_s, 0.7, 0.6, normal(4000, 1, 3))
    with pytest.raises(ConfigError, match="geodesic flow"):
        FLOW.renoise(x_s, 0.7, 0.8, normal(4000, 1, 3))


def test_a_flow_starts_uniform_and_goes_straight():
    x0 = rotation(4000, 1)
    z = normal(4000, 1, 3, seed=3)
    one, half = FLOW.perturb(x0, 1.0, z), FLOW.perturb(x0, 0.9, z)
    angle = angle_between(x0, one)
    assert kolmogorov((angle - torch.sin(angle)) / math.pi) < 1.63 / math.sqrt(4000)
    share = math.expm1(9.0) / math.expm1(10.0)
    torch.testing.assert_close(FLOW.tangent(x0, half), share * FLOW.tangent(x0, one), rtol=1e-9, atol=1e-9)


@BOTH
def test_masks_and_fixed_elements(process):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    fixed = torch.tensor([[True, False, False], [False, False, False]])
    x0, z = rotation(2, 3), normal(2, 3, 3)
    eye = torch.eye(3, dtype=F64)
    x0[~mask] = eye
    x_t = process.perturb(x0, torch.tensor([0.4, 0.9], dtype=F64), z, mask, fixed)
    moved = mask & ~fixed
    assert torch.equal(x_t[~mask], x0[~mask]) and torch.equal(x_t[fixed], x0[fixed])
    assert float(angle_between(x_t, x0)[moved].min()) > 1e-4
    assert torch.equal(process.project(z, mask, fixed) != 0, moved[..., None].expand(2, 3, 3))
    held = process.project(rotation(2, 3, seed=9), mask)
    assert torch.equal(held[~mask], x0[~mask]) and torch.equal(held[mask], rotation(2, 3, seed=9)[mask])
    prior = process.prior(torch.empty(2, 3, 3, 3, dtype=F64), Noise(0, [0, 1]), mask)
    assert torch.equal(prior[~mask], x0[~mask]) and process.log_prior(prior, mask).tolist() == [0.0, 0.0]
    rotations.check_rotations(prior)
    values = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]])
    assert process.mean(values, mask).tolist() == [2.0, 5.0] and process.mean(values, mask, fixed).tolist() == [
        3.0,
        5.0,
    ]
    for wrong in (mask[:, :2], mask.double(), mask[:1], torch.ones(2, 3, 3, dtype=torch.bool)):
        with pytest.raises(ConfigError, match="mask is a tensor"):
            process.perturb(x0, 0.5, z, wrong)


@pytest.mark.parametrize("rate", [0.0, 0.5, 10.0])
def test_the_exponential_schedule_equals_its_closed_form(rate):
    ours = Exponential(rate)
    for time in (0.0, 1e-3, 0.4, 0.999, 1.0):
        t = as_time(time)
        with mpmath.workdps(40):
            r, exact = mpmath.mpf(rate), mpmath.mpf(time)
            sigma = lambda t, r=r: mpmath.expm1(r * t) / mpmath.expm1(r) if rate else t
            value, slope = sigma(exact), mpmath.diff(sigma, exact)
            expected = [1 - value, value, -slope, slope]
        for name, truth in zip(("alpha", "sigma", "dalpha", "dsigma"), expected, strict=True):
            assert float(getattr(ours, name)(t)) == pytest.approx(float(truth), rel=1e-13, abs=1e-300), name
        if 0 < time < 1:
            assert float(ours.t_of_log_snr(ours.log_snr(t))) == pytest.approx(time, rel=1e-11)
    assert float(ours.sigma(as_time(ours.t_max))) == pytest.approx(0.999, rel=1e-12)
    published = torch.exp(-10 * (1 - torch.linspace(0, 1, 9, dtype=F64)))
    assert float((Exponential(10.0).sigma(torch.linspace(0, 1, 9, dtype=F64)) - published).abs().max()) < 4.6e-5


def test_rates_and_schedules_that_have_no_meaning_are_refused():
    for rate in (-1.0, math.nan, "linear", 1000.0):
        with pytest.raises(ScheduleError, match="rate ="):
            SO3Flow(rate)
    with pytest.raises(ConfigError, match="VP has alpha below 1"):
        SO3Process(VP())
    with pytest.raises(ConfigError, match="must be a Schedule"):
        SO3Process("ve")
    with pytest.raises(ScheduleError, match="sigma_min"):
        SO3Process(VE(0.0, 2.5))
    x = rotation(1, 2)
    with pytest.raises(ScheduleError, match="sigma must be positive"):
        _ = Prediction(SO3Process(EDM(0.02, 2.5)), x, as_time(0.0), x0=x).score
    with pytest.raises(ScheduleError, match="arrived"):
        _ = Prediction(FLOW, x, as_time(0.0), x0=x).velocity
    assert float(igso3_score(1.0, 0.5)) < 0


@pytest.mark.parametrize("name", ["eps", "v"])
def test_flat_fields_are_refused(name):
    x = rotation(1, 2)
    prediction = Prediction(PROCESS, x, as_time(0.5), x0=x)
    with pytest.raises(ConfigError, match=f"SO3Process has no {name}: its fields are x0, score, velocity"):
        getattr(prediction, name)
    with pytest.raises(ConfigError, match=f"has no {name}"):
        _ = Prediction(PROCESS, x, as_time(0.5), **{name: x[..., 0]}).x0


def test_what_is_no_rotation_is_refused_with_its_index_and_error():
    x, good = rotation(2, 3), lambda x_t, t: x_t
    bad = x.clone()
    bad[1, 2] *= 1.1
    with pytest.raises(DataError, match=r"the state: matrix \[1, 2\] of \(2, 3\) is no rotation, .* = 0.21"):
        sample(good, PROCESS, bad, "geodesic", 3)
    bad = x.clone()
    bad[0, 1, 0] *= -1
    with pytest.raises(DataError, match=r"x0_hat of the denoiser at step 1 of 3.*matrix \[0, 1\].*reflects"):
        sample(lambda x_t, t: bad, PROCESS, x, "geodesic", 3)
    for state in (x[0], x[..., :2], x.flatten(2)):
        with pytest.raises(ConfigError, match=r"the state must be rotations \(b, n, 3, 3\)"):
            sample(good, PROCESS, state, "geodesic", 3)
    with pytest.raises(ConfigError, match="needs a Gaussian process, not SO3Process"):
        sample(good, PROCESS, x, "heun", 3)
