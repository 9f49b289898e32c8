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

from collections.abc import Callable

import numpy as np
import torch

from polydiff.core.schedules import Schedule
from polydiff.core.solvers.base import Array, Point, tabulate

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)  # exact to rounding for intervals of log-SNR up to about 10
_FRACTIONS, _BACK, _WEIGHTS = 0.5 * (_NODES + 1), 0.5 * (_NODES - 1), 0.5 * _WEIGHTS

_UPPER = np.triu(np.ones((5, 5)))

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


def _scale(form: str, at: Point) -> Array:
    """c, but for the x0 form."""
    if form == "velocity":
        return np.ones_like(at.sigma)
    if form == "v":
        return np.hypot(at.alpha, at.sigma)
    return at.alpha if form == "eps" else at.alpha + at.sigma


def tau_span(form: str, start: Point, end: Point, eta2: Array = 0.0) -> tuple[Array, Array]:
    """Numbers c_s/c_t and c_s (tau_s - tau_t) of intervals whose log-SNR is finite at both ends."""
    if form == "x0":
        h = end.log_snr - start.log_snr
        return end.sigma / start.sigma * np.exp(-eta2 * h), -end.alpha * np.expm1(-(1 + eta2) * h)
    c_t, c_s = _scale(form, start), _scale(form, end)
    if form == "velocity":
        return c_s, end.time - start.time
    across = end.sigma * start.alpha - end.alpha * start.sigma
    if form == "v":  # the angle of the difference keeps all digits of a small step
        return c_s / c_t, c_s * np.arctan2(across, end.alpha * start.alpha + end.sigma * start.sigma)
    return c_s / c_t, -end.sigma * np.expm1(end.log_snr - start.log_snr) if form == "eps" else across / c_t


def noise_span(start: Point, end: Point, eta2: Array = 1.0) -> Array:
    """Standard deviation sigma_s sqrt(1 - exp(-2 eta^2 h)) of the noise that intervals of finite log-SNR add."""
    return end.sigma * np.sqrt(-np.expm1(-2 * eta2 * (end.log_snr - start.log_snr)))


def from_x0(form: str, schedule: Schedule, at: Point) -> tuple[Array, Array]:
    """Numbers a, b with p = a x + b x0_hat; sigma is positive."""
    if form == "x0":
        return np.zeros_like(at.sigma), np.ones_like(at.sigma)
    if form == "velocity":
        t = torch.from_numpy(at.time)
        a = schedule.dsigma(t).numpy() / at.sigma
        return a, schedule.dalpha(t).numpy() - at.alpha * a
    c = _scale(form, at)
    return (at.alpha / c if form == "v" else 1) / at.sigma, -c / at.sigma


def between(variable: str, schedule: Schedule, start: Point, end: Point, fractions: Array) -> Point:
    """The points at fractions of the way through each interval, measured in a variable: all at the first, and so on."""
    of, back = VARIABLES[variable]
    first, last = of(start.log_snr, start.time), of(end.log_snr, end.time)
    u = (first + np.multiply.outer(fractions, last - first)).ravel()
    return tabulate(schedule, u if variable == "t" else schedule.t_of_log_snr(torch.from_numpy(back(u))).numpy())


def quadrature(
    form: str, variable: str, schedule: Schedule, start: Point, end: Point, eta2: Array = 0.0
) -> tuple[Array, Array, Array]:
    """Nodes for integrals over tau in n intervals with finite log-SNR, which may have squared noise levels of their own.

    Returns:
        The variable less its value at the start, (n, 24); the weights of the mean over each interval, (n, 24); dtau/dlambda
        at the end of each interval over its mean, (n, 1). ``"index"`` counts the points of the grid.
    """
    back = (end.log_snr - start.log_snr)[:, None] * _BACK  # log-SNR above that of the end
    if variable == "index":
        return np.broadcast_to(_FRACTIONS, back.shape), np.broadcast_to(_WEIGHTS, back.shape), np.ones((len(back), 1))
    log_snr, t = end.log_snr[:, None] + back, back
    if variable == "t" or form == "velocity":
        t = schedule.t_of_log_snr(torch.from_numpy(log_snr)).numpy()
    if form == "x0":
        density = np.exp(back + back * (eta2[:, None] if isinstance(eta2, np.ndarray) else eta2))
    elif form == "eps":
        density = np.exp(-back)
    elif form == "v":
        density = 1 / np.cosh(log_snr)
    elif form == "flow":
        density = 1 / np.cosh(0.5 * log_snr) ** 2
    else:
        density = 1 / np.abs(schedule.dlog_snr(torch.from_numpy(t)).numpy())
    mass = (density @ _WEIGHTS)[:, None]
    of = VARIABLES[variable][0]
    u = of(log_snr, t) - of(start.log_snr, start.time)[:, None]
    return u, density * (_WEIGHTS / mass), 1 / mass


def moments(u: Array, mass: Array, nodes: Array) -> Array:
    """Means (n, p) of Newton's polynomials 1, u - u_1, (u - u_1)(u - u_2), ... of p nodes (n, p), u_1 = 0, in n intervals."""
    found = np.ones(nodes.shape)
    for m in range(1, nodes.shape[1]):
        mass = mass * (u if m == 1 else u - nodes[:, m - 1 : m])
        np.add.reduce(mass, 1, out=found[:, m])
    return found


def differences(nodes: Array) -> Array:
    """Weights (n, p, p) of the value at node j, in the divided difference through the nodes up to m: 0 where m < j."""
    gaps = nodes[:, :, None] - nodes[:, None, :]
    p = nodes.shape[1]
    gaps.reshape(len(nodes), -1)[:, :: p + 1] = 1.0
    return _UPPER[:p, :p] / np.multiply.accumulate(gaps, 2)
