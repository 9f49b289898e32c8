"""Grids: where along t a solver puts its steps. They know neither the solver nor the modality."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polydiff.core.checks import check_process, number, row, whole
from polydiff.core.errors import ScheduleError, unknown
from polydiff.core.schedules import as_time

if TYPE_CHECKING:
    from polydiff.core.schedules import Schedule

MOST_STEPS = 100_000  # a slip such as 1e9 would fill the memory with coefficients


@dataclass(frozen=True)
class Grid:
    """Decreasing times t_0 > ... > t_n in [0, 1].

    Args:
        times: the times; float64 numbers.
        final: add one last interval from ``times[-1]`` to sigma = 0, which returns x0_hat; it counts as a step.
        upward: the times increase instead, from data to noise; then there is no final interval.

    Raises:
        ScheduleError: times that increase, repeat, are not finite or leave [0, 1]; fewer than one interval.
    """

    times: tuple[float, ...]
    final: bool = False
    upward: bool = False

    def __post_init__(self) -> None:
        times = tuple(row("the times of a grid", self.times, ScheduleError).tolist())
        object.__setattr__(self, "times", times)
        way, sign = ("increase", 1) if self.upward else ("decrease", -1)
        if self.final and self.upward:
            raise ScheduleError("a grid that runs upward, from data to noise, has no final interval")
        if self.steps < 1:
            raise ScheduleError(f"a grid of {len(times)} time(s) has no interval: give at least two, or final=True")
        for k, t in enumerate(times):
            if not 0 <= t <= 1:
                raise ScheduleError(f"time {k} of the grid is {t}; times lie in [0, 1], 0 = data and 1 = noise")
            if k and sign * (t - times[k - 1]) <= 0:
                raise ScheduleError(f"times must {way} strictly, but time {k} is {t} after {times[k - 1]}")

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return len(self.times) - 1 + self.final

    def reversed(self) -> Grid:
        """The same times the other way, without a final interval."""
        return Grid(self.times[::-1], upward=not self.upward)


def uniform(schedule: Schedule, n: int, start: float, end: float) -> Tensor:
    """Uniform in t."""
    return torch.linspace(start, end, n, dtype=torch.float64)


def _through_log_snr(
    schedule: Schedule, n: int, start: float, end: float, of: Callable[[float], float], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """Uniform in a function of log-SNR; the ends are put in exactly."""
    ends = schedule.log_snr(as_time([start, end])).tolist()
    if not all(map(math.isfinite, ends)):
        raise ScheduleError(
            f"this grid needs a finite log-SNR at both ends, but it is {ends[0]} at t = {start} and {ends[1]} at "
            f"t = {end}: move t_start or t_end inside (0, 1), or take the uniform grid"
        )
    t = schedule.t_of_log_snr(back(uniform(schedule, n, of(ends[0]), of(ends[1]))))
    t[0] = start
    if n > 1:
        t[-1] = end
    return t


def log_snr(schedule: Schedule, n: int, start: float, end: float) -> Tensor:
    """Uniform in log-SNR."""
    return _through_log_snr(schedule, n, start, end, lambda value: value, lambda value: value)


def karras(schedule: Schedule, n: int, start: float, end: float, rho: float = 7.0) -> Tensor:
    """Uniform in (sigma/alpha)^(1/rho). Source: Karras 2022, eq. 5."""
    return _through_log_snr(
        schedule, n, start, end, lambda value: math.exp(-value / rho), lambda value: -rho * torch.log(value)
    )


def _discrete(indices: Callable[[Tensor, int], Tensor], schedule: Schedule, n: int, start: float, end: float) -> Tensor:
    """Times of n indices of a discrete chain, of 1000 steps unless the schedule is one: 0 at ``end``, the last at ``start``.

    ``indices`` are a function of 0, ..., n - 1 and the length.
    """
    length = getattr(schedule, "length", 1000)
    if n > length:
        raise ScheduleError(f"steps = {n}: a discrete chain of {length} has no more; take fewer or the uniform grid")
    return end + indices(torch.arange(n, dtype=torch.float64), length) / (length - 1) * (start - end)


def ddpm_leading(k: Tensor, length: int) -> Tensor:
    """Indices ..., 2r, r, 0 of a discrete chain, r = length // n."""
    return (len(k) - 1 - k) * (length // len(k))


def ddpm_trailing(k: Tensor, length: int) -> Tensor:
    """Indices length - 1, length - 1 - r, ... of a discrete chain, r = length / n, rounded."""
    return (length - k * (length / len(k))).round() - 1


def ddpm_linspace(k: Tensor, length: int) -> Tensor:
    """Indices of a discrete chain evenly from length - 1 to 0, rounded."""
    return torch.linspace(length - 1, 0, len(k), dtype=torch.float64).round()


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "log_snr": log_snr,
    "karras": karras,
    "ddpm-leading": functools.partial(_discrete, ddpm_leading),
    "ddpm-trailing": functools.partial(_discrete, ddpm_trailing),
    "ddpm-linspace": functools.partial(_discrete, ddpm_linspace),
}


def make_grid(
    name: str, n: int, process: Any, t_start: float | None = None, t_end: float | None = None, final: bool = True
) -> Grid:
    """Build a named grid of n intervals.

    Args:
        name: a name in ``GRIDS``.
        n: number of intervals, the last one to sigma = 0, where it returns x0_hat, if ``final``.
        process: gives the schedule and the default ends.
        t_start, t_end: noisiest and least noisy time, t_max and t_min by default; a discrete chain need not touch both.

    Raises:
        ConfigError: unknown name. ScheduleError: n is no whole number from 1 to 100,000, or ends at which the grid is not defined.
    """
    if name not in [*GRIDS]:
        raise unknown("grid", name, GRIDS)
    n = whole("steps", n, most=MOST_STEPS, error=ScheduleError)
    check_process(process)
    start = number("t_start", process.t_max if t_start is None else t_start, error=ScheduleError)
    end = number("t_end", process.t_min if t_end is None else t_end, error=ScheduleError)
    if not 0 <= end < start <= 1:
        raise ScheduleError(f"a grid runs down from t_start to t_end within [0, 1]; got {start} and {end}")
    return _named(name, process.schedule, n, start, end, final)


@functools.lru_cache(maxsize=256)
def _named(name: str, schedule: Schedule, n: int, start: float, end: float, final: bool) -> Grid:
    return Grid(tuple(GRIDS[name](schedule, n + (not final), start, end).tolist()), final)


def as_grid(grid: str | Grid | Tensor | Sequence[float], steps: int, process: Any) -> Grid:
    """Make a grid from what a caller has: a name (of ``steps`` intervals), a Grid, or explicit times (final=False)."""
    if isinstance(grid, str):
        return make_grid(grid, steps, process)
    if isinstance(grid, Grid):
        return grid
    return Grid(grid)  # type: ignore[arg-type]
