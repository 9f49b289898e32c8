"""What every schedule is: alpha and sigma as functions of t, and what follows from them; see ``schedules``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polydiff.core.checks import number
from polydiff.core.errors import ScheduleError


def as_time(t: Tensor | float | Sequence[float]) -> Tensor:
    """Time as a float64 tensor on its own device."""
    return torch.as_tensor(t, dtype=torch.float64)


def bisect(below: Callable[[Tensor], Tensor], like: Tensor, rounds: int) -> Tensor:
    """The places in [0, 1], shaped like a tensor, under which ``below`` is true: their lower bounds after some halvings."""
    low, high = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(rounds):
        middle = 0.5 * (low + high)
        under = below(middle)
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return low


class Schedule(ABC):
    """The interface of every schedule; see ``polydiff.core.schedules`` for the symbols."""

    t_min: float = 1e-3
    t_max: float = 1.0

    def check_positive(self) -> None:
        """Refuse parameters that are not positive, finite numbers."""
        for name, value in vars(self).items():
            number(f"{type(self).__name__}: {name}", value, above=0, error=ScheduleError)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at t."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha in t."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma in t."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time at which the log signal-to-noise ratio has the given value."""

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda = log(alpha/sigma), decreasing in t."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def f(self, t: Tensor) -> Tensor:
        """Linear drift coefficient of the forward SDE, alpha'/alpha."""
        return self.dalpha(t) / self.alpha(t)

    def g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient of the forward SDE."""
        sigma = self.sigma(t)
        return 2 * sigma * (self.dsigma(t) - self.f(t) * sigma)

    def dlog_snr(self, t: Tensor) -> Tensor:
        """Derivative of lambda in t, -g2 / (2 sigma^2)."""
        return self.f(t) - self.dsigma(t) / self.sigma(t)
