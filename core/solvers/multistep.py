r"""Linear multistep methods in the coordinates of ``polydiff.core.solvers.coordinates``, with corrector and noise.

A step is :math:`x_s = (c_s/c_t)\,x_t + \sum_j w_j p_j`, where :math:`w_j = c_s\int \ell_j\,d\tau` integrates the Lagrange
polynomials through the last predictions. A corrector takes the step again, with a polynomial that also goes through the
prediction at its end, where the next step needs it anyway. Both are linear in x, the predictions and the noise, so that

.. math:: x_s^{\text{corrected}} = x_s + \sum_j (w'_j - w_j)\,p_j

whatever x_t and the noise were: a corrector is nothing but other weights in the step after. With noise level eta in the
x0 form, :math:`\sigma_s\sqrt{1 - e^{-2\eta^2 h}}\,z` is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polydiff.core.denoiser import Denoise, as_prediction
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.schedules import Schedule
from polydiff.core.solvers.base import (
    COORDINATES,
    Plan,
    Point,
    Solver,
    State,
    checked,
    combine,
    first_order,
    gather,
    is_end,
)
from polydiff.core.solvers.coordinates import VARIABLES, Array, Quadrature, from_x0, tau_span
from polydiff.core.solvers.runge_kutta import TABLEAUS, Stage, stages, through_stages
from polydiff.core.variational import log_range

NOISE_FORMS = ("sde", "ancestral", "learned")
CORRECTORS = ("exact", "bh1", "bh2")
_START = {1: "euler", 2: "heun", 3: "heun3", 4: "rk4"}  # tableau of an order


class _Step(NamedTuple):
    field: str  # of the Prediction to use now
    scale: float  # of x
    weights: tuple[float, ...]  # of the predictions, newest first
    noise: float = 0.0  # standard deviation
    spread: float = 0.0  # log of the upper over the lower choice of its variance, where the network chooses
    stages: tuple[Stage, ...] = ()  # of a Runge-Kutta start, whose scale and weights are then those of its end
    own: tuple[float, float] = (0.0, 1.0)  # of x and x0_hat in the prediction to remember


@dataclass(frozen=True)
class Multistep(Solver):
    """Exponential and classical linear multistep methods; order 1 is DDIM, Euler and DDPM.

    Args:
        terms: number of predictions in a step, 1 to 4, which is the nominal order; a corrector uses one more and raises
            the order by one. The attribute ``order`` is what all the settings together reach.
        predict: the coordinate, as in ``polydiff.core.solvers.coordinates``.
        variable: what the interpolating polynomials are polynomials in; ``"index"`` gives the classical Adams weights,
            of order 2 at most unless the grid is uniform in tau.
        corrector: None; ``"exact"``; or UniPC's ``"bh1"`` and ``"bh2"``, which take B(h)/2 for the integral wherever a
            polynomial goes through two predictions. No corrector costs a call; the last interval is not corrected.
        rule: ``"exact"`` integral, or ``"midpoint"``: a line through two predictions counts by its value in the middle
            of the interval.
        blend: share of each polynomial through three or more predictions that its tangent at the newest replaces; 1/2 in
            the published third-order DPM-Solver++, whose order of accuracy it leaves at 2.
        lower_final: lower the order towards the end, so that the last interval has order 1.
        eta: noise level, a number or a function of the log-SNR, taken in the middle of each interval; 0 is the
            probability flow, 1 the full reverse SDE.
        noise_form: ``"sde"`` (constant eta over the interval) or ``"ancestral"`` (DDIM's, order 1); the same at 0 and 1.
            ``"learned"`` is ancestral at eta = 1 with the variance that the network's second head gives.
        startup: ``"low"``: the first steps use as many predictions as there are, one call each, which caps the order at
            2, or 3 with a corrector. ``"full"`` takes the first terms - 2 intervals by Runge-Kutta: 1 or 4 calls more
            for 3 or 4 terms, 2 or 6 with a corrector; in ``"index"`` the first terms - 1 intervals by the pseudo
            Runge-Kutta method of four stages, 3 calls more each.

    Raises:
        ConfigError: a combination without meaning.

    Source: Song 2020 (DDIM), eq. 12 and 16; Nichol 2021, eq. 15; Lu 2022 (DPM-Solver++), eq. 8 and algorithm 2; Zhang
    2023 (DEIS), eq. 14; Zhao 2023 (UniPC), algorithms 1 and 2; Xue 2023 (SA-Solver), algorithm 1; Liu 2022 (PNDM).
    """

    terms: int = 2
    predict: str = "x0"
    variable: str = "log_snr"
    corrector: str | None = None
    rule: str = "exact"
    blend: float = 0.0
    lower_final: bool = False
    eta: float | Callable[[float], float] = 0.0
    noise_form: str = "sde"
    startup: str = "low"
    stages = 1

    def __post_init__(self) -> None:
        if self.predict not in COORDINATES:
            raise unknown("form (predict)", self.predict, COORDINATES)
        if self.variable not in (*VARIABLES, "index"):
            raise unknown("variable", self.variable, (*VARIABLES, "index"))
        if self.corrector is not None and self.corrector not in CORRECTORS:
            raise unknown("corrector", self.corrector, CORRECTORS)
        if self.rule not in ("exact", "midpoint"):
            raise unknown("rule", self.rule, ("exact", "midpoint"))
        if self.noise_form not in NOISE_FORMS:
            raise unknown("noise form", self.noise_form, NOISE_FORMS)
        if self.startup not in ("low", "full"):
            raise unknown("startup", self.startup, ("low", "full"))
        if self.terms not in (1, 2, 3, 4):
            raise ConfigError(f"a multistep order of {self.terms} is not between 1 and 4")
        if not callable(self.eta) and not (math.isfinite(self.eta) and self.eta >= 0):
            raise ConfigError(f"eta = {self.eta} must be finite and at least 0")
        eta = "a function" if callable(self.eta) else self.eta
        bh = self.corrector in ("bh1", "bh2")
        ancestral = self.noise_form != "sde" and self.stochastic
        refused = {
            f"eta = {eta} needs predict='x0', not {self.predict!r}": self.stochastic and self.predict != "x0",
            f"noise_form={self.noise_form!r} has order 1 and no corrector; take noise_form='sde'": ancestral
            and (self.terms > 1 or self.corrector is not None),
            f"noise_form='learned' needs eta = 1, not {eta}": self.noise_form == "learned" and self.eta != 1,
            f"startup='full' has no noise: take eta = 0 instead of {eta}": self.startup == "full" and self.stochastic,
            "rule='midpoint' has no meaning for variable='index'": self.rule == "midpoint" and self.variable == "index",
            f"corrector={self.corrector!r} brings its own rule; leave rule='exact'": bh and self.rule != "exact",
            f"corrector={self.corrector!r} is defined for predict='x0' or 'eps' and variable='log_snr'": bh
            and (self.predict not in ("x0", "eps") or self.variable != "log_snr"),
            f"blend = {self.blend} must lie between 0 and 1": not 0 <= self.blend <= 1,
            "blend needs order 3 or 4, no corrector and another variable than 'index'": bool(self.blend)
            and (self.terms < 3 or self.corrector is not None or self.variable == "index"),
        }
        for reason, holds in refused.items():
            if holds:
                raise ConfigError(reason)

    @property
    def order(self) -> int:  # type: ignore[override]
        """Global order of accuracy without noise, on a grid that is smooth."""
        corrected = self.corrector is not None
        order = self.terms + corrected
        if self.startup == "low":
            order = min(order, 2 + corrected)
        return min(order, 2) if self.lower_final or self.blend or self.variable == "index" else order

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether eta is positive."""
        return callable(self.eta) or self.eta > 0

    def coefficients(self, schedule: Schedule, points: tuple[Point, ...]) -> tuple[_Step, ...]:
        """Scale, weights and noise of every interval."""
        n, table = len(points) - 1, gather(points)
        ends = is_end(table.cut(0, n), table.cut(1, n + 1))
        inner = np.flatnonzero(~ends)  # contiguous: only the first and the last intervals may touch an infinite log-SNR
        low, high = (int(inner[0]), int(inner[-1]) + 1) if len(inner) else (0, 0)
        outer = {k: first_order(points[k], points[k + 1]) for k in (*range(low), *range(high, n))}
        own = list(zip(*(column.tolist() for column in from_x0(self.predict, schedule, table.cut(0, n))), strict=True))
        steps = {k: _Step("x0", scale, (weight,), own=own[k]) for k, (scale, weight) in outer.items()}
        if len(inner):
            steps.update(enumerate(self._inner(schedule, table, low, high, own), low))
        return tuple(steps[k] for k in range(n))

    def _inner(
        self, schedule: Schedule, table: Point, low: int, high: int, own: list[tuple[float, float]]
    ) -> list[_Step]:
        start, end = table.cut(low, high), table.cut(low + 1, high + 1)
        h = end.log_snr - start.log_snr
        eta = self._levels(start.log_snr + 0.5 * h)
        scale, total = tau_span(self.predict, start, end, eta**2)
        quadrature = Quadrature(self.predict, self.variable, schedule, start, end, eta**2)
        nodes, first, last = self._nodes(table, low, high)
        spread = np.zeros_like(h)
        if self.stochastic and self.noise_form != "sde":
            noise = eta * end.sigma * np.sqrt(-np.expm1(-2 * h))
            scale = np.sqrt(np.maximum(end.sigma**2 - noise**2, 0.0)) / start.sigma
            weights = (end.alpha - start.alpha * scale)[:, None]
            if self.noise_form == "learned":
                spread = log_range(torch.from_numpy(start.log_snr), torch.from_numpy(end.log_snr)).numpy()
        else:
            noise = end.sigma * np.sqrt(-np.expm1(-2 * eta**2 * h))
            rule = self.corrector if self.corrector in ("bh1", "bh2") else self.rule
            weights = total[:, None] * _shares(quadrature, nodes, last - first, rule, self.blend)
        begin = self._begin(schedule, start, end, own[low:high])
        if self.corrector is not None:
            nodes = np.concatenate([last[:, None], nodes], 1)
            change = total[:, None] * _shares(quadrature, nodes, last - first, self.corrector, 0.0, base=1)
            change[:, 1:] -= weights
            change[: len(begin)] = 0.0
            weights = np.concatenate([weights, np.zeros((len(h), 1))], 1)
            weights[1:] += scale[1:, None] * change[:-1]
        columns = (scale.tolist(), map(_stripped, weights.tolist()), noise.tolist(), spread.tolist())
        steps = map(_Step, repeat(COORDINATES[self.predict]), *columns, repeat(()), own[low:high])
        return [*begin, *list(steps)[len(begin) :]]

    def _levels(self, log_snr: Array) -> Array:
        """Eta of each interval, from the log-SNR in its middle."""
        if not callable(self.eta):
            return np.full_like(log_snr, self.eta)
        levels = np.array([float(self.eta(value)) for value in log_snr.tolist()])
        for value, level in zip(log_snr, levels, strict=True):
            if not (math.isfinite(level) and level >= 0):
                raise ConfigError(f"eta = {level} at log-SNR {value:.4g} must be finite and at least 0")
        return levels

    def _nodes(self, table: Point, low: int, high: int) -> tuple[Array, Array, Array]:
        """Where the predictions of each interval stand, newest first, NaN for none; and both ends of the interval."""
        at, back = np.arange(low, high)[:, None], np.arange(self.terms)
        if self.variable == "index":
            values, first, last = -back.astype(float), np.zeros(high - low), np.ones(high - low)
        else:
            u = VARIABLES[self.variable][0](table.log_snr, table.time)
            values, first, last = u[at - back], u[low:high], u[low + 1 : high + 1]
        there = (at >= back) & np.isfinite(values)
        if self.lower_final:
            there &= back < len(table.time) - 1 - at
        return np.where(there, values, np.nan), first, last

    def _begin(self, schedule: Schedule, start: Point, end: Point, own: list[tuple[float, float]]) -> list[_Step]:
        """The intervals that a full start takes by Runge-Kutta."""
        index = self.variable == "index"
        count = self.terms - (1 if index else 2)
        if self.startup == "low" or count < 1:
            return []
        tableau = "pseudo-rk4" if index else _START[self.terms - (self.corrector is None)]
        rows = stages(TABLEAUS[tableau], self.predict, schedule, start.cut(0, count), end.cut(0, count))
        return [
            _Step("x0", scale, weights, stages=tuple(within), own=pair)
            for (*within, (_, scale, weights)), pair in zip(rows, own, strict=False)
        ]

    def calls(self, plan: Plan) -> int:
        """One an interval, and those of a Runge-Kutta start."""
        return sum(1 + len(step.stages) for step in plan.steps)

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """One call of the denoiser, but for a Runge-Kutta start, and one linear combination."""
        now: _Step = plan.steps[k]
        x, history, point = state.x, state.history, plan.points[k]
        keep = self.terms if self.corrector is not None else self.terms - 1
        if now.stages:
            out, x0 = through_stages(now, x, point, plan, denoise)
            return State(out, (torch.add(x0 * now.own[1], x, alpha=now.own[0]), *history)[:keep])
        output = denoise(x, point.t)
        if isinstance(output, Tensor):  # x0_hat
            own = output
            if self.predict != "x0" and (keep or now.field != "x0"):
                own = torch.add(output * now.own[1], x, alpha=now.own[0])
            used = output if now.field == "x0" else own
        else:
            used = checked(output, point).field(now.field)
            form = COORDINATES[self.predict]
            own = used if now.field == form or not keep else output.field(form)
        out = combine(x, now.scale, now.weights, (used, *history))
        if now.noise:
            z = noise.draw(k, "step", out, point.t, plan.points[k + 1].t)
            if now.spread:
                z = z * torch.exp(0.5 * now.spread * as_prediction(plan.process, x, point.t, output).fraction)
            out.add_(z, alpha=now.noise)
        return State(out, (own, *history)[:keep] if keep else ())


def _shares(quadrature: Quadrature, nodes: Array, width: Array, rule: str, blend: float, base: int = 0) -> Array:
    """Weights of the predictions in units of the whole integral; a rule takes the place of exact lines from the base."""
    count = np.isfinite(nodes).sum(1)
    lines = count == 2
    if rule == "exact" or count.max() > 2:
        weights = quadrature.weights(nodes, blend)
    else:
        weights = np.zeros_like(nodes)
        weights[:, 0] = 1.0
    if rule == "exact" or not lines.any():
        return weights
    half = 0.5 * (quadrature.density if rule == "bh1" else 1.0) * width / (nodes[:, 1 - base] - nodes[:, base])
    weights[:, 1 - base] = np.where(lines, half, weights[:, 1 - base])
    weights[:, base] = np.where(lines, 1 - half, weights[:, base])
    return weights


def _stripped(weights: list[float]) -> tuple[float, ...]:
    """Without zeros at the end, which stand for predictions that do not exist."""
    while len(weights) > 1 and not weights[-1]:
        weights.pop()
    return tuple(weights)
