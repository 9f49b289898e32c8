"""The Gaussian process: marginals, prior, masks, the mean-free subspace; per-item noise."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.noise import Noise, Projected, as_noise
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.schedules import SCHEDULES, VP

F64 = torch.float64


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_renoise_continues_the_forward_process(schedule):
    """Coefficients of perturb(s) then renoise(s -> t) equal those of perturb(t)."""
    process = gaussian(schedule)
    s, t = torch.tensor(0.3, dtype=F64), torch.tensor(0.8, dtype=F64)
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    mean = process.renoise(process.perturb(one, s, zero), s, t, zero)
    first = process.renoise(process.perturb(zero, s, one), s, t, zero)
    second = process.renoise(zero, s, t, one)
    torch.testing.assert_close(mean[0, 0], process.schedule.alpha(t), rtol=1e-12, atol=0)
    torch.testing.assert_close((first**2 + second**2)[0, 0], process.schedule.sigma(t) ** 2, rtol=1e-12, atol=0)
    with pytest.raises(ScheduleError):
        process.renoise(one, t, s, zero)


def test_projection_and_log_prior_on_the_mean_free_subspace():
    process = GaussianProcess(VP(), mean_free=True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    p = process.project(z, mask)
    assert float(p[0, 3].abs().max()) == 0
    torch.testing.assert_close(p.sum(1), torch.zeros(2, 3, dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(process.project(p, mask), p)
    # density on an orthonormal basis of the subspace
    sigma = float(process.schedule.sigma(torch.tensor(1.0, dtype=F64)))
    for row, n in ((0, 3), (1, 4)):
        basis = torch.linalg.svd(torch.eye(n, dtype=F64) - 1 / n)[0][:, : n - 1]
        coordinates = (basis.T @ p[row, :n]).flatten()
        normal = MultivariateNormal(torch.zeros_like(coordinates), sigma**2 * torch.eye(len(coordinates), dtype=F64))
        torch.testing.assert_close(process.log_prior(p, mask)[row], normal.log_prob(coordinates))


def test_fixed_elements_get_no_noise_and_keep_the_mean():
    process = GaussianProcess(VP(), mean_free=True)
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    fixed = torch.tensor([[True, False, False, False], [False] * 4])
    p = process.project(z, None, fixed)
    assert float(p[0, 0].abs().max()) == 0
    torch.testing.assert_close(p[0, 1:], z[0, 1:])  # no projection where something is fixed
    torch.testing.assert_close(p[1].sum(0), torch.zeros(3), atol=1e-6, rtol=0)


def test_all_noise_is_projected_and_fixed_elements_stay():
    """x_t = alpha x0 + sigma P z with P the projection, however z comes in; the fixed elements keep x0."""
    process = GaussianProcess(VP(), mean_free=True)
    g = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(3, 5, 2, generator=g, dtype=F64) for _ in range(2))
    mask = torch.tensor([[True] * 4 + [False], [True] * 5, [True] * 4 + [False]])
    fixed = torch.tensor([[False] * 5, [True, False, False, False, False], [True, True, False, False, False]])
    x0 = x0 * mask[..., None]
    t = torch.tensor([0.2, 0.5, 0.7], dtype=F64)
    alpha, sigma = process.schedule.alpha(t)[:, None, None], process.schedule.sigma(t)[:, None, None]
    for held in (None, fixed):
        p = process.project(z, mask, held)
        x_t = process.perturb(x0, t, z, mask, held)
        torch.testing.assert_close(x_t, process.perturb(x0, t, p, mask, held))
        free = mask if held is None else mask & ~held
        torch.testing.assert_close(x_t[free], (alpha * x0 + sigma * p)[free])
        assert torch.equal(x_t[~free], x0[~free])
    s = torch.tensor(0.1, dtype=F64)
    up = process.renoise(x0, s, t, z, mask)
    ratio = process.schedule.alpha(t) / process.schedule.alpha(s)
    added = (process.schedule.sigma(t) ** 2 - (ratio * process.schedule.sigma(s)) ** 2).sqrt()
    torch.testing.assert_close(up, ratio[:, None, None] * x0 + added[:, None, None] * process.project(z, mask))


def test_padding_is_outside_of_the_prior_and_masks_may_run_along_the_last_axis():
    process = gaussian("vp", mean_free=True, mask_axis=-1)
    mask = torch.tensor([[True, True, True, False]])
    x = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(process.log_prior(x, mask), process.log_prior(x[..., :3]))
    torch.testing.assert_close(process.project(x, mask)[..., :3], x[..., :3] - x[..., :3].mean(-1, keepdim=True))
    assert float(process.project(x, mask)[..., 3].abs().max()) == 0


def test_geometry_is_flat():
    x, y = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    process, t = gaussian("cosine"), torch.tensor(0.4, dtype=F64)
    torch.testing.assert_close(process.retract(x, process.tangent(x, y)), y)
    # data at a single point move straight to it: x' = alpha' x0 + sigma' (x - alpha x0)/sigma
    s = process.schedule
    rate = process.rate(x, t, Prediction(process, x, t, x0=y))
    torch.testing.assert_close(rate, s.dalpha(t) * y + s.dsigma(t) * (x - s.alpha(t) * y) / s.sigma(t))


def test_prior_has_the_deviation_of_t_max():
    process = gaussian("ve")
    x = process.prior(torch.zeros(64, 100), Noise(0, range(64)))
    assert float(x.std()) == pytest.approx(50.0, rel=3 / (2 * 6400) ** 0.5)


def test_masks_of_the_wrong_shape_are_refused():
    with pytest.raises(ConfigError, match="mask"):
        gaussian("vp").project(torch.zeros(2, 5, 3), torch.ones(2, 4, dtype=torch.bool))


def test_unknown_parameters_are_named():
    with pytest.raises(ConfigError, match="sigma_max"):
        gaussian("edm", sigma_maxx=3)
    with pytest.raises(ConfigError, match="rectified_flow"):
        gaussian("rectified-flow")
    with pytest.raises(ConfigError, match="number"):
        gaussian("edm", rho="7")


# --- noise


def test_an_item_draws_the_same_in_any_batch():
    alone = [Noise(5, [i]).draw(2, "step", torch.zeros(1, 3, 4)) for i in range(7)]
    together = Noise(5, range(7)).draw(2, "step", torch.zeros(7, 3, 4))
    assert torch.equal(torch.cat(alone), together)
    shuffled = Noise(5, [6, 2]).draw(2, "step", torch.zeros(2, 3, 4))
    assert torch.equal(shuffled, together[[6, 2]])


def test_streams_differ_by_item_purpose_draw_and_seed():
    draws = [
        Noise(seed, [item]).draw(k, purpose, torch.zeros(1, 50))
        for seed, item, k, purpose in ((0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b"))
    ]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs(float((one * other).mean())) < 0.5 and not torch.equal(one, other)


def test_a_masked_item_draws_at_its_own_length():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    z = Noise(0, [3, 4]).draw(0, "step", torch.zeros(2, 5, 2), mask=mask)
    short = Noise(0, [3]).draw(0, "step", torch.zeros(1, 3, 2))
    assert torch.equal(z[0, :3], short[0]) and float(z[0, 3:].abs().max()) == 0
    last = Noise(0, [3, 4], mask_axis=-1).draw(0, "step", torch.zeros(2, 2, 5), mask=mask)
    assert torch.equal(last[0, :, :3], Noise(0, [3], mask_axis=-1).draw(0, "step", torch.zeros(1, 2, 3))[0])


def test_noise_is_standard_normal():
    z = Noise(0, range(200)).draw(0, "step", torch.zeros(200, 100, dtype=F64))
    assert z.dtype == F64
    n = z.numel()
    assert abs(float(z.mean())) < 4 / n**0.5 and abs(float(z.var()) - 1) < 4 * (2 / n) ** 0.5


def test_what_solvers_draw_is_projected():
    process = GaussianProcess(VP(), mean_free=True)
    mask = torch.tensor([[True] * 3 + [False], [True] * 4])
    fixed = torch.tensor([[False] * 4, [True] + [False] * 3])
    like, noise = torch.zeros(2, 4, 3), Noise(0, [0, 1])
    drawn = Projected(noise, process, mask, fixed).draw(1, "step", like)
    assert torch.equal(drawn, process.project(noise.draw(1, "step", like, mask=mask), mask, fixed))
    assert float(drawn[1, 0].abs().max()) == 0 and float(drawn[0].sum(0).abs().max()) < 1e-6


def test_generators_become_item_seeds():
    one = as_noise(torch.Generator().manual_seed(1), 3).draw(0, "step", torch.zeros(3, 4))
    again = as_noise(torch.Generator().manual_seed(1), 3).draw(0, "step", torch.zeros(3, 4))
    assert torch.equal(one, again) and not torch.equal(one[0], one[1])
    other = as_noise(torch.Generator().manual_seed(2), 3).draw(0, "step", torch.zeros(3, 4))
    assert not torch.equal(one, other)
    with pytest.raises(ConfigError, match="generators"):
        as_noise([torch.Generator()], 3)
    state = torch.get_rng_state()
    as_noise(None, 2)
    assert torch.equal(state, torch.get_rng_state())  # the global stream is left alone
