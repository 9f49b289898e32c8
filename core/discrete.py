r"""Chains of N noising steps, as most published models were trained on, as schedules in continuous t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydiff.core.checks import number, row, whole
from polydiff.core.errors import ScheduleError, unknown
from polydiff.core.schedule import Schedule, as_time, bisect

BETAS = ("linear", "scaled_linear", "cosine")
# slopes at two end nodes
_EDGE = torch.tensor([[-25, 48, -36, 16, -3], [-3, -10, 18, -6, 1]], dtype=torch.float64) / 12
_BISECTIONS, _NEWTON = 12, 4  # to 2e-4 of a step, where the cubic is nearly a line, and then to rounding


def _chain(betas: str, start: float, end: float, n: int) -> Tensor:
    """1 - alpha after each of n steps, alpha being the root of the product of all 1 - beta so far."""
    if betas == "cosine":
        angle = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * (math.pi / 2)
        level = torch.cos(angle) ** 2
        beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    elif betas == "scaled_linear":
        beta = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    else:
        beta = torch.linspace(start, end, n, dtype=torch.float64)
    return -torch.expm1(0.5 * torch.log1p(-beta).cumsum(0))


@dataclass(frozen=True)
class Discrete(Schedule):
    r"""The variance-preserving chain of N steps with :math:`\bar\alpha_i = \prod_{j \le i}(1 - \beta_j)`, index i at t = (i+1)/N.

    There, where the grids ``ddpm-*`` stand, alpha is the root of :math:`\bar\alpha_i` exactly, and alpha(0) = 1. Between,
    1 - alpha is a cubic, continuous in its slope, such that the log-SNR decreases; all that follows is of the interpolant.

    Args:
        betas: ``"linear"`` from beta_start to beta_end; ``"scaled_linear"``, linear in the root of beta; ``"cosine"``
            (elsewhere also squaredcos_cap_v2), which takes neither.
        beta_start, beta_end: first and last beta, in (0, 1).
        length: N.
        zero_terminal: rescale alpha so that it is 0 at t = 1 and unchanged at the first index.
        alphas_cumprod: the chain itself, decreasing numbers in [0, 1) in a row of any kind, instead of betas and length.

    Raises:
        ScheduleError: an unknown name, betas outside (0, 1), a chain that does not decrease or has fewer than 4 steps.

    Source: Ho 2020, eq. 4; Nichol 2021, eq. 17; Rombach 2022; Lin 2024, algorithm 1.
    """

    betas: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    length: int = 1000
    zero_terminal: bool = False
    alphas_cumprod: Sequence[float] | Tensor | None = None  # kept as a tuple

    def __post_init__(self) -> None:
        if self.betas not in BETAS:
            raise unknown("betas", self.betas, BETAS)
        start, end = (number(name, getattr(self, name), error=ScheduleError) for name in ("beta_start", "beta_end"))
        if not 0 < start <= end < 1:
            raise ScheduleError(f"Discrete: needs 0 < beta_start <= beta_end < 1, got {start}, {end}")
        gamma = _chain(self.betas, start, end, whole("length", self.length, error=ScheduleError))
        if self.alphas_cumprod is not None:
            table = row("alphas_cumprod", self.alphas_cumprod, ScheduleError).cpu()
            gamma = (1 - table) / (1 + table.clamp_min(0).sqrt())
            object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))
        if len(gamma) < 4:
            raise ScheduleError(f"Discrete: a chain of {len(gamma)} steps is too short, at least 4 are needed")
        if self.zero_terminal:
            gamma = 1 - (gamma[-1] - gamma) * ((1 - gamma[0]) / (gamma[-1] - gamma[0]))
        gamma = torch.cat([torch.zeros(1, dtype=torch.float64), gamma])
        wrong = ~((torch.diff(gamma) > 0) & (gamma[1:] <= 1))
        if bool(wrong.any()):
            where = int(wrong.nonzero()[0])
            raise ScheduleError(f"Discrete: alphas_cumprod must decrease within [0, 1), which fails at index {where}")
        cubics = _monotone_cubics(gamma)
        for name, value in {"length": len(gamma) - 1, "t_min": 1 / (len(gamma) - 1), "_cubics": cubics}.items():
            object.__setattr__(self, name, value)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Fraction u of the step that holds t, and its cubic (4, *t.shape)."""
        scaled = as_time(t) * self.length
        step = scaled.detach().floor().clamp(0, self.length - 1)
        return scaled - step, self._cubics.to(scaled.device)[:, step.long()]  # type: ignore[attr-defined]

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - _cubic(*self._place(t))

    def sigma(self, t: Tensor) -> Tensor:
        gamma = _cubic(*self._place(t))
        return torch.sqrt(gamma * (2 - gamma))  # 1 - alpha^2 without cancellation

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.length * _slope(*self._place(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return -self.dalpha(t) * self.alpha(t) / self.sigma(t)

    def g2(self, t: Tensor) -> Tensor:
        return -2 * self.dalpha(t) / self.alpha(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        log_snr = as_time(log_snr)
        gamma = torch.sigmoid(-2 * log_snr) / (1 + torch.sigmoid(2 * log_snr).sqrt())
        cubics = self._cubics.to(gamma.device)  # type: ignore[attr-defined]
        step = (torch.searchsorted(cubics[0].contiguous(), gamma.contiguous(), right=True) - 1).clamp_min(0)
        cubic = cubics[:, step]
        u = bisect(lambda place: _cubic(place, cubic) <= gamma, gamma, _BISECTIONS)
        for _ in range(_NEWTON):
            u = (u - (_cubic(u, cubic) - gamma) / _slope(u, cubic)).clamp(0, 1)
        return (step + u) / self.length


def _cubic(u: Tensor, cubic: Tensor) -> Tensor:
    a, b, c, d = cubic
    return a + u * (b + u * (c + u * d))


def _slope(u: Tensor, cubic: Tensor) -> Tensor:
    _, b, c, d = cubic
    return b + u * (2 * c + u * (3 * d))


def _monotone_cubics(values: Tensor) -> Tensor:
    """Coefficients (4, n) of cubics in u in [0, 1] through n + 1 rising values, joined with continuous slopes.

    Slopes are those of fourth-order differences, kept between 0.1 and 2 times the smaller rise beside them: up to 3 every
    piece rises (Fritsch 1980, section 3).
    """
    rise = torch.diff(values)
    inner = (8 * (values[3:-1] - values[1:-3]) - (values[4:] - values[:-4])) / 12
    first, last = _EDGE @ values[:5], -(_EDGE @ values[-5:].flip(0)).flip(0)
    least = torch.minimum(torch.cat([rise[:1], rise]), torch.cat([rise, rise[-1:]]))
    slopes = torch.cat([first, inner, last]).clamp(0.1 * least, 2 * least)
    left, right = slopes[:-1], slopes[1:]
    return torch.stack([values[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise])
