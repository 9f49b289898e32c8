r"""Inverse problems: guides that sample the data behind an observation y = A(x_0) + sigma_y z.

Each moves the prediction along the gradient of an approximate log p(y | x_t), which adds :math:`J^T A^T u` to the score:

.. math:: \hat x_0' = \hat x_0 + \frac{\sigma_t^2}{\alpha_t} J^T A^T u, \qquad J = \partial\hat x_0/\partial x_t

====== ========================================================================================================
guide  u, of the residual :math:`r = y - A\hat x_0`
====== ========================================================================================================
DPS    :math:`\zeta\, r / |r|`
PiGDM  :math:`(\sigma_y^2 + \rho_t^2 A A^T)^{-1} r` with :math:`\rho_t^2 = \sigma_t^2 s^2/(\alpha_t^2 s^2 + \sigma_t^2)`
MMPS   :math:`(\sigma_y^2 + A V A^T)^{-1} r` with the covariance :math:`V = (\sigma_t^2/\alpha_t) J` of x_0 given x_t
====== ========================================================================================================

MMPS is exact on every Gaussian prior, PiGDM on N(m, s^2). A is any differentiable function of a batch of states, linear
but for DPS; its adjoint comes from automatic differentiation.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from polydiff.core.checks import check_bool, check_real, number, shown, whole
from polydiff.core.denoiser import Denoise, Prediction
from polydiff.core.errors import ConfigError
from polydiff.core.guidance import Guide, differentiable, gradient_of, predicted
from polydiff.core.tree import expand

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Posterior(Guide):
    """What the guides of the module's table share.

    Args:
        y: what is observed, without batch axis, or (b, ...) after ``stack``; zero where A observes nothing.
        operator: A, from states (b, *dims) to observations (b, ...).
        mask: valid elements, bool (n,) or (b, n); nothing else is moved.

    Raises:
        ConfigError: a number that is not finite or negative; when called: an operator whose output does not have the shape
            of ``y`` or that is not linear, a Denoise that detaches its input or returns a bare state.
        ScheduleError: when called: at a time where alpha is under 1e-6.
    """

    y: Tensor
    operator: Linear
    mask: Tensor | None = field(default=None, kw_only=True)
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real("y", self.y)
        if bad := int((~torch.isfinite(self.y)).sum()):
            raise ConfigError(f"{bad} of the observed numbers y are not finite")
        for entry in dataclasses.fields(self):
            if entry.type == "float":
                number(entry.name, getattr(self, entry.name), least=0)
            elif entry.type == "int":
                whole(entry.name, getattr(self, entry.name))

    @abstractmethod
    def weigh(self, residual: Tensor, prediction: Prediction, pull: Linear) -> Tensor:
        """u of the module's table; ``pull`` is V A^T."""

    def __call__(self, denoise: Denoise) -> Denoise:
        """The guided Denoise."""
        name, looked = type(self).__name__, not self.linear

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            nonlocal looked
            x, again = differentiable(x_t)
            with torch.enable_grad():
                prediction = predicted(denoise(x, t), name, signal=True)
                x0_hat = prediction.x0
                seen = self.operator(x0_hat)
            if not isinstance(seen, Tensor) or seen.shape[:1] != x.shape[:1]:
                raise ConfigError(
                    f"the operator makes {shown(seen)} of states {tuple(x.shape)}: a tensor (b, ...) is needed"
                )
            if self.y.shape not in (seen.shape, seen.shape[1:]):
                raise ConfigError(f"the operator makes {tuple(seen.shape)} of a state, y has {tuple(self.y.shape)}")
            if not looked and not is_linear(self.operator, x_t):
                raise ConfigError(f"{name} needs a linear operator, but here A(a + 2b) is not A(a) + 2 A(b): take DPS")
            looked = True
            process, sigma = prediction.process, prediction.process.schedule.sigma(prediction.t)
            scale = expand(sigma**2 / process.schedule.alpha(prediction.t), x_t)
            mask = None if self.mask is None else self.mask.to(x_t.device).expand(x_t.shape[0], -1)

            def pull(u: Tensor) -> Tensor:
                return scale * process.project(gradient_of(seen, x, u, again, "the observed x0_hat"), mask)

            with torch.set_grad_enabled(again):
                u = self.weigh(self.y.to(seen) - seen, prediction, pull)
                moved = prediction.replace(x0_hat + pull(u), "x0")
            return moved if again else moved.detach()

        return guided


@dataclass(frozen=True, eq=False)
class DPS(Posterior):
    """Diffusion posterior sampling: a step of fixed length against the residual; A may be nonlinear.

    Args:
        zeta: the length, in units of 1/y; of the order of the root of the number of elements of y.

    Source: Chung 2023 (DPS), eq. 16 and algorithm 1; the step is taken in the score, so that every solver can use it.
    """

    zeta: float = 1.0
    linear = False

    def weigh(self, residual: Tensor, prediction: Prediction, pull: Linear) -> Tensor:
        """zeta r / |r|."""
        length = residual.flatten(1).norm(dim=1).clamp_min(torch.finfo(residual.dtype).tiny)
        return self.zeta * residual / expand(length, residual)


@dataclass(frozen=True, eq=False)
class MMPS(Posterior):
    """Moment matching posterior sampling: the covariance of x_0 given x_t by Tweedie's formula.

    Args:
        sigma_y: standard deviation of the noise in y.
        iterations: most iterations of ``solve``, each one backward pass through the network.
        tolerance: residual, relative to r, at which an item is solved.

    Source: Rozet 2024, section 4.2; conjugate residuals, as a learned network's Jacobian is only about symmetric.
    """

    sigma_y: float = 0.0
    iterations: int = 5
    tolerance: float = 1e-4

    def weigh(self, residual: Tensor, prediction: Prediction, pull: Linear) -> Tensor:
        """(sigma_y^2 + A V A^T)^-1 r."""
        covariance = self.covariance(prediction, pull)
        apply = lambda u: self.sigma_y**2 * u + self.operator(covariance(u))
        return solve(apply, residual, self.iterations, self.tolerance)

    def covariance(self, prediction: Prediction, pull: Linear) -> Linear:
        """V A^T."""
        return pull


@dataclass(frozen=True, eq=False)
class PiGDM(MMPS):
    """Pseudo-inverse guidance: as ``MMPS`` with the covariance of data N(m, s^2), which costs no passes through the network.

    Args:
        variance: s^2 of the normalised data.

    Source: Song 2023 (PiGDM), section 3, without the further factor of its algorithm 1.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("variance", self.variance, above=0)

    def covariance(self, prediction: Prediction, pull: Linear) -> Linear:
        """rho_t^2 A^T."""
        schedule, t = prediction.process.schedule, prediction.t
        alpha2, sigma2 = schedule.alpha(t) ** 2 * self.variance, schedule.sigma(t) ** 2
        scale = expand(sigma2 * self.variance / (alpha2 + sigma2), prediction.x_t)
        with torch.enable_grad():
            x = torch.zeros_like(prediction.x_t).requires_grad_()
            seen = self.operator(x)
        return lambda u: scale * gradient_of(seen, x, u, torch.is_grad_enabled(), "the operator's output")


def is_linear(operator: Linear, like: Tensor) -> bool:
    """Whether A(a + 2b) = A(a) + 2 A(b) for two random states shaped like (b, *dims), to rounding."""
    draw = torch.randn(2, *like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    first, second, both = (operator(x) for x in (draw[0], draw[1], draw[0] + 2 * draw[1]))
    size = first.abs().amax() + 2 * second.abs().amax() if first.numel() else 0
    return bool(((both - first - 2 * second).abs() <= torch.finfo(like.dtype).eps ** 0.5 * size).all())


def solve(apply: Linear, b: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Solve apply(u) = b (b, ...) for each item by itself, lessening its residual along one new direction an iteration.

    ``apply`` is linear, not always symmetric. An item stops at its relative ``tolerance``, or where <r, apply(r)> is not
    positive as a covariance would have it, and is not touched by what others still need.

    Source: Eisenstat 1983, section 2 (generalised conjugate residuals).
    """
    dot = lambda v, w: (v * w).flatten(1).sum(1).reshape(-1, *[1] * (b.ndim - 1))
    past: list[tuple[Tensor, Tensor]] = []  # directions and what they are mapped to
    u, residual = torch.zeros_like(b), b
    for _ in range(iterations):
        going = dot(residual, residual) > tolerance**2 * dot(b, b)
        if not bool(going.any()):
            break
        direction, mapped = residual, apply(residual)
        going = going & (dot(direction, mapped) > 0)  # a learned covariance can fail to be one
        for other, seen in past:  # what they are mapped to is orthonormal
            along = dot(mapped, seen)
            direction, mapped = direction - along * other, mapped - along * seen
        length = dot(mapped, mapped).sqrt()
        factor = torch.where(going & (length > 0), 1 / torch.where(length > 0, length, 1), 0)
        direction, mapped = factor * direction, factor * mapped
        along = dot(residual, mapped)
        u, residual = u + along * direction, residual - along * mapped
        past.append((direction, mapped))
    return u


def identity(x: Tensor) -> Tensor:
    """Everything is observed: denoising."""
    return x


@dataclass(frozen=True, eq=False)
class Select:
    """Observe some elements and zero for the others: inpainting. ``where`` has the axes of an item, some of length 1."""

    where: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (b, *dims)."""
        check_bool("where", self.where)
        where, item = tuple(self.where.shape), tuple(x.shape[1:])
        fits = all(m in (1, n) for m, n in zip(where[::-1], x.shape[::-1], strict=False))
        if len(where) not in (x.ndim, x.ndim - 1) or not fits:
            raise ConfigError(f"where {where} needs an axis for each axis of an item {item}, as long or of length 1")
        return x * self.where.to(x)


@dataclass(frozen=True)
class AverageBlocks:
    """Average over blocks of the last axes: super-resolution. ``factors`` holds a block length for each of those axes."""

    factors: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (b, ..., n_1 / factors[0], ...)."""
        if not isinstance(self.factors, tuple | list) or not 0 < len(self.factors) < x.ndim:
            needed = f"a block length for some of the last axes of an item {tuple(x.shape[1:])}"
            raise ConfigError(f"factors = {shown(self.factors)} must be {needed}")
        for axis, factor in enumerate(self.factors, x.ndim - len(self.factors)):
            if not isinstance(factor, int) or factor < 1 or x.shape[axis] % factor:
                raise ConfigError(f"axis {axis} of a state {tuple(x.shape)} does not divide into blocks of {factor}")
            x = x.unflatten(axis, (-1, factor)).mean(axis + 1)
        return x


@dataclass(frozen=True, eq=False)
class Mix:
    """Observe weighted sums along one axis: colourisation. ``weights`` is (k, c) where that axis has length c."""

    weights: Tensor
    axis: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """Shape of x with k instead of c."""
        check_real("weights", self.weights)
        weights, axis = self.weights.to(x), self.axis
        fits = -x.ndim < axis < x.ndim and axis != 0 and weights.ndim in (2, 3) and weights.shape[-1] == x.shape[axis]
        if not fits or (weights.ndim == 3 and len(weights) not in (1, len(x))):
            raise ConfigError(f"weights {tuple(weights.shape)} do not fit axis {self.axis} of a state {tuple(x.shape)}")
        mapped = torch.einsum("b...c,bkc->b...k", x.movedim(self.axis, -1), weights.expand(len(x), -1, -1))
        return mapped.movedim(-1, self.axis)


@dataclass(frozen=True, eq=False)
class Matrix:
    """Any linear map of a flattened item: ``matrix`` is (m, d), d the number of elements of an item."""

    matrix: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (b, m)."""
        return Mix(self.matrix)(x.flatten(1))
