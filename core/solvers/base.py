"""What every solver is: a frozen description of a method, a plan of numbers, and a step."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polydiff.core.denoiser import Denoise, Prediction, as_prediction
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import Grid
from polydiff.core.schedules import Schedule, as_time

ALPHA_FLOOR = 1e-6  # below it the state holds no data, and an interval is taken at first order in x0_hat

# name -> the field of a Prediction that obeys dy = p dtau; see Multistep for the table
COORDINATES = {"x0": "x0", "eps": "eps", "v": "angle", "flow": "flow", "velocity": "velocity"}


class Point(NamedTuple):
    """Schedule values at one time, plain numbers; ``t`` is the 0-dim float64 tensor that denoisers get.

    While a plan is made one Point holds many times: arrays, and ``t`` a tensor of one axis.
    """

    t: Tensor
    time: Any
    alpha: Any
    sigma: Any
    log_snr: Any

    def cut(self, start: int, end: int) -> Point:
        """The times from one place to another."""
        return Point(*(column[start:end] for column in self))

    def rows(self) -> list[Point]:
        """One Point of plain numbers for each time."""
        return list(map(Point, self.t.unbind(), *(column.tolist() for column in self[1:])))


@dataclass(frozen=True)
class Plan:
    """Everything a solver needs to know about its grid, computed once.

    Args:
        process: the process the plan was made for.
        points: the n + 1 ends of the n intervals, the last with sigma = 0 where the grid is final.
        steps: one record of coefficients per interval, of the solver's own type.
    """

    process: Any
    points: tuple[Point, ...]
    steps: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.steps)


class State(NamedTuple):
    """A solver's state: the sample and the predictions it remembers, newest first."""

    x: Tensor
    history: tuple[Tensor, ...] = ()


def tabulate(schedule: Schedule, t: Tensor) -> Point:
    """Evaluate a schedule at many times (n,), float64."""
    return Point(t, *(column.numpy() for column in (t, schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t))))


def make_points(schedule: Schedule, grid: Grid) -> tuple[Point, ...]:
    """Evaluate a schedule at the times of a grid, vectorised in float64; a final grid ends at the data."""
    points = tabulate(schedule, as_time(grid.times)).rows()
    if grid.final:
        points.append(Point(torch.zeros((), dtype=torch.float64), 0.0, 1.0, 0.0, math.inf))
    return tuple(points)


def gather(points: Sequence[Point]) -> Point:
    """Many points as one that holds arrays."""
    columns = np.array([point[1:] for point in points]).T
    return Point(torch.from_numpy(columns[0]), *columns)


def first_order(start: Point, end: Point) -> tuple[float, float]:
    """Numbers a, w of the first-order step in x0_hat, x_s = a x_t + w x0_hat (DDIM); finite at alpha = 0 and sigma_s = 0."""
    if start.sigma == 0:
        raise ScheduleError(f"a step cannot start at t = {start.time}, where sigma = 0 and nothing is left to denoise")
    ratio = end.sigma / start.sigma
    return ratio, end.alpha - start.alpha * ratio


def is_end(start: Point, end: Point) -> Any:
    """Whether an interval touches an infinite log-SNR (or alpha under 1e-6) and is taken at first order in x0_hat."""
    return (start.alpha < ALPHA_FLOOR) | ~(np.isfinite(start.log_snr) & np.isfinite(end.log_snr))


def predict(denoise: Denoise, process: Any, x: Tensor, point: Point) -> Prediction:
    """Call a Denoise at a point of the plan and check that x0_hat can be had from it there."""
    return checked(as_prediction(process, x, point.t, denoise(x, point.t)), point)


def checked(prediction: Prediction, point: Point) -> Prediction:
    """A prediction from which x0_hat can be had at this point.

    Raises:
        ScheduleError: alpha is practically 0, and eps or the score was predicted.
    """
    if point.alpha < ALPHA_FLOOR and prediction.given in ("eps", "score"):
        raise ScheduleError(
            f"at t = {point.time} alpha is {point.alpha:.1g}, where x0 does not follow from a predicted "
            f"{prediction.given}: start the grid at a smaller t, or use a denoiser that predicts x0, v or velocity"
        )
    return prediction


def predict_x0(denoise: Denoise, x: Tensor, point: Point) -> Tensor:
    """x0_hat at a point of the plan; a Denoise that returns it bare is not wrapped."""
    output = denoise(x, point.t)
    return output if isinstance(output, Tensor) else checked(output, point).x0


def combine(x: Tensor, scale: float, weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """scale x + sum of weights times terms, a new tensor; as many terms as both have."""
    out = x * scale if scale else torch.zeros_like(x)
    for weight, term in zip(weights, terms, strict=False):
        if weight:
            out.add_(term, alpha=weight)
    return out


class Solver(ABC):
    """Interface of every solver. Subclasses are frozen dataclasses, so that plans can be cached by value.

    Attributes:
        order: global order of accuracy of the method without noise.
        stages: calls of the denoiser per interval, or None where they are not known before.
        stochastic: whether steps draw noise.
        needs: ``"gaussian"`` or ``"any"`` process.
    """

    order: int
    stages: int | None
    stochastic: bool
    needs: str = "gaussian"

    def plan(self, process: Any, grid: Grid) -> Plan:
        """Compute every coefficient of a grid once; cached by solver, process and grid.

        Raises:
            ConfigError: the solver does not work on this process.
        """
        if self.needs == "gaussian" and getattr(process, "kind", "") != "gaussian":
            raise ConfigError(f"{type(self).__name__} needs a Gaussian process, not {type(process).__name__}")
        return _cached_plan(self, process, grid)

    def make_plan(self, process: Any, grid: Grid) -> Plan:
        """What ``plan`` keeps: one record per interval of the grid; solvers around another one lay out more."""
        points = make_points(process.schedule, grid)
        return Plan(process, points, self.coefficients(process.schedule, points))

    def coefficients(self, schedule: Schedule, points: tuple[Point, ...]) -> tuple[Any, ...]:
        """One record per interval; without any for solvers that make their own plan."""
        return ()

    def init(self, x: Tensor, plan: Plan) -> State:
        """Start from the state at the first time of the plan."""
        return State(x)

    def calls(self, plan: Plan) -> int | None:
        """Calls of the denoiser that a plan takes; None where that depends on what is sampled."""
        if self.stages is None:
            return None
        return sum(1 if is_end(start, end) else self.stages for start, end in itertools.pairwise(plan.points))

    @abstractmethod
    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """Go through interval k."""


@functools.lru_cache(maxsize=256)
def _cached_plan(solver: Solver, process: Any, grid: Grid) -> Plan:
    return solver.make_plan(process, grid)
