r"""Coordinates in which the linear part of the probability flow is exact, and quadrature in them.

Along the flow y = x/c obeys dy = p dtau with

======== ================= ========================== ===========================
predict  c                 tau                        p
======== ================= ========================== ===========================
x0       sigma             alpha/sigma                x0
eps      alpha             sigma/alpha                eps
v        hypot             atan2(sigma, alpha)        cos(tau) eps - sin(tau) x0
flow     alpha + sigma     sigma/(alpha + sigma)      eps - x0
velocity 1                 t                          alpha' x0 + sigma' eps
======== ================= ========================== ===========================

so that :math:`x_s = (c_s/c_t)\,x_t + c_s\int p\,d\tau`. With noise level eta in the x0 form
:math:`c = \sigma(\sigma/\alpha)^{\eta^2}` and :math:`\tau = (\alpha/\sigma)^{1+\eta^2}`. Everything here works on all
intervals of a grid at once: a ``Point`` may hold numpy arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from polydiff.core.schedules import Schedule
from polydiff.core.solvers.base import Point, tabulate

Array = Any

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)  # exact to rounding for intervals of log-SNR up to about 10
_FRACTIONS, _WEIGHTS = 0.5 * (_NODES + 1), 0.5 * _WEIGHTS

# name -> (value from log-SNR and t, log-SNR from value); time itself needs no inverse
VARIABLES: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array], Array]]] = {
    "log_snr": (lambda log_snr, t: log_snr, lambda u: u),
    "t": (lambda log_snr, t: t, lambda u: u),
    "alpha_over_sigma": (lambda log_snr, t: np.exp(log_snr), np.log),
    "sigma_over_alpha": (lambda log_snr, t: np.exp(-log_snr), lambda u: -np.log(u)),
    "angle": (lambda log_snr, t: np.arctan(np.exp(-log_snr)), lambda u: -np.log(np.tan(u))),
    "flow": (lambda log_snr, t: 1 / (1 + np.exp(log_snr)), lambda u: np.log1p(-u) - np.log(u)),
}
TAU = {"x0": "alpha_over_sigma", "eps": "sigma_over_alpha", "v": "angle", "flow": "flow", "velocity": "t"}


def tau_span(form: str, start: Point, end: Point, eta2: Array = 0.0) -> tuple[Array, Array]:
    """Numbers c_s/c_t and c_s (tau_s - tau_t) of intervals whose log-SNR is finite at both ends."""
    h = end.log_snr - start.log_snr
    if form == "x0":
        return end.sigma / start.sigma * np.exp(-eta2 * h), -end.alpha * np.expm1(-(1 + eta2) * h)
    if form == "eps":
        return end.alpha / start.alpha, -end.sigma * np.expm1(h)
    if form == "v":
        c_s = np.hypot(end.alpha, end.sigma)
        # atan2 of the difference of the two angles keeps all digits of a small step
        turn = np.arctan2(
            end.sigma * start.alpha - end.alpha * start.sigma, end.alpha * start.alpha + end.sigma * start.sigma
        )
        return c_s / np.hypot(start.alpha, start.sigma), c_s * turn
    if form == "flow":
        c_t = start.alpha + start.sigma
        return (end.alpha + end.sigma) / c_t, (end.sigma * start.alpha - start.sigma * end.alpha) / c_t
    return np.ones_like(h), end.time - start.time


def from_x0(form: str, schedule: Schedule, at: Point) -> tuple[Array, Array]:
    """Numbers a, b with p = a x + b x0_hat; sigma is positive."""
    if form == "x0":
        return np.zeros_like(at.sigma), np.ones_like(at.sigma)
    a = 1 / at.sigma
    if form == "eps":
        return a, -at.alpha * a
    if form == "v":
        c = np.hypot(at.alpha, at.sigma)
        return at.alpha * a / c, -c * a
    if form == "flow":
        return a, -(at.alpha + at.sigma) * a
    t = torch.as_tensor(at.time, dtype=torch.float64)
    a = schedule.dsigma(t).numpy() * a
    return a, schedule.dalpha(t).numpy() - at.alpha * a


def between(variable: str, schedule: Schedule, start: Point, end: Point, fraction: float) -> Point:
    """The points at a fraction of the way through each interval, measured in a variable."""
    if fraction == 1:
        return end
    of, back = VARIABLES[variable]
    first, last = of(start.log_snr, start.time), of(end.log_snr, end.time)
    u = torch.from_numpy(first + fraction * (last - first))
    return tabulate(schedule, u if variable == "t" else schedule.t_of_log_snr(torch.from_numpy(back(u.numpy()))))


class Quadrature:
    """Integrals over tau of polynomials in a variable, for n intervals at once.

    Args:
        form, variable: names in the table above and in ``VARIABLES``; ``"index"`` counts the points of the grid, which
            gives the classical Adams weights.
        schedule, start, end: the n intervals, with finite log-SNR.
        eta2: squared noise level of each interval, (n,) or a number.
    """

    def __init__(self, form: str, variable: str, schedule: Schedule, start: Point, end: Point, eta2: Array = 0.0):
        self.form, self.variable, self.schedule, self.start, self.end, self.eta2 = (
            form,
            variable,
            schedule,
            start,
            end,
            eta2,
        )

    @functools.cached_property
    def _integrand(self) -> tuple[Array, Array, Array]:
        """The variable and the integrand's weights at the nodes of every interval, (n, 24); and the density."""
        form, schedule = self.form, self.schedule
        h = (self.end.log_snr - self.start.log_snr)[:, None]
        back = h * (_FRACTIONS - 1)  # log-SNR above that of the end
        if self.variable == "index":
            shape = back.shape
            return np.broadcast_to(_FRACTIONS, shape), np.broadcast_to(_WEIGHTS, shape), np.ones(shape[0])
        log_snr, t = self.end.log_snr[:, None] + back, np.zeros(())
        if self.variable == "t" or form == "velocity":
            t = schedule.t_of_log_snr(torch.from_numpy(log_snr)).numpy()
        if form == "x0":
            density = np.exp((1 + np.asarray(self.eta2)[..., None]) * back)
        elif form == "eps":
            density = np.exp(-back)
        elif form == "v":
            density = 1 / np.cosh(log_snr)
        elif form == "flow":
            density = 1 / np.cosh(0.5 * log_snr) ** 2
        else:
            density = 1 / np.abs(schedule.dlog_snr(torch.from_numpy(t)).numpy())
        density = density * _WEIGHTS
        mass = density.sum(1)
        return VARIABLES[self.variable][0](log_snr, t), density / mass[:, None], 1 / mass

    @property
    def density(self) -> Array:
        """dtau/dlambda at the end of each interval over its mean, (n,)."""
        return self._integrand[2]

    def weights(self, nodes: Array, blend: float = 0.0) -> Array:
        """Mean of each Lagrange polynomial through the nodes (n, p), NaN where there is none; rows sum to 1.

        ``blend`` replaces that share of the polynomial through three or more nodes by its tangent at the first one.
        """
        if nodes.shape[1] == 1:
            return np.ones_like(nodes)
        u, mass, _ = self._integrand
        there = np.isfinite(nodes)
        away = np.where(there[:, None], u[:, :, None] - nodes[:, None], 1.0)
        gaps = np.where(there[:, None], nodes[:, :, None] - nodes[:, None], 1.0)
        diagonal = np.arange(nodes.shape[1])
        gaps[:, diagonal, diagonal] = 1.0
        scale = gaps.prod(2)
        basis = away.prod(2)[..., None] / away  # no node lies strictly inside its interval
        weights = np.where(there, (mass[:, None] @ basis)[:, 0] / scale, 0.0)
        if blend:
            slopes = np.where(there, gaps[:, 0].prod(1)[:, None] / gaps[:, 0] / scale, 0.0)
            slopes[:, 0] = -slopes[:, 1:].sum(1)
            tangent = slopes * (mass * (u - nodes[:, :1])).sum(1)[:, None]
            tangent[:, 0] += 1
            weights = np.where(there.sum(1)[:, None] > 2, (1 - blend) * weights + blend * tangent, weights)
        return weights
