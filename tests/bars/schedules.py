"""Bar "schedules, conversions": float64 against closed forms in 40 digits and against autograd.

python tests/bars/schedules.py
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import mpmath
import torch
from _bars import check, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.numerics.test_schedules import CLOSED

from polydiff.core.denoiser import FIELDS, Prediction
from polydiff.core.processes import gaussian
from polydiff.core.schedules import SCHEDULES

TIMES = torch.linspace(1e-3, 0.999, 60, dtype=torch.float64)


def closed_forms(name: str) -> float:
    """Largest relative error of alpha, sigma, their derivatives, f, g2, lambda's derivative and the inverse."""
    schedule, (alpha, sigma), worst = SCHEDULES[name](), CLOSED[name], mpmath.mpf(0)
    for t in TIMES:
        exact = mpmath.mpf(float(t))
        a, s, da, ds = alpha(exact), sigma(exact), mpmath.diff(alpha, exact), mpmath.diff(sigma, exact)
        log_snr = mpmath.log(a / s)
        pairs = (
            (schedule.alpha(t), a),
            (schedule.sigma(t), s),
            (schedule.dalpha(t), da),
            (schedule.dsigma(t), ds),
            (schedule.f(t), da / a),
            (schedule.g2(t), 2 * s * ds - 2 * da / a * s**2),
            (schedule.dlog_snr(t), da / a - ds / s),
            (schedule.t_of_log_snr(torch.tensor(float(log_snr), dtype=torch.float64)), exact),
        )
        for ours, truth in pairs:
            worst = max(worst, abs(mpmath.mpf(float(ours)) - truth) / abs(truth) if truth else abs(float(ours)))
        worst = max(worst, abs(float(schedule.log_snr(t)) - log_snr) / max(1, abs(log_snr)))
    return float(worst)


def chain_products() -> float:
    """Largest relative error of alpha, sigma and the inverse at the times of the chain with linear betas."""
    schedule, worst, product = SCHEDULES["discrete"](), mpmath.mpf(0), mpmath.mpf(1)
    for i in range(1000):
        product *= 1 - (mpmath.mpf("1e-4") + (mpmath.mpf("0.02") - mpmath.mpf("1e-4")) * i / 999)
        t = torch.tensor((i + 1) / 1000, dtype=torch.float64)
        log_snr = torch.tensor(float(mpmath.log(product / (1 - product)) / 2), dtype=torch.float64)
        pairs = (
            (schedule.alpha(t), mpmath.sqrt(product)),
            (schedule.sigma(t), mpmath.sqrt(1 - product)),
            (schedule.t_of_log_snr(log_snr), mpmath.mpf(i + 1) / 1000),
        )
        worst = max(worst, *(abs(mpmath.mpf(float(ours)) / truth - 1) for ours, truth in pairs))
    return float(worst)


def autograd(name: str) -> float:
    """Largest relative difference between dalpha, dsigma and automatic differentiation."""
    schedule, worst = SCHEDULES[name](), 0.0
    t = TIMES.clone().requires_grad_(True)
    for function, derivative in ((schedule.alpha, schedule.dalpha), (schedule.sigma, schedule.dsigma)):
        value = function(t)
        gradient = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        scale = gradient.abs().clamp_min(1e-300)
        worst = max(worst, float(((derivative(t.detach()) - gradient).abs() / scale).max()))
    return worst


def conversions(name: str) -> float:
    """Largest error of all 25 conversions, relative to the largest term of the linear combination they are."""
    from polydiff.core.denoiser import coefficients

    process, g = gaussian(name), torch.Generator().manual_seed(0)
    s = process.schedule
    x0, eps = (torch.randn(len(TIMES), 64, generator=g, dtype=torch.float64) for _ in range(2))
    a, sg, da, ds = (f(TIMES)[:, None] for f in (s.alpha, s.sigma, s.dalpha, s.dsigma))
    x_t = a * x0 + sg * eps
    truth = {"x0": x0, "eps": eps, "score": -eps / sg, "v": a * eps - sg * x0, "velocity": da * x0 + ds * eps}
    worst = 0.0
    for given, wanted in itertools.product(FIELDS, FIELDS):
        ours = Prediction(process, x_t, TIMES, **{given: truth[given]}).field(wanted)
        left, right = (c[:, None].abs() for c in coefficients(s, TIMES, given, wanted))
        size = torch.maximum(left * x_t.abs(), right * truth[given].abs()).amax(1, keepdim=True)
        size = torch.maximum(size, truth[wanted].abs().amax(1, keepdim=True))
        worst = max(worst, float(((ours - truth[wanted]).abs() / size).max()))
    return worst


if __name__ == "__main__":
    mpmath.mp.dps = 40
    met = []
    for schedule in SCHEDULES:
        if schedule in CLOSED:
            met.append(check(f"{schedule}: closed forms, relative error", closed_forms(schedule), 1e-10))
        else:
            met.append(check(f"{schedule}: products of 1 - beta, relative error", chain_products(), 1e-10))
        met.append(check(f"{schedule}: autograd derivatives, relative error", autograd(schedule), 1e-10))
        met.append(check(f"{schedule}: 25 conversions, relative error", conversions(schedule), 1e-10))
    print(machine())
    raise SystemExit(0 if all(met) else 1)
