"""What every solver is: a frozen description of a method, a plan of numbers, and a step."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polydiff.core.checks import number, shown
from polydiff.core.denoiser import Denoise, Prediction, as_prediction
from polydiff.core.errors import ConfigError, ScheduleError, unknown
from polydiff.core.grids import Grid
from polydiff.core.schedules import Schedule

Array = Any  # of numpy, or a number

ALPHA_FLOOR = 1e-6  # below it the state holds no data, and an interval is taken at first order in x0_hat

_DATA = np.array([[0.0], [1.0], [0.0], [math.inf]])  # a Point less t

# name -> the field of a Prediction that obeys dy = p dtau; see Multistep for the table
COORDINATES = {"x0": "x0", "eps": "eps", "v": "angle", "flow": "flow", "velocity": "velocity"}


class Point(NamedTuple):
    """Schedule values at one time, plain numbers; ``t`` is the 0-dim float64 tensor that denoisers get.

    While a plan is made one Point holds many times: arrays, of which ``t`` is then one, too.
    """

    t: Any
    time: Any
    alpha: Any
    sigma: Any
    log_snr: Any

    def cut(self, start: int, end: int) -> Point:
        """The times from one place to another."""
        return Point(*[column[start:end] for column in self])

    def rows(self) -> list[Point]:
        """One Point of plain numbers for each time."""
        t = torch.from_numpy(self.time).unbind()  # all at once: far cheaper than a tensor at a time
        return list(map(Point, t, *[column.tolist() for column in self[1:]]))


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


def tabulate(schedule: Schedule, time: Array, final: bool = False) -> Point:
    """Evaluate a schedule at many times (n,), vectorised in float64; where ``final`` the data follow, at sigma = 0."""
    t, n = torch.from_numpy(time), len(time)
    columns = np.empty((4, n + final))
    columns[:, n:] = _DATA
    columns[0, :n] = time
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    own = type(schedule).log_snr is not Schedule.log_snr  # otherwise it follows from the two, which are known
    log_snr = schedule.log_snr(t) if own else torch.log(alpha) - torch.log(sigma)
    for k, values in enumerate((alpha, sigma, log_snr), 1):
        columns[k, :n] = values.numpy()
    return Point(columns[0], *columns)


def make_points(schedule: Schedule, grid: Grid) -> tuple[Point, ...]:
    """The points of a grid; a final one ends at the data."""
    return tuple(tabulate(schedule, np.array(grid.times), grid.final).rows())


def is_end(start: Point, end: Point) -> bool:
    """Whether an interval touches an infinite log-SNR (or alpha under 1e-6) and is taken at first order in x0_hat."""
    return start.alpha < ALPHA_FLOOR or math.isinf(start.log_snr) or math.isinf(end.log_snr)


def first_order(start: Point, end: Point) -> tuple[float, float]:
    """Numbers a, w of the first-order step in x0_hat, x_s = a x_t + w x0_hat (DDIM); finite at alpha = 0 and sigma_s = 0."""
    if start.sigma == 0:
        raise ScheduleError(f"a step cannot start at t = {start.time}, where sigma = 0 and nothing is left to denoise")
    ratio = end.sigma / start.sigma
    return ratio, end.alpha - start.alpha * ratio


def divide(starts: Sequence[Point], ends: Sequence[Point]) -> tuple[int, int, dict[int, tuple[float, float]]]:
    """First and last (exclusive) of the inner intervals, which stand together, and the ``first_order`` of the others."""
    outer = {k: first_order(*pair) for k, pair in enumerate(zip(starts, ends, strict=True)) if is_end(*pair)}
    low = next(k for k in itertools.count() if k not in outer)
    return low, low + len(starts) - len(outer), outer


def level_at(name: str, level: float | Callable[[float], float], log_snr: float = math.nan) -> float:
    """A noise level, a number or a function of the log-SNR, there.

    Raises:
        ConfigError: a level that is negative or not finite.
    """
    if callable(level):
        name = f"{name} at log-SNR {log_snr:.4g}"
        try:
            level = level(log_snr)
        except TypeError as error:
            raise ConfigError(f"{name}: {error}; a function of the log-SNR alone is needed") from error
    return number(name, level, 0.0)


def resolve(solver: str | Solver) -> Solver:
    """A solver from its name, or itself.

    Raises:
        ConfigError: unknown name (the nearest are named), or not a solver.
    """
    if isinstance(solver, Solver):
        return solver
    from polydiff.core.solvers.names import NAMES  # every solver, those that stand around another one, too

    if not isinstance(solver, str):
        raise ConfigError(f"a solver is a name or a Solver, not {shown(solver)}")
    if solver not in NAMES:
        raise unknown("solver", solver, NAMES)
    return NAMES[solver].solver


def settle(frozen: Solver, /, **values: Any) -> None:
    """Put what its arguments were found to be into a frozen solver."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


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
        table = tabulate(process.schedule, np.array(grid.times), grid.final)
        points = tuple(table.rows())
        return Plan(process, points, tuple(self.coefficients(process.schedule, table, points)))

    def coefficients(self, schedule: Schedule, table: Point, points: Sequence[Point]) -> Sequence[Any]:
        """One record per interval from the points, all in one and one by one; none where ``make_plan`` is another."""
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
