"""Log-likelihoods: exact densities of Gaussians and mixtures, estimates, masks, bits, and the bound of a discrete chain."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from polydiff.core.adapter import Condition
from polydiff.core.denoiser import Denoiser, Prediction
from polydiff.core.errors import ConfigError, DivergenceError, ScheduleError
from polydiff.core.likelihood import bits_per_dim, dequantise, elbo, log_prob
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.schedules import EDM, VE, VP
from tests.numerics.exact import Gaussian, Mixture, as_field

F64 = torch.float64
PATHS = ("vp", "sub_vp", "ve", "edm", "cosine", "rectified_flow")


def _expected(data: Gaussian, x, t):
    """The exact log density at t, with the prior N(0, sigma^2) in the place of the true marginal at t_max."""
    process = data.process
    end = data.flow(x, t, process.t_max)
    return data.log_prob(x, t) + process.log_prior(end) - data.log_prob(end, process.t_max)


@pytest.mark.parametrize("schedule", PATHS)
def test_gaussian_data_have_their_density(schedule):
    data = Gaussian(gaussian(schedule), std=(0.5, 1.0, 1.4), mean=(0.2, -0.4, 0.0))
    for t in (data.process.t_min, 0.4):
        x = data.draw(t, 4)
        ours = log_prob(data.x0_hat, data.process, x, t_min=t, exact=True)
        assert ours.shape == (4,) and ours.dtype == F64
        torch.testing.assert_close(ours, _expected(data, x, t), rtol=0, atol=3e-4)  # 1e-4 a dimension


@pytest.mark.parametrize("field", ["x0", "eps", "v", "score", "velocity"])
def test_a_mixture_has_its_density_in_every_field(field):
    data = Mixture(gaussian("rectified_flow"), std=0.5)
    x = data.draw(1e-3, 3)
    ours = log_prob(as_field(data, field), data.process, x, exact=True, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours, data.log_prob(x, 1e-3), rtol=0, atol=1e-2)  # the prior: alpha(t_max) = 1e-3
    base = log_prob(data.x0_hat, data.process, x, exact=True, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours, base, rtol=0, atol=1e-5)


def test_the_estimate_is_unbiased_and_exact_for_isotropic_data():
    process = gaussian("vp")
    round_ = Gaussian(process, std=(0.6, 0.6), mean=(0.1, 0.2))
    x = round_.draw(1e-3, 3)  # the derivative is a multiple of the identity: any probe of signs gives the trace
    exact = log_prob(round_.x0_hat, process, x, exact=True)
    torch.testing.assert_close(log_prob(round_.x0_hat, process, x, generator=0), exact, rtol=0, atol=1e-5)
    data = Mixture(process, d=3, std=0.6)
    copies = data.draw(1e-3, 1).repeat(200, 1)
    truth = float(log_prob(data.x0_hat, process, copies[:1], exact=True))
    one, four = (log_prob(data.x0_hat, process, copies, probes=n, generator=0) for n in (1, 4))
    for estimates in (one, four):
        assert abs(float(estimates.mean()) - truth) < 4.2 * float(estimates.std()) / math.sqrt(200) + 1e-3
    assert 1.5 < float(one.std() / four.std()) < 2.7  # 2 in expectation


def test_probes_belong_to_items_and_are_the_same_all_along():
    data = Mixture(gaussian("vp"), d=4)
    x = data.draw(1e-3, 3)
    ours = log_prob(data.x0_hat, data.process, x, generator=Noise(0, [5, 6, 7]))
    alone = log_prob(data.x0_hat, data.process, x[1:2], generator=Noise(0, [6]))
    torch.testing.assert_close(ours[1:2], alone, rtol=1e-10, atol=1e-10)
    again = log_prob(data.x0_hat, data.process, x, generator=Noise(0, [5, 6, 7]))
    assert torch.equal(ours, again)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 1, 3, 2)])
def test_states_of_any_rank_have_the_density_of_their_elements(shape):
    process = gaussian("vp")
    flat = Gaussian(process, std=(0.7,), mean=(0.3,))
    x = flat.draw(1e-3, math.prod(shape)).reshape(shape)
    each = _expected(flat, x.reshape(-1, 1), 1e-3).reshape(shape[0], -1).sum(1)
    for exact in (True, False):  # diagonal derivative: the estimate is exact
        ours = log_prob(flat.x0_hat, process, x, exact=exact, generator=0)
        torch.testing.assert_close(ours, each, rtol=0, atol=1e-4 * x[0].numel())


@pytest.mark.parametrize("exact", [True, False])
def test_padding_has_no_density(exact):
    process = gaussian("cosine")
    flat = Gaussian(process, std=(0.7,), mean=(0.0,))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    x = flat.draw(1e-3, 12).reshape(2, 3, 2)
    ours = log_prob(flat.x0_hat, process, x, exact=exact, mask=mask, generator=0)
    alone = log_prob(flat.x0_hat, process, x[:1, :2], exact=exact, generator=0)
    torch.testing.assert_close(ours[:1], alone, rtol=1e-10, atol=1e-10)
    assert process.dims(x, mask).tolist() == [4, 6]


def test_the_tolerance_holds_the_density_where_the_state_stands_still():
    """At the mean of Gaussian data the flow is at rest, so that the density alone asks for small steps."""
    data = Gaussian(gaussian("vp"), std=(0.05, 1.0, 3.0), mean=(0.0, 0.0, 0.0))
    x = torch.zeros(1, 3, dtype=F64)
    ours = log_prob(data.x0_hat, data.process, x, exact=True, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours, _expected(data, x, data.process.t_min), rtol=0, atol=1e-6)


def test_probes_have_the_length_of_their_item():
    """Where elements depend on each other the estimate is the probe's, and padding must not change the probe."""
    process = gaussian("cosine")
    mask = torch.tensor([[True, True, True], [True, False, True]])
    x = process.project(torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64), mask)

    def of(valid):
        return lambda x_t, t: 0.5 * torch.tanh(x_t + x_t.flip(2).sum(1, keepdim=True)) * valid[..., None]

    ours = log_prob(of(mask), process, x, t_min=0.1, probes=5, mask=mask, generator=Noise(3, [4, 5]))
    alone = log_prob(of(mask[1:, ::2]), process, x[1:, ::2], t_min=0.1, probes=5, generator=Noise(3, [5]))
    torch.testing.assert_close(ours[1:], alone, rtol=1e-8, atol=1e-8)
    assert abs(float(ours[1] - log_prob(of(mask), process, x, t_min=0.1, mask=mask, exact=True)[1])) > 1e-3


@pytest.mark.parametrize("exact", [True, False])
def test_mean_free_states_have_their_density_on_the_subspace(exact):
    """Isotropic Gaussian data of standard deviation s, centred: N(0, s^2) in (n - 1) d dimensions."""
    process, std = GaussianProcess(VP(), mean_free=True), 0.6
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    g = torch.Generator().manual_seed(0)
    x = process.project(0.6 * torch.randn(2, 4, 2, generator=g, dtype=F64), mask)

    def denoise(x_t, t):
        t = t.reshape(-1, 1, 1)
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        shrunk = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x_t
        return process.project(shrunk, mask.repeat(len(x_t) // 2, 1))

    t = torch.tensor(1e-3, dtype=F64)
    total = float(torch.hypot(process.schedule.alpha(t) * std, process.schedule.sigma(t)))
    dims = torch.tensor([4.0, 6.0], dtype=F64)
    assert torch.equal(process.dims(x, mask), dims)
    truth = -0.5 * (x / total).pow(2).sum((1, 2)) - dims * math.log(total * math.sqrt(2 * math.pi))
    if exact:
        shifted = x + torch.tensor([3.0, -1.0], dtype=F64)  # neither centred nor zero on padding: projected first
        for state in (x, shifted):
            ours = log_prob(denoise, process, state, exact=True, mask=mask)
            torch.testing.assert_close(ours, truth, rtol=0, atol=6e-4)
    else:
        many = log_prob(denoise, process, x, probes=400, mask=mask, generator=0)
        one = log_prob(denoise, process, x.repeat(50, 1, 1), mask=mask.repeat(50, 1), generator=1).reshape(50, 2)
        assert bool(((many - truth).abs() < 4.2 * one.std(0) / 20).all())


def test_a_network_in_single_precision_with_frozen_weights_works_without_outer_gradients():
    data = Gaussian(gaussian("vp"), std=(0.5, 1.0, 1.4))
    x = data.draw(1e-3, 3)
    exact = log_prob(data.x0_hat, data.process, x, exact=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            single = log_prob(lambda x_t, t: data.x0_hat(x_t.double(), t).float(), data.process, x.float(), exact=True)
        torch.testing.assert_close(single, exact, rtol=0, atol=2e-3)


def test_bad_input_is_named():
    data = Mixture(gaussian("vp"))
    x, process = data.draw(1e-3, 2), data.process
    with pytest.raises(ConfigError, match=r"1,000,000 elements.*Hutchinson"):
        log_prob(data.x0_hat, process, torch.zeros(1, 1000, 1000), exact=True)
    for denoise in (lambda x_t, t: data.x0_hat(x_t, t).detach(), torch.no_grad()(data.x0_hat)):
        with pytest.raises(ConfigError, match="no gradient"):
            log_prob(denoise, process, x)
    with pytest.raises(ConfigError, match="probes"):
        log_prob(data.x0_hat, process, x, probes=0)
    with pytest.raises(ConfigError, match="rtol"):
        log_prob(data.x0_hat, process, x, rtol=0.0)
    with pytest.raises(ScheduleError, match="increase"):
        log_prob(data.x0_hat, process, x, t_min=1.0)
    with pytest.raises(ScheduleError, match="sigma is 0"):
        log_prob(data.x0_hat, process, x, t_min=0.0)
    with pytest.raises(ConfigError, match="item 1"):
        log_prob(data.x0_hat, process, torch.tensor([[0.0, 0.0], [0.0, math.nan]], dtype=F64))
    with pytest.raises(DivergenceError, match=r"not finite at t = 0\.001"):
        log_prob(lambda x_t, t: x_t * math.nan, process, x)
    with pytest.raises(ConfigError, match="shape"):
        log_prob(lambda x_t, t: x_t[:, :1], process, x)


def test_dequantised_levels_are_uniform_in_their_cells():
    g = torch.Generator().manual_seed(0)
    level = torch.randint(256, (4, 5000), generator=g)
    x = dequantise(level / 127.5 - 1, generator=0)
    place = (x + 1) * 128
    assert torch.equal(place.floor().long(), level)
    u = (place - level).flatten()
    assert abs(float(u.mean()) - 0.5) < 0.01 and abs(float(u.var()) * 12 - 1) < 0.03
    with pytest.raises(ConfigError, match="levels"):
        dequantise(level / 127.4 - 1)
    for beyond in (-1, 256):
        with pytest.raises(ConfigError, match="levels"):
            dequantise(torch.full((1, 2), beyond / 127.5 - 1))
    with pytest.raises(ConfigError, match="bins"):
        dequantise(level / 127.5 - 1, bins=1)


def test_bits_of_uniform_levels_are_the_bits_they_have():
    """Uniform density on the range is log2(bins) bits, whatever the range; 8-bit levels add 7 bits on [-1, 1]."""
    log_p, dims = torch.full((2,), -12 * math.log(2.0), dtype=F64), 12
    assert bits_per_dim(log_p, dims).tolist() == pytest.approx([8.0, 8.0])
    assert bits_per_dim(0 * log_p, dims, low=0.0).tolist() == pytest.approx([8.0, 8.0])
    assert bits_per_dim(0 * log_p, dims).tolist() == pytest.approx([7.0, 7.0])
    scaled = bits_per_dim(log_p - 12 * math.log(0.5), dims, alpha=0.5)
    assert scaled.tolist() == pytest.approx([8.0, 8.0])


@pytest.mark.parametrize("schedule", [EDM(sigma_min=0.05, sigma_max=20.0), VE(sigma_min=0.05, sigma_max=20.0)])
def test_the_bound_of_the_chain_holds_and_closes_in_on_the_likelihood(schedule):
    process, std, copies = GaussianProcess(schedule), 0.5, 4000
    data = Gaussian(process, std=(std,), mean=(0.1,))
    values = torch.tensor([-0.3, 0.6], dtype=F64)
    x0 = values[:, None].repeat(1, copies)  # the average over elements takes the expectation
    truth = Normal(0.1, std).log_prob(values)
    gaps = []
    for steps in (10, 40, 160):
        bound = elbo(data.x0_hat, process, x0, steps, generator=0) / copies
        gaps.append(truth - bound)
    assert all(bool((gap > -0.03).all()) for gap in gaps)
    assert bool((gaps[1] > 3 * gaps[2]).all())
    assert bool(((4 * gaps[2] - gaps[1]) / 3).abs().max() < 0.03)  # the gap falls as 1/steps: this is its limit


def test_the_bound_counts_valid_elements_and_levels():
    process = GaussianProcess(EDM(sigma_min=0.1, sigma_max=2.0))
    x0 = torch.zeros(2, 3, 2, dtype=F64)
    mask = torch.tensor([[True, True, False], [True] * 3])
    known = lambda x_t, t: torch.zeros_like(x_t)  # no step errs; the last one has the variance sigma^2/(1 + sigma^2)
    density = -0.5 * math.log(2 * math.pi * 0.01 / 1.01)
    ours = elbo(known, process, x0, 5, mask=mask, generator=0)
    torch.testing.assert_close(ours, torch.tensor([4 * density, 6 * density], dtype=F64))
    cell = Normal(torch.tensor(0.0, dtype=F64), math.sqrt(0.01 / 1.01)).cdf(torch.tensor(1 / 2, dtype=F64))
    levels = elbo(known, process, x0, 5, bins=3, generator=0)
    torch.testing.assert_close(levels, (6 * torch.log(2 * cell - 1)).expand(2))
    with pytest.raises(ConfigError, match="mean-free"):
        elbo(known, GaussianProcess(VP(), mean_free=True), x0, 5)
    with pytest.raises(ConfigError, match="steps = 1 "):
        elbo(known, process, x0, 1)


def test_densities_and_bounds_of_states_without_numbers_are_one():
    process, nothing = gaussian("vp"), lambda x_t, t: x_t
    for shape in ((0, 3), (2, 0)):
        for exact in (True, False):
            assert torch.equal(
                log_prob(nothing, process, torch.zeros(shape), exact=exact), torch.zeros(shape[0], dtype=F64)
            )
    assert elbo(nothing, process, torch.zeros(0, 3), 2).shape == (0,)


def test_states_of_one_number_each_have_a_density():
    data = Mixture(gaussian("vp"))
    x = torch.linspace(-1, 1, 4, dtype=F64)
    denoise = lambda x_t, t: Prediction(data.process, x_t, t, x0=0.3 * x_t)
    wide = log_prob(denoise, data.process, x[:, None], exact=True)
    torch.testing.assert_close(log_prob(denoise, data.process, x, exact=True), wide)


def test_nothing_is_warned_of(recwarn):
    log_prob(lambda x_t, t: 0.5 * x_t, gaussian("vp"), torch.ones(2, 3), rtol=0.1, atol=0.1, generator=0)
    assert [str(warning.message) for warning in recwarn] == []


def test_the_bound_does_not_remember_cleaner_states():
    """A self-conditioned network that repeats what it was given would otherwise know the data."""

    class Repeat(torch.nn.Module):
        def forward(self, x, c_noise, mask, cond, present):
            assert not present["x0_hat"].any()
            return cond["x0_hat"]

    conditions = {"x0_hat": Condition("x0_hat", "given", None)}
    bound = Denoiser(Repeat(), gaussian("vp"), "x0", conditions=conditions).bind()
    first = elbo(bound, gaussian("vp"), torch.ones(2, 3), 5, generator=0)
    assert first.dtype == F64 and torch.isfinite(first).all()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: log_prob(_half, gaussian("vp"), x, probes=1.5), "probes = 1.5"),
        (lambda x: log_prob(_half, gaussian("vp"), x, probes="1"), "probes = '1'"),
        (lambda x: log_prob(_half, gaussian("vp"), x, probes=True), "probes = True"),
        (lambda x: log_prob(_half, gaussian("vp"), x, probes=0), "probes = 0"),
        (lambda x: log_prob(_half, gaussian("vp"), x, probes=10**9), "probes = 1000000000 .* to 10,000"),
        (lambda x: log_prob(_half, gaussian("vp"), x, t_min="a"), "t_min = 'a'"),
        (lambda x: log_prob(_half, gaussian("vp"), {"x": x}), "dictionary"),
        (lambda x: elbo(_half, gaussian("vp"), {"x": x}), "dictionary"),
        (lambda x: log_prob(_half, VP(), x), "the process is"),
        (lambda x: elbo(_half, None, x), "the process is"),
        (lambda x: log_prob(_half, gaussian("vp"), x, mask=[[True]]), "mask is"),
        (lambda x: elbo(_half, gaussian("vp"), x, mask=torch.ones(1, 3).bool()), "mask is"),
        (lambda x: elbo(_half, gaussian("vp"), x, steps=2.5), "steps = 2.5"),
        (lambda x: dequantise(x, bins=math.nan), "bins = nan"),
        (lambda x: dequantise(x, bins=1), "bins = 1 "),
        (lambda x: dequantise(x, high=math.inf), "high = inf"),
        (lambda x: dequantise(x, low=1.0, high=-1.0), "high - low = -2.0"),
        (lambda x: dequantise(x * math.nan), "not on 256"),
        (lambda x: dequantise(x, generator="a"), "generator = 'a'"),
        (lambda x: dequantise([1.0]), "x must be a floating-point tensor"),
        *((lambda x, d=d: bits_per_dim(x[:, 0], d), "dims = ") for d in (0, -1, math.nan, math.inf, torch.ones(3))),
        *((lambda x, a=a: bits_per_dim(x[:, 0], 3, alpha=a), "alpha = ") for a in (0.0, -1.0, math.nan)),
        *((lambda x, b=b: bits_per_dim(x[:, 0], 3, bins=b), "bins = ") for b in (0, -2, math.nan, "a")),
        (lambda x: bits_per_dim(x[:, 0], 3, low=1.0, high=1.0), "high - low = 0.0"),
        (lambda x: bits_per_dim(-3.0, 3), "log_p must be"),
    ],
)
def test_numbers_that_cannot_be_used_are_named(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make(torch.ones(2, 3))


def _half(x_t, t):
    return 0.5 * x_t


def test_bits_take_dimensions_of_any_kind():
    log_p = torch.tensor([-3.0, -6.0], dtype=F64)
    each = bits_per_dim(log_p, torch.tensor([3, 3]))
    assert torch.equal(each, bits_per_dim(log_p, 3)) and each.dtype == F64
