"""Bars of IGSO(3): density, slope and distribution against mpmath, draws against them, speed against the series.

    python tests/bars/igso3.py [n=100000] [rotations=1000000]

The reference is the character series in 70 digits. ``n`` draws a sigma for the Kolmogorov-Smirnov test; ``rotations`` are
scored by our function and by a series of 1,000 orders in float64, in one thread, in pieces that stay in the cache.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import mpmath
import torch
from _bars import arguments, check, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.numerics.test_igso3 import double, reference

from polydiff.core.noise import Noise
from polydiff.core.processes.igso3 import (
    igso3_cdf,
    igso3_log_density,
    igso3_score,
    igso3_tangent,
    igso3_tangent_score,
)

SIGMAS = [0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999999]
SIGMAS += [1.0, 1.01, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5]
ANGLES = [0.0, *(10.0**-k for k in (14, 10, 8, 6, 5, 4, 3, 2)), *(math.pi - 10.0**-k for k in (1, 2, 3, 4, 6, 8, 12))]
ANGLES += [0.0999, 0.1001, *(math.pi * k / 24 for k in range(1, 25))]


def errors(sigma: float) -> tuple[float, float, float]:
    """Largest errors of log density and slope, in units of what the bar allows 1e-6 of, and of the distribution."""
    angles = sorted({*ANGLES, *(sigma * k for k in (0.1, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11.5))})
    angles = [angle for angle in angles if angle <= math.pi]
    at = double(angles)
    log_f, score, cdf = igso3_log_density(at, sigma), igso3_score(at, sigma), igso3_cdf(at, sigma)
    assert bool(log_f.isfinite().all() and score.isfinite().all())
    worst = [0.0, 0.0, 0.0]
    for i, (f, slope, below) in enumerate(reference(angles, sigma)):
        if f > 1e-30:
            exact = float(mpmath.log(f))
            worst[0] = max(worst[0], abs(float(log_f[i]) - exact) / max(1.0, abs(exact)))
            worst[1] = max(worst[1], abs(float(score[i]) - float(slope)) / max(1e-3, abs(float(slope))))
        worst[2] = max(worst[2], abs(float(cdf[i]) - float(below)))
    return worst[0], worst[1], worst[2]


def least_p(n: int) -> tuple[float, float]:
    """Smallest p of the Kolmogorov-Smirnov test over sigmas: of the angles, and of the axes along z."""
    from scipy.stats import kstest

    angle_p, axis_p = [], []
    for k, sigma in enumerate((0.01, 0.1, 0.5, 0.9, 1.1, 1.5, 2.5, 3.5)):
        tangent = igso3_tangent(Noise(0, range(10)).draw(k, "z", torch.empty(10, n // 10, 3)), sigma).reshape(-1, 3)
        length = tangent.double().norm(dim=-1)
        angle_p.append(kstest(igso3_cdf(length, sigma).numpy(), "uniform").pvalue)
        axis_p.append(kstest((0.5 + 0.5 * tangent[:, 2] / length).numpy(), "uniform").pvalue)
    return min(angle_p), min(axis_p)


def series_score(omega: torch.Tensor, sigma: float, orders: int = 1000) -> torch.Tensor:
    """The score by the truncated series as it is commonly summed: sine and cosine of every order."""
    angle = omega.norm(dim=-1)
    half = 0.5 * angle
    value, slope = torch.zeros_like(angle), torch.zeros_like(angle)
    for order in range(orders):
        weight, phase = (2 * order + 1) * math.exp(-0.5 * order * (order + 1) * sigma**2), (order + 0.5) * angle
        value.add_(torch.sin(phase), alpha=weight)
        slope.add_(torch.cos(phase), alpha=weight * (order + 0.5))
    return ((slope / value - 0.5 / torch.tan(half)) / angle).unsqueeze(-1) * omega


def seconds(function, omega: torch.Tensor, sigma: float) -> float:
    """Time for all rotations, in pieces of 16,384."""
    start = time.perf_counter()
    for piece in omega.split(16_384):
        function(piece, sigma)
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = arguments()
    worst = torch.tensor([errors(sigma) for sigma in SIGMAS], dtype=torch.float64).amax(0).tolist()
    where = f"{len(SIGMAS)} sigmas from 0.01 to 3.5, angles 0 to pi, where f > 1e-30"
    met = [check("log density, error / max(1, |log f|)", worst[0], 1e-6, note=where)]
    met.append(check("slope of it, error / max(1e-3, |slope|)", worst[1], 1e-6, note=where))
    met.append(check("distribution function, absolute error", worst[2], 1e-8))
    n = int(given.get("n", 100_000))
    angle_p, axis_p = least_p(n)
    met.append(check(f"KS of {n} angles, least p of 8 sigmas", angle_p, 0.01, at_least=True, note="seed 0"))
    met.append(check(f"KS of {n} axes, least p of 8 sigmas", axis_p, 0.01, at_least=True, note="seed 0"))
    count = int(given.get("rotations", 1_000_000))
    for sigma in (0.5, 1.5):
        omega = igso3_tangent(Noise(1, [0]).draw(0, "z", torch.empty(1, count, 3, dtype=torch.float64))[0], sigma)
        gap = float((igso3_tangent_score(omega[:1000], sigma) - series_score(omega[:1000], sigma)).abs().max())
        ours = min(seconds(igso3_tangent_score, omega, sigma) for _ in range(3))
        series = seconds(series_score, omega, sigma)
        note = f"{ours:.3g} s against {series:.3g} s; they agree within {gap:.1g}"
        met.append(
            check(
                f"score of {count} rotations over the 1,000-order series, sigma {sigma}", ours / series, 0.25, note=note
            )
        )
    print(machine())
    raise SystemExit(0 if all(met) else 1)
