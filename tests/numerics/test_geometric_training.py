"""Objectives on tangents and denoisers of rotations and products."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from polydiff.core import rotations
from polydiff.core.adapter import Condition, Item
from polydiff.core.denoiser import Denoiser, Prediction
from polydiff.core.errors import ConfigError
from polydiff.core.objectives import Objective
from polydiff.core.processes import ProductProcess, SO3Flow, SO3Process, gaussian
from polydiff.core.processes.igso3 import igso3_score_square
from polydiff.core.sampling import sample
from polydiff.core.schedules import VE, as_time
from tests.numerics.exact_rotations import F64, normal, rotation

PROCESS = SO3Process(VE(0.02, 2.5))
FLAT = gaussian("vp")
PRODUCT = ProductProcess({"place": FLAT, "frame": PROCESS}, clock="frame")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Tell(torch.nn.Module):
    """Returns what a function makes of its arguments, and remembers them."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_t, c_noise, mask, cond, present):
        self.seen = (x_t, c_noise, mask, cond, present)
        return self.function(x_t, c_noise)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 0.99, 1.0, 2.5])
def test_mean_square_of_the_score_against_the_series(sigma):
    with mpmath.workdps(30):
        s = mpmath.mpf(sigma)

        def integrand(w):
            terms = range(int(12 / sigma) + 8)
            weight = [(2 * l + 1) * mpmath.exp(-l * (l + 1) * s**2 / 2) for l in terms]
            f = sum(c * mpmath.sin((l + 0.5) * w) for l, c in zip(terms, weight, strict=True)) / mpmath.sin(w / 2)
            up = sum(c * (l + 0.5) * mpmath.cos((l + 0.5) * w) for l, c in zip(terms, weight, strict=True))
            slope = up / mpmath.sin(w / 2) - 0.5 * f * mpmath.cot(w / 2)
            return slope**2 / f * (1 - mpmath.cos(w)) / mpmath.pi

        if sigma > 0.1:
            truth = mpmath.quad(integrand, [0, min(mpmath.pi, 3 * s), min(mpmath.pi, 9 * s)])
        else:
            truth = 3 / s**2 - mpmath.mpf("0.75")  # the next term of small sigma
    assert float(igso3_score_square(sigma)) == pytest.approx(float(truth), rel=1e-8)


@pytest.mark.parametrize("process", [PROCESS, SO3Flow(), SO3Flow(10.0)], ids=repr)
def test_a_prediction_that_says_nothing_costs_one_and_the_truth_nothing(process):
    x0 = rotation(2000, 2)
    objective = Objective(process, time="log_snr")
    still = Denoiser(Tell(lambda x, c: torch.zeros_like(x[..., 0])), process)
    out = objective(still, Item(x0, None, {}, []), generator())
    share = (process.schedule.sigma(out["t"]) / 0.1).clamp_max(1) ** 2 if isinstance(process, SO3Flow) else 1.0
    assert float(out["loss"].mean() / torch.as_tensor(share).mean()) == pytest.approx(1, abs=0.05)
    true = Denoiser(Tell(lambda x, c: x0), process)
    assert float(objective(true, Item(x0, None, {}, []), generator())["loss"].max()) < 1e-12


def test_the_loss_of_rotations_against_its_definition():
    x0, t = rotation(4, 3), torch.tensor([0.1, 0.4, 0.8, 1.0], dtype=F64)
    mask = torch.tensor([[True, True, False]] * 4)
    x_t, guess = PROCESS.perturb(x0, t, normal(4, 3, 3)), rotation(4, 3, seed=5)
    error = PROCESS.error(Prediction(PROCESS, x_t, t, x0=guess), x0, mask)
    for item in range(4):
        at = lambda r, item=item: Prediction(PROCESS, x_t[item : item + 1], t[item], x0=r[item : item + 1]).score[0, :2]
        square = (at(guess) - at(x0)).square().sum(-1).mean()
        expected = square / igso3_score_square(PROCESS.schedule.sigma(t[item]))
        torch.testing.assert_close(error[item], expected)


def test_the_least_loss_of_one_point_is_at_the_point():
    """Gradients of a constant guess vanish at the data alone, and are finite at every angle, pi too."""
    x0 = torch.eye(3, dtype=F64).expand(512, 1, 3, 3)
    objective = Objective(PROCESS, time="log_snr")
    for angle, least in ((0.0, True), (1.0, False), (math.pi, False)):
        u = torch.tensor([angle, 0, 0], dtype=F64, requires_grad=True)
        guess = Denoiser(Tell(lambda x, c, u=u: rotations.exp(u).expand_as(x)), PROCESS)
        objective(guess, Item(x0, None, {}, []), generator())["loss"].mean().backward()
        assert bool(u.grad.isfinite().all()) and (float(u.grad.norm()) < 1e-9) is least


def test_networks_of_rotations_return_tangents_or_rotations():
    x, t = rotation(3, 2), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    target, mask = rotation(3, 2, seed=8), torch.tensor([[True, False]] * 3)
    fixed = torch.tensor([[True, False], [False, False], [False, False]])
    for function in (
        lambda x_t, c: target,
        lambda x_t, c: rotations.tangent(x_t, target) / PROCESS.spread(t)[:, None, None],
    ):
        network = Tell(function)
        denoiser = Denoiser(network, PROCESS)
        prediction = denoiser(x, t, mask)
        torch.testing.assert_close(prediction.x0[:, 0], target[:, 0])
        torch.testing.assert_close(prediction.x0[:, 1], x[:, 1])  # padding stays
        assert prediction.given == "x0" and network.seen[0] is x
        torch.testing.assert_close(network.seen[1], 0.25 * PROCESS.schedule.sigma(t).log().float())
        assert torch.equal(
            PROCESS.reach(x, t, function(x, None), None, fixed)[0, 0], PROCESS.retract(x, 0 * x[..., 0])[0, 0]
        )
    out = sample(Denoiser(Tell(lambda x_t, c: target), PROCESS).bind(), PROCESS, x, "geodesic", 4)
    torch.testing.assert_close(out, target)
    flow = Tell(lambda x_t, c: target)
    Denoiser(flow, SO3Flow())(x, as_time(0.25))
    assert flow.seen[1].tolist() == [0.25] * 3 and flow.seen[1].dtype == torch.float32
    with pytest.raises(ConfigError, match=r"made \(3, 2\) of rotations \(3, 2, 3, 3\): .* or \(3, 2, 3\) is needed"):
        Denoiser(Tell(lambda x_t, c: x_t[..., 0, 0]), PROCESS)(x, t)
    with pytest.raises(ConfigError, match="precondition = 'eps' is for Gaussian processes"):
        Denoiser(flow, PROCESS, "eps")


def test_a_product_is_trained_leaf_by_leaf():
    x0 = {"place": normal(6, 2, 3), "frame": rotation(6, 2)}
    place, frame = torch.nn.Linear(3, 3).double(), torch.nn.Linear(9, 3).double()

    def both(x_t, c):
        return {"place": place(x_t["place"]), "frame": frame(x_t["frame"].flatten(-2))}

    network = Tell(both)
    denoiser = Denoiser(network, PRODUCT, sigma_data=0.7)
    objective = Objective(PRODUCT, time="uniform", sigma_data=0.7)
    mask = torch.tensor([[True, True]] * 3 + [[True, False]] * 3)
    out = objective(denoiser, Item(x0, mask, {}, []), generator())
    torch.testing.assert_close(out["loss"], out["place"] + out["frame"])
    assert [*network.seen[1]] == ["place", "frame"] and network.seen[2] is mask
    t, x_t = out["t"], PRODUCT.perturb(x0, out["t"], {n: normal(6, 2, 3, seed=k) for k, n in enumerate(x0)})
    whole = denoiser(x_t, t, mask)
    for name, process, layer in (
        ("place", FLAT, lambda x, c: place(x)),
        ("frame", PROCESS, lambda x, c: frame(x.flatten(-2))),
    ):
        alone = Denoiser(Tell(layer), process, sigma_data=0.7)(x_t[name], t, mask)
        torch.testing.assert_close(whole.x0[name], alone.x0)
        torch.testing.assert_close(whole.score[name], alone.score)
    out["loss"].mean().backward()
    for layer in (place, frame):
        assert bool(layer.weight.grad.isfinite().all()) and float(layer.weight.grad.norm()) > 0
    at = objective.at(denoiser, Item(x0, mask, {}, []), 0.5, generator())
    assert at.shape == (6,) and bool((at > 0).all())


def test_self_conditioning_of_a_product():
    x = {"place": normal(2, 1, 3), "frame": rotation(2, 1)}
    target, seen = {"place": normal(2, 1, 3, seed=4), "frame": rotation(2, 1, seed=4)}, []

    class Network(torch.nn.Module):
        def forward(self, x_t, c_noise, mask, cond, present):
            seen.append((cond["x0_hat"], present["x0_hat"]))
            return {"place": x_t["place"], "frame": target["frame"]}

    conditions = {"x0_hat": Condition("x0_hat")}
    denoiser = Denoiser(Network(), PRODUCT, conditions=conditions)
    sample(denoiser.bind(), PRODUCT, x, "geodesic", 3, "uniform")
    assert not bool(seen[0][1].any()) and bool(seen[1][1].all())
    torch.testing.assert_close(seen[2][0]["frame"], target["frame"])
    assert seen[0][0]["place"].shape == (2, 1, 3) and float(seen[0][0]["frame"].abs().max()) == 0


@pytest.mark.parametrize("process", [PROCESS, SO3Flow(), SO3Flow(10.0)], ids=repr)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_what_networks_of_rotations_have_to_return_has_unit_size(process, t):
    x0 = rotation(4000, 1)
    u = process.tangent(process.perturb(x0, t, normal(4000, 1, 3)), x0) / process.spread(as_time(t))
    assert float(u.square().mean().sqrt()) == pytest.approx(1, abs=0.02 if isinstance(process, SO3Flow) else 0.25)
