r"""Noise schedules: how much data and how much noise a state holds at time t.

Every path here is :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,\varepsilon` with t in [0, 1], 0 = data and 1 = noise. A schedule
gives :math:`\alpha, \sigma`, their derivatives, the log signal-to-noise ratio :math:`\lambda = \log(\alpha/\sigma)` with
its inverse, and the coefficients of the forward SDE :math:`dx = f x\,dt + \sqrt{g^2}\,dw`, where

.. math:: f = \alpha'/\alpha, \qquad g^2 = 2\sigma\sigma' - 2 f \sigma^2 = -2\sigma^2\lambda'.

All of them take and return float64 tensors of any shape, dimensionless, on the tensor's own device. At the ends t = 0
and t = 1, lambda, f and g2 may be infinite; they are never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polydiff.core.discrete import Discrete
from polydiff.core.errors import ScheduleError
from polydiff.core.schedule import Schedule, as_time, bisect

__all__ = [
    "EDM",
    "SCHEDULES",
    "VE",
    "VP",
    "Cosine",
    "Custom",
    "Discrete",
    "RectifiedFlow",
    "Schedule",
    "SubVP",
    "as_time",
]


@dataclass(frozen=True)
class _LinearBeta(Schedule):
    """What VP and sub-VP share: beta(t) = beta_min + (beta_max - beta_min) t, its integral B(t), alpha = exp(-B/2)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        self.check_positive()
        if self.beta_max < self.beta_min:
            raise ScheduleError(f"{type(self).__name__}: beta_max {self.beta_max} is below beta_min {self.beta_min}")

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def integral(self, t: Tensor) -> Tensor:
        return as_time(t) * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * as_time(t))

    def _t_of_integral(self, integral: Tensor) -> Tensor:
        # The root of the quadratic in the form that keeps all digits when B is small.
        slope = 2 * (self.beta_max - self.beta_min)
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + slope * integral))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integral(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t) * self.alpha(t)

    def f(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)


class VP(_LinearBeta):
    """Variance preserving, the continuous limit of DDPM: sigma = sqrt(1 - exp(-B)), lambda = -log(exp(B) - 1)/2.

    Source: Song 2021, eq. 11 and 29.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def dsigma(self, t: Tensor) -> Tensor:
        return 0.5 * self.beta(t) * torch.exp(-self.integral(t)) / self.sigma(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._t_of_integral(torch.logaddexp(-2 * as_time(log_snr), torch.zeros((), dtype=torch.float64)))

    def g2(self, t: Tensor) -> Tensor:
        return self.beta(t)


class SubVP(_LinearBeta):
    """Sub-variance preserving: sigma = 1 - exp(-B), below VP's at the same drift.

    Its inverse is B = 2 asinh(exp(-lambda)/2). Source: Song 2021, eq. 12 and 29.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integral(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return self.beta(t) * torch.exp(-self.integral(t))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._t_of_integral(2 * torch.asinh(0.5 * torch.exp(-as_time(log_snr))))


class _UnitAlpha(Schedule):
    """What VE and EDM share: the data are never scaled down."""

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        self.check_positive()
        if self.sigma_max <= self.sigma_min:
            name = type(self).__name__
            raise ScheduleError(f"{name}: sigma_max {self.sigma_max} must exceed sigma_min {self.sigma_min}")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(as_time(t))


@dataclass(frozen=True)
class VE(_UnitAlpha):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t. Source: Song 2021, eq. 9, appendix C."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min = 0.0  # sigma_min is reached at 0

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._log_ratio * as_time(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return self._log_ratio * self.sigma(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-math.log(self.sigma_min) - as_time(log_snr)) / self._log_ratio


@dataclass(frozen=True)
class EDM(_UnitAlpha):
    """alpha = 1, sigma = sigma_max t^rho, so that uniform t is the Karras grid. Source: Karras 2022, eq. 5 and table 1."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "t_min", (self.sigma_min / self.sigma_max) ** (1 / self.rho))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * as_time(t) ** self.rho

    def dsigma(self, t: Tensor) -> Tensor:
        return self.rho * self.sigma_max * as_time(t) ** (self.rho - 1)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-(as_time(log_snr) + math.log(self.sigma_max)) / self.rho)

    def dlog_snr(self, t: Tensor) -> Tensor:
        return -self.rho / as_time(t)


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(pi t/2), sigma = sin(pi t/2). Source: Nichol 2021, in the continuous form of Salimans 2022."""

    t_max = 0.999

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1 - as_time(t)))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * as_time(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.sigma(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-as_time(log_snr))) * (2 / math.pi)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t: straight lines from data to noise. Source: Liu 2023, eq. 1; Lipman 2023, eq. 22."""

    t_max = 0.999

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Tensor) -> Tensor:
        return as_time(t).clone()

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(as_time(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(as_time(t))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-as_time(log_snr))


@dataclass(frozen=True)
class Custom(Schedule):
    """A schedule from two functions of t; derivatives by autograd, the inverse by bisection.

    Args:
        alpha_of_t, sigma_of_t: differentiable functions of a float64 tensor; alpha/sigma must decrease on [t_min, t_max].
        t_min, t_max: the range of t that grids use.
    Raises:
        ScheduleError: alpha/sigma does not decrease, or a value is not finite, at one of 257 probed times.
    """

    alpha_of_t: Callable[[Tensor], Tensor]
    sigma_of_t: Callable[[Tensor], Tensor]
    t_min: float = 1e-3
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ScheduleError(f"Custom: needs 0 <= t_min < t_max <= 1, got {self.t_min}, {self.t_max}")
        t = torch.linspace(self.t_min, self.t_max, 257, dtype=torch.float64)
        falls = torch.diff(self.log_snr(t)) < 0
        if not bool(falls.all()):
            first = float(t[int((~falls).nonzero()[0])])
            raise ScheduleError(f"Custom: alpha/sigma must be finite and decrease, which fails near t = {first:.4g}")

    def alpha(self, t: Tensor) -> Tensor:
        return self.alpha_of_t(as_time(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_of_t(as_time(t))

    def dalpha(self, t: Tensor) -> Tensor:
        return _derivative(self.alpha_of_t, t)

    def dsigma(self, t: Tensor) -> Tensor:
        return _derivative(self.sigma_of_t, t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        log_snr = as_time(log_snr)
        return bisect(lambda t: self.log_snr(t) >= log_snr, log_snr, 60)


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    with torch.enable_grad():
        t = as_time(t).detach().requires_grad_(True)
        value = function(t)
        if not value.requires_grad:  # a constant
            return torch.zeros_like(t)
        return torch.autograd.grad(value.sum(), t)[0]


SCHEDULES: dict[str, type[Schedule]] = {
    "vp": VP,
    "sub_vp": SubVP,
    "ve": VE,
    "edm": EDM,
    "cosine": Cosine,
    "rectified_flow": RectifiedFlow,
    "discrete": Discrete,
}
