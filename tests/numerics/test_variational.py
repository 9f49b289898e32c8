"""The learned reverse variance: the published discrete chain, closed forms of Gaussian data, and the loss that trains it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import erf, log_ndtr
from torch.distributions import Normal, kl_divergence

from polydiff.core.denoiser import Prediction
from polydiff.core.grids import make_grid
from polydiff.core.objectives import Objective
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import sample
from polydiff.core.schedules import SCHEDULES, Custom
from polydiff.core.solvers import NAMES
from polydiff.core.variational import (
    VariationalBound,
    _log_normal_cdf,
    log_bin_probability,
    log_posterior_variance,
    log_range,
)
from tests.numerics.exact import Gaussian

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Discrete:
    """Ho 2020: 1000 values of beta from 1e-4 to 0.02; index k stands at t = (k + 1)/1000 of a continuous path."""

    def __init__(self) -> None:
        self.beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
        self.bar = torch.cumprod(1 - self.beta, 0)
        self.bar_before = torch.cat([torch.ones(1, dtype=F64), self.bar[:-1]])
        self.variance = self.beta * (1 - self.bar_before) / (1 - self.bar)  # eq. 7
        log_bar = torch.cat([torch.zeros(1, dtype=F64), self.bar.log()])

        def bar_of(t: torch.Tensor) -> torch.Tensor:
            place = (t.detach() * 1000).floor().long().clamp(0, 999)
            return torch.exp(torch.lerp(log_bar[place], log_bar[place + 1], t * 1000 - place))

        schedule = Custom(lambda t: bar_of(t).sqrt(), lambda t: (1 - bar_of(t)).sqrt(), 1e-3, 1.0)
        self.process = GaussianProcess(schedule)


@pytest.fixture(scope="module")
def discrete() -> Discrete:
    return Discrete()


def best_fraction(process: GaussianProcess, t: torch.Tensor, s: torch.Tensor, std: float) -> torch.Tensor:
    """v for the exact reverse variance of data N(m, std^2), from the Gaussian conditional, not from the module's formula."""
    a_t, a_s, v_t, v_s = (
        f(u) for f, u in zip(2 * [process.schedule.alpha] + 2 * [process.schedule.sigma], [t, s, t, s], strict=True)
    )
    v_t, v_s = v_t**2 + (a_t * std) ** 2, v_s**2 + (a_s * std) ** 2  # of x_t and x_s
    ratio = a_t / a_s
    step = process.schedule.sigma(t) ** 2 - (ratio * process.schedule.sigma(s)) ** 2
    log_variance = torch.log(v_s * step / v_t)
    low = log_posterior_variance(process.schedule, t, s)
    return (log_variance - low) / log_range(process.schedule.log_snr(t), process.schedule.log_snr(s))


def test_the_two_choices_are_those_of_the_discrete_chain(discrete: Discrete) -> None:
    t = torch.arange(2, 1001, dtype=F64) / 1000
    schedule = discrete.process.schedule
    low = log_posterior_variance(schedule, t, t - 1e-3)
    high = low + log_range(schedule.log_snr(t), schedule.log_snr(t - 1e-3))
    torch.testing.assert_close(low.exp(), discrete.variance[1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(high.exp(), discrete.beta[1:], rtol=1e-10, atol=0)


def test_the_solver_steps_along_the_posterior_of_the_discrete_chain(discrete: Discrete) -> None:
    """Ho 2020, eq. 7: mean and variance; the last interval returns x0_hat."""
    plan = NAMES["ddpm-learned"].solver.plan(discrete.process, make_grid("uniform", 1000, discrete.process))
    steps = plan.steps[::-1]
    x_t, x0, noise, high = (
        torch.tensor(column, dtype=F64)
        for column in zip(
            *((step.scale, step.weights[0], step.noise, step.noise**2 * math.exp(step.spread)) for step in steps),
            strict=True,
        )
    )
    of_x0 = discrete.bar_before.sqrt() * discrete.beta / (1 - discrete.bar)
    of_x_t = (1 - discrete.beta).sqrt() * (1 - discrete.bar_before) / (1 - discrete.bar)
    torch.testing.assert_close(x0, of_x0, rtol=1e-10, atol=0)
    torch.testing.assert_close(x_t, of_x_t, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(noise[1:] ** 2, discrete.variance[1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(high[1:], discrete.beta[1:], rtol=1e-10, atol=0)
    assert [float(column[0]) for column in (x_t, x0, noise)] == [0, 1, 0]


def test_each_step_is_the_divergence_of_two_gaussians(discrete: Discrete) -> None:
    """Against torch.distributions, with the discrete posterior and log-variances interpolated as in Nichol 2021, eq. 15."""
    k = torch.tensor([1, 2, 50, 500, 999])
    bound = VariationalBound(discrete.process)
    x0, x0_hat, z, v = (torch.randn(5, 7, generator=generator(i), dtype=F64) for i in range(4))
    t = (k + 1).to(F64) / 1000
    x_t = discrete.process.perturb(x0, t, z)
    column = k[:, None]
    low, high = discrete.variance[column].log(), discrete.beta[column].log()
    scale = discrete.bar_before[column].sqrt() * discrete.beta[column] / (1 - discrete.bar[column])
    rest = (1 - discrete.beta[column]).sqrt() * (1 - discrete.bar_before[column]) / (1 - discrete.bar[column]) * x_t
    truth = Normal(scale * x0 + rest, (0.5 * low).exp())
    model = Normal(scale * x0_hat + rest, (0.5 * (v * high + (1 - v) * low)).exp())
    prediction = Prediction(discrete.process, x_t, t, x0=x0_hat, fraction=v)
    torch.testing.assert_close(bound.nats(prediction, x0), kl_divergence(truth, model), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        bound(prediction, x0), kl_divergence(truth, model) * 1000 / math.log(2), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("bins", [None, 256])
def test_the_last_step_is_the_likelihood_of_the_data(discrete: Discrete, bins: int | None) -> None:
    """beta_tilde of the second step stands in for that of the first, as in the published program."""
    bound = VariationalBound(discrete.process, bins=bins)
    x0 = (torch.randint(256, (3, 9), generator=generator(), dtype=F64) / 127.5) - 1
    x0_hat = x0 + 0.01 * torch.randn(3, 9, generator=generator(1), dtype=F64)
    v = torch.rand(3, 9, generator=generator(2), dtype=F64)
    log_variance = v * discrete.beta[0].log() + (1 - v) * discrete.variance[1].log()
    t = torch.full((3,), 1e-3, dtype=F64)
    ours = bound.nats(Prediction(discrete.process, x0, t, x0=x0_hat, fraction=v), x0)
    if bins is None:
        reference = -Normal(x0_hat, (0.5 * log_variance).exp()).log_prob(x0)
    else:
        reference = -log_bin_probability(x0, x0_hat, log_variance, 256)
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


def test_bins_have_the_probabilities_of_the_error_function_and_sum_to_one() -> None:
    x0 = torch.arange(256, dtype=F64)[:, None] / 127.5 - 1
    mean = torch.tensor([-1.3, -0.999, -0.2, 0.004, 0.77, 1.0, 1.1], dtype=F64).expand(256, 7)
    log_variance = torch.tensor([-9.0, -12.0, -3.0, -8.0, 0.0, -11.0, -5.0], dtype=F64).expand(256, 7)
    ours = log_bin_probability(x0.expand(256, 7), mean, log_variance, 256)
    edge = lambda offset: torch.from_numpy(erf(((x0 + offset - mean) / (0.5 * log_variance).exp() / 2**0.5).numpy()))
    upper, lower = edge(1 / 255), edge(-1 / 255)
    upper[-1], lower[0] = 1, -1
    torch.testing.assert_close(ours.exp(), 0.5 * (upper - lower), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(ours.exp().sum(0), torch.ones(7, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", [0.3, 1.0, 150.0, 1e3, 1e5])
def test_bins_far_away_keep_their_log_probability_and_slope_in_float32(distance: float) -> None:
    """Far in either tail it is log density at the near edge - log z; a difference of error functions would be log 0."""
    log_variance = torch.full((3,), -9.0, requires_grad=True)
    x0 = torch.tensor([0.6, -0.6, 1.0])
    out = log_bin_probability(x0, x0 - distance * torch.tensor([1.0, -1.0, 1.0]), log_variance, 256)
    z = (distance - 1 / 255) * math.exp(4.5)
    tail = -0.5 * z**2 - math.log(z * (2 * math.pi) ** 0.5)
    torch.testing.assert_close(out, torch.tensor([tail, tail, tail]), rtol=2e-4, atol=0)
    out.sum().backward()
    torch.testing.assert_close(log_variance.grad, torch.full((3,), 0.5 * z**2), rtol=1e-2, atol=0)


def test_the_log_normal_distribution_function_and_its_slope_are_smooth_where_its_two_forms_meet() -> None:
    z = torch.linspace(-24, -16, 81, dtype=F64, requires_grad=True)
    ours = _log_normal_cdf(z)
    ours.sum().backward()
    torch.testing.assert_close(ours.detach(), torch.from_numpy(log_ndtr(z.detach().numpy())), rtol=0, atol=2e-8)
    slope = torch.exp(-0.5 * z.detach() ** 2 - 0.5 * math.log(2 * math.pi) - ours.detach())
    torch.testing.assert_close(z.grad, slope, rtol=1e-7, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("std", [0.3, 1.0, 1.6])
def test_the_bound_is_least_at_the_exact_reverse_variance_of_gaussian_data(schedule: str, std: float) -> None:
    """Free v's, one for each time, found by LBFGS through the objective's own term."""
    process = gaussian(schedule)
    bound = VariationalBound(process, steps=20)
    data = Gaussian(process, std=(std,), mean=(0.4,))
    n, places = 64, torch.arange(1, 20, dtype=F64)
    t_of = lambda place: process.t_min + place / 19 * (process.t_max - process.t_min)
    t = t_of(places)
    # x0 and z with exactly their moments: the expected squared error is then exact too
    raw = torch.randn(n, 2, generator=generator(), dtype=F64)
    raw = torch.linalg.qr(raw - raw.mean(0)).Q * n**0.5
    x0, z = (0.4 + std * raw[:, :1]).repeat(19, 1), raw[:, 1:].repeat(19, 1)
    times = t.repeat_interleave(n)
    x_t = process.perturb(x0, times, z)
    x0_hat = torch.cat([data.x0_hat(part, u) for part, u in zip(x_t.split(n), t, strict=True)])
    span = log_range(process.schedule.log_snr(t), process.schedule.log_snr(t_of(places - 1)))
    w = torch.zeros(19, dtype=F64, requires_grad=True)  # v times its range, which is equally curved at every time
    search = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        search.zero_grad()
        prediction = Prediction(process, x_t, times, x0=x0_hat, fraction=(w / span).repeat_interleave(n)[:, None])
        value = bound.nats(prediction, x0).view(19, n).mean(1).sum()
        value.backward()
        return value

    search.step(loss)
    truth = best_fraction(process, t, t_of(places - 1), std)
    usable = span > 1e-3  # elsewhere both choices agree and v does nothing
    assert usable.sum() >= 5
    torch.testing.assert_close((w.detach() / span)[usable], truth[usable], rtol=1e-3, atol=1e-3)
    if std == 1:
        torch.testing.assert_close(truth[usable], torch.ones_like(truth[usable]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", ["vp", "cosine", "edm", "rectified_flow"])
def test_the_exact_variance_samples_gaussian_data_exactly_in_few_steps(schedule: str) -> None:
    """What the feature is for: with 6 steps the marginal variance is right, with either fixed choice it is not."""
    process, std = gaussian(schedule), 0.4
    data = Gaussian(process, std=(std,), mean=(0.3,))
    grid = make_grid("log_snr", 6, process, min(process.t_max, 0.95), final=False)
    times = torch.tensor(grid.times, dtype=F64)
    exact = dict(zip(grid.times, best_fraction(process, times[:-1], times[1:], std).tolist(), strict=False))
    x = data.draw(grid.times[0], 40_000).T  # one item of many elements: one stream of noise

    def variance(v) -> float:
        def denoise(x_t, t):
            value = torch.full_like(x_t, v(float(t)))
            return Prediction(process, x_t, t, x0=data.x0_hat(x_t, t), fraction=value)

        out = sample(denoise, process, x, "ddpm-learned", grid=grid, generator=5)
        return float(out.var())

    end = times[-1]
    truth = float((process.schedule.alpha(end) * std) ** 2 + process.schedule.sigma(end) ** 2)
    assert abs(variance(exact.__getitem__) / truth - 1) < 0.03  # 4 standard errors
    assert variance(lambda t: 0.0) / truth < 0.9
    assert variance(lambda t: 1.0) / truth > 1.1


def test_without_a_say_of_the_network_it_is_ddpm_bit_for_bit() -> None:
    process = gaussian("vp")
    data = Gaussian(process)
    x = data.draw(1.0, 4).float()

    def denoise(x_t, t):
        return Prediction(process, x_t, t, x0=data.x0_hat(x_t.double(), t).float(), fraction=torch.zeros_like(x_t))

    ours, theirs = (sample(denoise, process, x, name, steps=12, generator=3) for name in ("ddpm-learned", "ddpm"))
    assert torch.equal(ours, theirs)


def test_times_are_those_of_the_chain_equally_often(discrete: Discrete) -> None:
    objective = Objective(discrete.process, "simple", "uniform", variance={"steps": 1000})
    t = objective.times(3000, generator())
    assert torch.bincount((t * 1000).round().long() - 1).tolist() == [3] * 1000
    torch.testing.assert_close(t * 1000, (t * 1000).round(), rtol=0, atol=1e-9)
    grid = torch.tensor(make_grid("uniform", 1000, discrete.process).times, dtype=F64)
    torch.testing.assert_close(t.unique(), grid.flip(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("std", [0.2, 0.8])
def test_the_total_with_the_exact_model_is_the_negative_log_likelihood(std: float) -> None:
    """With mean and variance of the true reverse chain the bound is tight for each x0, in expectation over the noise."""
    process, copies = gaussian("vp"), 40_000
    data = Gaussian(process, std=(std,), mean=(0.1,))
    bound = VariationalBound(process, steps=30)
    values = torch.tensor([-0.3, 0.1, 0.6], dtype=F64)
    x0 = values[:, None].repeat(1, copies)  # the average over elements takes the expectation
    end, second = (torch.tensor(process.t_min + i / 29 * (1 - process.t_min), dtype=F64) for i in (0, 1))

    def denoise(x_t, t):
        place = ((t - process.t_min) / (1 - process.t_min) * 29).round()
        if place == 0:
            sigma = process.schedule.sigma(t)
            exact = 2 * sigma.log() + 2 * math.log(std) - torch.log((process.schedule.alpha(t) * std) ** 2 + sigma**2)
            low = log_posterior_variance(process.schedule, second, end)
            v = (exact - low) / (sigma.log() * 2 - low)
        else:
            v = best_fraction(process, t, process.t_min + (place - 1) / 29 * (1 - process.t_min), std)
        return Prediction(process, x_t, t, x0=data.x0_hat(x_t, t), fraction=v.expand_as(x_t))

    nll = -Normal(0.1, std).log_prob(values) / math.log(2)
    torch.testing.assert_close(bound.total(denoise, x0, generator()), nll, rtol=0, atol=0.03)  # 3 standard errors

    def worse(x_t, t):
        exact = denoise(x_t, t)
        return Prediction(process, x_t, t, x0=exact.x0, fraction=torch.zeros_like(x_t))

    assert (bound.total(worse, x0, generator()) > nll + 0.05).all()


def test_a_denoiser_that_knows_the_data_pays_for_the_prior_and_the_last_step_alone() -> None:
    """Then no step errs: what is left are both closed forms, over valid elements; padding is never given noise."""
    process = gaussian("edm", sigma_min=0.1, sigma_max=2.0)
    bound, schedule = VariationalBound(process, steps=7), process.schedule
    x0 = torch.randn(2, 5, 3, generator=generator(), dtype=F64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    seen = []

    def denoise(x_t, t):
        seen.append(float(t))
        assert torch.equal(x_t[0, 3:], x0[0, 3:])  # alpha = 1
        return Prediction(process, x_t, t, x0=x0, fraction=torch.zeros_like(x_t))

    second, first = (torch.tensor(process.t_min + i / 6 * (1 - process.t_min), dtype=F64) for i in (1, 0))
    last = 0.5 * (math.log(2 * math.pi) + float(log_posterior_variance(schedule, second, first)))
    prior = torch.stack([x0[0, :3].square().mean(), x0[1].square().mean()]) / (2 * 2.0**2)
    torch.testing.assert_close(bound.total(denoise, x0, generator(), mask), (prior + last) / math.log(2))
    assert seen == pytest.approx([process.t_min + i / 6 * (1 - process.t_min) for i in range(7)], abs=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_ends_of_the_range_are_times_of_the_chain(schedule: str) -> None:
    """Time samplers that are clipped draw them exactly."""
    process = gaussian(schedule)
    ends = torch.tensor([process.t_min, process.t_max], dtype=F64)
    torch.testing.assert_close(VariationalBound(process, steps=9).snap(ends), ends, rtol=0, atol=1e-15)


def test_half_precision_is_widened_before_anything_is_squared() -> None:
    process = gaussian("vp")
    bound = VariationalBound(process, steps=10)
    x0, x0_hat, v = (torch.randn(4, 6, generator=generator(i)).bfloat16() for i in range(3))
    t = torch.tensor([0.001, 0.112, 0.445, 1.0], dtype=F64)
    ours, wide = (
        bound.nats(Prediction(process, x, bound.snap(t), x0=y, fraction=u), x)
        for x, y, u in ((x0, x0_hat, v), (x0.float(), x0_hat.float(), v.float()))
    )
    assert ours.dtype == torch.float32 and torch.equal(ours, wide)
