"""Weights, time samplers and the loss against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest, norm

from polydiff.core.adapter import Condition, Item
from polydiff.core.denoiser import FIELDS, Denoiser, Prediction
from polydiff.core.errors import ConfigError
from polydiff.core.objectives import TIMES, WEIGHTS, Objective
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.schedules import SCHEDULES, VP

T = torch.tensor([0.02, 0.3, 0.6, 0.98], dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_make_the_squared_error_of_each_field(schedule):
    """W |dx0|^2 equals the squared error in eps, score, v, velocity when x0_hat is off by dx0."""
    s = SCHEDULES[schedule]()
    a, sg, da, ds = s.alpha(T), s.sigma(T), s.dalpha(T), s.dsigma(T)
    d_eps = -a / sg  # change of eps per unit change of x0 at fixed x_t
    for name, error in {
        "x0": torch.ones_like(T),
        "eps": d_eps,
        "score": d_eps / sg,
        "v": a * d_eps - sg,
        "velocity": da + ds * d_eps,
    }.items():
        torch.testing.assert_close(WEIGHTS[name](s, T, 1.0), error**2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(WEIGHTS["simple"](s, T, 1.0), (a / sg) ** 2)
    torch.testing.assert_close(WEIGHTS["min_snr"](s, T, 1.0), ((a / sg) ** 2).clamp(max=5))
    torch.testing.assert_close(WEIGHTS["likelihood"](s, T, 1.0), s.g2(T) * a**2 / (2 * sg**4))
    torch.testing.assert_close(WEIGHTS["edm"](s, T, 0.5), (0.25 * a**2 + sg**2) / (0.5 * sg) ** 2)


@pytest.mark.parametrize("stratified", [False, True])
def test_time_samplers_have_their_distributions(stratified):
    g = torch.Generator().manual_seed(0)
    process = gaussian("edm", sigma_min=1e-9, sigma_max=1e9)  # a range so wide that nothing is clipped

    def draw(time, process=process, n=4000):
        return Objective(process, time=time, stratified=stratified).times(n, g)

    log_sigma = -process.schedule.log_snr(draw({"name": "log_normal", "mean": -1.2, "std": 1.2}))
    assert kstest(log_sigma.numpy(), norm(-1.2, 1.2).cdf).pvalue > 0.01
    flow = gaussian("rectified_flow")
    u = (draw("logit_normal", flow) - flow.t_min) / (flow.t_max - flow.t_min)
    assert kstest(torch.logit(u).numpy(), norm(0, 1).cdf).pvalue > 0.01
    t = draw("uniform", flow)
    assert kstest(((t - 1e-3) / 0.998).numpy(), "uniform").pvalue > 0.01
    level = flow.schedule.log_snr(draw("log_snr", flow))
    ends = flow.schedule.log_snr(torch.tensor([flow.t_max, flow.t_min], dtype=torch.float64))
    assert kstest(((level - ends[0]) / (ends[1] - ends[0])).numpy(), "uniform").pvalue > 0.01
    if stratified:  # one time in each of n equal slices
        slots = ((draw("uniform", flow, n=64) - 1e-3) / 0.998 * 64).floor().long()
        assert slots.sort().values.tolist() == list(range(64))


class _Linear(torch.nn.Module):
    """Predicts c x, so that the expected loss on Gaussian data is known."""

    def __init__(self, c=0.0):
        super().__init__()
        self.c = torch.nn.Parameter(torch.tensor(float(c), dtype=torch.float64))

    def forward(self, x_t, c_noise, mask, cond, present):
        self.x, self.cond, self.present = x_t, cond, present
        return self.c * x_t


@pytest.mark.parametrize("field", FIELDS)
def test_expected_loss_of_a_known_predictor(field):
    """On N(0, 1) data and VP, a network that returns 0 has E W |x0_hat - x0|^2 in closed form."""
    process = gaussian("vp")
    objective = Objective(process, weight="x0", time="uniform")
    denoiser = Denoiser(_Linear(), process, field, 1.0)
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(4000, 50, generator=g, dtype=torch.float64)
    out = objective(denoiser, Item(x0), g)
    alpha, sigma = process.schedule.alpha(out["t"]), process.schedule.sigma(out["t"])
    da, ds = process.schedule.dalpha(out["t"]), process.schedule.dsigma(out["t"])
    # value 0 of each field means this x0_hat = a x0 + b z
    a, b = {
        "x0": (torch.zeros_like(alpha), torch.zeros_like(alpha)),
        "eps": (torch.ones_like(alpha), sigma / alpha),
        "score": (torch.ones_like(alpha), sigma / alpha),
        "v": (alpha**2, alpha * sigma),
        "velocity": (-alpha * ds / (da * sigma - alpha * ds), -ds * sigma / (da * sigma - alpha * ds)),
    }[field]
    expected = (a - 1) ** 2 + b**2
    ratio = (out["loss"].detach() / expected).mean()
    assert abs(float(ratio) - 1) < 5 * math.sqrt(2 / x0.numel()) * 2


def test_loss_is_the_same_whatever_the_network_predicts():
    """Given one x0_hat, the loss does not depend on the field it is expressed in."""
    process = gaussian("vp")
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(16, 3, 4, generator=g, dtype=torch.float64)
    losses = []
    for field in FIELDS:

        class Wrapped(torch.nn.Module):
            def forward(self, x_t, t, mask=None, cond=None, present=None, field=field):
                prediction = Prediction(process, x_t, t, x0=0.3 * x_t)
                return Prediction(process, x_t, t, **{field: prediction.field(field)})

        losses.append(Objective(process, weight="edm", sigma_data=0.5)(Wrapped(), Item(x0), g.manual_seed(2))["loss"])
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=1e-10)


def test_conditions_drop_at_their_rate_and_reserved_ones_never():
    process = gaussian("vp")
    network = _Linear()
    conditions = {"label": Condition(), "text": Condition("tensor", (2,))}
    denoiser = Denoiser(network, process, conditions=conditions)
    n = 4000
    item = Item(torch.zeros(n, 1), cond={"label": torch.zeros(n, dtype=torch.int64), "text": torch.zeros(n, 2)})
    Objective(process, drop={"label": 0.25})(denoiser, item, torch.Generator().manual_seed(0))
    assert abs(float(network.present["label"].float().mean()) - 0.75) < 4 * math.sqrt(0.25 * 0.75 / n)
    assert network.present["text"].all()


def test_padding_and_fixed_elements_carry_no_loss_and_no_noise():
    process = GaussianProcess(VP())
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x_t, c_noise, mask, cond, present):
            seen["x"] = x_t
            return torch.zeros_like(x_t)

    denoiser = Denoiser(Spy(), process, "x0", 1.0, {"fixed": Condition("tensor")})
    x0 = torch.full((2, 4, 3), 2.0)
    x0[:, 3] = 0
    mask = torch.tensor([[True, True, True, False]] * 2)
    fixed = torch.tensor([[True, False, False, False]] * 2)
    objective = Objective(process, weight="x0", time="uniform")
    out = objective(denoiser, Item(x0, mask, {"fixed": fixed}), torch.Generator().manual_seed(0))
    # x0_hat = 0: the error is 4 on each element that counts, and padding or fixed ones would change the mean
    torch.testing.assert_close(out["loss"], torch.full((2,), 4.0))
    size = (process.schedule.alpha(out["t"]) ** 2 + process.schedule.sigma(out["t"]) ** 2).sqrt().float()
    torch.testing.assert_close(seen["x"][:, 0] * size[:, None], torch.full((2, 3), 2.0))
    assert float(seen["x"][:, 3].abs().max()) == 0


@pytest.mark.parametrize("field", FIELDS)
def test_targets_hold_the_noise_that_was_added(field):
    """A network that knows x0 has no loss, also on a mean-free process, with padding and fixed elements."""
    process = GaussianProcess(VP(), mean_free=True)
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * 4 + [False], [True] * 5] * 8)
    fixed = torch.zeros(16, 5, dtype=torch.bool)
    fixed[:8, :2] = True
    x0 = process.project(torch.randn(16, 5, 3, generator=g, dtype=torch.float64), mask)

    class Knowing(torch.nn.Module):
        def forward(self, x_t, t, mask=None, cond=None, present=None):
            assert torch.equal(x_t[fixed], x0[fixed])
            prediction = Prediction(process, x_t, t, x0=x0)
            return Prediction(process, x_t, t, **{field: prediction.field(field)})

    item = Item(x0, mask, {"fixed": fixed})
    out = Objective(process, weight="x0", time="uniform")(Knowing(), item, g)
    assert float(out["loss"].max()) < 1e-18
    assert float(Objective(process).at(Knowing(), item, 0.5, g).max()) < 1e-18


def test_held_out_error_of_a_known_predictor():
    """x0_hat = 0 is off by x0, x0_hat = c x_t by (c alpha - 1) x0 + c sigma z; conditions and mask are passed on."""
    process = gaussian("vp")
    mask = torch.tensor([[True, True, False], [True, True, True]]).repeat(2000, 1)
    x0 = torch.full((4000, 3, 2), 2.0, dtype=torch.float64) * mask[..., None]
    seen: dict[str, Any] = {}

    def denoiser(x_t, t, mask, cond):
        seen.update(mask=mask, cond=cond)
        return Prediction(process, x_t, t, x0=seen["c"] * x_t)

    item = Item(x0, mask, {"label": torch.zeros(4000)})
    t = torch.tensor(0.4, dtype=torch.float64)
    alpha, sigma = float(process.schedule.alpha(t)), float(process.schedule.sigma(t))
    for c in (0.0, 0.5):
        seen["c"] = c
        error = Objective(process).at(denoiser, item, 0.4, torch.Generator().manual_seed(0))
        expected = 4 * (c * alpha - 1) ** 2 + (c * sigma) ** 2
        assert error.shape == (4000,) and float(error.mean()) == pytest.approx(expected, rel=0.02 if c else 1e-12)
    assert seen["mask"] is mask and seen["cond"] is item.cond


def test_further_terms_are_weighted_in():
    process = gaussian("vp")
    denoiser = Denoiser(_Linear(), process)
    item, g = Item(torch.ones(4, 2, dtype=torch.float64)), torch.Generator()
    plain = Objective(process)(denoiser, item, g.manual_seed(0))
    term = {"size": (lambda prediction, x0, t, mask, cond: x0.flatten(1).sum(1), 3.0)}
    with_term = Objective(process, terms=term)(denoiser, item, g.manual_seed(0))
    torch.testing.assert_close(with_term["loss"], plain["loss"] + 3.0 * 2.0)
    torch.testing.assert_close(with_term["size"], torch.full((4,), 2.0, dtype=torch.float64))


def test_self_conditioning_is_given_to_half_of_the_items():
    process, network = gaussian("vp"), _Linear(0.5)
    denoiser = Denoiser(network, process, "x0", conditions={"x0_hat": Condition("tensor")})
    n = 2000
    Objective(process)(denoiser, Item(torch.ones(n, 2, dtype=torch.float64)), torch.Generator().manual_seed(0))
    share = float(network.present["x0_hat"].float().mean())
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / n)
    assert not network.cond["x0_hat"].requires_grad
    torch.testing.assert_close(network.cond["x0_hat"], 0.5 * network.x)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": "edmm"},
        {"time": "lognormal"},
        {"time": {"name": "uniform", "mean": 1}},
        {"time": {"name": "log_normal", "std": 0.0}},
        {"time": {"name": "logit_normal", "mean": math.nan}},
        {"drop": 1.5},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError):
        Objective(gaussian("vp"), **options)


def test_every_time_sampler_stays_in_range():
    for schedule in SCHEDULES:
        process = gaussian(schedule)
        for name in TIMES:
            t = Objective(process, time=name).times(500, torch.Generator().manual_seed(0))
            assert float(t.min()) >= process.t_min - 1e-12 and float(t.max()) <= process.t_max + 1e-12
