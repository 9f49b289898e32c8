"""What every process is: its schedule, which elements of a state count, and its geometry."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from polydiff.core.checks import check_mask
from polydiff.core.schedules import Schedule
from polydiff.core.tree import flat


class Process:
    """What processes on one tensor share. The geometry here is that of flat space: a tangent is a difference.

    Attributes:
        kind: the geometry: ``"gaussian"``, ``"so3"`` or ``"product"``.
        schedule: how far from the data a state is at t.
        mask_axis: axis of the batch that masks (b, n) run along.
    """

    kind: ClassVar[str]
    schedule: Schedule
    mask_axis: int = 1

    @property
    def t_min(self) -> float:
        """The least noisy time of named grids."""
        return self.schedule.t_min

    @property
    def t_max(self) -> float:
        """The noisiest time of named grids, at which the prior stands."""
        return self.schedule.t_max

    def valid(self, like: Tensor, mask: Tensor | None, fixed: Tensor | None = None) -> Tensor | None:
        """Generated elements as a 0/1 tensor that broadcasts against (b, *dims), or None when all of them are."""
        for name, marked in (("mask", mask), ("fixed", fixed)):
            check_mask(name, marked, like, self.mask_axis)
        if fixed is not None:
            mask = ~fixed if mask is None else mask & ~fixed
        if mask is None:
            return None
        axis = self.mask_axis % like.ndim
        shape = [len(like), *[1] * (like.ndim - 1)]
        shape[axis] = like.shape[axis]
        return mask.reshape(shape).to(like.dtype)

    def mean(self, values: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None) -> Tensor:
        """Average (b,) of values (b, *dims) over the generated elements."""
        valid = self.valid(values, mask, fixed)
        if valid is None:
            return flat(values).mean(1)
        valid = valid.expand_as(values).flatten(1)
        return (values.flatten(1) * valid).sum(1) / valid.sum(1).clamp_min(1)

    def tangent_like(self, x: Tensor) -> Tensor:
        """A tensor shaped like tangents at a state, and like the noise that ``perturb`` takes."""
        return x

    def check(self, x: Any, what: str = "the state") -> None:
        """Refuse what is no state of this process; numbers and layout have been looked at before."""

    def rate(self, x_t: Tensor, t: Tensor, prediction: Any) -> Tensor:
        """Velocity of the probability flow, a tangent."""
        return prediction.velocity

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map: x + u."""
        return x + u

    def tangent(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm map: y - x."""
        return y - x

    def move(self, start: Any, end: Any, level: float) -> tuple[str, float, float, float, float]:
        r"""A solver's step from one Point to the next, with noise of a level, where the process is Brownian motion (alpha = 1).

        .. math:: u = \sigma_t^2\,(1 - r^{1+\eta^2})\,s + \sigma_s\sqrt{1 - r^{2\eta^2}}\;z, \qquad r = \sigma_s/\sigma_t

        In flat space it is exact for point data at every level, which steps of :math:`\tfrac12(1 + \eta^2)\,dv` are not.

        Returns:
            The field, its weight, the standard deviation of the noise, and the weights of the field at both ends in a
            step of second order, the trapezoidal rule in sigma for -sigma s.
        """
        h = math.log(start.sigma / end.sigma)
        span = start.sigma - end.sigma
        weight = -(start.sigma**2) * math.expm1(-(1 + level**2) * h)
        noise = end.sigma * math.sqrt(-math.expm1(-2 * level**2 * h)) if level else 0.0
        return "score", weight, noise, 0.5 * span * start.sigma, 0.5 * span * end.sigma
