"""Euler-Maruyama: its steps against the SDE written out, its bias, its ends, and a process that is not Gaussian."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.noise import Noise
from polydiff.core.processes import gaussian
from polydiff.core.processes.base import Process
from polydiff.core.sampling import sample
from polydiff.core.schedules import EDM, SCHEDULES, as_time
from polydiff.core.solvers import EulerMaruyama, Geodesic, PredictorCorrector, Resample
from polydiff.core.solvers.multistep import Multistep
from tests.numerics.affine import moments, start
from tests.numerics.exact import Gaussian, Mixture, as_field

F64 = torch.float64
PATHS = ["vp", "ve", "edm", "rectified_flow"]


@pytest.mark.parametrize("field", ["x0", "velocity", "score"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("level", [0.0, 0.6, 1.0, 1.7])
def test_a_step_is_that_of_the_reverse_sde(schedule, level, field):
    """dx = [f x - (1 + level^2) g2 score / 2] dt + level g dw: Song 2021, eq. 6 and 13, in f and g2 instead of u."""
    data = Mixture(gaussian(schedule))
    s, noise = data.process.schedule, Noise(3, range(4))
    t, end = as_time(0.6), 0.55
    x = data.draw(0.6, 4)
    score = (s.alpha(t) * data.x0_hat(x, t) - x) / s.sigma(t) ** 2
    z = noise.draw(0, "step", x)
    drift = s.f(t) * x - 0.5 * (1 + level**2) * s.g2(t) * score
    expected = x + (end - 0.6) * drift + level * torch.sqrt(s.g2(t) * (0.6 - end)) * z
    out = sample(as_field(data, field), data.process, x, EulerMaruyama(level), grid=[0.6, end], generator=noise)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("schedule", PATHS)
def test_the_bias_of_the_marginal_falls_with_the_step(schedule, level):
    """Weak order 1, from the exact recursion of mean and variance; on VE and EDM order 2 at level 1."""
    data = Gaussian(gaussian(schedule))
    errors = []
    for n in (100, 200, 400):
        grid = make_grid(
            "log_snr", n, data.process, *{"ve": (0.9, 0.3), "edm": (0.8, 0.3)}.get(schedule, (0.9, 0.1)), False
        )
        found = moments(EulerMaruyama(level), data, grid, *start(data, grid.times[0]))
        wanted = start(data, grid.times[-1])
        errors.append(max(float(((a - b) / wanted[1].sqrt()).abs().max()) for a, b in zip(found, wanted, strict=True)))
    assert errors[-1] < 0.03
    for coarse, fine in itertools.pairwise(errors):
        assert 1.7 < coarse / fine < 4.5


def test_the_marginal_of_a_mixture_is_kept_from_the_ode_to_beyond_the_reverse_sde():
    data = Mixture(gaussian("rectified_flow"))
    grid, n = make_grid("log_snr", 200, data.process, 0.99, 0.2, final=False), 4000
    x, exact = data.draw(0.99, n)[None], data.draw(0.2, 200_000, seed=5)

    def denoise(x_t, t):  # one item of many points, and only the velocity that a flow would learn
        return Prediction(data.process, x_t, t, velocity=as_field(data, "velocity")(x_t[0], t).value[None])

    for level in (1.0, lambda log_snr: 1.5 if log_snr < 0 else 0.5):
        out = sample(denoise, data.process, x, EulerMaruyama(level), grid=grid, generator=1)[0]
        error = (out.mean(0) - exact.mean(0)).abs() / (exact.std(0) / math.sqrt(n))
        spread = out.var(0) / exact.var(0) - 1
        assert float(error.max()) < 4.2 and float(spread.abs().max()) < 4.2 * math.sqrt(2 / n) + 0.02


@pytest.mark.parametrize("schedule", PATHS)
def test_multistep_noise_of_any_level_keeps_the_marginal_to_second_order(schedule):
    """No draws: the exact variance of Gaussian data, for levels between and beyond the ODE and the reverse SDE."""
    data = Gaussian(gaussian(schedule))
    end = float(data.process.schedule.t_of_log_snr(as_time(2.0)))
    for solver in (
        Multistep(2, eta=lambda log_snr: 0.5 + 0.5 * math.tanh(log_snr)),
        Multistep(2, eta=1.3, rule="midpoint"),
        Multistep(3, eta=0.7, corrector="exact"),
    ):
        wrong = []
        for n in (60, 120):
            grid = make_grid("log_snr", n, data.process, t_end=end, final=False)
            found = moments(solver, data, grid, *start(data, grid.times[0]))
            wanted = start(data, grid.times[-1])
            wrong.append(float((found[1] / wanted[1] - 1).abs().max()))
        assert wrong[1] < 3e-3 and wrong[0] / wrong[1] > 3.4


def test_a_level_of_multistep_noise_is_that_of_the_middle_of_its_interval():
    data, noise = Mixture(gaussian("vp")), Noise(1, range(3))
    grid, x = (0.7, 0.3), data.draw(0.7, 3)
    middle = float(data.process.schedule.log_snr(as_time(grid)).mean())
    of = lambda log_snr: 0.6 + 0.1 * log_snr
    ours, plain = (
        sample(data.x0_hat, data.process, x, Multistep(1, eta=eta), grid=grid, generator=noise)
        for eta in (of, of(middle))
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_level_may_depend_on_the_noise_level():
    """A function of the log-SNR is taken at the start of each interval."""
    process = gaussian("vp")
    grid = make_grid("uniform", 5, process, final=False)
    middle = float(process.schedule.log_snr(as_time(grid.times[2])))
    steps = EulerMaruyama(lambda log_snr: 0.7 if log_snr >= middle else 0.0).plan(process, grid).steps
    assert [step.noise > 0 for step in steps] == [False, False, True, True, True]
    assert steps[2:] == EulerMaruyama(0.7).plan(process, grid).steps[2:]


@pytest.mark.parametrize("schedule", ["cosine", "rectified_flow"])
@pytest.mark.parametrize("level", [0.0, 1.0, 2.0])
def test_infinite_diffusion_is_stepped_over_in_x0_hat(schedule, level):
    """At t = 1 g2 is infinite and x holds no data: x_s = alpha_s x0_hat + sigma_s x. The last interval returns x0_hat."""
    data = Mixture(gaussian(schedule))
    s, t = data.process.schedule, as_time(1.0)
    x = data.draw(1.0, 4)
    out = sample(as_field(data, "velocity"), data.process, x, EulerMaruyama(level), grid=[1.0, 0.7], generator=0)
    expected = s.alpha(as_time(0.7)) * data.x0_hat(x, t) + s.sigma(as_time(0.7)) * x
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    final = sample(data.x0_hat, data.process, x, EulerMaruyama(level), grid=Grid((0.3,), final=True), generator=0)
    torch.testing.assert_close(final, data.x0_hat(x, as_time(0.3)), rtol=1e-12, atol=1e-12)


class Circle(Process):
    """Diffusion of an angle, of data at angle 1: the marginal at t is the wrapped normal of deviation sigma(t)."""

    kind = "circle"
    schedule = EDM(sigma_max=3.0)

    def retract(self, x, u):
        return torch.remainder(x + u, 2 * math.pi)

    def project(self, z, mask=None, fixed=None):
        return z

    def denoise(self, x_t, t):
        offset = x_t[..., None] - 1 + 2 * math.pi * torch.arange(-6, 7, dtype=F64)
        weight = torch.softmax(-0.5 * (offset / self.schedule.sigma(t)) ** 2, -1)
        return Prediction(self, x_t, t, score=-(weight * offset).sum(-1) / self.schedule.sigma(t) ** 2)


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5])
def test_it_follows_a_process_that_is_not_gaussian(level):
    """Through the score and retract alone: cos and sin of the angle have the moments exp(-sigma^2 / 2) and 0."""
    process = Circle()
    x = torch.remainder(
        1 + 3.0 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0), dtype=F64), 2 * math.pi
    )
    end = (0.7 / 3.0) ** (1 / 7)
    out = sample(
        process.denoise,
        process,
        x,
        Geodesic(1, level),
        grid=make_grid("log_snr", 150, process, 1.0, end, False),
        generator=2,
    )
    assert bool((out >= 0).all() and (out < 2 * math.pi).all())
    assert float(torch.cos(out - 1).mean()) == pytest.approx(math.exp(-0.5 * 0.7**2), abs=0.015)
    assert abs(float(torch.sin(out - 1).mean())) < 4.2 * 0.6 / math.sqrt(4000)
    for solver in (EulerMaruyama(), PredictorCorrector(EulerMaruyama(), snr=0.1), Multistep(1), Resample(Multistep(1))):
        with pytest.raises(ConfigError, match="Gaussian"):
            solver.plan(process, make_grid("log_snr", 5, process))


@pytest.mark.parametrize("level", [-0.1, math.nan, math.inf, None, "a"])
def test_bad_levels_are_refused(level):
    with pytest.raises(ConfigError, match="level = "):
        EulerMaruyama(level)
    with pytest.raises(ConfigError, match=r"level at log-SNR .* = "):
        EulerMaruyama(lambda _: level).plan(gaussian("vp"), Grid((0.5, 0.4)))


def test_a_level_is_a_function_of_one_number():
    with pytest.raises(ConfigError, match="a function of the log-SNR alone"):
        EulerMaruyama(lambda: 1.0).plan(gaussian("vp"), Grid((0.5, 0.4)))
