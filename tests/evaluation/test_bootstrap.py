"""Intervals cover what they should as often as they say."""

from __future__ import annotations

import pytest
import torch

from polydiff.core.evaluation.bootstrap import interval, mean_interval
from polydiff.core.evaluation.frechet import frechet_distance, moments


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_coverage_of_a_mean(level: float):
    """400 experiments of 60 draws; the share that covers the true mean is the level within three standard errors."""
    generator = torch.Generator().manual_seed(0)
    trials, hits = 400, 0
    for trial in range(trials):
        x = torch.randn(60, generator=generator) + 3
        low, high = mean_interval(x, seed=trial, level=level)
        hits += low <= 3 <= high
    error = (level * (1 - level) / trials) ** 0.5
    assert level - 0.02 - 3 * error <= hits / trials <= level + 3 * error  # 0.02: percentile ends at n = 60 are narrow


def test_width_is_the_standard_error():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = mean_interval(x, resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(float(x.mean()), abs=0.01)


def test_same_seed_same_interval():
    x = torch.arange(30.0)
    assert mean_interval(x, seed=4) == mean_interval(x, seed=4)
    assert mean_interval(x, seed=4) != mean_interval(x, seed=5)


def test_centring_undoes_the_bias_of_a_biased_statistic():
    """A Frechet distance between equal distributions: the plain interval misses the estimate, the centred one holds it."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 20, generator=generator) for n in (100, 2000))
    fitted, estimate = moments(y), frechet_distance(x, moments(y))
    statistic = lambda index: frechet_distance(x[index], fitted)
    plain, centred = interval(statistic, 100), interval(statistic, 100, estimate=estimate)
    assert plain[0] > estimate
    assert centred[0] < estimate < centred[1]
    assert centred[1] - centred[0] == pytest.approx(plain[1] - plain[0])


def test_the_centred_interval_covers():
    """A shift by v adds |v|^2 to the Frechet distance's value without shift, in about 95 of 100 experiments."""
    generator = torch.Generator().manual_seed(0)
    shift, hits, trials = torch.full((4,), 0.5), 0, 60
    fitted = moments(torch.randn(20_000, 4, generator=generator))
    floor = [frechet_distance(torch.randn(80, 4, generator=generator), fitted) for _ in range(200)]
    truth = 1.0 + sum(floor) / len(floor)
    values, widths = [], []
    for trial in range(trials):
        x = torch.randn(80, 4, generator=generator) + shift
        values.append(frechet_distance(x, fitted))
        statistic = lambda index, x=x: frechet_distance(x[index], fitted)
        low, high = interval(statistic, 80, seed=trial, resamples=100, estimate=values[-1])
        hits += low <= truth <= high
        widths.append(high - low)
    assert hits / trials > 0.95 - 0.02 - 3 * (0.95 * 0.05 / trials) ** 0.5
    assert sum(widths) / trials == pytest.approx(2 * 1.96 * float(torch.tensor(values).std()), rel=0.35)
