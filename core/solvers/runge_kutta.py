"""Explicit Runge-Kutta and single-step exponential methods in any coordinate, with EDM's churn as an option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polydiff.core.checks import number, shown
from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.schedules import Schedule
from polydiff.core.solvers import base
from polydiff.core.solvers.base import COORDINATES, Array, Plan, Point, Solver, State, combine, divide, predict_x0
from polydiff.core.solvers.coordinates import TAU, between, differences, from_x0, moments, quadrature, tau_span


class Tableau(NamedTuple):
    """A method with several stages in an interval.

    Args:
        nodes: where the stages after the first stand, as fractions of the interval in ``variable``.
        rows: of each stage after the first and of the end, the weights of the stages before; or, where
            ``variable`` is ``"log_snr"``, the stages through which a polynomial in log-SNR is put and integrated.
        order: of accuracy.
        variable: a name in ``VARIABLES``, or ``"tau"`` for the coordinate's own.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[Any, ...], ...]
    order: int
    variable: str = "tau"


_RK4 = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
TABLEAUS = {
    "euler": Tableau((), ((1.0,),), 1),
    "heun": Tableau((1.0,), ((1.0,), (0.5, 0.5)), 2),
    "midpoint": Tableau((0.5,), ((0.5,), (0.0, 1.0)), 2),
    "ralston": Tableau((2 / 3,), ((2 / 3,), (0.25, 0.75)), 2),
    "heun3": Tableau((1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3), (0.25, 0.0, 0.75)), 3),
    "rk4": Tableau((0.5, 0.5, 1.0), _RK4, 4),
    "rk38": Tableau((1 / 3, 2 / 3, 1.0), ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)), 4),
    "pseudo-rk4": Tableau((0.5, 0.5, 1.0), _RK4, 2, "t"),
    "dpm2": Tableau((0.5,), ((0,), (1,)), 2, "log_snr"),
    "dpm3": Tableau((1 / 3, 2 / 3), ((0,), (0, 1), (0, 2)), 3, "log_snr"),
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


class Stage(NamedTuple):
    """Where a stage stands, and its state as a combination of x and the x0_hat of the stages before."""

    point: Point
    scale: float
    weights: tuple[float, ...]


class _Step(NamedTuple):
    raised: Point  # where the step starts; the grid's own point unless churn raised it
    lift: tuple[float, float] | None  # scale of x and of the noise that lead there
    stages: tuple[Stage, ...]
    scale: float
    weights: tuple[float, ...]


def stages(
    tableau: Tableau, form: str, schedule: Schedule, start: Point, end: Point, ends: Sequence[Point]
) -> list[list[Stage]]:
    """The stages of many intervals with finite log-SNR, the last of each being its end; ``ends`` are those one by one.

    A slope p_i = a_i X_i + b_i x0_hat_i, where X_i is itself a combination of x and the x0_hat before it, so that each
    stage folds into one combination of x and x0_hat.
    """
    n, nodes = len(ends), (0.0, *tableau.nodes, 1.0)
    variable = TAU[form] if tableau.variable == "tau" else tableau.variable
    at: dict[float, Point] = {0.0: start, 1.0: end}
    rows: dict[float, Sequence[Point]] = {1.0: ends}
    inner = sorted({*nodes} - {*at})
    if inner:
        middle = between(variable, schedule, start, end, np.array(inner))
        at |= {node: middle.cut(k * n, (k + 1) * n) for k, node in enumerate(inner)}
        rows |= {node: at[node].rows() for node in inner}
    converted = {node: from_x0(form, schedule, at[node]) for node in {*nodes[:-1]}}
    spans = {node: tau_span(form, start, at[node]) for node in {*nodes[1:]}}
    folded: list[tuple[Array, Array]] = [(np.ones(n), np.zeros((0, n)))]
    columns = []
    for node, row in zip(nodes[1:], tableau.rows, strict=True):
        scale, span = spans[node]
        if tableau.variable == "log_snr":
            places = np.stack([at[nodes[i]].log_snr - start.log_snr for i in row], 1)
            u, mass, _ = quadrature(form, variable, schedule, start, at[node])
            shares = differences(places) @ moments(u, mass, places)[:, :, None]
            slopes = [(i, span * shares[:, j, 0]) for j, i in enumerate(row)]
        else:
            slopes = [(i, span * (weight / sum(row))) for i, weight in enumerate(row) if weight]
        weights = np.zeros((len(folded), n))
        for i, slope in slopes:
            (a, b), (of_x, of_x0) = converted[nodes[i]], folded[i]
            scale = scale + slope * a * of_x
            weights[:i] += slope * a * of_x0
            weights[i] += slope * b
        folded.append((scale, weights))
        columns.append(map(Stage, rows[node], scale.tolist(), zip(*weights.tolist(), strict=True)))
    return list(map(list, zip(*columns, strict=True)))


def through_stages(now: Any, x: Tensor, start: Point, plan: Plan, denoise: Denoise) -> tuple[Tensor, Tensor]:
    """Go through the stages of one interval: the state at its end, and x0_hat at its start."""
    x0 = [predict_x0(denoise, x, start)]
    for point, scale, weights in now.stages:
        x0.append(predict_x0(denoise, combine(x, scale, weights, x0), point))
    return combine(x, now.scale, now.weights, x0), x0[0]


@dataclass(frozen=True)
class RungeKutta(Solver):
    """A method with several stages in each interval, for the probability flow in the coordinate of a predicted field.

    Explicit Runge-Kutta methods in tau, and the single-step exponential ones (``dpm2``, ``dpm3``), whose stages integrate
    polynomials in log-SNR exactly. Every stage is folded into one combination of x and x0_hat. An interval that ends at
    sigma = 0 or starts below alpha = 1e-6 is taken at first order in x0_hat.

    Args:
        tableau: a name in ``TABLEAUS``.
        predict: the coordinate, as in ``Multistep``.
        churn: EDM's stochasticity, or None.

    Source: Karras 2022, algorithms 1 and 2 (``heun`` in the eps form); Lu 2022 (DPM-Solver), algorithms 1 and 2.
    """

    tableau: str = "heun"
    predict: str = "eps"
    churn: Churn | None = None

    def __post_init__(self) -> None:
        for kind, value, valid in (("tableau", self.tableau, TABLEAUS), ("form (predict)", self.predict, COORDINATES)):
            if value not in tuple(valid):
                raise unknown(kind, value, valid)
        if self.churn is not None:
            if not isinstance(self.churn, Churn):
                raise ConfigError(f"churn = {shown(self.churn)} must be a Churn(amount, low, high, scale) or None")
            for name, value in self.churn._asdict().items():
                number(f"churn {name}", value, self.churn.low if name == "high" else 0.0)
        tableau = TABLEAUS[self.tableau]
        base.settle(
            self, order=tableau.order, stages=len(tableau.rows), stochastic=bool(self.churn and self.churn.amount)
        )

    def coefficients(self, schedule: Schedule, table: Point, points: Sequence[Point]) -> Sequence[_Step]:
        """Stages, weights and churn of every interval."""
        n = len(points) - 1
        start, first, ends = table.cut(0, n), points[:-1], points[1:]
        lifts: list[tuple[float, float] | None] = [None] * n
        if self.stochastic:
            start, lifts = self._raise(schedule, start)
            first = start.rows()
        low, high, outer = divide(first, ends)
        steps = {k: _Step(first[k], lifts[k], (), scale, (weight,)) for k, (scale, weight) in outer.items()}
        if low < high:
            args = start.cut(low, high), table.cut(low + 1, high + 1), ends[low:high]
            rows = stages(TABLEAUS[self.tableau], self.predict, schedule, *args)
            for k, (*within, (_, scale, weights)) in enumerate(rows, low):
                steps[k] = _Step(first[k], lifts[k], tuple(within), scale, weights)
        return [steps[k] for k in range(n)]

    def _raise(self, schedule: Schedule, start: Point) -> tuple[Point, list[tuple[float, float] | None]]:
        """Where the intervals start once churn has raised them, and what leads there."""
        churn, level = self.churn or Churn(0.0), np.exp(-start.log_snr)
        factor = 1 + min(churn.amount / len(level), math.sqrt(2) - 1)
        usable = (start.alpha >= base.ALPHA_FLOOR) & np.isfinite(start.log_snr)
        usable &= (level >= churn.low) & (level <= churn.high)
        log_snr = np.where(usable, start.log_snr - math.log(factor), 0.0)
        t = schedule.t_of_log_snr(torch.from_numpy(log_snr)).clamp_max(schedule.t_max).numpy()
        usable &= t > start.time
        point = base.tabulate(schedule, np.where(usable, t, start.time))
        scale = point.alpha / np.where(usable, start.alpha, np.inf)
        # the variance that is added, sigma^2 - (scale sigma_t)^2 >= 0
        noise = churn.scale * np.sqrt(np.maximum(point.sigma**2 - (scale * start.sigma) ** 2, 0.0))
        pairs = zip(scale.tolist(), noise.tolist(), strict=True)
        return point, [pair if moved else None for pair, moved in zip(pairs, usable.tolist(), strict=True)]

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """Churn, the stages, and the final combination."""
        now: _Step = plan.steps[k]
        x = state.x
        if now.lift is not None:
            x = x * now.lift[0] + now.lift[1] * noise.draw(k, "churn", x, plan.points[k].t, now.raised.t)
        return State(through_stages(now, x, now.raised, plan, denoise)[0])
