r"""Euler-Maruyama for the family of reverse SDEs that share their marginals, from the ODE to any amount of noise.

Backward in t, for every diffusion :math:`w(t) \ge 0`,

.. math:: dx = \left[u(x, t) - \tfrac{w}{2}\, s(x, t)\right] dt + \sqrt{w}\, d\bar w

has the marginals of the forward process, where u is the velocity of the probability flow and s the score. With
:math:`w = \text{level}^2 g^2` level 0 is the ODE and level 1 the reverse SDE of the forward process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError
from polydiff.core.schedules import Schedule
from polydiff.core.solvers.base import Plan, Point, Solver, State, first_order, is_end, predict
from polydiff.core.tree import tree_map

Level = float | Callable[[float], float]


def level_at(level: Level, log_snr: float) -> float:
    """A noise level, a number or a function of the log-SNR, at one point.

    Raises:
        ConfigError: it is negative or not finite.
    """
    value = float(level(log_snr)) if callable(level) else float(level)
    if not (math.isfinite(value) and value >= 0):
        where = f" at log-SNR {log_snr:.4g}" if callable(level) else ""
        raise ConfigError(f"noise level {value}{where} must be finite and at least 0")
    return value


class _Step(NamedTuple):
    end: tuple[float, float] | None  # of x and x0_hat, for an interval with an infinite end
    rate: float  # of the velocity: s - t
    score: float
    noise: float  # standard deviation


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""Euler-Maruyama at any diffusion level, on any process and path; the score is derived from the prediction.

    .. math:: x_s = x_t + (s - t)\left(u - \tfrac{w}{2} s\right) + \sqrt{w\,(t - s)}\; z, \qquad w = \text{level}^2 g^2(t)

    through ``process.retract``. Weak order 1, and strong order 1, for w does not depend on x. An interval with an infinite
    log-SNR at an end, or from alpha under 1e-6, where g2 may be infinite, is taken at first order in x0_hat, without noise.

    Args:
        level: 0 is the probability flow, 1 the full reverse SDE; a number or a function of the log-SNR, taken at the start
            of each interval.

    Raises:
        ConfigError: a level that is negative or not finite.

    Source: Song 2021, eq. 6; Karras 2022, eq. 6, for other levels; Ma 2024 (SiT), section 2, for flows.
    """

    level: Level = 1.0
    order = 1
    stages = 1
    needs = "any"

    def __post_init__(self) -> None:
        if not callable(self.level):
            level_at(self.level, 0.0)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether the level is positive."""
        return callable(self.level) or self.level > 0

    def coefficients(self, schedule: Schedule, points: tuple[Point, ...]) -> tuple[_Step, ...]:
        """Numbers of every interval."""
        steps = []
        for start, end in itertools.pairwise(points):
            if is_end(start, end):
                steps.append(_Step(first_order(start, end), 0.0, 0.0, 0.0))
                continue
            span = start.time - end.time
            w = level_at(self.level, start.log_snr) ** 2 * float(schedule.g2(start.t))
            steps.append(_Step(None, -span, 0.5 * w * span, math.sqrt(w * span)))
        return tuple(steps)

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """One call of the denoiser."""
        now: _Step = plan.steps[k]
        prediction = predict(denoise, plan.process, state.x, plan.points[k])
        if now.end is not None:
            scale, weight = now.end
            return State(tree_map(lambda x, x0: x * scale + x0 * weight, state.x, prediction.x0))
        move = tree_map(lambda u: u * now.rate, plan.process.rate(state.x, plan.points[k].t, prediction))
        if now.noise:
            score = prediction.score  # which has the shape of a tangent, as noise has
            z = noise.draw(k, "step", score, plan.points[k].t, plan.points[k + 1].t)
            move = tree_map(lambda m, s, z: m + s * now.score + z * now.noise, move, score, z)
        return State(plan.process.retract(state.x, move))
