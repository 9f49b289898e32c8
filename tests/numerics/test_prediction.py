"""Every conversion between the fields of a prediction, and the preconditionings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from polydiff.core.adapter import Condition
from polydiff.core.denoiser import FIELDS, PRECONDITIONS, Denoiser, Prediction, coefficients, preconditioning
from polydiff.core.errors import ConfigError
from polydiff.core.processes import gaussian
from polydiff.core.schedules import SCHEDULES

T = torch.tensor([0.02, 0.3, 0.6, 0.98], dtype=torch.float64)


def _truth(schedule, t):
    """x_t and all five fields from x0 and eps by their definitions."""
    g = torch.Generator().manual_seed(3)
    x0, eps = (torch.randn(len(t), 3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    a, s, da, ds = (f(t)[:, None, None] for f in (schedule.alpha, schedule.sigma, schedule.dalpha, schedule.dsigma))
    fields = {"x0": x0, "eps": eps, "score": -eps / s, "v": a * eps - s * x0, "velocity": da * x0 + ds * eps}
    return a * x0 + s * eps, fields


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("given,wanted", list(itertools.product(FIELDS, FIELDS)))
def test_every_conversion_gives_the_definition_back(schedule, given, wanted):
    process = gaussian(schedule)
    x_t, fields = _truth(process.schedule, T)
    ours = getattr(Prediction(process, x_t, T, **{given: fields[given]}), wanted)
    scale = fields[wanted].abs().max()
    # rounding of x_t is amplified by the condition number of the conversion, which the coefficients tell
    a, b = coefficients(process.schedule, T, given, wanted)
    amplified = (a.abs() * x_t.abs().amax((1, 2)) + b.abs() * fields[given].abs().amax((1, 2))).max()
    assert float((ours - fields[wanted]).abs().max()) <= 1e-10 * float(scale) + 1e-15 * float(amplified)
    one = Prediction(process, x_t[1:2], T[1], **{given: fields[given][1:2]})
    torch.testing.assert_close(getattr(one, wanted), ours[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("given", FIELDS)
def test_the_fields_that_solvers_integrate_are_as_defined(schedule, given):
    process = gaussian(schedule)
    t = T[1:]  # at the first sigma may be 1e-10, which amplifies rounding
    x_t, fields = _truth(process.schedule, t)
    a, s = process.schedule.alpha(t)[:, None, None], process.schedule.sigma(t)[:, None, None]
    prediction = Prediction(process, x_t, t, **{given: fields[given]})
    torch.testing.assert_close(prediction.field("flow"), fields["eps"] - fields["x0"], rtol=1e-7, atol=1e-7)
    angle = (a * fields["eps"] - s * fields["x0"]) / torch.hypot(a, s)
    torch.testing.assert_close(prediction.field("angle"), angle, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PRECONDITIONS)
def test_a_network_that_meets_its_target_denoises_exactly(schedule, name):
    process, sd = gaussian(schedule), 0.5
    x_t, fields = _truth(process.schedule, T)
    c_skip, c_out, c_in, c_noise = (c[:, None, None] for c in preconditioning(process.schedule, T, name, sd))

    class Target(torch.nn.Module):
        def forward(self, x, level, mask, cond, present):
            torch.testing.assert_close(x, c_in * x_t)
            torch.testing.assert_close(level, c_noise.flatten().float())
            return (fields["x0" if name == "edm" else name] - c_skip * x_t) / c_out

    x0_hat = Denoiser(Target(), process, name, sd)(x_t, T).x0
    torch.testing.assert_close(x0_hat, fields["x0"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity_is_the_drift_minus_half_the_score(schedule):
    process = gaussian(schedule)
    x_t, fields = _truth(process.schedule, T)
    f, g2 = (c(T)[:, None, None] for c in (process.schedule.f, process.schedule.g2))
    torch.testing.assert_close(f * x_t - 0.5 * g2 * fields["score"], fields["velocity"], rtol=1e-9, atol=1e-9)


def test_conversions_without_a_limit_return_zero():
    x = torch.ones(1, 2, dtype=torch.float64)
    for schedule in ("cosine", "rectified_flow"):
        process = gaussian(schedule)
        start, end = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        assert float(Prediction(process, x, start, eps=x).x0.abs().max()) == 0
        assert float(Prediction(process, x, start, score=x).x0.abs().max()) == 0
        assert float(Prediction(process, x, end, x0=0.5 * x).eps.abs().max()) == 0
        assert float(Prediction(process, x, end, x0=0.5 * x).score.abs().max()) == 0
    velocity = Prediction(gaussian("vp"), x, torch.tensor(0.0, dtype=torch.float64), x0=0.5 * x).velocity
    assert float(velocity.abs().max()) == 0  # sigma' is infinite at t = 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_number_at_an_end_is_infinite(schedule):
    process = gaussian(schedule)
    for time in (0.0, 1.0):
        t = torch.tensor(time, dtype=torch.float64)
        for given, wanted in itertools.product(FIELDS, (*FIELDS, "flow", "angle")):
            assert all(map(torch.isfinite, coefficients(process.schedule, t, given, wanted))), (given, wanted)
        for name in PRECONDITIONS:
            assert all(map(torch.isfinite, preconditioning(process.schedule, t, name, 0.5))), name
    if schedule != "ve":  # sigma = 0 at t = 0: the state is the data, whatever the velocity, eps or v
        for given in ("eps", "v", "velocity", "score"):
            a, b = coefficients(process.schedule, torch.zeros((), dtype=torch.float64), given, "x0")
            assert (float(a), float(b)) == (1.0, 0.0), given


def test_one_time_for_all_is_the_same_as_one_for_each():
    denoiser = Denoiser(_Echo(), gaussian("cosine"), "edm", 0.5)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for time in (0.0, 0.3, 1.0):
        t = torch.tensor(time, dtype=torch.float64)
        together, c_noise = denoiser(x, t).x0, denoiser.network.seen[1]
        torch.testing.assert_close(together, denoiser(x, t.expand(3)).x0)
        assert torch.equal(c_noise, denoiser.network.seen[1]) and c_noise.dtype == torch.float32
        assert float(c_noise[0]) == pytest.approx({0.0: -5, 1.0: 5}.get(time, math.log(math.tan(0.15 * math.pi)) / 4))


@pytest.mark.parametrize("name", PRECONDITIONS)
def test_networks_may_answer_in_half_precision(name):
    class Half(torch.nn.Module):
        def forward(self, x_t, c_noise, mask, cond, present):
            assert x_t.dtype == torch.float32
            return x_t.bfloat16()

    for shape in ((), (2,)):
        t = torch.full(shape, 0.5, dtype=torch.float64)
        prediction = Denoiser(Half(), gaussian("vp"), name)(torch.ones(2, 3), t)
        assert prediction.value.dtype == prediction.x0.dtype == torch.float32


def test_network_outputs_are_projected():
    """Nothing on padding or fixed elements, no mean elsewhere: what is predicted lies where the data do."""
    process = gaussian("vp", mean_free=True)
    denoiser = Denoiser(_Echo(), process, "x0", conditions={"fixed": Condition("tensor")})
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    fixed = torch.tensor([[False] * 4, [True, False, False, False]])
    x0_hat = denoiser(x, torch.tensor(0.5, dtype=torch.float64), mask, {"fixed": fixed}).x0
    torch.testing.assert_close(x0_hat.sum(1)[0], torch.zeros(3), atol=1e-6, rtol=0)
    assert float(x0_hat[0, 3].abs().max()) == 0 and float(x0_hat[1, 0].abs().max()) == 0
    assert float(x0_hat[1].sum(0).abs().max()) > 1e-3


def test_exactly_one_known_field():
    x = torch.ones(1, 2)
    for fields in ({}, {"x0": x, "eps": x}, {"noise": x}):
        with pytest.raises(ConfigError, match="exactly one"):
            Prediction(gaussian("vp"), x, T[0], **fields)


class _Echo(torch.nn.Module):
    def forward(self, x_t, c_noise, mask, cond, present):
        self.seen = (x_t, c_noise, mask, cond, present)
        return 0.7 * x_t


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PRECONDITIONS)
def test_preconditioning_gives_unit_inputs_and_targets(schedule, name):
    """With data N(0, sd^2) the network's input and the target that the loss implies both have variance 1."""
    process, sd = gaussian(schedule), 0.5
    c_skip, c_out, c_in, _ = preconditioning(process.schedule, T, name, sd)
    alpha, sigma = process.schedule.alpha(T), process.schedule.sigma(T)
    torch.testing.assert_close(c_in**2 * ((alpha * sd) ** 2 + sigma**2), torch.ones_like(T))
    field = "x0" if name == "edm" else name
    if field == "velocity":
        x0_part, eps_part = process.schedule.dalpha(T), process.schedule.dsigma(T)
    else:
        x0_part = {"x0": 1.0, "eps": 0.0, "score": 0.0, "v": -sigma}[field] * torch.ones_like(T)
        eps_part = {"x0": 0.0, "eps": 1.0, "score": -1 / sigma, "v": alpha}[field] * torch.ones_like(T)
    # target = (field - c_skip x_t) / c_out, variance by components
    variance = ((x0_part - c_skip * alpha) * sd / c_out) ** 2 + ((eps_part - c_skip * sigma) / c_out) ** 2
    torch.testing.assert_close(variance, torch.ones_like(T), rtol=1e-9, atol=0)


def test_edm_preconditioning_equals_the_published_table():
    process, sd = gaussian("edm"), 0.5
    t = torch.linspace(process.t_min, 1, 9, dtype=torch.float64)
    sigma = process.schedule.sigma(t)
    c_skip, c_out, c_in, c_noise = preconditioning(process.schedule, t, "edm", sd)
    torch.testing.assert_close(c_skip, sd**2 / (sigma**2 + sd**2))
    torch.testing.assert_close(c_out, sigma * sd / torch.sqrt(sd**2 + sigma**2))
    torch.testing.assert_close(c_in, 1 / torch.sqrt(sigma**2 + sd**2))
    torch.testing.assert_close(c_noise, torch.log(sigma) / 4)


def test_denoiser_fills_absent_conditions_and_refuses_unknown_ones():
    network = _Echo()
    denoiser = Denoiser(network, gaussian("vp"), "v", 1.0, {"label": Condition(), "style": Condition("tensor", (4,))})
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    prediction = denoiser(x, torch.tensor(0.5, dtype=torch.float64), cond={"label": torch.tensor([1, 2, 0])})
    assert prediction.given == "v" and prediction.v.dtype == torch.float32
    _, c_noise, _, cond, present = network.seen
    assert c_noise.shape == (3,) and cond["style"].shape == (3, 4)
    assert present["label"].all() and not present["style"].any()
    with pytest.raises(ConfigError, match="label"):
        denoiser(x, torch.tensor(0.5), cond={"labels": torch.tensor([1, 2, 0])})


def test_self_conditioning_feeds_the_last_prediction_back():
    network = _Echo()
    denoise = Denoiser(network, gaussian("vp"), conditions={"x0_hat": Condition("tensor")}).bind()
    x, t = torch.ones(2, 3), torch.tensor(0.5, dtype=torch.float64)
    first = denoise(x, t)
    assert not network.seen[4]["x0_hat"].any()
    denoise(x, t)
    assert network.seen[4]["x0_hat"].all()
    torch.testing.assert_close(network.seen[3]["x0_hat"], first.x0)


def test_self_conditioning_is_left_out_where_items_have_times_of_their_own():
    """Adaptive integration and likelihoods need a function of state and time: no memory is used, none is left."""
    process, seen = gaussian("vp"), []

    class Network(torch.nn.Module):
        def forward(self, x_t, c_noise, mask, cond, present):
            seen.append((bool(present["x0_hat"].any()), float(cond["x0_hat"].abs().sum()) > 0))
            return x_t

    denoiser = Denoiser(Network(), process, "x0", conditions={"x0_hat": Condition("tensor")})
    denoise = denoiser.bind()
    x, t = torch.ones(2, 3), torch.tensor(0.5, dtype=torch.float64)
    for time in (t, t, t.expand(2), t):
        denoise(x, time)
    assert seen == [(False, False), (True, True), (False, False), (True, True)]
