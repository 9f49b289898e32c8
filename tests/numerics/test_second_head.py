"""A network's second head: what splits it off, trains it, passes it on and takes it."""

from __future__ import annotations

import math

import pytest
import torch

from polydiff.core.adapter import Item
from polydiff.core.denoiser import Denoiser, Prediction
from polydiff.core.errors import ConfigError
from polydiff.core.guidance import cfg
from polydiff.core.objectives import Objective
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import sample
from polydiff.core.schedules import SCHEDULES
from polydiff.core.solvers import Multistep

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TwoHeads(torch.nn.Module):
    """A linear map of the state with a second head along one axis."""

    def __init__(self, d: int, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.mean, self.head = (torch.nn.Parameter(torch.full((d,), value, dtype=F64)) for value in (0.3, -0.2))

    def forward(self, x_t, c_noise, mask, cond, present):
        return torch.cat([self.mean * x_t, self.head * torch.ones_like(x_t)], self.axis)


def test_the_bound_trains_the_second_head_alone() -> None:
    """The mean learns from the simple loss what it learns without the bound; the head learns from the bound only."""
    process = gaussian("vp")
    item = Item(torch.randn(64, 3, generator=generator(), dtype=F64))
    gradients = {}
    for weight in (0.0, 1.0):
        network = TwoHeads(3)
        objective = Objective(process, "simple", "uniform", variance={"weight": weight, "steps": 50})
        out = objective(Denoiser(network, process, "eps"), item, generator(1))
        out["loss"].mean().backward()
        gradients[weight] = (network.mean.grad, network.head.grad)
        torch.testing.assert_close(out["loss"] - weight * out["vlb"], _simple(network, process, item, out["t"]))
    assert torch.equal(gradients[0.0][0], gradients[1.0][0]) and gradients[0.0][0].abs().min() > 0
    assert gradients[0.0][1].abs().max() == 0 and gradients[1.0][1].abs().min() > 0


def _simple(network, process, item, t):
    """The squared error of the noise with the draws of ``Objective``: times first, then noise."""
    g = generator(1)
    torch.rand(64, generator=g, dtype=F64)
    z = torch.randn(64, 3, generator=g, dtype=F64)
    x_t = process.perturb(item.x, t, z)
    return ((network.mean * x_t - z) ** 2).mean(1).detach()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("field", ["eps", "x0", "edm"])
def test_gradients_in_float32_are_finite_and_those_of_float64(schedule, field) -> None:
    """An untrained network errs by hundreds of standard deviations of the last step at the other times."""
    gradients = []
    for dtype in (torch.float32, F64):
        network = TwoHeads(3).to(dtype)
        process = gaussian(schedule)
        objective = Objective(process, "x0", "uniform", variance={"bins": 256, "weight": 1.0, "steps": 100})
        x0 = torch.randint(256, (200, 3), generator=generator(2)).to(dtype) / 127.5 - 1
        prediction = Denoiser(network, process, field)
        z = torch.randn(200, 3, generator=generator(3), dtype=F64).to(dtype)
        t = objective.times(200, generator(4))
        out = prediction(process.perturb(x0, t, z), t)
        objective.terms["vlb"][0](out, x0, t, None, {}).mean().backward()
        gradients.append(network.head.grad)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=2e-3, atol=1e-6)


def test_padding_and_fixed_elements_do_not_count() -> None:
    process = GaussianProcess(gaussian("vp").schedule)
    x = torch.randn(2, 5, 3, generator=generator(), dtype=F64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    fixed = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    objective = Objective(process, "simple", "uniform", variance={"steps": 10})
    assert objective.bound is not None
    t = torch.tensor([0.001, 0.445], dtype=F64)
    v = torch.rand(2, 5, 3, generator=generator(1), dtype=F64)
    prediction = Prediction(process, 0.9 * x, t, x0=x + v, fraction=v)
    whole = objective.bound(prediction, x)
    ours = objective.terms["vlb"][0](prediction, x, t, mask, {"fixed": fixed})
    torch.testing.assert_close(ours, torch.stack([whole[0, 1:4].mean(), whole[1].mean()]))


@pytest.mark.parametrize("shape,axis", [((2, 3), 1), ((2, 3, 4, 4), 1), ((2, 7, 3), 2)])
def test_a_network_with_twice_the_channels_has_a_second_head(shape, axis) -> None:
    process = gaussian("vp")
    network = TwoHeads(1, axis)
    x, t = torch.randn(shape, generator=generator(), dtype=F64), torch.tensor(0.4, dtype=F64)
    prediction = Denoiser(network, process, "eps")(x, t)
    c_in = 1 / torch.hypot(process.schedule.alpha(t), process.schedule.sigma(t))
    torch.testing.assert_close(prediction.eps, 0.3 * c_in * x)
    torch.testing.assert_close(prediction.fraction, torch.full(shape, 0.4, dtype=F64))  # (1 - 0.2)/2
    for name in ("ddim", "heun", "dpmpp-2m", "dpmpp-2m-sde", "ddpm"):
        plain = Denoiser(_First(network, axis), process, "eps")
        ours, theirs = (
            sample(d.bind(), process, x, name, steps=3, generator=1) for d in (Denoiser(network, process, "eps"), plain)
        )
        assert torch.equal(ours, theirs)


class _First(torch.nn.Module):
    def __init__(self, network: torch.nn.Module, axis: int) -> None:
        super().__init__()
        self.network, self.axis = network, axis

    def forward(self, *args):
        return self.network(*args).chunk(2, self.axis)[0]


def test_an_output_of_another_shape_is_refused() -> None:
    network = lambda x, *rest: torch.cat([x, x, x], 1)
    denoiser = Denoiser(torch.nn.Identity(), gaussian("vp"), "eps")
    denoiser.network.forward = network  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"made \(2, 9\) of a state \(2, 3\)"):
        denoiser(torch.zeros(2, 3), torch.tensor(0.5))


def test_guidance_keeps_the_variance_of_the_conditional_branch() -> None:
    process, x, t = gaussian("vp"), torch.ones(2, 3), torch.tensor(0.3, dtype=F64)
    with_condition, without = (
        lambda x, t, value=value: Prediction(process, x, t, eps=value * x, fraction=torch.full_like(x, value))
        for value in (0.25, 0.5)
    )
    for scale in (1.0, 2.5):
        guided = cfg(with_condition, without, scale)(x, t)
        assert torch.equal(guided.fraction, torch.full_like(x, 0.25))
    assert torch.equal(guided.eps, 0.5 * x + 2.5 * (0.25 - 0.5) * x)


def test_what_does_not_go_together_is_refused() -> None:
    process = gaussian("vp")
    assert Objective(process, variance={}).terms["vlb"][1] == 0.001  # lambda of Nichol 2021, section 3.1
    x = torch.ones(2, 3)
    with pytest.raises(ConfigError, match="second head"):
        sample(lambda x, t: x, process, x, "ddpm-learned", steps=4, generator=0)
    with pytest.raises(ConfigError, match="second head"):
        Objective(process, "simple", "uniform", variance={})(
            Denoiser(_First(TwoHeads(3), 1), process, "eps"), Item(x.double()), generator()
        )
    with pytest.raises(ConfigError, match="mean-free"):
        Objective(GaussianProcess(process.schedule, mean_free=True), variance={})
    centred = Prediction(GaussianProcess(process.schedule, mean_free=True), x, torch.tensor(0.5), x0=x, fraction=x)
    with pytest.raises(ConfigError, match="mean-free"):
        _ = centred.fraction
    for options in ({"steps": 1}, {"steps": 2.5}, {"bins": 1}, {"weight": -1.0}, {"weight": math.inf}, {"weight": "a"}):
        with pytest.raises(ConfigError, match=f"objective.variance.{next(iter(options))} = "):
            Objective(process, variance=options)
    with pytest.raises(ConfigError, match="eta = 1"):
        Multistep(1, "x0", eta=0.5, noise_form="learned")
    with pytest.raises(ConfigError, match="order 1"):
        Multistep(2, "x0", eta=1.0, noise_form="learned")
