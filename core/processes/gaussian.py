r"""The Gaussian process on R^d: :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,z` with standard normal z."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polydiff.core.checks import number, shown
from polydiff.core.errors import ConfigError, ScheduleError, unknown
from polydiff.core.noise import Noise
from polydiff.core.processes.base import Process
from polydiff.core.schedules import SCHEDULES, Schedule, as_time
from polydiff.core.tree import expand, flat


@dataclass(frozen=True)
class GaussianProcess(Process):
    """Gaussian noising of a tensor (b, *dims), optionally restricted to its mean-free subspace.

    Args:
        schedule: alpha(t) and sigma(t).
        mean_free: project data and noise on states whose valid elements average to zero along the mask axis, which
            makes the process invariant to translations.
        mask_axis: axis of the batch that masks (b, n) run along: 1, or -1 for the last.
    """

    schedule: Schedule
    mean_free: bool = False
    mask_axis: int = 1
    kind = "gaussian"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(f"schedule = {shown(self.schedule)} must be a Schedule; by name: gaussian('vp')")
        if type(self.mean_free) is not bool or self.mask_axis not in (1, -1):
            raise ConfigError(
                f"mean_free = {shown(self.mean_free)} must be true or false, mask_axis = {shown(self.mask_axis)} 1 or -1"
            )

    @property
    def _prior_std(self) -> float:
        return float(self.schedule.sigma(as_time(self.t_max)))

    def prior(self, like: Tensor, noise: Noise, mask: Tensor | None = None) -> Tensor:
        """Draw the state at t_max, shaped like (b, *dims), from N(0, sigma(t_max)^2), by the purpose ``"prior"``.

        ``mask`` are the valid elements, bool (b, n).
        """
        return self._prior_std * self.project(noise.draw(0, "prior", like, mask=mask), mask)

    def perturb(
        self, x0: Tensor, t: Tensor, z: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None
    ) -> Tensor:
        """State at t: alpha(t) x0 + sigma(t) z, for t of shape () or (b,).

        The noise z is projected first; fixed elements, bool (b, n), stay at x0.
        """
        alpha, sigma = (expand(c(as_time(t)), x0) for c in (self.schedule.alpha, self.schedule.sigma))
        x_t = alpha * x0 + sigma * self.project(z, mask, fixed)
        held = self.valid(x0, fixed)
        return x_t if held is None else torch.where(held.bool(), x0, x_t)

    def renoise(
        self, x_s: Tensor, s: Tensor, t: Tensor, z: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None
    ) -> Tensor:
        r"""Go from s up to a noisier t along the forward process.

        .. math:: x_t = r\,x_s + \sqrt{\sigma_t^2 - r^2\sigma_s^2}\;z, \qquad r = \alpha_t/\alpha_s
        """
        s, t = as_time(s), as_time(t)
        if bool((t < s).any()):
            raise ScheduleError(f"renoise goes from s to a later t, but t = {t.tolist()} is before s = {s.tolist()}")
        ratio = self.schedule.alpha(t) / self.schedule.alpha(s)
        variance = self.schedule.sigma(t) ** 2 - (ratio * self.schedule.sigma(s)) ** 2
        return expand(ratio, x_s) * x_s + expand(variance.clamp_min(0).sqrt(), x_s) * self.project(z, mask, fixed)

    def project(self, z: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None) -> Tensor:
        """Zero on padding and fixed elements; mean-free over the valid ones where declared.

        Items with fixed elements keep their mean: ``collate`` has centred them on what is fixed.
        """
        valid = self.valid(z, mask, fixed)
        if valid is not None:
            z = z * valid
        if not self.mean_free:
            return z
        axis = self.mask_axis
        weight = torch.ones_like(z) if valid is None else valid.expand_as(z)
        mean = z.sum(axis, keepdim=True) / weight.sum(axis, keepdim=True).clamp_min(1)
        if fixed is not None:
            mean = mean * expand(~fixed.any(dim=1), z)
        return z - weight * mean

    def log_prior(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log density (b,) in nats of the prior N(0, sigma(t_max)^2) over valid elements (their mean-free subspace)."""
        valid, sigma = self.valid(x, mask), self._prior_std
        squares = ((x if valid is None else x * valid) / sigma) ** 2
        return -0.5 * (flat(squares).sum(1) + math.log(2 * math.pi * sigma**2) * self.dims(x, mask))

    def dims(self, like: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dimension (b,) of the space that states live in: valid elements, less those that being mean-free takes."""
        valid = self.valid(like, mask)
        weight = torch.ones_like(like) if valid is None else valid.expand_as(like)
        dims = flat(weight).sum(1)
        return dims - weight.amax(self.mask_axis).flatten(1).sum(1) if self.mean_free else dims


def gaussian(schedule: str = "edm", mean_free: bool = False, mask_axis: int = 1, **parameters: Any) -> GaussianProcess:
    """Build a Gaussian process from names, numbers and switches, as configurations hold them.

    Args:
        schedule: a name in ``SCHEDULES``.
        mean_free, mask_axis: as in ``GaussianProcess``.
        parameters: the schedule's own, e.g. ``sigma_max``.

    Raises:
        ConfigError: unknown schedule or parameter, or a parameter that is no number (no name, not true or false).
    """
    if schedule not in [*SCHEDULES]:
        raise unknown("schedule", schedule, SCHEDULES)
    valid = inspect.signature(SCHEDULES[schedule]).parameters
    for name, value in parameters.items():
        if name not in valid:
            raise unknown(f"parameter of the schedule {schedule!r}", name, valid)
        kind = type(valid[name].default)
        if kind in (int, float):
            number(f"process.{name}", value)
        elif kind in (str, bool) and not isinstance(value, kind):
            raise ConfigError(f"process.{name} = {shown(value)} must be {'a name' if kind is str else 'true or false'}")
    return GaussianProcess(SCHEDULES[schedule](**parameters), mean_free, mask_axis)
