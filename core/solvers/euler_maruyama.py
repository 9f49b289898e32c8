"""Euler-Maruyama for all the reverse SDEs that share the marginals of the forward process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from polydiff.core.denoiser import Denoise
from polydiff.core.schedules import Schedule
from polydiff.core.solvers.base import Plan, Point, Solver, State, combine, divide, level_at, predict, settle


class _Step(NamedTuple):
    end: tuple[float, float] | None  # of x and x0_hat, for an interval with an infinite end
    rate: float = 0.0  # of the velocity
    score: float = 0.0
    noise: float = 0.0  # standard deviation


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""Euler-Maruyama with any amount of noise, on any path; the score is derived from the prediction.

    Backward in t, :math:`dx = [u - \tfrac{w}{2}\,s]\,dt + \sqrt{w}\,d\bar w` has the forward marginals for every diffusion
    :math:`w(t) \ge 0`, where u is the velocity of the probability flow and s the score. From t to s < t

    .. math:: x_s = x_t + (s - t)\left(u - \tfrac{w}{2}\,\text{score}\right) + \sqrt{w\,(t - s)}\; z,
              \qquad w = \text{level}^2\, g^2(t)

    of order 1 in the weak and, as w does not depend on x, in the strong sense. An interval with an infinite log-SNR at an
    end, or from alpha under 1e-6, where g2 may be infinite, is taken in x0_hat without noise.

    Args:
        level: 0 is the probability flow, 1 the reverse of the forward SDE; a number or a function of the log-SNR, taken at
            the start of each interval.

    Raises:
        ConfigError: a level that is negative or not finite, a function's when the plan is made.

    Source: Song 2021, eq. 6; Karras 2022, eq. 6, for other levels; Ma 2024 (SiT), section 2, for flows.
    """

    level: float | Callable[[float], float] = 1.0
    order = 1
    stages = 1

    def __post_init__(self) -> None:
        settle(self, level=self.level if callable(self.level) else level_at("level", self.level))
        settle(self, stochastic=bool(self.level))

    def coefficients(self, schedule: Schedule, table: Point, points: Sequence[Point]) -> Sequence[_Step]:
        """Numbers of every interval."""
        low, high, outer = divide(points[:-1], points[1:])
        g2 = schedule.g2(torch.from_numpy(table.time[low:high])).tolist()
        steps = {k: _Step(numbers) for k, numbers in outer.items()}
        for k, value in enumerate(g2, low):
            span = points[k].time - points[k + 1].time
            spread = level_at("level", self.level, points[k].log_snr) ** 2 * value * span
            steps[k] = _Step(None, -span, 0.5 * spread, math.sqrt(spread))
        return [steps[k] for k in range(len(steps))]

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """One call of the denoiser."""
        now: _Step = plan.steps[k]
        start, end = plan.points[k], plan.points[k + 1]
        prediction = predict(denoise, plan.process, state.x, start)
        if now.end is not None:
            scale, weight = now.end
            return State(combine(state.x, scale, (weight,), (prediction.x0,)))
        terms, weights = [prediction.velocity], [now.rate]
        if now.noise:
            terms += [prediction.score, noise.draw(k, "step", state.x, start.t, end.t)]
            weights += [now.score, now.noise]
        return State(combine(state.x, 1.0, weights, terms))
