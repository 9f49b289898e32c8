import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from polydiff.core.adapter import Condition
from polydiff.core.denoiser import Denoiser, Prediction
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.guidance import Replacement, cfg, classifier_guidance
from polydiff.core.inverse import DPS, MMPS, AverageBlocks, Matrix, Mix, PiGDM, Select, identity, is_linear, solve
from polydiff.core.nn.mlp import MLP
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import sample
from polydiff.core.schedules import SCHEDULES, VP, as_time
from tests.numerics.exact import Mixture, as_field

HALF = as_time(0.5)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Full:
    """Data N(mean, covariance) on items of any shape, flattened."""

    def __init__(self, process, shape=(6,), variance=None, seed=0):
        self.process, self.shape, d = process, shape, math.prod(shape)
        root = randn(d, d, seed=seed) / d**0.5
        self.eye = torch.eye(d, dtype=torch.float64)
        self.mean = randn(d, seed=seed + 1)
        self.covariance = root @ root.mT + 0.05 * self.eye if variance is None else variance * self.eye

    def __call__(self, x_t, t):
        alpha, sigma = self.process.schedule.alpha(t)[..., None], self.process.schedule.sigma(t)[..., None]
        noisy = alpha[..., None] ** 2 * self.covariance + sigma[..., None] ** 2 * self.eye
        offset = x_t.flatten(1) - alpha * self.mean
        x0 = self.mean + alpha * (torch.linalg.solve(noisy, offset[..., None])[..., 0] @ self.covariance)
        return Prediction(self.process, x_t, t, x0=x0.reshape(x_t.shape))

    def posterior_mean(self, x_t, t, a, y, sigma_y):
        """E[x_0 | x_t, y] of one item at t of shape (): x_t and y are two observations of x_0."""
        alpha, sigma = self.process.schedule.alpha(t), self.process.schedule.sigma(t)
        precision = torch.linalg.inv(self.covariance) + alpha**2 / sigma**2 * self.eye + a.mT @ a / sigma_y**2
        weighted = torch.linalg.solve(self.covariance, self.mean) + alpha / sigma**2 * x_t.flatten()
        return torch.linalg.solve(precision, weighted + a.mT @ y.flatten() / sigma_y**2).reshape(x_t.shape)


def matrix_of(operator, shape):
    """A linear operator written out."""
    d = math.prod(shape)
    return operator(torch.eye(d, dtype=torch.float64).reshape(d, *shape)).flatten(1).mT


OPERATORS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "matrix": (Matrix(randn(3, 6, seed=4)), (6,)),
    "select": (Select(randn(2, 3, 1, seed=5) > 0), (2, 3, 2)),
    "blocks": (AverageBlocks((2, 3)), (1, 4, 3)),
    "mix": (Mix(torch.tensor([[0.3, 0.6, 0.1]])), (3, 4)),
    "mix along the last axis": (Mix(torch.tensor([[1.0, -1.0], [0.5, 2.0]]), axis=-1), (3, 2)),
    "identity": (identity, (2, 2)),
    "function": (lambda x: x.cumsum(1)[:, 1::2], (6,)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPERATORS)
def test_mmps_is_exact_on_a_gaussian_prior(schedule, name):
    operator, shape = OPERATORS[name]
    data, a = Full(gaussian(schedule), shape), matrix_of(operator, shape)
    x, times = 2 * randn(4, *shape, seed=8), as_time([0.2, 0.5, 0.8, 0.95])
    y = operator(randn(1, *shape, seed=9))[0]
    guided = MMPS(y, operator, sigma_y=0.2, iterations=12, tolerance=1e-12)(data)
    expected = [data.posterior_mean(x[i], t, a, y, 0.2) for i, t in enumerate(times)]
    with torch.no_grad():  # as in the sampling loop
        together = guided(x, times)
        alone = torch.cat([guided(x[i : i + 1], t).x0 for i, t in enumerate(times)])
    assert not together.x0.requires_grad and not together.x_t.requires_grad
    torch.testing.assert_close(together.x0, torch.stack(expected), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(alone, torch.stack(expected), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", [0.25, 1.0])
def test_pigdm_is_exact_on_an_isotropic_prior(schedule, variance):
    operator, shape = OPERATORS["matrix"]
    data, x, times = Full(gaussian(schedule), shape, variance), randn(3, 6, seed=8), as_time([0.2, 0.5, 0.9])
    y = randn(3, seed=9)
    guide = PiGDM(y, operator, sigma_y=0.3, iterations=8, tolerance=1e-12, variance=variance)
    expected = [data.posterior_mean(x[i], t, operator.matrix, y, 0.3) for i, t in enumerate(times)]
    torch.testing.assert_close(guide(data)(x, times).x0, torch.stack(expected), rtol=1e-7, atol=1e-7)


def test_without_noise_the_observation_is_met():
    data, (operator, shape) = Full(gaussian("vp"), (1, 4, 3)), OPERATORS["blocks"]
    y = randn(1, 2, 1, seed=3)
    for guide in (MMPS(y, operator, iterations=6, tolerance=0.0), PiGDM(y, operator)):
        found = sample(guide(data), data.process, randn(5, *shape), "dpmpp-2m", 30, "log_snr")
        torch.testing.assert_close(operator(found), y.expand(5, 1, 2, 1), rtol=2e-3, atol=2e-3)


def test_dps_steps_along_the_residual():
    operator, shape = OPERATORS["matrix"]
    data, x, y, a = Full(gaussian("vp"), shape), randn(4, 6, seed=1), randn(3, seed=2), OPERATORS["matrix"][0].matrix
    alpha, sigma = data.process.schedule.alpha(HALF), data.process.schedule.sigma(HALF)
    jacobian = alpha * data.covariance @ torch.linalg.inv(alpha**2 * data.covariance + sigma**2 * data.eye)
    x0 = data(x, HALF).x0
    residual = y - x0 @ a.mT
    step = 0.7 * residual / residual.norm(dim=1, keepdim=True) @ a @ jacobian
    found = DPS(y, operator, zeta=0.7)(data)(x, HALF).x0
    torch.testing.assert_close(found, x0 + sigma**2 / alpha * step, rtol=1e-9, atol=1e-9)
    met = DPS(operator(x0)[0], operator)(data)(x[:1], HALF).x0  # nothing left to do, and no 0/0
    torch.testing.assert_close(met, x0[:1])


def test_solve_is_right_for_each_item_and_independent_of_the_others():
    b = randn(5, 2, 4, seed=1)
    matrices = randn(5, 8, 8, seed=2) + 4 * torch.eye(8, dtype=torch.float64)  # not symmetric
    apply = lambda matrix: lambda u: (matrix @ u.flatten(1)[..., None])[..., 0].reshape(u.shape)
    found = solve(apply(matrices), b, 8, 1e-13)
    expected = torch.linalg.solve(matrices, b.flatten(1)[..., None])[..., 0].reshape(b.shape)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    # an easy item stops at once, whatever the others need; one without a right-hand side stays at 0
    matrices[0] = 3 * torch.eye(8)
    b[1] = 0
    calls: list[torch.Tensor] = []

    def counted(u):
        calls.append(u.clone())
        return apply(matrices)(u)

    found = solve(counted, b, 8, 1e-6)
    torch.testing.assert_close(found[0], b[0] / 3)
    assert torch.equal(found[1], torch.zeros(2, 4, dtype=torch.float64)) and len(calls) > 3
    alone = torch.cat([solve(apply(matrices[i : i + 1]), b[i : i + 1], 8, 1e-6) for i in range(5)])
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-12)
    residuals = [(apply(matrices)(solve(apply(matrices), b, n, 0.0)) - b).flatten(1).norm(dim=1) for n in range(1, 6)]
    assert all(bool((after <= before + 1e-12).all()) for before, after in itertools.pairwise(residuals))


def test_solve_goes_on_to_its_tolerance_and_no_further():
    scale = torch.linspace(1.0, 30.0, 12, dtype=torch.float64)
    b = randn(1, 12, seed=3)
    calls: list[torch.Tensor] = []

    def scaled(u):
        calls.append(u)
        return scale * u

    for tolerance in (1e-1, 1e-2, 1e-3):
        before = len(calls)
        residual = b - scale * solve(scaled, b, 12, tolerance)
        assert float(residual.norm() / b.norm()) <= tolerance
        fewer = len(calls) - before - 1
        residual = b - scale * solve(lambda u: scale * u, b, fewer, 0.0)
        assert float(residual.norm() / b.norm()) > tolerance


def test_solve_of_a_singular_problem_leaves_what_cannot_be_met():
    where = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    found = solve(lambda u: 2 * where * u, torch.tensor([[1.0, 3.0, 5.0]], dtype=torch.float64), 6, 1e-9)
    torch.testing.assert_close(found * where, torch.tensor([[0.5, 1.5, 0.0]], dtype=torch.float64))
    assert bool(torch.isfinite(found).all())


def test_solve_leaves_directions_in_which_there_is_no_covariance():
    """A learned Jacobian can have small negative eigenvalues; following them would make u huge."""
    scale = torch.tensor([[1.0, 1.0], [1.0, -1e-4], [-1.0, -2.0]], dtype=torch.float64)
    b = torch.tensor([[2.0, 3.0], [2.0, 0.01], [1.0, 1.0]], dtype=torch.float64)
    found = solve(lambda u: scale * u, b, 10, 1e-12)
    torch.testing.assert_close(found[0], b[0])
    torch.testing.assert_close(found[1], as_time([2.0, 0.01]), rtol=1e-2, atol=1e-2)  # not -100
    assert torch.equal(found[2], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [DPS, PiGDM, MMPS])
def test_guides_work_through_a_network_in_float32(kind):
    denoiser, double = (Denoiser(MLP(4, width=32, blocks=2), gaussian("edm"), "edm", 0.7) for _ in range(2))
    g = torch.Generator().manual_seed(0)
    for p in denoiser.parameters():  # the last layer is zero at first
        p.data = 0.3 * torch.randn(p.shape, generator=g)
    double.load_state_dict(denoiser.state_dict())
    denoiser.requires_grad_(False)
    y, x = randn(2, seed=3), 3 * randn(5, 4, seed=4)
    operator = Matrix(randn(2, 4, seed=5))
    single, reference = (kind(y, operator) if kind is DPS else kind(y, operator, sigma_y=0.1) for _ in range(2))
    t = denoiser.process.schedule.t_of_log_snr(as_time(-0.5))
    with torch.no_grad():
        found = single(denoiser.bind())(x.float(), t).x0
        expected = reference(double.double().bind())(x, t).x0
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    assert float((expected - double(x, t).x0).detach().abs().max()) > 1e-2
    assert all(p.grad is None for p in double.parameters())
    out = sample(single(denoiser.bind()), denoiser.process, 80 * x.float(), "heun", 6)
    one = sample(single(denoiser.bind()), denoiser.process, 80 * x.float()[2:3], "heun", 6)
    torch.testing.assert_close(out[2:3], one, rtol=1e-4, atol=1e-4)


def test_stacked_guides_have_their_own_observation_and_operator():
    data, x = Full(gaussian("vp"), (2, 3)), randn(2, 2, 3)
    for first, second in (
        (Select(randn(2, 3, seed=1) > 0), Select(randn(2, 3, seed=2) > 0)),
        (Matrix(randn(4, 6, seed=1)), Matrix(randn(4, 6, seed=2))),
        (Mix(randn(1, 2, seed=1)), Mix(randn(1, 2, seed=2))),
        (AverageBlocks((3,)), AverageBlocks((3,))),
        (identity, identity),
    ):
        guides = [
            MMPS(operator(randn(1, 2, 3, seed=i))[0], operator, sigma_y=0.2)
            for i, operator in enumerate((first, second))
        ]
        batch = guides[0].stack(guides)(data)(x, HALF).x0
        alone = torch.cat([guide(data)(x[i : i + 1], HALF).x0 for i, guide in enumerate(guides)])
        torch.testing.assert_close(batch, alone, rtol=1e-10, atol=1e-10)
    y = torch.zeros(2, 3)
    base = MMPS(y, identity, sigma_y=0.2)
    for other, reason in (
        (dataclasses.replace(base, sigma_y=0.3), "sigma_y of one batch must be equal"),
        (PiGDM(y, identity, sigma_y=0.2), "one kind, not MMPS, PiGDM"),
        (MMPS(y, AverageBlocks(()), sigma_y=0.2), "operator of one batch"),
        (MMPS(y[:1], identity, sigma_y=0.2), "y of one batch must have one shape"),
    ):
        with pytest.raises(ConfigError, match=reason):
            base.stack([base, other])


def test_padding_is_not_moved():
    class Padded(Full):
        def __call__(self, x_t, t):  # leaks from padding into padding, as a preconditioner without a mask does
            return Prediction(self.process, x_t, t, x0=0.5 * x_t)

    data, mask = Padded(gaussian("vp"), (4, 2)), torch.tensor([True, True, True, False])
    x = randn(2, 4, 2) * mask[:, None]
    for kind in (MMPS, PiGDM):
        free = kind(randn(1, 4, 2)[0], identity, sigma_y=0.5)
        held = dataclasses.replace(free, mask=mask)
        assert float(free(data)(x, HALF).x0[:, 3].abs().min()) > 0.01
        assert float(held(data)(x, HALF).x0[:, 3].abs().max()) == 0
        torch.testing.assert_close(held(data)(x, HALF).x0[:, :3], free(data)(x, HALF).x0[:, :3])
        batch = held.stack([held, held])
        torch.testing.assert_close(batch(data)(x, HALF).x0, held(data)(x, HALF).x0)


def test_mmps_stays_in_the_mean_free_subspace_and_is_exact_there():
    process, s2, sigma_y = GaussianProcess(VP(), mean_free=True), 0.6, 0.3
    project = torch.eye(4, dtype=torch.float64) - 0.25
    alpha, sigma = process.schedule.alpha(HALF), process.schedule.sigma(HALF)
    # the exact denoiser of N(0, s2 P) on states of the subspace, which says nothing outside of it
    denoise = lambda x_t, t: Prediction(process, x_t, t, x0=alpha * s2 / (alpha**2 * s2 + sigma**2) * x_t)
    x, a, y = project @ randn(1, 4, 1), randn(2, 4, seed=1), randn(2, seed=2)
    found = MMPS(y, Matrix(a), sigma_y=sigma_y, tolerance=1e-12)(denoise)(x, HALF).x0[0, :, 0]
    covariance = s2 * sigma**2 / (alpha**2 * s2 + sigma**2) * project
    x0 = denoise(x, HALF).x0[0, :, 0]
    gain = covariance @ a.mT @ torch.linalg.inv(a @ covariance @ a.mT + sigma_y**2 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(found, x0 + gain @ (y - a @ x0), rtol=1e-8, atol=1e-8)
    assert abs(float(found.sum())) < 1e-12


def test_guides_compose_with_all_others():
    data = Mixture(gaussian("vp"), d=3)
    denoise, x, y = as_field(data, "eps"), data.draw(0.5, 4), randn(2, seed=1)
    operator = Matrix(randn(2, 3, seed=2))
    mmps, log_prob = MMPS(y, operator, sigma_y=0.4, tolerance=1e-10), lambda x_t, t: -((x_t - 1) ** 2).sum(1)
    # guidance of a denoiser by a copy of itself changes nothing, inside or outside
    plain = mmps(denoise)(x, HALF).x0
    torch.testing.assert_close(mmps(cfg(denoise, denoise, 3.0))(x, HALF).x0, plain)
    torch.testing.assert_close(cfg(mmps(denoise), mmps(denoise), 3.0)(x, HALF).x0, plain)
    where = torch.tensor([True, False, False])
    known = torch.full((3,), 0.5, dtype=torch.float64)
    assert torch.equal(Replacement(known, where)(mmps(denoise))(x, HALF).x0[:, 0], torch.full((4,), 0.5).double())
    # the classifier tilts the prior that MMPS sees: the same as MMPS on the tilted denoiser written out
    sigma, alpha = data.process.schedule.sigma(HALF), data.process.schedule.alpha(HALF)
    tilted = lambda x_t, t: Prediction(
        data.process, x_t, t, x0=data.x0_hat(x_t, t) - 0.3 * sigma**2 / alpha * 2 * (x_t - 1)
    )
    nested = mmps(classifier_guidance(denoise, log_prob, 0.3))(x, HALF).x0
    torch.testing.assert_close(nested, mmps(tilted)(x, HALF).x0, rtol=1e-8, atol=1e-8)


def test_a_guide_inside_a_guide_is_differentiated_through():
    """Two halves of an observation, one by a guide around the guide of the other, are one observation."""
    data, x, a, y = Full(gaussian("cosine")), randn(3, 6, seed=1), randn(4, 6, seed=2), randn(4, seed=3)
    options = {"sigma_y": 0.3, "iterations": 6, "tolerance": 1e-12}
    inner, outer = MMPS(y[:2], Matrix(a[:2]), **options), MMPS(y[2:], Matrix(a[2:]), **options)
    with torch.no_grad():
        nested = outer(inner(data))(x, HALF).x0
        whole = MMPS(y, Matrix(a), **options)(data)(x, HALF).x0
    torch.testing.assert_close(nested, whole, rtol=1e-8, atol=1e-8)


def test_self_conditioning_keeps_no_graph():
    class Remembers(torch.nn.Module):
        def forward(self, x_t, c_noise, mask, cond, present):
            assert not cond["x0_hat"].requires_grad
            return x_t + 0.1 * cond["x0_hat"]

    denoiser = Denoiser(Remembers(), gaussian("edm"), "edm", 0.5, {"x0_hat": Condition("field", None)})
    guide = MMPS(torch.ones(3), identity, sigma_y=0.3)
    out = sample(guide(denoiser.bind()), denoiser.process, 80 * randn(2, 3).float(), "ddim", 4)
    assert bool(torch.isfinite(out).all())


def test_linearity_is_looked_at_once_and_to_the_rounding_of_the_state():
    """Linear operators of many elements pass in single precision; three calls of A tell, in the first call of a guide."""
    data, x, seen = Full(gaussian("vp"), (64,)), randn(2, 64), []

    def watched(x):
        seen.append(x)
        return x.cumsum(1)

    guided, counts = PiGDM(torch.zeros(64), watched)(data), []
    for _ in range(3):
        seen.clear()
        guided(x, HALF)
        counts.append(len(seen))
    assert counts[0] - 3 == counts[1] == counts[2]
    assert all(
        is_linear(lambda x: x.cumsum(1), torch.zeros(2, 4096, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert not any(
        is_linear(lambda x: x + 0.1 * x**2, torch.zeros(2, 64, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert is_linear(identity, torch.zeros(0, 3))


def test_operators_are_what_they_say():
    x = randn(2, 3, 4, 6)
    torch.testing.assert_close(AverageBlocks((2, 3))(x), torch.nn.functional.avg_pool2d(x, (2, 3)))
    torch.testing.assert_close(
        AverageBlocks((3,))(x), torch.nn.functional.avg_pool1d(x.flatten(0, 2), 3).reshape(2, 3, 4, 2)
    )
    weights = torch.tensor([[0.2, 0.3, 0.5]])
    torch.testing.assert_close(Mix(weights)(x)[:, 0], 0.2 * x[:, 0] + 0.3 * x[:, 1] + 0.5 * x[:, 2])
    assert Mix(torch.ones(2, 6), axis=-1)(x).shape == (2, 3, 4, 2)
    where = torch.zeros(1, 4, 6, dtype=torch.bool)
    where[:, 1] = True
    assert torch.equal(Select(where)(x)[:, :, 1], x[:, :, 1]) and float(Select(where)(x)[:, :, 0].abs().max()) == 0
    for bad, reason in (
        (AverageBlocks((5,)), "blocks of 5"),
        (AverageBlocks((0,)), "blocks of 0"),
        (Mix(torch.ones(1, 4)), "do not fit axis 1"),
        (Mix(torch.ones(3)), "do not fit axis 1"),
        (Matrix(torch.ones(2, 71)), "do not fit axis 1"),
        (Select(torch.ones(6, dtype=torch.bool)), "an axis for each axis"),
        (Select(torch.ones(3, 4, 5, dtype=torch.bool)), "as long or of length 1"),
        (Select([True]), "bool tensor"),
        (AverageBlocks((2, 3, 4, 6)), "block length for some of the last axes"),
        (AverageBlocks(3), "block length for some of the last axes"),
        (AverageBlocks((1.5,)), "blocks of 1.5"),
        (Mix(torch.ones(1, 2), axis=0), "do not fit axis 0"),
        (Mix(torch.ones(1, 2), axis=-4), "do not fit axis -4"),
        (Mix(torch.ones(1, 2), axis=5), "do not fit axis 5"),
        (Mix(torch.ones(3, 1, 3)), "do not fit axis 1"),
        (Mix([[1.0]]), "weights must be"),
    ):
        with pytest.raises(ConfigError, match=reason):
            bad(x)


def test_bad_input_is_refused():
    y, operator = torch.zeros(2), Matrix(torch.ones(2, 6))
    for build, reason in (
        (lambda: MMPS(torch.tensor([0.0, math.nan]), operator), "1 of the observed numbers"),
        (lambda: DPS(torch.tensor([math.inf, math.nan]), operator), "2 of the observed numbers"),
        (lambda: MMPS(y, operator, sigma_y=-0.1), "sigma_y = -0.1"),
        (lambda: PiGDM(y, operator, sigma_y=math.nan), "sigma_y = nan"),
        (lambda: PiGDM(y, operator, variance=-1.0), "variance = -1.0"),
        (lambda: DPS(y, operator, zeta=math.inf), "zeta = inf"),
        (lambda: MMPS(y, operator, iterations=-1), "iterations = -1"),
        (lambda: MMPS(y, operator, tolerance=math.nan), "tolerance = nan"),
        (lambda: MMPS(y, operator, iterations=0), "iterations = 0"),
        (lambda: MMPS(y, operator, iterations=2.5), "iterations = 2.5"),
        (lambda: PiGDM(y, operator, variance=0.0), "variance = 0.0"),
        (lambda: MMPS(y, operator, sigma_y="a"), "sigma_y = 'a'"),
        (lambda: MMPS(y, operator, sigma_y=torch.tensor(math.nan)), "sigma_y = nan"),
        (lambda: DPS(y, operator, zeta=None), "zeta = None"),
        (lambda: DPS([0.0, 0.0], operator), "y must be a floating-point tensor"),
        (lambda: DPS(y.int(), operator), "y must be a floating-point tensor"),
        (lambda: DPS(y, operator).stack([]), "no guides"),
    ):
        with pytest.raises(ConfigError, match=reason):
            build()


@pytest.mark.parametrize("kind", [DPS, PiGDM, MMPS])
def test_bad_calls_are_refused(kind):
    data, x = Full(gaussian("rectified_flow")), randn(3, 6)
    good = kind(torch.zeros(2), Matrix(torch.ones(2, 6)))
    with pytest.raises(ConfigError, match=r"makes \(3, 4\) of a state, y has \(2,\)"):
        kind(torch.zeros(2), Matrix(torch.ones(4, 6)))(data)(x, HALF)
    for operator in (lambda x: None, lambda x: x.sum(), lambda x: x[:1]):
        with pytest.raises(ConfigError, match="the operator makes"):
            kind(torch.zeros(2), operator)(data)(x, HALF)
    with pytest.raises(ConfigError, match="detaches"):
        good(lambda x_t, t: data(x_t.detach(), t))(x, HALF)
    with pytest.raises(ConfigError, match="detaches"):
        kind(torch.zeros(6), lambda x: x.detach())(data)(x, HALF)
    with pytest.raises(ConfigError, match=f"{kind.__name__}.*bare state"):
        good(lambda x_t, t: data(x_t, t).x0)(x, HALF)
    with pytest.raises(ScheduleError, match="start the grid"):
        good(data)(x, as_time(1.0))
    if kind is not DPS:  # which takes any function
        for operator in (lambda x: x + 1, lambda x: x**2, lambda x: x.abs(), lambda x: x.clamp(-1, 1)):
            with pytest.raises(ConfigError, match=f"{kind.__name__} needs a linear operator"):
                kind(torch.zeros(6), operator)(data)(x, HALF)
