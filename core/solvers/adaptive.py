r"""An embedded pair of orders 5 and 4 that chooses the step of every item by itself.

The probability flow is integrated in the angle of ``Multistep``: with :math:`\theta = \mathrm{atan2}(\sigma, \alpha)` and
:math:`y = x/\sqrt{\alpha^2 + \sigma^2}`

.. math:: \frac{dy}{d\theta} = \cos\theta\,\hat\varepsilon - \sin\theta\,\hat x_0,

which is finite from sigma = 0 to alpha = 0 and vanishes for standard normal data, on every path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polydiff.core.checks import number, whole
from polydiff.core.denoiser import Denoise, Prediction
from polydiff.core.errors import DivergenceError
from polydiff.core.schedules import Schedule
from polydiff.core.solvers.base import Plan, Point, Solver, State, combine, divide, predict, settle
from polydiff.core.tree import expand

# Dormand 1980, table 2: the rows of the stages after the first; the last row is the fifth-order result (FSAL)
_ROWS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # fifth minus fourth order

_SHARE = 0.25  # of the tolerance for one step, so that their sum keeps it too (measured: tests/bars/likelihood.py)

Leaves = tuple[Tensor, ...]
Resume = tuple[Leaves, Tensor]  # slopes where the last integration ended, and the size of the next step (b,)


def _move(step: Tensor, slopes: Sequence[Leaves], weights: Sequence[float]) -> Leaves:
    """step * sum of weights times slopes, with a step of its own for every item."""
    totals = [combine(leaves[0], weights[0], weights[1:], leaves[1:]) for leaves in zip(*slopes, strict=True)]
    return tuple(expand(step, total) * total for total in totals)


def _where(accepted: Tensor, new: Leaves, old: Leaves) -> Leaves:
    return tuple(torch.where(expand(accepted, a).bool(), a, b) for a, b in zip(new, old, strict=True))


def integrate(
    slope: Callable[[Leaves, Tensor], Leaves],
    y: Leaves,
    start: float,
    end: float,
    norm: Callable[[Leaves], Tensor],
    rtol: float,
    atol: float,
    max_steps: int,
    where: Callable[[Tensor], Tensor],
    resume: Resume | None = None,
) -> tuple[Leaves, Resume]:
    r"""Solve dy/dtau = slope(y, tau) from ``start`` to ``end``, up or down, with an error and a step of every item's own.

    A step is accepted where ``norm`` of :math:`e/(a_{tol} + r_{tol}\max(|y|, |y_{new}|))` is at most 1/4, with e the
    difference of the two orders. All items are evaluated together; those at the end stand still.

    Args:
        slope: of tensors (b, ...) at tau (b,), float64 on the host; returns tensors like them.
        y: the values at ``start``.
        norm: from the scaled errors, one for each tensor, to one number per item (b,).
        rtol, atol: relative and absolute tolerance of a step.
        max_steps: largest number of attempts.
        where: from tau to t, for messages.
        resume: what an earlier call returned that ended at ``start``: it saves an evaluation and the search for a step.

    Returns:
        The values at ``end`` and what resumes there; of no elements, ``y`` without a call.

    Raises:
        DivergenceError: an item whose step falls under 1e-12 of the span, or that ``max_steps`` do not carry to the end.

    Source: Dormand 1980, table 2; Hairer 1993, section II.4, for the choice of the step.
    """
    span, sign = abs(end - start), math.copysign(1.0, end - start)
    tau = torch.full((y[0].shape[0],), start, dtype=torch.float64)

    def size(values: Leaves, *scales: Leaves) -> Tensor:
        largest = [torch.stack([s.abs() for s in group]).amax(0) for group in zip(*scales, strict=True)]
        scaled = [value / (atol + rtol * scale) for value, scale in zip(values, largest, strict=True)]
        return norm(tuple(scaled)).to("cpu", torch.float64)

    if not y[0].numel():
        return y, (y, tau)
    if resume is None:
        first = slope(y, tau)
        guess = 0.01 * size(y, y) / size(first, y).clamp_min(1e-300)
        resume = first, torch.nan_to_num(guess, nan=0.0).clamp(1e-4 * span, span)
    first, h = resume
    for _ in range(max_steps):
        left = (end - tau).abs()
        last = left <= h
        step = sign * torch.where(last, left, h)
        slopes, new = [first], y
        for row in _ROWS:
            new = tuple(map(torch.add, y, _move(step, slopes, row)))
            slopes.append(slope(new, tau + sum(row) * step))
        error = size(_move(step, slopes, _ERROR), y, new) / _SHARE
        accepted = error <= 1  # false for an error that is not a number
        factor = torch.nan_to_num(0.9 * error.clamp_min(1e-10) ** -0.2, nan=0.2).clamp(0.2, 2.0)
        y, first = _where(accepted, new, y), _where(accepted, slopes[-1], first)
        tau = torch.where(accepted, torch.where(last, end, tau + step), tau)
        # a step that was cut short at the end says nothing against the one that was planned
        h = torch.where(accepted & last, torch.maximum(h, factor * left), factor * step.abs())
        if bool((tau == end).all()):
            return y, (first, h)
        stuck = (tau != end) & (h < 1e-12 * span)
        if bool(stuck.any()):
            break
    else:
        stuck = tau != end
    item = int(stuck.nonzero()[0])
    raise DivergenceError(
        f"item {item} does not reach rtol = {rtol:g}, atol = {atol:g} at t = {float(where(tau)[item]):.6g}: its step "
        f"there is {float(h[item] / span):.1g} of the interval (max_steps = {max_steps}); loosen the tolerances, or see "
        "whether the denoiser is smooth and finite there"
    )


def angle(point: Point) -> float:
    """theta = atan2(sigma, alpha)."""
    return math.atan2(point.sigma, point.alpha)


def time_of(schedule: Schedule, start: Point, end: Point) -> Callable[[Tensor], Tensor]:
    """t as a function of theta between two points, never outside of them by rounding."""
    low, high = sorted((start.time, end.time))
    return lambda theta: schedule.t_of_log_snr(-torch.log(torch.tan(theta))).clamp(low, high)


def scale(schedule: Schedule, t: Tensor) -> Tensor:
    """c = x / y = sqrt(alpha^2 + sigma^2)."""
    return torch.hypot(schedule.alpha(t), schedule.sigma(t))


def predict_items(denoise: Denoise, process: Any, x: Tensor, t: Tensor) -> Prediction:
    """``predict`` with a time for every item, judged by the noisiest."""
    noisiest = t.amax()
    alpha = float(process.schedule.alpha(noisiest))
    return predict(denoise, process, x, Point(t, float(noisiest), alpha, math.nan, math.nan))


def check_tolerances(rtol: float, atol: float) -> None:
    """Refuse tolerances that are not positive and finite."""
    number("rtol", rtol, above=0.0)
    number("atol", atol, above=0.0)


@dataclass(frozen=True)
class Adaptive(Solver):
    """The probability flow to a tolerance: Dormand-Prince 5(4) in the angle, substeps inside each interval of the grid.

    Denoisers get t as a float64 tensor (b,): every item has its own. An interval that ends at sigma = 0 or starts below
    alpha = 1e-6 is taken at first order in x0_hat, as in the other solvers. What is integrated is y = x / hypot(alpha,
    sigma), of which the error of a step is held below a quarter of atol + rtol |y|, root mean square over the generated elements.

    Args:
        rtol, atol: relative and absolute tolerance of a step.
        max_steps: largest number of attempted steps in an interval.

    Raises:
        ConfigError: a tolerance that is not positive and finite, or a number of steps that is not whole and positive.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000
    order = 5
    stages = None  # as many as the tolerance takes
    stochastic = False

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        settle(self, rtol=float(self.rtol), atol=float(self.atol), max_steps=whole("max_steps", self.max_steps))

    def coefficients(self, schedule: Schedule, table: Point, points: Sequence[Point]) -> Sequence[Any]:
        """The numbers of the first-order step where an interval needs one, else None."""
        outer = divide(points[:-1], points[1:])[2]
        return [outer.get(k) for k in range(len(points) - 1)]

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """Substeps through interval k; the history is what the integration resumes with."""
        start, end, process = plan.points[k], plan.points[k + 1], plan.process
        schedule = process.schedule
        if plan.steps[k] is not None:
            ratio, weight = plan.steps[k]
            items = start._replace(t=start.t.expand(len(state.x)))
            x0_hat = predict(denoise, process, state.x, items).x0
            return State(state.x * ratio + x0_hat * weight if ratio else x0_hat * weight)
        t_of = time_of(schedule, start, end)

        def slope(y: Leaves, theta: Tensor) -> Leaves:
            t = t_of(theta)
            x = y[0] * expand(scale(schedule, t), y[0])
            return (predict_items(denoise, process, x, t).field("angle"),)

        def norm(errors: Leaves) -> Tensor:
            return process.mean(errors[0] ** 2, noise.mask, noise.fixed).sqrt()

        resume = None
        if state.history and state.history[2] is state.x:  # not where the state has been moved since
            resume = (state.history[0],), state.history[1]
        y = (state.x / math.hypot(start.alpha, start.sigma),)
        (out,), (slopes, h) = integrate(
            slope, y, angle(start), angle(end), norm, self.rtol, self.atol, self.max_steps, t_of, resume
        )
        out = out * math.hypot(end.alpha, end.sigma)
        return State(out, (slopes[0], h, out))
