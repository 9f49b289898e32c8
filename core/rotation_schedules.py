"""Schedules that published models of rotations use, beside VE (the logarithmic one) and EDM: alpha = 1, sigma in radians.

Rotations are uniform but for a total variation of 0.13 at sigma = 1.5, 0.023 at 2 and 0.0024 at 2.5: a prior wants 2.5.
"""
# ruff: noqa: D102  # the class docstring holds the formulas of the overriding methods

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polydiff.core.checks import number
from polydiff.core.errors import ScheduleError
from polydiff.core.schedules import Schedule, _UnitAlpha, as_time


@dataclass(frozen=True)
class LogLinear(_UnitAlpha):
    """sigma = log((1 - t) exp(sigma_min) + t exp(sigma_max)). Source: Yim 2023, appendix (FrameDiff)."""

    sigma_min: float = 0.1
    sigma_max: float = 1.5
    t_min = 0.0  # sigma_min is reached at 0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + torch.log1p(math.expm1(self.sigma_max - self.sigma_min) * as_time(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return math.expm1(self.sigma_max - self.sigma_min) * torch.exp(self.sigma_min - self.sigma(t))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        rise = torch.exp(-as_time(log_snr)) - self.sigma_min
        return torch.expm1(rise) / math.expm1(self.sigma_max - self.sigma_min)


@dataclass(frozen=True)
class Quadratic(_UnitAlpha):
    """sigma = sigma_min + (sigma_max - sigma_min) ((1 - bend) t + bend t^2). Source: Watson 2023, methods (RFdiffusion)."""

    sigma_min: float = 0.02
    sigma_max: float = 2.02
    bend: float = 0.25
    t_min = 0.0  # sigma_min is reached at 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bend >= 1:
            raise ScheduleError(f"Quadratic: bend = {self.bend} must be below 1, or sigma would stand still at t = 0")

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + (self.sigma_max - self.sigma_min) * t * (1 - self.bend + self.bend * as_time(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return (self.sigma_max - self.sigma_min) * (1 - self.bend + 2 * self.bend * as_time(t))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        share, line = (torch.exp(-as_time(log_snr)) - self.sigma_min) / (self.sigma_max - self.sigma_min), 1 - self.bend
        return 2 * share / (line + torch.sqrt(line**2 + 4 * self.bend * share))  # the root that keeps all digits


@dataclass(frozen=True)
class Exponential(Schedule):
    """Share of the way from the data to the noise: sigma = (exp(rate t) - 1)/(exp(rate) - 1) and alpha = 1 - sigma.

    With rate 0, its limit, the linear path sigma = t. Going down, the share that is left of the way to a fixed clean
    rotation falls by exp(-rate dt). Differs from the source, whose sigma is exp(-rate (1 - t)), by exp(-rate) at most:
    here the way ends at the data. Source: Yim 2023 (FrameFlow), section on inference.
    """

    rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= number("Exponential: rate", self.rate, least=0, error=ScheduleError) <= 100:
            raise ScheduleError(f"Exponential: rate = {self.rate} must be at most 100; published models use 10")
        # sigma = 0.999, as in rectified flow: its log-SNR is finite
        object.__setattr__(self, "t_max", float(self.t_of_log_snr(as_time(math.log(0.001 / 0.999)))))

    def sigma(self, t: Tensor) -> Tensor:
        t = as_time(t)
        return torch.expm1(self.rate * t) / math.expm1(self.rate) if self.rate else t.clone()

    def alpha(self, t: Tensor) -> Tensor:
        t = as_time(t)  # without a difference, which would lose digits at t = 1
        return -torch.expm1(self.rate * (t - 1)) / -math.expm1(-self.rate) if self.rate else 1 - t

    def dsigma(self, t: Tensor) -> Tensor:
        t = as_time(t)
        return torch.exp(self.rate * t) * (self.rate / math.expm1(self.rate)) if self.rate else torch.ones_like(t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.dsigma(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        share = torch.sigmoid(-as_time(log_snr))
        return torch.log1p(share * math.expm1(self.rate)) / self.rate if self.rate else share
