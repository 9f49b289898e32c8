r"""The isotropic Gaussian on SO(3): where Brownian motion of variance sigma^2 per axis takes a fixed rotation.

Its density with respect to normalised Haar measure (uniform = 1) depends on the angle :math:`\omega` alone and solves the
heat equation, so that variances add. It has two expansions, equal by Poisson's summation:

.. math:: f &= \sum_{l \ge 0} (2l+1)\,e^{-l(l+1)\sigma^2/2}\,\frac{\sin((l+\frac12)\omega)}{\sin(\omega/2)} \\
   &= \frac{\sqrt{2\pi}\,e^{\sigma^2/8}}{\sigma^3 \sin(\omega/2)} \sum_k (-1)^k (\omega + 2\pi k)\,e^{-(\omega+2\pi k)^2/2\sigma^2}.

Either needs few terms where the other needs many: where they meet here, at sigma = 1, three images :math:`|k| \le 1` and
nine orders l leave 1e-16. The image k = 0 is taken out as a factor, so that nothing over- or underflows at any angle,
while at small sigma rounding makes a sum of a thousand orders negative. The angle has density :math:`f (1-\cos\omega)/\pi`.

Radians and float64 throughout; everything broadcasts. Sources: Nikolayev 1997; Leach 2022, eq. 5, whose scale is ours over
:math:`\sqrt2`; the images, the distribution function and its inverse are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from polydiff.core.errors import ScheduleError

_LEGENDRE = np.polynomial.legendre.leggauss(64)
_ORDERS, _MOMENTS = 8, 10  # l, and powers of sigma^2/8, that leave 1e-16 at sigma = 1


def igso3_log_density(angle: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Log density in nats with respect to normalised Haar measure.

    Args:
        angle: in [0, pi].
        sigma: positive; while it is small, the standard deviation of the tangent per axis.

    Raises:
        ScheduleError: a sigma that is not positive and finite, or an angle outside [0, pi].
    """
    return _log_density(*_checked(angle, sigma))


def igso3_score(angle: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Slope of the log density in the angle, 0 at both ends and negative between. Arguments as for the density."""

    def near(angle: Tensor, sigma: Tensor) -> Tensor:
        height, slope = _windings(angle, sigma)
        square, far = angle**2, angle.clamp_min(0.1)
        sinc = angle * (1 / 12 + square * (1 / 720 + square * (1 / 30240 + square / 1209600)))
        sinc = torch.where(angle < 0.1, sinc, 1 / far - 0.5 / torch.tan(0.5 * far))  # slope of -log sinc(angle/2)
        return sinc - angle / sigma**2 + slope / height

    def wide(angle: Tensor, sigma: Tensor) -> Tensor:
        above, slope = _orders(angle, sigma)
        return slope / (1 + above)

    return _either(*_checked(angle, sigma), near, wide)


def igso3_tangent_score(omega: Tensor, sigma: Tensor | float) -> Tensor:
    """Score, at R_0 Exp(omega), of IGSO(3) around R_0: a body-frame tangent (..., 3).

    Args:
        omega: Log(R_0^T R_t), of norm at most pi; the result has its dtype.
        sigma: broadcasts against (...).
    """
    length = torch.linalg.vector_norm(omega.double(), dim=-1).clamp_min(1e-30)
    return ((igso3_score(length, sigma) / length).unsqueeze(-1) * omega).to(omega.dtype)


def igso3_score_square(sigma: Tensor | float) -> Tensor:
    """Mean squared norm of the score under IGSO(3) itself, 3/sigma^2 while sigma is small: Gauss-Legendre over the angle."""
    sigma = _checked(0.0, sigma)[1].unsqueeze(-1)
    nodes, weights = (torch.from_numpy(part).to(sigma.device) for part in _LEGENDRE)
    half = 0.5 * (10 * sigma).clamp_max(math.pi)
    angle = half * (1 + nodes)
    density = torch.exp(_log_density(angle, sigma)) * torch.sin(0.5 * angle) ** 2 * (2 / math.pi)
    return (half * weights * density * igso3_score(angle, sigma) ** 2).sum(-1)


def igso3_cdf(angle: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Probability of an angle up to this one, to an absolute 1e-14. Arguments as for the density."""
    return _either(*_checked(angle, sigma), _cdf_near, _cdf_wide)


def igso3_angle(probability: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Inverse of the distribution function, for probabilities in [0, 1]; others raise ``ScheduleError``."""
    p, sigma = _checked(probability, sigma, 1.0, "a probability must lie in [0, 1]")
    # The radius of a normal vector in space: its left tail's power law, Wilson and Hilferty's cube, its right tail.
    cube = (1 - 2 / 27 + math.sqrt(2 / 27) * torch.special.ndtri(p)).clamp_min(0) ** 3
    flat = torch.maximum((3 * cube).sqrt(), (3 * math.sqrt(math.pi / 2) * p) ** (1 / 3))
    for _ in range(3):
        tail = torch.log(math.sqrt(2 / math.pi) * (flat + 1 / flat) / (1 - p))
        flat = torch.where(p > 0.95, (2 * tail).sqrt(), flat)
    return _invert(p, flat, sigma)


def igso3_tangent(z: Tensor, sigma: Tensor | float) -> Tensor:
    """Turn standard normal vectors (..., 3) into tangents whose exponentials are IGSO(3) around the identity.

    Directions stay and lengths go to the angles of equal probability: sigma z while sigma is small.

    Args:
        z: standard normal; the result has its dtype.
        sigma: broadcasts against (...).
    """
    radius, sigma = _checked(torch.linalg.vector_norm(z.double(), dim=-1), sigma, 1e100, "draws must be finite")
    p = torch.erf(radius / math.sqrt(2)) - math.sqrt(2 / math.pi) * radius * torch.exp(-0.5 * radius**2)
    angle = _invert(p.clamp_min(0), radius, sigma)
    return ((angle / radius.clamp_min(1e-30)).unsqueeze(-1) * z).to(z.dtype)


def _either(angle: Tensor, sigma: Tensor, near: Callable[..., Tensor], wide: Callable[..., Tensor]) -> Tensor:
    """Images for sigma below 1, orders from there on, and both only where a batch has both."""
    is_near = sigma < 1
    if bool(is_near.all()):
        return near(angle, sigma)
    if not bool(is_near.any()):
        return wide(angle, sigma)
    return torch.where(is_near, near(angle, sigma.clamp_max(1)), wide(angle, sigma.clamp_min(1)))


def _windings(angle: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    r"""Three images over the first of them, and the slope of that in the angle.

    With :math:`y = 2\pi\omega/\sigma^2` and :math:`q = e^{-2\pi^2/\sigma^2}` they are
    :math:`1 - 2q (\cosh y - (2\pi/\sigma)^2 \sinh(y)/y)`; q is multiplied in before anything grows.
    """
    rate = 2 * math.pi / sigma**2
    a = torch.maximum(angle, 1e-4 / rate)  # below it the sum is flat and its slope linear, to 1e-13
    up, down, y = torch.exp(rate * (a - math.pi)), torch.exp(-rate * (a + math.pi)), rate * a
    sinh, cosh, ratio = -0.5 * up * torch.expm1(-2 * y), 0.5 * (up + down), 2 * math.pi * rate
    slope = 2 * rate * (ratio * (cosh - sinh / y) / y - sinh)
    return 1 - 2 * (cosh - ratio * sinh / y), slope * angle / a


def _orders(angle: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The orders from l = 1 on, and their slope, as a sum over cos(m angle), whose weights sum over l >= m; Clenshaw."""
    cos, tail = torch.cos(angle), torch.zeros_like(sigma)
    value = last_value = slope = last_slope = torch.zeros_like(cos * tail)
    for m in range(_ORDERS, 0, -1):
        tail = tail + (2 * m + 1) * torch.exp(-0.5 * m * (m + 1) * sigma**2)
        value, last_value = 2 * tail + 2 * cos * value - last_value, value
        slope, last_slope = 2 * m * tail + 2 * cos * slope - last_slope, slope
    return tail + cos * value - last_value, -torch.sin(angle) * slope


def _log_density(angle: Tensor, sigma: Tensor) -> Tensor:
    def near(angle: Tensor, sigma: Tensor) -> Tensor:
        constant = math.log(2 * math.sqrt(2 * math.pi)) - 3 * torch.log(sigma) + sigma**2 / 8
        shape = torch.log(_windings(angle, sigma)[0] / torch.sinc(angle / (2 * math.pi)))
        return constant - 0.5 * (angle / sigma) ** 2 + shape

    return _either(angle, sigma, near, lambda angle, sigma: torch.log1p(_orders(angle, sigma)[0]))


def _cdf_wide(angle: Tensor, sigma: Tensor) -> Tensor:
    """The term of order l integrates cos(l angle) - cos((l+1) angle)."""
    total, sine, double = angle - torch.sin(angle), torch.sin(angle), 2 * torch.cos(angle)
    last = torch.zeros_like(sine)
    for m in range(1, _ORDERS + 1):
        following = double * sine - last
        weight = (2 * m + 1) * torch.exp(-0.5 * m * (m + 1) * sigma**2)
        total, sine, last = total + weight * (sine / m - following / (m + 1)), following, sine
    return total / math.pi


def _cdf_near(angle: Tensor, sigma: Tensor) -> Tensor:
    """The images side by side continue one function of the unrolled angle, proportional to v exp(-v^2/2sigma^2) sin(v/2).

    Its integral is by parts that of cos(v/2) under a normal density, whose power series has the moments of the normal for
    coefficients and falls as (sigma^2/8)^j / j!.
    """

    def unrolled(v: Tensor) -> Tensor:
        x = v / sigma
        bell = torch.exp(-0.5 * x**2)
        moment, power, factor = math.sqrt(math.pi / 2) * torch.erf(x / math.sqrt(2)), bell * x, torch.ones_like(sigma)
        total = moment - 2 * bell * torch.sin(0.5 * v) / sigma
        for j in range(1, _MOMENTS + 1):
            moment, power = (2 * j - 1) * moment - power, power * x**2
            factor = factor * -(sigma**2) / (8 * j * (2 * j - 1))
            total = total + factor * moment
        return total

    total = unrolled(angle) + unrolled(2 * math.pi + angle) - unrolled(2 * math.pi - angle)
    return math.sqrt(2 / math.pi) * torch.exp(sigma**2 / 8) * total


def _invert(p: Tensor, flat: Tensor, sigma: Tensor) -> Tensor:
    """Newton's method between bounds that close in, from the angle ``sigma flat`` that flat space would have."""
    p, flat, sigma = torch.broadcast_tensors(p, flat, sigma)
    cube = (6 * math.pi * p) ** (1 / 3)  # the uniform angle has w - sin(w) = pi p: its start, and a tangent at pi
    angle = torch.minimum(sigma * flat, torch.minimum(cube * (1 + cube**2 / 60), 0.5 * math.pi * (1 + p)))
    low, high = torch.zeros_like(p), torch.full_like(p, math.pi)
    for _ in range(5):
        gap = _either(angle, sigma, _cdf_near, _cdf_wide) - p
        gap = torch.where(gap.abs() > 1e-15, gap, 0)  # less is rounding, which the far tail's density would magnify
        low, high = torch.where(gap < 0, angle, low), torch.where(gap > 0, angle, high)
        density = torch.exp(_log_density(angle, sigma)) * torch.sin(0.5 * angle) ** 2 * (2 / math.pi)
        angle = (angle - gap / density.clamp_min(1e-300)).clamp(0, math.pi)
        angle = torch.where((angle >= low) & (angle <= high), angle, 0.5 * (low + high))
    return angle


def _checked(
    value: Tensor | float, sigma: Tensor | float, end: float = math.pi, rule: str = "an angle must lie in [0, pi]"
) -> tuple[Tensor, Tensor]:
    """Both in float64 on the first one's device; what rounding took beyond the end is brought back."""
    value = torch.as_tensor(value, dtype=torch.float64)
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=value.device)
    bad_sigma, bad_value = ~((sigma > 1e-100) & (sigma < math.inf)), ~((value >= 0) & (value <= end * (1 + 1e-6)))
    for what, bad, text in ((sigma, bad_sigma, "sigma must be positive and finite"), (value, bad_value, rule)):
        if bool(bad.any()):
            index = bad.nonzero()[0].tolist()
            raise ScheduleError(
                f"IGSO(3): {text}, not {what[tuple(index)].item():g}{f' at index {index}' * bool(index)}"
            )
    return value.clamp_max(end), sigma
