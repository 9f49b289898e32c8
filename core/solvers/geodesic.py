r"""Solvers for any geometry: a step is a tangent at the state, and the exponential map takes it along a geodesic.

A process says which field of the prediction is integrated and with what weight, exactly in its own clock; averages of
tangents at both ends of a step are taken in the body frame, which keeps order 2 without transport (their difference is
of the step's order, and its commutator with the step of the order that the method neglects).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from polydiff.core.checks import whole
from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError
from polydiff.core.grids import Grid
from polydiff.core.solvers.base import (
    COORDINATES,
    Plan,
    Point,
    Solver,
    State,
    first_order,
    is_end,
    level_at,
    predict,
    settle,
    tabulate,
)
from polydiff.core.solvers.coordinates import noise_span, tau_span
from polydiff.core.tree import tree_map


class Move(NamedTuple):
    """A step of one leaf, the tangent ``x x_t + weight field + noise z``."""

    field: str
    x: float  # where states can be scaled
    weight: float
    noise: float = 0.0
    ends: tuple[float, float] | None = None  # instead of the weight, of the field at both ends: second order


@dataclass(frozen=True)
class Geodesic(Solver):
    r"""Geodesic Euler, Heun and random walk, on any process: Gaussian, SO(3), and every leaf of a product in its own clock.

    On SO(3) a step is :math:`R_s = R_t\,\mathrm{Exp}(u)` with, for Brownian motion and :math:`r = \sigma_s/\sigma_t`,

    .. math:: u = \sigma_t^2\,(1 - r^{1+\eta^2})\,s(R_t) + \sigma_s\sqrt{1 - r^{2\eta^2}}\;z, \qquad
              u = -\tfrac12(\sigma_s - \sigma_t)\,[\sigma_t\,s(R_t) + \sigma_s\,s(R_s^{\text{Euler}})]

    at order 1 and 2, and for a flow the same share of the geodesic to x0_hat. On a Gaussian process order 1 is DDIM (for
    eta = 1 its SDE form, ``Multistep(1, eta=eta)``) and order 2 is Heun in the angle (``heun-v``). The final interval
    returns x0_hat.

    Args:
        order: 1, or 2 for Heun's method: two calls an interval, the first and last ones excepted where ``is_end``.
        level: eta, the amount of noise: 0 the probability flow, 1 the reverse of the forward SDE; a number or a function
            of the (clock leaf's) log-SNR, taken at the start of each interval.

    Raises:
        ConfigError: noise at order 2, or on a flow, which has no score; a level that is negative or not finite.

    Source: De Bortoli 2022, algorithm 1, for the geodesic random walk; the exact flat limit and Heun's rule in sigma ours.
    """

    order: int = 1
    level: float | Callable[[float], float] = 0.0
    needs = "any"

    def __post_init__(self) -> None:
        settle(self, order=whole("order", self.order, 1, 2))
        if not callable(self.level):
            settle(self, level=level_at("level", self.level))
        if self.order > 1 and self.stochastic:
            raise ConfigError("Geodesic of order 2 has no noise: take level = 0, or order = 1")

    @property
    def stages(self) -> int:  # type: ignore[override]
        """One call for each order."""
        return self.order

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether the level is positive."""
        return callable(self.level) or self.level > 0

    def make_plan(self, process: Any, grid: Grid) -> Plan:
        """The points of the (clock leaf's) schedule; of each interval one ``Move``, by leaf for a product, or None: x0_hat."""
        points = tuple(tabulate(process.schedule, np.array(grid.times), grid.final).rows())
        levels = [level_at("level", self.level, point.log_snr) for point in points[: len(grid.times)]]
        if process.kind == "product":
            rows = {}
            for name, leaf in process.processes.items():
                time = process.time(name, torch.tensor(grid.times, dtype=torch.float64)).numpy()
                rows[name] = self._moves(leaf, tabulate(leaf.schedule, time, grid.final).rows(), levels)
            steps = [dict(zip(rows, moves, strict=True)) for moves in zip(*rows.values(), strict=True)]
        else:
            steps = self._moves(process, points, levels)
        return Plan(process, points, (*steps[:-1], None) if grid.final else tuple(steps))

    def _moves(self, process: Any, points: Sequence[Point], levels: Sequence[float]) -> list[Any]:
        return [
            self._move(process, *ends, level) for ends, level in zip(itertools.pairwise(points), levels, strict=False)
        ]

    def _move(self, process: Any, start: Point, end: Point, level: float) -> Move | None:
        if end.sigma == 0:
            return None
        scale, weight = first_order(start, end)  # which refuses to start from the data
        if process.kind != "gaussian":
            field, weight, noise, *ends = process.move(start, end, level)
            return Move(field, 0.0, weight, noise, tuple(ends) if self.order > 1 else None)
        if is_end(start, end):
            return Move("x0", scale - 1, weight)
        form = "x0" if self.order == 1 else "v"
        scale, weight = map(float, tau_span(form, start, end, level**2))
        noise = float(noise_span(start, end, level**2))
        return Move(
            COORDINATES[form], scale - 1, weight, noise, (0.5 * weight, 0.5 * weight) if self.order > 1 else None
        )

    def calls(self, plan: Plan) -> int:
        """One an interval, and a second one where any leaf takes it at order 2."""
        return sum(1 + _twice(moves) for moves in plan.steps)

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """One or two calls of the denoiser."""
        moves, start, end, process, x = plan.steps[k], plan.points[k], plan.points[k + 1], plan.process, state.x
        prediction = predict(denoise, process, x, start)
        if moves is None:
            return State(prediction.x0)
        fields = tree_map(lambda move: move.field, moves)
        first = prediction.field(fields)
        shift = tree_map(_shift, moves, x, first)
        if any(move.noise for move in _each(moves)):
            z = noise.draw(k, "step", process.tangent_like(x), start.t, end.t)
            shift = tree_map(lambda move, u, z: u + z * move.noise if move.noise else u, moves, shift, z)
        moved = process.retract(x, shift)
        if _twice(moves):
            second = predict(denoise, process, moved, end).field(fields)
            shift = tree_map(_average, moves, x, first, second)
            moved = process.retract(x, shift)
        return State(moved)


def _each(moves: Any) -> Sequence[Move]:
    return [] if moves is None else [*moves.values()] if isinstance(moves, dict) else [moves]


def _twice(moves: Any) -> bool:
    return any(move.ends is not None for move in _each(moves))


def _shift(move: Move, x: Any, p: Any) -> Any:
    return torch.add(p * move.weight, x, alpha=move.x) if move.x else p * move.weight


def _average(move: Move, x: Any, p: Any, q: Any) -> Any:
    """With a field at both ends; a leaf that is taken at first order ignores the second."""
    if move.ends is None:
        return _shift(move, x, p)
    u = p * move.ends[0] + q * move.ends[1]
    return torch.add(u, x, alpha=move.x) if move.x else u
