"""What every process is: its schedule, which elements of a state count, and its geometry."""

from __future__ import annotations

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
