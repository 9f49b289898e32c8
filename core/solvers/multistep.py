r"""Linear multistep methods in the coordinates where the linear part of the probability flow is exact.

Along the flow y = x/c obeys dy = p dtau, with

======== ================= ========================== ===========================
predict  c                 tau                        p
======== ================= ========================== ===========================
x0       sigma             alpha/sigma                x0
eps      alpha             sigma/alpha                eps
v        hypot             atan2(sigma, alpha)        cos(tau) eps - sin(tau) x0
flow     alpha + sigma     sigma/(alpha + sigma)      eps - x0
velocity 1                 t                          alpha' x0 + sigma' eps
======== ================= ========================== ===========================

so that :math:`x_s = (c_s/c_t) x_t + \sum_j w_j p_j` where :math:`w_j = c_s\int \ell_j\,d\tau` integrates the Lagrange
polynomials through the last predictions. With noise level eta in the x0 form,
:math:`c = \sigma(\sigma/\alpha)^{\eta^2}`, :math:`\tau = (\alpha/\sigma)^{1+\eta^2}`, and
:math:`\sigma_s\sqrt{1 - e^{-2\eta^2 h}}\,z` is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.schedules import Schedule, as_time
from polydiff.core.solvers.base import COORDINATES, Plan, Point, Solver, State, first_order, is_end, predict
from polydiff.core.variational import log_range

_NODES, _QUADRATURE = np.polynomial.legendre.leggauss(24)  # on [-1, 1]; exact to rounding for |h| up to about 10

NOISE_FORMS = ("sde", "ancestral", "learned")

Array = Any


def tau_span(form: str, start: Point, end: Point, eta2: float = 0.0) -> tuple[float, float]:
    """Numbers c_s/c_t and c_s (tau_s - tau_t) of an interval whose log-SNR is finite at both ends."""
    h = end.log_snr - start.log_snr
    if form == "x0":
        return end.sigma / start.sigma * math.exp(-eta2 * h), -end.alpha * math.expm1(-(1 + eta2) * h)
    if form == "eps":
        return end.alpha / start.alpha, -end.sigma * math.expm1(h)
    if form == "v":
        c_t, c_s = math.hypot(start.alpha, start.sigma), math.hypot(end.alpha, end.sigma)
        # atan2 of the difference of the two angles keeps all digits of a small step
        turn = math.atan2(
            end.sigma * start.alpha - end.alpha * start.sigma, end.alpha * start.alpha + end.sigma * start.sigma
        )
        return c_s / c_t, c_s * turn
    if form == "flow":
        c_t, c_s = start.alpha + start.sigma, end.alpha + end.sigma
        return c_s / c_t, (end.sigma * start.alpha - start.sigma * end.alpha) / c_t
    return 1.0, end.time - start.time


def _density(form: str, log_snr: Array, t: Array, schedule: Schedule, eta2: float) -> Array:
    """|dtau/dlambda| up to a constant factor per interval: the weight under which polynomials are integrated."""
    shifted = log_snr - log_snr[:, -1:]
    if form == "x0":
        return np.exp((1 + eta2) * shifted)
    if form == "eps":
        return np.exp(-shifted)
    if form == "v":
        return 1 / np.cosh(log_snr)
    if form == "flow":
        return 1 / np.cosh(0.5 * log_snr) ** 2
    return 1 / np.abs(schedule.dlog_snr(torch.from_numpy(t)).numpy())


VARIABLES: dict[str, Callable[[Array, Array], Array]] = {  # of (log-SNR, t)
    "log_snr": lambda log_snr, t: log_snr,
    "t": lambda log_snr, t: t,
    "sigma_over_alpha": lambda log_snr, t: np.exp(-log_snr),
    "angle": lambda log_snr, t: np.arctan(np.exp(-log_snr)),
    "flow": lambda log_snr, t: 1 / (1 + np.exp(log_snr)),
}


def _lagrange(nodes: list[float], u: Array, j: int) -> Array:
    out = np.ones_like(u)
    for i, node in enumerate(nodes):
        if i != j:
            out = out * (u - node) / (nodes[j] - node)
    return out


class _Step(NamedTuple):
    field: str  # of the Prediction to use now
    scale: float  # of x
    weights: tuple[float, ...]  # of the predictions, newest first
    noise: float  # standard deviation
    spread: float = 0.0  # log of the upper over the lower choice of its variance, where the network chooses


@dataclass(frozen=True)
class Multistep(Solver):
    """Exponential and classical linear multistep methods; order 1 is DDIM, Euler and DDPM.

    Args:
        order: number of predictions used, 1 to 4. The first steps use as many as there are, so the global order is
            at most 2.
        predict: the coordinate of the module's table.
        variable: what the interpolating polynomials are polynomials in; ``"index"`` gives the classical
            Adams-Bashforth weights.
        rule: ``"exact"`` integral, or ``"midpoint"``: the polynomial's value in the middle of the interval.
        lower_final: lower the order towards the end, so that the last interval has order 1.
        eta: noise level; 0 is the probability flow, 1 the full reverse SDE.
        noise_form: ``"sde"`` (constant eta over the interval) or ``"ancestral"`` (DDIM's, order 1); the same at 0 and 1.
            ``"learned"`` is ancestral at eta = 1 with the variance that the network's second head gives.

    Raises:
        ConfigError: a combination without meaning.

    Source: Song 2020 (DDIM), eq. 12 and 16; Nichol 2021, eq. 15; Lu 2022 (DPM-Solver++), eq. 8 and algorithm 2; Zhang
    2023 (DEIS), eq. 14.
    """

    order: int = 2
    predict: str = "x0"
    variable: str = "log_snr"
    rule: str = "exact"
    lower_final: bool = False
    eta: float = 0.0
    noise_form: str = "sde"
    stages = 1

    def __post_init__(self) -> None:
        if self.predict not in COORDINATES:
            raise unknown("form (predict)", self.predict, COORDINATES)
        if self.variable not in (*VARIABLES, "index"):
            raise unknown("variable", self.variable, (*VARIABLES, "index"))
        if self.rule not in ("exact", "midpoint"):
            raise unknown("rule", self.rule, ("exact", "midpoint"))
        if self.noise_form not in NOISE_FORMS:
            raise unknown("noise form", self.noise_form, NOISE_FORMS)
        if not 1 <= self.order <= 4:
            raise ConfigError(f"a multistep order of {self.order} is not between 1 and 4")
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ConfigError(f"eta = {self.eta} must be finite and at least 0")
        if self.eta and self.predict != "x0":
            raise ConfigError(f"eta = {self.eta} needs predict='x0', not {self.predict!r}")
        if self.eta and self.noise_form != "sde" and self.order > 1:
            raise ConfigError(f"noise_form={self.noise_form!r} has order 1; take noise_form='sde' for higher orders")
        if self.eta != 1 and self.noise_form == "learned":
            raise ConfigError(f"noise_form='learned' needs eta = 1, not {self.eta}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether eta is positive."""
        return self.eta > 0

    def coefficients(self, schedule: Schedule, points: tuple[Point, ...]) -> tuple[_Step, ...]:
        """Scale, weights and noise of every interval."""
        n = len(points) - 1
        ends = [is_end(points[k], points[k + 1]) for k in range(n)]
        inner = [k for k in range(n) if not ends[k]]
        u, density = self._quadrature(schedule, points, inner)
        steps = []
        row = 0
        for k in range(n):
            start, end = points[k], points[k + 1]
            if ends[k]:
                scale, weight = first_order(start, end)
                steps.append(_Step("x0", scale, (weight,), 0.0))
                continue
            order = min(self.order, n - k) if self.lower_final else self.order
            steps.append(self._step(points, k, order, u[row], density[row]))
            row += 1
        return tuple(steps)

    def _quadrature(self, schedule: Schedule, points: tuple[Point, ...], inner: list[int]) -> tuple[Array, Array]:
        """The polynomials' variable and the weight of the integral at the nodes of all inner intervals at once."""
        start = np.array([points[k].log_snr for k in inner])[:, None]
        end = np.array([points[k + 1].log_snr for k in inner])[:, None]
        fraction = 0.5 * (_NODES + 1)
        log_snr = start + (end - start) * np.append(fraction, 1.0)
        t = schedule.t_of_log_snr(torch.from_numpy(log_snr)).numpy()
        density = _density(self.predict, log_snr, t, schedule, self.eta**2)[:, : len(_NODES)] * _QUADRATURE
        if self.variable == "index":
            u = np.broadcast_to(fraction, density.shape)
            return u, np.broadcast_to(0.5 * _QUADRATURE, density.shape)
        u = VARIABLES[self.variable](log_snr, t)
        if self.rule == "midpoint":
            first, last = (VARIABLES[self.variable](log_snr_, t_) for log_snr_, t_ in self._ends(points, inner))
            return 0.5 * (first + last)[:, None], np.ones((len(inner), 1))
        return u[:, : len(_NODES)], density

    @staticmethod
    def _ends(points: tuple[Point, ...], inner: list[int]) -> list[tuple[Array, Array]]:
        return [
            (np.array([points[k + i].log_snr for k in inner]), np.array([points[k + i].time for k in inner]))
            for i in (0, 1)
        ]

    def _step(self, points: tuple[Point, ...], k: int, order: int, u: Array, density: Array) -> _Step:
        start, end = points[k], points[k + 1]
        nodes: list[float] = []
        for back in range(min(order, k + 1)):
            point = points[k - back]
            if self.variable == "index":
                node = float(-back)
            else:
                node = float(VARIABLES[self.variable](np.float64(point.log_snr), np.float64(point.time)))
            if not math.isfinite(node):
                break
            nodes.append(node)
        eta2 = self.eta**2
        h = end.log_snr - start.log_snr
        if self.noise_form != "sde" and eta2:
            noise = self.eta * end.sigma * math.sqrt(-math.expm1(-2 * h))
            along = math.sqrt(max(end.sigma**2 - noise**2, 0.0)) / start.sigma
            spread = float(log_range(as_time(start.log_snr), as_time(end.log_snr)))
            spread = spread if self.noise_form == "learned" else 0.0
            return _Step("x0", along, (end.alpha - start.alpha * along,), noise, spread)
        scale, total = tau_span(self.predict, start, end, eta2)
        mass = density.sum()
        weights = tuple(total * float((density * _lagrange(nodes, u, j)).sum() / mass) for j in range(len(nodes)))
        noise = end.sigma * math.sqrt(-math.expm1(-2 * eta2 * h)) if eta2 else 0.0
        return _Step(COORDINATES[self.predict], scale, weights, noise)

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """One call of the denoiser and one linear combination."""
        now: _Step = plan.steps[k]
        prediction = predict(denoise, plan.process, state.x, plan.points[k])
        used = prediction.field(now.field)
        x = torch.add(state.x * now.scale, used, alpha=now.weights[0]) if now.scale else used * now.weights[0]
        for weight, past in zip(now.weights[1:], state.history, strict=False):
            x = x.add_(past, alpha=weight)
        if now.noise:
            z = noise.draw(k, "step", x, plan.points[k].t, plan.points[k + 1].t)
            if now.spread:
                z = z * torch.exp(0.5 * now.spread * prediction.fraction)
            x = x.add_(z, alpha=now.noise)
        if self.order == 1:
            return State(x)
        own = COORDINATES[self.predict]
        remembered = used if now.field == own else prediction.field(own)
        return State(x, (remembered, *state.history)[: self.order - 1])
