"""The best linear denoiser against brute-force least squares, its own closed form, and denoisers of known error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polydiff.core.adapter import Condition, Item, collate
from polydiff.core.denoiser import Denoiser
from polydiff.core.errors import DataError
from polydiff.core.evaluation.linear import LinearDenoiser, fitted, ratios
from polydiff.core.processes import gaussian


def correlated(n: int, seed: int = 0) -> Tensor:
    """n states (2, 3) whose 6 numbers lie in 4 dimensions around a mean, and are no Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
    latent = torch.rand(n, 4, generator=generator) ** 2
    return (latent @ mix + torch.arange(6) / 6).view(n, 2, 3)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.3), (0.6, 0.8), (0.1, 2.0)])
def test_it_is_what_least_squares_finds(alpha: float, sigma: float) -> None:
    """A regression of x0 on (x_t, 1) over many noisy copies of the same items."""
    x0 = correlated(400)
    linear = LinearDenoiser([x0[:150], x0[150:]])
    generator = torch.Generator().manual_seed(1)
    target = x0.flatten(1).double().repeat(60, 1)
    x_t = alpha * target + sigma * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    design = torch.cat([x_t, torch.ones(len(x_t), 1, dtype=torch.float64)], 1)
    weights = torch.linalg.solve(design.T @ design, design.T @ target)  # the normal equations of least squares
    ours = linear(x_t.view(-1, 2, 3), alpha, sigma).flatten(1)
    assert float((design @ weights - ours).square().mean().sqrt()) < 0.01 * float(target.std())
    errors = [float((guess - target).square().mean()) for guess in (design @ weights, ours)]
    assert errors[0] <= errors[1] <= 1.003 * errors[0]  # a fit to these very copies can only be better, and barely is
    assert linear.error(sigma / alpha) == pytest.approx(errors[1], rel=0.01)


def test_without_noise_it_returns_the_state_and_in_noise_alone_the_mean() -> None:
    x0 = correlated(100)
    linear = LinearDenoiser([x0])
    torch.testing.assert_close(linear(0.5 * x0, 0.5, 0.0), x0.double(), rtol=0, atol=1e-6)
    mean = x0.double().mean(0).expand(3, 2, 3)
    torch.testing.assert_close(linear(torch.zeros(3, 2, 3), 1e-9, 1.0), mean, rtol=0, atol=1e-6)


def test_a_single_item_has_no_covariance() -> None:
    with pytest.raises(DataError, match="at least 2"):
        LinearDenoiser([torch.zeros(1, 4)])


class Known(torch.nn.Module):
    """A network whose x0_hat is the linear denoiser's plus an offset, and which notes what it is told."""

    def __init__(self, linear: LinearDenoiser, process: Any, offset: float) -> None:
        super().__init__()
        self.linear, self.process, self.offset = linear, process, offset
        self.seen: list[dict[str, bool]] = []

    def forward(self, x_t: Tensor, c_noise: Tensor, mask: Any, cond: Any, present: Any) -> Tensor:
        self.seen.append({name: bool(value.all()) for name, value in present.items()})
        log_snr = -4 * c_noise[:1].double()
        t = self.process.schedule.t_of_log_snr(log_snr)
        alpha, sigma = float(self.process.schedule.alpha(t)), float(self.process.schedule.sigma(t))
        size = (alpha**2 * 0.7**2 + sigma**2) ** 0.5  # what the preconditioning divided x_t by
        return (self.linear(x_t * size, alpha, sigma) + self.offset).float() / 0.7


def opened(schedule: str, offset: float) -> SimpleNamespace:
    """As much of a run as the ratios need; predicts x0, so that the network's output is known."""
    splits = {"train": correlated(3000), "test": correlated(600, seed=5)}
    data = {name: [Item(x, cond={"label": torch.tensor(1)}) for x in split] for name, split in splits.items()}
    process = gaussian(schedule)
    run = SimpleNamespace(dataset=data.__getitem__, process=process, device=torch.device("cpu"))
    run.adapter = SimpleNamespace(collate=collate)
    network = Known(fitted(run), process, offset)
    run.denoiser = Denoiser(network, process, "x0", 0.7, {"label": Condition("class")})
    return run


@pytest.mark.parametrize("schedule", ["edm", "vp", "rectified_flow"])
def test_ratios_of_denoisers_that_are_known(schedule: str) -> None:
    same = ratios(opened(schedule, 0.0), levels=(0.3, 1.0), n=500)
    assert list(same) == [0.3, 1.0]
    assert all(value == pytest.approx(1, abs=1e-4) for value in same.values())
    run = opened(schedule, 0.5)
    worse = ratios(run, levels=(1.0,), n=500, conditions=False)
    linear = run.denoiser.network.linear
    assert worse[1.0] == pytest.approx(1 + 0.25 / linear.error(0.7), rel=0.05)
    assert run.denoiser.network.seen == [{"label": False}] * 2  # 500 items in calls of 250


def test_ratios_count_every_item_whatever_the_batch() -> None:
    run = opened("vp", 0.5)
    whole, parts = (ratios(run, levels=(1.0,), n=60, linear=run.denoiser.network.linear, batch=b) for b in (60, 7))
    assert parts[1.0] == pytest.approx(whole[1.0], rel=1e-6)
