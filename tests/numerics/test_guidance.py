import itertools
import math

import pytest
import torch

from polydiff.core.denoiser import FIELDS, Prediction
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.guidance import Replacement, autoguidance, cfg, cfg_pp, classifier_guidance
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import sample
from polydiff.core.schedules import SCHEDULES, VP, as_time
from polydiff.core.solvers import NAMES, resolve
from polydiff.core.solvers.resample import Resample
from tests.numerics.exact import Gaussian, Mixture, as_field

HALF = as_time(0.5)


def pair(schedule="vp"):
    process = gaussian(schedule)
    return Mixture(process, seed=1), Mixture(process, seed=2)


@pytest.mark.parametrize("schedule", ["vp", "edm", "rectified_flow"])
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_pp_denoises_guided_and_renoises_unconditionally(schedule, scale):
    strong, weak = pair(schedule)
    process = strong.process
    grid = make_grid("uniform", 7, process)
    x = strong.draw(grid.times[0], 8)
    found = sample(cfg_pp(as_field(strong, "v"), as_field(weak, "eps"), scale, grid), process, x, "ddim", grid=grid)
    for start, s in itertools.pairwise([*grid.times, None]):
        t = as_time(start)
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        alpha_s, sigma_s = (
            (1, 0) if s is None else (f(as_time(s)) for f in (process.schedule.alpha, process.schedule.sigma))
        )
        d_u, d_c = weak.x0_hat(x, t), strong.x0_hat(x, t)
        x = alpha_s * (d_u + scale * (d_c - d_u)) + sigma_s * (x - alpha * d_u) / sigma
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)


def test_cfg_pp_starts_at_alpha_zero_and_stops_before_the_data():
    strong, weak = pair("rectified_flow")
    x = strong.draw(1.0, 4)
    guide = cfg_pp(as_field(strong, "x0"), as_field(weak, "x0"), 0.5, [1.0, 0.6, 0.2])
    expected = cfg(as_field(strong, "x0"), as_field(weak, "x0"), 0.5)(x, as_time(1.0)).x0
    torch.testing.assert_close(guide(x, as_time(1.0)).x0, expected)  # h is infinite
    h = strong.process.schedule.log_snr(as_time([0.2, 0.6])).diff().abs()
    expected = cfg(as_field(strong, "x0"), as_field(weak, "x0"), float(0.5 / (1 - torch.exp(-h))))(x, as_time(0.6)).x0
    torch.testing.assert_close(guide(x, as_time(0.6)).x0, expected)
    torch.testing.assert_close(guide(x, as_time([0.6] * 4)).x0, expected)
    for time in (0.2, 0.5):  # the end of the grid, and between
        with pytest.raises(ConfigError, match=rf"t = {time}, .*solver=ddim"):
            guide(x, as_time(time))


def test_cfg_pp_needs_a_prediction_and_the_grid_that_is_sampled():
    strong, weak = pair()
    x, grid = strong.draw(1.0, 2), Grid((1.0, 0.5, 0.1))
    with pytest.raises(ConfigError, match=r"CFG.*Prediction"):
        cfg_pp(strong.x0_hat, weak.x0_hat, 0.5, grid)(x, as_time(1.0))
    with pytest.raises(ConfigError, match="no interval of its grid"):
        sample(
            cfg_pp(as_field(strong, "x0"), as_field(weak, "x0"), 0.5, grid), strong.process, x, "midpoint", grid=grid
        )
    with pytest.raises(ConfigError, match="guidance = nan"):
        cfg_pp(strong.x0_hat, weak.x0_hat, math.nan, grid)


def test_autoguidance_extrapolates_from_the_weak_network():
    strong, weak = pair()
    x = strong.draw(0.5, 6)
    expected = weak.x0_hat(x, HALF) + 1.7 * (strong.x0_hat(x, HALF) - weak.x0_hat(x, HALF))
    for field in FIELDS:
        torch.testing.assert_close(
            autoguidance(as_field(strong, field), as_field(weak, "x0"), 1.7)(x, HALF).x0, expected
        )
    # bare states are x0_hat, on either side
    for pair_ in ((strong.x0_hat, weak.x0_hat), (strong.x0_hat, as_field(weak, "v"))):
        torch.testing.assert_close(autoguidance(*pair_, 1.7)(x, HALF), expected)
    torch.testing.assert_close(autoguidance(as_field(strong, "eps"), weak.x0_hat, 1.7)(x, HALF).x0, expected)
    guide = autoguidance(as_field(strong, "x0"), as_field(weak, "x0"), 1.7, interval=(50.0, 60.0))
    assert torch.equal(guide(x, HALF).x0, strong.x0_hat(x, HALF))  # outside of the window: the strong one alone


def test_interval_holds_item_by_item():
    strong, weak = pair()
    x, t = strong.draw(0.5, 3), as_time([0.9, 0.3, 0.01])  # log-SNR -4.0, about 0, 5.8
    guide = cfg(as_field(strong, "x0"), as_field(weak, "x0"), 2.1, (-1.0, 1.0))
    c, u = strong.x0_hat(x, t), weak.x0_hat(x, t)
    expected = torch.stack([c[0], u[1] + 2.1 * (c[1] - u[1]), c[2]])
    torch.testing.assert_close(guide(x, t).x0, expected, rtol=1e-12, atol=1e-12)


class Two:
    """Classes 0 and 1 with densities N(-1, 0.5^2) and N(2, 0.8^2), weights 0.3 and 0.7, in 2 dimensions."""

    means, stds, weights = as_time([-1.0, 2.0]), as_time([0.5, 0.8]), as_time([0.3, 0.7])

    def __init__(self, process):
        self.process = process

    def log_joint(self, x_t, t):
        alpha, sigma = (f(t).reshape(-1, 1, 1) for f in (self.process.schedule.alpha, self.process.schedule.sigma))
        variance = (alpha * self.stds) ** 2 + sigma**2  # (b | 1, 1, 2)
        log = -0.5 * (x_t[..., None] - alpha * self.means) ** 2 / variance - 0.5 * variance.log()
        return log.sum(1) + self.weights.log()

    def score(self, x_t, t, y=None):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            joint = self.log_joint(x, t)
            value = joint.logsumexp(1) if y is None else joint.gather(1, y[:, None])[:, 0]
            return torch.autograd.grad(value.sum(), x)[0]

    def log_prob(self, y):
        return lambda x_t, t: self.log_joint(x_t, t).log_softmax(1).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("field", FIELDS)
def test_classifier_guidance_is_the_rule_of_bayes(schedule, field):
    data = Two(gaussian(schedule))
    y = torch.tensor([0, 1, 1])
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x_t, t):
        prediction = Prediction(data.process, x_t, t, score=data.score(x_t, t))
        return Prediction(data.process, x_t, t, **{field: prediction.field(field)})

    for t in (HALF, as_time([0.3, 0.5, 0.8])):
        with torch.no_grad():  # as in the sampling loop
            guided = classifier_guidance(denoise, data.log_prob(y))(x, t)
            twice = classifier_guidance(denoise, data.log_prob(y), 2.0)(x, t)
        assert guided.given == field and not guided.x0.requires_grad
        torch.testing.assert_close(guided.score, data.score(x, t, y), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(twice.score - guided.score, guided.score - data.score(x, t), rtol=1e-6, atol=1e-7)


def test_bad_classifiers_are_refused():
    data = Mixture(gaussian("rectified_flow"))
    x, denoise = data.draw(0.5, 2), as_field(data, "x0")
    for log_prob, reason in (
        (lambda x_t, t: x_t.sum(), "returned .* where a tensor"),
        (lambda x_t, t: x_t, "a tensor .2, 2. of float64 where a tensor"),
        (lambda x_t, t: x_t.detach().sum(1), "detaches"),
        (lambda x_t, t: torch.zeros(2, requires_grad=True) * 1, "detaches"),
    ):
        with pytest.raises(ConfigError, match=reason):
            classifier_guidance(denoise, log_prob)(x, HALF)
    with pytest.raises(ConfigError, match="bare state"):
        classifier_guidance(data.x0_hat, lambda x_t, t: x_t.sum(1))(x, HALF)
    with pytest.raises(ConfigError, match="guidance = inf"):
        classifier_guidance(denoise, lambda x_t, t: x_t.sum(1), math.inf)
    with pytest.raises(ScheduleError, match="alpha is 0"):
        classifier_guidance(denoise, lambda x_t, t: x_t.sum(1))(x, as_time(1.0))


KNOWN = torch.tensor([0.25, math.nan, -1.5], dtype=torch.float64)
WHERE = torch.tensor([True, False, True])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("field", ["eps", "velocity"])
def test_replacement_ends_on_the_known_elements_under_every_solver(name, field):
    data = Gaussian(gaussian("vp"))
    guide = Replacement(KNOWN, WHERE)
    denoise = as_field(data, field)
    second = lambda x_t, t: Prediction(
        data.process, x_t, t, fraction=torch.full_like(x_t, 0.5), x0=denoise(x_t, t).x0
    )  # a network with a second head, which ddpm-learned needs
    x = data.draw(1.0, 3)
    found, free = (sample(d, data.process, x, name, 8, "karras", generator=3) for d in (guide(second), second))
    assert torch.equal(found[:, WHERE], KNOWN[WHERE].expand(3, 2))
    # the elements of this prior are independent, so that the unknown ones are sampled as ever
    if name != "pc":  # whose step size looks at all elements, as rk45's does
        precision = 1e-4 if name == "rk45" else 1e-9
        torch.testing.assert_close(found[:, 1], free[:, 1], rtol=precision, atol=precision)
    assert float((free[:, WHERE] - KNOWN[WHERE]).abs().min()) > 1e-3


def test_known_elements_are_noised_along_the_path():
    data = Gaussian(gaussian("cosine"))
    x_T, seen = data.draw(0.999, 4), []  # noqa: N806
    sample(
        Replacement(KNOWN, WHERE)(as_field(data, "v")),
        data.process,
        x_T,
        "dpmpp-2m",
        grid=[0.999, 0.7, 0.4, 0.1],
        callback=lambda k, t, x, x0: seen.append(x.clone()),
    )
    schedule = data.process.schedule
    for s, x in zip((0.7, 0.4, 0.1), seen, strict=True):
        (a, b), (c, d) = ((schedule.alpha(u), schedule.sigma(u)) for u in as_time([0.999, s]))
        noise = (x_T - a * KNOWN) / b
        torch.testing.assert_close(x[:, WHERE], (c * KNOWN + d * noise)[:, WHERE], rtol=1e-9, atol=1e-9)


def test_resampling_turns_replacement_into_the_conditional():
    """RePaint: with correlated elements replacement alone is biased; going up again lets the others take notice."""
    process = gaussian("vp")
    covariance, eye = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)

    def denoise(x_t, t):
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        gain = alpha * torch.linalg.solve(alpha**2 * covariance + sigma**2 * eye, covariance)
        return Prediction(process, x_t, t, x0=x_t @ gain)

    guided = Replacement(as_time([1.5, 0.0]), torch.tensor([True, False]))(denoise)
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for repeats in (0, 1, 5):
        out = sample(guided, process, x, Resample(resolve("ddpm"), repeats), 20, "log_snr", generator=1)
        assert torch.equal(out[:, 0], torch.full((400,), 1.5, dtype=torch.float64))
        found.append(float(out[:, 1].mean()))
    errors = [abs(mean - 0.9 * 1.5) for mean in found]  # E[second | first = 1.5]
    assert errors[0] > 0.4 and errors[1] < 0.7 * errors[0] and errors[2] < 0.2


def test_guides_compose_in_any_order():
    strong, weak = (Gaussian(gaussian("vp"), std=std) for std in ((0.3, 1.0, 1.7), (1.0, 2.0, 0.5)))
    c, u, inpaint = as_field(strong, "eps"), as_field(weak, "eps"), Replacement(KNOWN, WHERE)
    x = strong.draw(0.5, 5)
    log_prob = lambda x_t, t: -(x_t**2).sum(1)
    inside = inpaint(cfg(c, u, 2.0))(x, HALF).x0
    outside = cfg(inpaint(c), inpaint(u), 2.0)(x, HALF).x0
    torch.testing.assert_close(inside, outside)
    assert torch.equal(inside[:, WHERE], KNOWN[WHERE].expand(5, 2))
    torch.testing.assert_close(inside[:, 1], cfg(c, u, 2.0)(x, HALF).x0[:, 1])
    tilted = classifier_guidance(cfg(c, u, 2.0), log_prob, 0.3)(x, HALF).score
    same = cfg(classifier_guidance(c, log_prob, 0.3), classifier_guidance(u, log_prob, 0.3), 2.0)(x, HALF).score
    torch.testing.assert_close(tilted, same)
    torch.testing.assert_close(tilted, cfg(c, u, 2.0)(x, HALF).score - 0.6 * x)


def test_guides_keep_the_fraction_of_a_second_head():
    data = Gaussian(gaussian("vp"))
    x, fraction = data.draw(0.5, 2), torch.tensor([[0.1, 0.2, 0.3]]).expand(2, 3)
    denoise = lambda x_t, t: Prediction(data.process, x_t, t, fraction=fraction, x0=data.x0_hat(x_t, t))
    plain = as_field(data, "eps")
    for guided in (
        cfg(denoise, plain, 2.0),
        autoguidance(denoise, plain, 2.0),
        cfg_pp(denoise, plain, 0.5, [0.5, 0.1]),
        classifier_guidance(denoise, lambda x_t, t: x_t.sum(1)),
        Replacement(KNOWN, WHERE)(denoise),
    ):
        assert torch.equal(guided(x, HALF).fraction, fraction)


def test_stacked_guides_guide_each_item_by_its_own():
    data = Gaussian(gaussian("vp"))
    x, denoise = data.draw(0.5, 2), as_field(data, "v")
    guides = [Replacement(KNOWN, WHERE), Replacement(KNOWN.nan_to_num() + 1, ~WHERE)]
    batch = guides[0].stack(guides)(denoise)(x, HALF).x0
    for i, guide in enumerate(guides):
        assert torch.equal(batch[i : i + 1], guide(denoise)(x[i : i + 1], HALF).x0)
    other = Replacement(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"one shape, not \[\(3,\), \(4,\)\]"):
        guides[0].stack([guides[0], other])


def test_bad_replacements_are_refused():
    data = Gaussian(gaussian("vp"))
    x, denoise = data.draw(0.5, 2), as_field(data, "eps")
    with pytest.raises(ConfigError, match="bool"):
        Replacement(KNOWN, WHERE.double())
    with pytest.raises(ConfigError, match="1 of the known numbers"):
        Replacement(KNOWN, torch.tensor([True]))
    for where in (torch.ones(2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(ConfigError, match="fit known"):
            Replacement(KNOWN, where)
    with pytest.raises(ConfigError, match="do not fit a state"):
        Replacement(torch.zeros(4), torch.ones(4, dtype=torch.bool))(denoise)(x, HALF)
    with pytest.raises(ConfigError, match="bare state"):
        Replacement(KNOWN, WHERE)(data.x0_hat)(x, HALF)
    flow = Gaussian(gaussian("rectified_flow"))
    with pytest.raises(ScheduleError, match="replacement cannot act where alpha is 0"):
        Replacement(KNOWN, WHERE)(as_field(flow, "eps"))(x, as_time(1.0))
    moving = GaussianProcess(VP(), mean_free=True)
    with pytest.raises(ConfigError, match="mean-free"):
        Replacement(KNOWN, WHERE)(lambda x_t, t: Prediction(moving, x_t, t, x0=x_t))(x, HALF)


@pytest.mark.parametrize("scale", ["2", None, math.nan, torch.ones(4), True])
def test_scales_that_are_no_numbers_are_named(scale):
    data = Mixture(gaussian("vp"))
    denoise = as_field(data, "x0")
    for make in (
        lambda: cfg(denoise, denoise, scale),
        lambda: cfg_pp(denoise, denoise, scale, (0.9, 0.1)),
        lambda: classifier_guidance(denoise, data.x0_hat, scale),
    ):
        with pytest.raises(ConfigError, match="guidance = "):
            make()


def test_a_scale_of_cfg_is_none_of_cfg_pp():
    denoise = as_field(Mixture(gaussian("vp")), "x0")
    for scale in (7.0, -0.1):
        with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
            cfg_pp(denoise, denoise, scale, (0.9, 0.1))
    with pytest.raises(ConfigError, match=r"make_grid\('karras', steps, process\)"):
        cfg_pp(denoise, denoise, 0.5, "karras")


@pytest.mark.parametrize("interval", [(-1,), "ab", 5, (None, 1), (1, 2, 3), (2, 1)])
def test_intervals_that_are_none_are_named(interval):
    denoise = as_field(Mixture(gaussian("vp")), "x0")
    with pytest.raises(ConfigError, match="guidance interval"):
        cfg(denoise, denoise, 2.0, interval)


@pytest.mark.parametrize("wrapped", [False, True])
def test_guidance_does_not_broadcast(wrapped):
    data = Mixture(gaussian("vp"))
    x = data.draw(0.5, 4)
    whole = as_field(data, "x0") if wrapped else data.x0_hat
    for bad in (lambda x_t, t: data.x0_hat(x_t, t)[:1], lambda x_t, t: data.x0_hat(x_t, t)[:, :1], lambda x_t, t: None):
        with pytest.raises(ConfigError, match=r"without its condition, at t = 0\.5"):
            cfg(whole, bad, 2.0)(x, HALF)
        with pytest.raises(ConfigError, match=r"with its condition, at t = 0\.5"):
            cfg(bad, whole, 2.0)(x, HALF)


def test_what_is_known_is_a_tensor():
    known, where = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    for make in (
        lambda: Replacement(None, where),
        lambda: Replacement([0.0] * 3, where),
        lambda: Replacement(known.int(), where),
    ):
        with pytest.raises(ConfigError, match="known must be a floating-point tensor"):
            make()
    with pytest.raises(ConfigError, match="where must be a bool tensor"):
        Replacement(known, [True] * 3)
