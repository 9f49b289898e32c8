r"""Noising processes on SO(3): Brownian motion, and the geodesic flow to a uniform rotation.

States are rotations (b, n, 3, 3). Tangents, noise, scores and velocities are (b, n, 3): body frame, right multiplication,
radians. The displacement :math:`\omega = \mathrm{Log}(\hat R_0^T R_t)` takes the place of x_t - x0_hat of flat space.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from polydiff.core import rotations
from polydiff.core.checks import shown
from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.noise import Noise
from polydiff.core.processes.base import Process
from polydiff.core.processes.igso3 import (
    igso3_log_density,
    igso3_score,
    igso3_score_square,
    igso3_tangent,
    igso3_tangent_score,
)
from polydiff.core.rotation_schedules import Exponential
from polydiff.core.schedules import Schedule, as_time
from polydiff.core.tree import expand

__all__ = ["SO3Flow", "SO3Process", "igso3_log_density", "igso3_score"]

_UNIFORM_SQUARE = math.pi**2 / 3 + 2  # mean squared angle of uniform rotations
_UNIFORM = 20.0  # IGSO(3) of this sigma is uniform to exp(-400)


class RotationProcess(Process, ABC):
    """What both processes share; the prior is uniform, of log density 0 with respect to normalised Haar measure."""

    kind = "so3"
    fields: ClassVar[tuple[str, ...]]  # that a Prediction can be built from

    def prior(self, like: Tensor, noise: Noise, mask: Tensor | None = None) -> Tensor:
        """Draw uniform rotations shaped like (b, n, 3, 3), by the purpose ``"prior"``; padding gets the identity."""
        return rotations.uniform(like, noise, mask)

    def perturb(
        self, x0: Tensor, t: Tensor, z: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None
    ) -> Tensor:
        """State at t of shape () or (b,), from standard normal z (b, n, 3); padding and fixed elements stay at x0."""
        return self._move(x0, self._noise(self.project(z, mask, fixed), as_time(t)), fixed)

    def project(self, z: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None) -> Tensor:
        """On padding and fixed elements zero tangents or, of rotations (b, n, 3, 3), the identity."""
        valid = self.valid(z, mask, fixed)
        if valid is None:
            return z
        return z * valid if z.ndim < 4 else torch.where(valid.bool(), z, torch.eye(3, dtype=z.dtype, device=z.device))

    def log_prior(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log density (b,) in nats of the uniform prior with respect to normalised Haar measure: 0."""
        return x.new_zeros(len(x))

    def tangent_like(self, x: Tensor) -> Tensor:
        """A tensor (b, n, 3)."""
        return x[..., 0]

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map R Exp(u)."""
        return rotations.retract(x, u)

    def tangent(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm map Log(x^T y), of norm at most pi."""
        return rotations.tangent(x, y)

    def check(self, x: Any, what: str = "the state") -> None:
        """Refuse what are no rotations (b, n, 3, 3).

        Raises:
            ConfigError: another shape. DataError: a matrix that is no rotation, with its index and its error.
        """
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[-2:] != (3, 3):
            raise ConfigError(f"{what} must be rotations (b, n, 3, 3), not {shown(x)}")
        rotations.check_rotations(x, what)

    def convert(self, prediction: Any, wanted: str) -> Tensor:
        """Another field of a Prediction than the one given."""
        given = prediction.given
        if wanted not in self.fields or given not in self.fields:
            name = wanted if given in self.fields else given
            raise ConfigError(f"{type(self).__name__} has no {name}: its fields are {', '.join(self.fields)}")
        return self._convert(prediction.x_t, as_time(prediction.t), given, prediction.value, wanted)

    def reach(
        self, x_t: Tensor, t: Tensor, output: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None
    ) -> Tensor:
        """x0_hat of a network's output: that itself, (b, n, 3, 3), or ``spread(t)`` times it is the tangent there, (b, n, 3)."""
        if output.shape not in (x_t.shape, x_t.shape[:-1]):
            shape, valid = tuple(output.shape), f"{tuple(x_t.shape)} or {tuple(x_t.shape[:-1])}"
            raise ConfigError(f"the network made {shape} of rotations {tuple(x_t.shape)}: {valid} is needed")
        u = expand(self.spread(t), output) * output if output.ndim < 4 else self.tangent(x_t, output)
        return self.retract(x_t, self.project(u, mask, fixed))

    @abstractmethod
    def spread(self, t: Tensor) -> Tensor:
        """About the root mean square per axis of the tangent from a state at t to its x0, of unknown data."""

    @abstractmethod
    def level(self, t: Tensor) -> Tensor:
        """What a network is told of the time, c_noise."""

    @abstractmethod
    def error(self, prediction: Any, x0: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None) -> Tensor:
        """Loss (b,) of a prediction, about 1 at every t where x0_hat = x_t says nothing."""

    def _move(self, x: Tensor, u: Tensor, fixed: Tensor | None) -> Tensor:
        moved, held = self.retract(x, u), self.valid(x, fixed)
        return moved if held is None else torch.where(held.bool(), x, moved)

    @abstractmethod
    def _noise(self, z: Tensor, t: Tensor) -> Tensor:
        """Tangents at x0 to the states at t, from standard normal z."""

    @abstractmethod
    def _convert(self, x_t: Tensor, t: Tensor, given: str, value: Tensor, wanted: str) -> Tensor:
        """One of ``fields`` from another."""


@dataclass(frozen=True)
class SO3Process(RotationProcess):
    r"""Brownian motion on SO(3): :math:`R_t \sim \mathrm{IGSO(3)}(R_0, \sigma(t))`, with variance sigma^2 per axis.

    The fields of a prediction are x0 (a rotation), score and velocity (tangents), where, with f the density of IGSO(3),

    .. math:: s = \frac{d\log f}{d|\omega|}\,\frac{\omega}{|\omega|}, \qquad u = -\tfrac12 g^2 s, \qquad
              \hat R_0 = R_t\,\mathrm{Exp}(\sigma^2 s).

    The last, Tweedie's formula along a geodesic, is what x0 means where a score or velocity is given: that of point data
    to a relative sigma^2/12, and the mean of IGSO(3) data as far as flat space goes.

    Args:
        schedule: sigma(t) in radians, with alpha = 1: ``VE``, ``EDM`` or one of ``rotation_schedules``. A uniform prior
            wants sigma_max of 2.5 (there the total variation is 0.0024).

    Raises:
        ConfigError: a schedule with another alpha.

    Source: Leach 2022 for the kernel; Yim 2023 (FrameDiff) for its score; De Bortoli 2022 for the reverse in general.
    """

    schedule: Schedule
    fields = ("x0", "score", "velocity")

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(
                f"schedule = {shown(self.schedule)} must be a Schedule with alpha = 1, such as VE(0.02, 2.5)"
            )
        if bool((self.schedule.alpha(as_time([self.t_min, 0.5, self.t_max])) != 1).any()):
            name = type(self.schedule).__name__
            raise ConfigError(f"rotations cannot be scaled, but {name} has alpha below 1: take VE, EDM or SO3Flow")

    def renoise(
        self, x_s: Tensor, s: Tensor, t: Tensor, z: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None
    ) -> Tensor:
        """Go from s up to a noisier t: Brownian motion of variance sigma_t^2 - sigma_s^2, from z (b, n, 3)."""
        s, t = as_time(s), as_time(t)
        if bool((t < s).any()):
            raise ScheduleError(f"renoise goes from s to a later t, but t = {t.tolist()} is before s = {s.tolist()}")
        low, high, z = self.schedule.sigma(s), self.schedule.sigma(t), self.project(z, mask, fixed)
        if bool((t == s).all()):
            return x_s
        deviation = ((high - low) * (high + low)).sqrt().clamp_min(1e-30)  # where t = s in a batch
        return self._move(x_s, igso3_tangent(z, _by_item(deviation, z)), fixed)

    def spread(self, t: Tensor) -> Tensor:
        """sigma while that is small, and at last that of uniform rotations."""
        sigma = self.schedule.sigma(as_time(t))
        return sigma / torch.sqrt(1 + 3 * sigma**2 / _UNIFORM_SQUARE)

    def level(self, t: Tensor) -> Tensor:
        """ln(sigma)/4."""
        return 0.25 * torch.log(self.schedule.sigma(t))

    def error(self, prediction: Any, x0: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None) -> Tensor:
        r"""Denoising score matching :math:`|\hat s - s|^2 / \mathrm{E}|s|^2`, the mean (b,) over elements.

        Source: Yim 2023 (FrameDiff), its score loss; the weight is found here by quadrature at every sigma.
        """
        t = as_time(prediction.t)
        target = Prediction(self, prediction.x_t, t, x0=x0).score
        square = 3 / igso3_score_square(self.schedule.sigma(t))
        return expand(square, x0[:, 0, 0, 0]) * self.mean((prediction.score - target) ** 2, mask, fixed)

    def _noise(self, z: Tensor, t: Tensor) -> Tensor:
        return igso3_tangent(z, _by_item(self.schedule.sigma(t), z))

    def _convert(self, x_t: Tensor, t: Tensor, given: str, value: Tensor, wanted: str) -> Tensor:
        sigma, slope = self.schedule.sigma(t), -0.5 * self.schedule.g2(t)
        if given == "x0":
            score = igso3_tangent_score(self.tangent(value, x_t), _by_item(sigma, x_t[..., 0]))
        else:
            score = value if given == "score" else value / expand(slope, value)
        if wanted == "x0":
            return self.retract(x_t, expand(sigma**2, score) * score)
        return score if wanted == "score" else expand(slope, score) * score


@dataclass(frozen=True)
class SO3Flow(RotationProcess):
    r"""Flow matching along geodesics: :math:`R_t = R_0\,\mathrm{Exp}(\sigma(t)\,\omega_1)` with :math:`R_0\,\mathrm{Exp}(\omega_1)` uniform.

    The fields of a prediction are x0 (a rotation), flow and velocity (tangents):

    .. math:: \text{flow} = \mathrm{Log}(\hat R_0^T R_t)/\sigma, \qquad u = \sigma'\,\text{flow}.

    There is no score: on SO(3) it does not follow from the velocity. Nor is there a way up from a noisy state.

    Args:
        decay: 0 for the linear schedule sigma = t; the rate of an exponential one otherwise, see ``Exponential``.

    Source: Chen 2024, conditional flows along geodesics; Yim 2023 (FrameFlow), on SO(3) and for the exponential schedule.
    """

    decay: float = 0.0
    schedule: Schedule = field(init=False, repr=False)
    fields = ("x0", "velocity", "flow")

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Exponential(self.decay))

    def renoise(self, x_s: Tensor, s: Tensor, t: Tensor, z: Tensor, mask: Any = None, fixed: Any = None) -> Tensor:
        """Refused: the states of a geodesic flow are no Markov chain.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a geodesic flow cannot noise a noisy state further: take SO3Process, or a solver that only goes down"
        )

    def move(self, start: Any, end: Any, level: float) -> tuple[str, float, float, float, float]:
        """As of every process: along the geodesic to x0_hat, exact for point data. A level above 0 is refused."""
        if level:
            raise ConfigError(f"a geodesic flow has no score and takes no noise: level = {level:g} must be 0")
        span = end.sigma - start.sigma
        return "flow", span, 0.0, 0.5 * span, 0.5 * span

    def spread(self, t: Tensor) -> Tensor:
        """That of uniform rotations times sigma, exactly."""
        return self.schedule.sigma(as_time(t)) * math.sqrt(_UNIFORM_SQUARE / 3)

    def level(self, t: Tensor) -> Tensor:
        """t."""
        return as_time(t)

    def error(self, prediction: Any, x0: Tensor, mask: Tensor | None = None, fixed: Tensor | None = None) -> Tensor:
        r"""Flow matching: :math:`|\mathrm{flow}_{\hat R_0} - \mathrm{flow}_{R_0}|^2` over its mean square, the mean (b,).

        Below sigma = 0.1 the weight stays that of 0.1, as published. Source: Yim 2023 (FrameFlow), its losses.
        """
        t = as_time(prediction.t)
        target = Prediction(self, prediction.x_t, t, x0=x0).field("flow")
        weight = 3 / _UNIFORM_SQUARE * (self.schedule.sigma(t) / 0.1).clamp_max(1) ** 2
        return expand(weight, x0[:, 0, 0, 0]) * self.mean((prediction.field("flow") - target) ** 2, mask, fixed)

    def _noise(self, z: Tensor, t: Tensor) -> Tensor:
        return expand(self.schedule.sigma(t), z) * igso3_tangent(z, _UNIFORM)

    def _convert(self, x_t: Tensor, t: Tensor, given: str, value: Tensor, wanted: str) -> Tensor:
        sigma, speed = self.schedule.sigma(t), self.schedule.dsigma(t)
        if bool((sigma == 0).any()):
            raise ScheduleError("at t = 0 a geodesic flow has arrived: nothing follows from a prediction there")
        if given == "x0":
            flow = self.tangent(value, x_t) / expand(sigma, x_t[..., 0])
        else:
            flow = value if given == "flow" else value / expand(speed, value)
        if wanted == "x0":
            return self.retract(x_t, -expand(sigma, flow) * flow)
        return flow if wanted == "flow" else expand(speed, flow) * flow


def _by_item(sigma: Tensor, like: Tensor) -> Tensor:
    """A () or (b,) number for each of the elements (b, n) that tangents (b, n, 3) belong to, float64."""
    return sigma.to(like.device).reshape(sigma.shape + (1,) * (like.ndim - 2)) if sigma.ndim else sigma
