"""Explicit Runge-Kutta methods in any of the coordinates of ``Multistep``, with EDM's churn as an option."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.schedules import Schedule, as_time
from polydiff.core.solvers.base import COORDINATES, Plan, Point, Solver, State, first_order, is_end, predict
from polydiff.core.solvers.multistep import tau_span


class Tableau(NamedTuple):
    """A Butcher tableau: rows of the stages after the first, final weights, order."""

    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    order: int

    @property
    def nodes(self) -> tuple[float, ...]:
        """Position of each stage within the interval."""
        return (0.0, *(sum(row) for row in self.rows))


TABLEAUS = {
    "euler": Tableau((), (1.0,), 1),
    "heun": Tableau(((1.0,),), (0.5, 0.5), 2),
    "midpoint": Tableau(((0.5,),), (0.0, 1.0), 2),
    "ralston": Tableau(((2 / 3,),), (0.25, 0.75), 2),
    "heun3": Tableau(((1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3),
    "rk4": Tableau(((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
}


class Churn(NamedTuple):
    """Noise added before a step: sigma/alpha is raised by the factor 1 + min(amount/steps, sqrt(2) - 1).

    Args:
        amount: S_churn. low, high: range of sigma/alpha in which it acts (S_min, S_max). scale: S_noise.

    Source: Karras 2022, algorithm 2; defaults of its table 5 for ImageNet-64.
    """

    amount: float = 40.0
    low: float = 0.05
    high: float = 50.0
    scale: float = 1.003


class _Step(NamedTuple):
    raised: Point  # where the step starts; the grid's own point unless churn raised it
    lift: tuple[float, float] | None  # scale of x and of the noise that lead there
    field: str
    stages: tuple[tuple[Point, float, tuple[float, ...]], ...]  # where, scale of x, weights of the predictions so far
    scale: float
    weights: tuple[float, ...]


def _point(schedule: Schedule, t: float) -> Point:
    t_ = as_time(t)
    return Point(t_, t, float(schedule.alpha(t_)), float(schedule.sigma(t_)), float(schedule.log_snr(t_)))


def _inside(schedule: Schedule, form: str, start: Point, end: Point, fraction: float) -> Point:
    """The point whose tau lies at a fraction of the way from one end of an interval to the other."""
    if fraction == 1:
        return end

    def tau(point: Point) -> float:
        if form == "x0":
            return math.exp(point.log_snr)
        if form == "eps":
            return math.exp(-point.log_snr)
        if form == "v":
            return math.atan(math.exp(-point.log_snr))
        return point.sigma / (point.alpha + point.sigma)

    if form == "velocity":
        return _point(schedule, start.time + fraction * (end.time - start.time))
    value = tau(start) + fraction * (tau(end) - tau(start))
    log_snr = {
        "x0": lambda: math.log(value),
        "eps": lambda: -math.log(value),
        "v": lambda: -math.log(math.tan(value)),
        "flow": lambda: math.log1p(-value) - math.log(value),
    }[form]()
    return _point(schedule, float(schedule.t_of_log_snr(as_time(log_snr))))


@dataclass(frozen=True)
class RungeKutta(Solver):
    """An explicit Runge-Kutta method for the probability flow in the coordinate of a predicted field.

    Every stage is folded into one linear combination of x and the predictions. An interval that ends at sigma = 0 or
    starts below alpha = 1e-6 is taken at first order in x0_hat.

    Args:
        tableau: a name in ``TABLEAUS``.
        predict: the coordinate, as in ``Multistep``.
        churn: EDM's stochasticity, or None.

    Source: Karras 2022, algorithms 1 and 2 (``heun`` in the eps form).
    """

    tableau: str = "heun"
    predict: str = "eps"
    churn: Churn | None = None

    def __post_init__(self) -> None:
        if self.tableau not in TABLEAUS:
            raise unknown("tableau", self.tableau, TABLEAUS)
        if self.predict not in COORDINATES:
            raise unknown("form (predict)", self.predict, COORDINATES)
        if self.churn is not None and not (all(math.isfinite(v) for v in self.churn) and self.churn.amount >= 0):
            raise ConfigError(f"churn {tuple(self.churn)} must be finite, with an amount of at least 0")

    @property
    def order(self) -> int:  # type: ignore[override]
        """Order of the tableau."""
        return TABLEAUS[self.tableau].order

    @property
    def stages(self) -> int:  # type: ignore[override]
        """Stages of the tableau."""
        return len(TABLEAUS[self.tableau].weights)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether churn adds noise."""
        return self.churn is not None and self.churn.amount > 0

    def coefficients(self, schedule: Schedule, points: tuple[Point, ...]) -> tuple[_Step, ...]:
        """Stages, weights and churn of every interval."""
        n = len(points) - 1
        return tuple(self._step(schedule, points[k], points[k + 1], n) for k in range(n))

    def _step(self, schedule: Schedule, start: Point, end: Point, n: int) -> _Step:
        lift = None
        if not is_end(start, start):
            start, lift = self._raise(schedule, start, n)
        if is_end(start, end):
            scale, weight = first_order(start, end)
            return _Step(start, lift, "x0", (), scale, (weight,))
        tableau = TABLEAUS[self.tableau]
        stages = []
        scale, total = tau_span(self.predict, start, end)
        for row, node in zip(tableau.rows, tableau.nodes[1:], strict=True):
            point = _inside(schedule, self.predict, start, end, node)
            ratio, span = tau_span(self.predict, start, point)
            stages.append((point, ratio, tuple(span / node * weight for weight in row)))
        return _Step(
            start, lift, COORDINATES[self.predict], tuple(stages), scale, tuple(total * b for b in tableau.weights)
        )

    def _raise(self, schedule: Schedule, start: Point, n: int) -> tuple[Point, tuple[float, float] | None]:
        if not self.stochastic or self.churn is None:
            return start, None
        level = math.exp(-start.log_snr)
        if not self.churn.low <= level <= self.churn.high:
            return start, None
        raised = level * (1 + min(self.churn.amount / n, math.sqrt(2) - 1))
        t = min(float(schedule.t_of_log_snr(as_time(-math.log(raised)))), schedule.t_max)
        if t <= start.time:
            return start, None
        point = _point(schedule, t)
        added = math.exp(-2 * point.log_snr) - level**2
        return point, (point.alpha / start.alpha, point.alpha * math.sqrt(max(added, 0.0)) * self.churn.scale)

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """Churn, the stages, and the final combination."""
        now: _Step = plan.steps[k]
        x = state.x
        if now.lift is not None:
            x = x * now.lift[0] + now.lift[1] * noise.draw(k, "churn", x, plan.points[k].t, now.raised.t)
        slopes = [predict(denoise, plan.process, x, now.raised).field(now.field)]
        for point, scale, weights in now.stages:
            slopes.append(predict(denoise, plan.process, _combine(x, scale, slopes, weights), point).field(now.field))
        return State(_combine(x, now.scale, slopes, now.weights))


def _combine(x: Tensor, scale: float, slopes: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    out = x * scale if scale != 1 else x.clone()
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            out.add_(slope, alpha=weight)
    return out
