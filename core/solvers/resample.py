"""Going back up the forward process and down again: restart sampling and the resampling of RePaint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from polydiff.core.checks import number, whole
from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError
from polydiff.core.grids import Grid, make_grid
from polydiff.core.schedules import as_time
from polydiff.core.solvers.base import Plan, Point, Solver, State, resolve, settle

MOST_REPEATS = 1000  # a plan lists every pass: a slip such as 1e9 would fill the memory


class _Step(NamedTuple):
    inner: Plan  # of the solver, from the start of this pass to the end of the grid
    k: int  # interval of that plan
    again: str  # marks the noise of this pass; empty for the first
    below: Point | None  # where to go up from first


@dataclass(frozen=True)
class Resample(Solver):
    r"""Another solver that goes back up by the forward process and repeats parts of its way down.

    Without a window every stretch of ``jump`` intervals between noisy points of the grid, counted from the least noisy one,
    is gone through ``repeats`` more times (RePaint). With a window that is the stretch from ``high`` to the point of the
    grid nearest to ``low``, cut into ``jump`` intervals uniform in (sigma/alpha)^(1/7) (restart sampling). Each pass has
    fresh noise and starts the solver without memory; churn is shared out over the intervals from there to the end.

    Args:
        solver: the solver of every pass, by name or itself.
        repeats: how often each stretch is repeated, at most 1000 times; 0 is the solver alone, and RePaint's r is repeats + 1.
        jump: intervals of a stretch.
        low, high: the window, in sigma/alpha.

    Raises:
        ConfigError: repeats or jump out of range, not 0 < low < high < infinity; when a plan is made: a grid that has no such
            stretch, or a solver that goes up itself.

    Source: Lugmayr 2022 (RePaint), algorithm 1 and section 4.2; Xu 2023 (restart sampling), algorithm 2.
    """

    solver: Any
    repeats: int = 1
    jump: int = 1
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        inner = resolve(self.solver)
        repeats, jump = whole("repeats", self.repeats, 0, MOST_REPEATS), whole("jump", self.jump, 1, MOST_REPEATS)
        settle(self, solver=inner, repeats=repeats, jump=jump, stochastic=repeats > 0 or inner.stochastic)
        settle(self, order=inner.order, stages=inner.stages, needs=inner.needs)
        if (self.low, self.high) != (None, None):
            low = number("low of the window", self.low, above=0.0)
            settle(self, low=low, high=number("high of the window", self.high, above=low))

    def calls(self, plan: Plan) -> int | None:
        """Calls of the solver on all passes."""
        return self.solver.calls(replace(plan, steps=tuple(step.inner.steps[step.k] for step in plan.steps)))

    def make_plan(self, process: Any, grid: Grid) -> Plan:
        """All passes one after the other; ``points[k]`` is where step k starts, after it has gone up if it does."""
        times, here, ways = grid.times, 0, []
        for low, above in self._stretches(process, times) if self.repeats else ():
            ways += [(times[here:], low - here), *[((*above, *times[low:]), self.jump)] * self.repeats]
            here = low
        if here < grid.steps:
            ways.append((times[here:], grid.steps - here))
        points: list[Point] = []
        steps: list[_Step] = []
        for count, (way, taken) in enumerate(ways):
            inner = one_way(self, self.solver, process, Grid(way, grid.final, grid.upward and not self.repeats))
            below = points.pop() if points else inner.points[0]
            steps += [_Step(inner, k, f"pass-{count}" if count else "", None) for k in range(taken)]
            if below.time < inner.points[0].time:
                steps[-taken] = steps[-taken]._replace(below=below)
            points += inner.points[: taken + 1]
        return Plan(process, tuple(points), tuple(steps))

    def _stretches(self, process: Any, times: tuple[float, ...]) -> list[tuple[int, tuple[float, ...]]]:
        """Index of the lower end of each stretch, and the times of the stretch above it."""
        n = len(times) - 1
        if self.low is None or self.high is None:
            if self.jump > n:
                raise ConfigError(f"jump = {self.jump} is longer than a grid of {n} interval(s) between noisy points")
            return [(i, times[i - self.jump : i]) for i in range(n % self.jump + self.jump, n + 1, self.jump)]
        log_snr = process.schedule.log_snr(as_time(times)).tolist()
        low, high = -math.log(self.low), max(-math.log(self.high), log_snr[0])
        found = [i for i, value in enumerate(log_snr) if high < value < math.inf]
        if not found or low <= high:
            window = f"the window of sigma/alpha from {self.low} to {self.high}"
            raise ConfigError(
                f"no noisy point of the grid lies in {window} or under it: take more steps or another window"
            )
        last = min(found, key=lambda i: abs(log_snr[i] - low))
        start = min(float(process.schedule.t_of_log_snr(as_time(high))), times[0])
        return [(last, make_grid("karras", self.jump, process, start, times[last], final=False).times[:-1])]

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """Go up where a pass starts above the end of the last one; then one step of the solver."""
        now: _Step = plan.steps[k]
        noise = noise.again(now.again)
        if now.k == 0:
            x = state.x
            if now.below is not None:
                z = noise.draw(0, "renoise", plan.process.tangent_like(x))
                x = plan.process.renoise(x, now.below.t, plan.points[k].t, z, noise.mask, noise.fixed)
            state = self.solver.init(x, now.inner)
        return self.solver.step(state, now.k, now.inner, denoise, noise)


def one_way(outer: Solver, solver: Solver, process: Any, grid: Grid) -> Plan:
    """The plan of a solver inside another one; a ConfigError unless it goes through each interval of the grid once."""
    plan = solver.plan(process, grid)
    if len(plan) != grid.steps:
        name = type(solver).__name__
        raise ConfigError(f"{name} goes up again, so it stands around {type(outer).__name__} and not inside")
    return plan
