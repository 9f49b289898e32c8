r"""The log-likelihood of data along the probability flow, exact or estimated, and what it is in bits.

With y, theta of ``polydiff.core.solvers.adaptive`` and :math:`p = dy/d\theta`, the density that the flow carries obeys
:math:`d\log\rho(y)/d\theta = -\nabla_y\cdot p`, so in d dimensions, with :math:`c = \sqrt{\alpha^2 + \sigma^2}`,

.. math:: \log\rho(x_s) = \log\rho(x_T) + d\,\log\frac{c_T}{c_s} + \int_{\theta_s}^{\theta_T}\nabla_y\cdot p\;d\theta .

Source: Chen 2018, theorem 1; Grathwohl 2019, section 3.1, for the estimate of the divergence; Song 2021, eq. 39.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from polydiff.core.checks import check_mask, check_output, check_process, check_real, check_state, number, shown, whole
from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import Grid
from polydiff.core.noise import as_noise
from polydiff.core.solvers.adaptive import Leaves, angle, check_tolerances, integrate, predict_items, scale, time_of
from polydiff.core.solvers.base import make_points
from polydiff.core.tree import expand, flat
from polydiff.core.variational import VariationalBound

EXACT_LIMIT = 4096  # most elements of which every derivative is taken: one backward pass for each, at every evaluation
MAX_STEPS, MOST_PROBES = 10_000, 10_000


@torch.inference_mode(False)
@torch.no_grad()
def log_prob(
    denoise: Denoise,
    process: Any,
    x0: Tensor,
    t_min: float | None = None,
    exact: bool = False,
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    mask: Tensor | None = None,
    generator: Any = None,
) -> Tensor:
    """Log density of states under the model's probability flow from the prior at t_max, whatever the data leave there.

    Args:
        denoise, process: as in ``sample``; gradients with respect to the state are taken through ``denoise``.
        x0: taken as the state at ``t_min``, (b, *dims); it is projected first (padding, mean-free).
        t_min: where the density is that of; default the process's.
        exact: take the divergence element by element, at the cost of d backward passes an evaluation; otherwise
            Hutchinson's estimate, whose expectation it is.
        probes: of the estimate, random signs drawn once; their average is taken.
        rtol, atol: tolerances of a step, of the state and of the log density for each dimension.
        mask: valid elements, bool (b, n); an item's dimensions are its valid elements (of their mean-free subspace).
        generator: of the probes, as in ``sample``.

    Returns:
        Nats (b,), float64 on the host.

    Raises:
        ConfigError: a process that is not Gaussian, an exact divergence of too many elements, probes or tolerances that are
            not positive, a denoiser without a gradient (a constant one, too) or that returns anything but a tensor like the state.
        ScheduleError: t_min is not below t_max, or sigma is 0 there. DivergenceError: a step cannot reach the tolerance.
    """
    check_state(x0, process, denoise)
    check_process(process, "log_prob", gaussian=True)
    check_mask("mask", mask, x0, process.mask_axis)
    check_tolerances(rtol, atol)
    schedule = process.schedule
    low = process.t_min if t_min is None else number("t_min", t_min)
    start, end = make_points(schedule, Grid((low, process.t_max), upward=True))
    if start.sigma == 0:
        raise ScheduleError(f"at t = {low} sigma is 0 and there is no density to follow: take a larger t_min")
    dims = process.dims(x0, mask).to("cpu", torch.float64)
    probes = 0 if exact else whole("probes", probes, most=MOST_PROBES)
    noise = as_noise(generator, len(x0), process.mask_axis)
    if not x0.numel():
        return torch.zeros(len(x0), dtype=torch.float64)
    signs = [process.project(noise.draw(k, "probe", x0, mask=mask).sign(), mask) for k in range(probes)]
    if exact and x0[0].numel() > EXACT_LIMIT:
        raise ConfigError(
            f"an exact divergence of {x0[0].numel():,} elements takes as many backward passes at each of some hundred "
            f"evaluations; up to {EXACT_LIMIT:,} are allowed: take Hutchinson's estimate, exact=False with probes=1 or more"
        )
    t_of = time_of(schedule, start, end)

    def slope(leaves: Leaves, theta: Tensor) -> Leaves:
        t = t_of(theta)
        c = scale(schedule, t)
        with torch.enable_grad():
            x = (leaves[0] * expand(c, leaves[0])).requires_grad_()
            prediction = predict_items(denoise, process, x, t)
            check_output(prediction, x, f"at t = {float(t[0]):.6g}")
            if not prediction.value.requires_grad:
                raise ConfigError(
                    "log_prob differentiates the denoiser by the state, but its output has no gradient: remove the "
                    "detach, no_grad or inference_mode inside of it"
                )
            p = prediction.field("angle")
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for u in _basis(process, x, mask) if exact else signs:
            (product,) = torch.autograd.grad(p, x, u, retain_graph=True)
            trace += flat(u * product).sum(1)
        return p.detach(), c * trace.to("cpu", torch.float64) / ((probes or 1) * dims.clamp_min(1))

    def norm(errors: Leaves) -> Tensor:
        return torch.maximum(process.mean(errors[0] ** 2, mask).sqrt().to("cpu", torch.float64), errors[1].abs())

    c_s, c_T = (math.hypot(point.alpha, point.sigma) for point in (start, end))  # noqa: N806
    begin = (process.project(x0, mask) / c_s, torch.zeros(len(x0), dtype=torch.float64))
    (y, gain), _ = integrate(slope, begin, angle(start), angle(end), norm, rtol, atol, MAX_STEPS, t_of)
    prior = process.log_prior(y.to("cpu", torch.float64) * c_T, None if mask is None else mask.cpu())
    return prior + dims * (math.log(c_T / c_s) + gain)


def _basis(process: Any, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """The unit vectors of the elements that are valid in some item, projected; the sum of u u^T is the projection."""
    valid = process.valid(x, mask)
    used = torch.ones_like(x) if valid is None else valid.expand_as(x)
    for i in flat(used).any(0).nonzero()[:, 0]:
        u = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        u.view(len(x), -1)[:, i] = 1
        yield process.project(u, mask)


def elbo(
    denoise: Denoise,
    process: Any,
    x0: Tensor,
    steps: int = 1000,
    bins: int | None = None,
    mask: Tensor | None = None,
    generator: Any = None,
) -> Tensor:
    r"""Lower bound on the log-likelihood of clean data under the discrete chain with fixed variances, one draw of it.

    .. math:: \log p(x_0) \ge -\mathrm{KL}\big(q(x_T|x_0)\,\|\,N(0, \sigma_T^2)\big)
              - \tfrac12\sum_{t>s}(\mathrm{SNR}_s - \mathrm{SNR}_t)\,|x_0 - \hat x_0|^2 + \log p(x_0 | x_{t_{min}})

    Args:
        denoise, process: as in ``sample``.
        x0: clean data (b, *dims).
        steps, bins: of the chain, see ``VariationalBound``; with bins the bound is on the probability of the levels,
            without on the density of x0.
        mask, generator: valid elements, bool (b, n), and the source of the noise.

    Returns:
        Nats (b,), float64 on the host, whose expectation over the noise is the bound; -nats / (d ln 2) are bits per dimension.

    Raises:
        ConfigError: fewer than 2 steps or bins, a mean-free process, or a denoiser that returns anything but a tensor like
            the state. DivergenceError: it is not finite.

    Source: Ho 2020, eq. 5; Kingma 2021, eq. 13 and 14.
    """
    check_state(x0, process, denoise)
    check_process(process, "elbo", gaussian=True)
    check_mask("mask", mask, x0, process.mask_axis)
    bound = VariationalBound(process, steps, bins, learned=False)

    def checked(x_t: Tensor, t: Tensor) -> Any:
        output = denoise(x_t, t)
        check_output(output, x_t, f"at t = {float(t):.6g}")
        return output

    bits = bound.total(checked, x0, generator, mask) * process.dims(x0, mask)
    return -math.log(2) * bits.to("cpu", torch.float64)


def dequantise(x: Tensor, bins: int = 256, low: float = -1.0, high: float = 1.0, generator: Any = None) -> Tensor:
    """Spread values (b, *dims) on ``bins`` equally spaced levels uniformly over cells that fill [low, high].

    Level k, stored as low + (high - low) k/(bins - 1), becomes low + (high - low) (k + u)/bins, u uniform in [0, 1) drawn
    from ``generator``, as in ``sample``.

    Raises:
        ConfigError: fewer than 2 bins, low not under high, or values that are not on the levels.

    Source: Theis 2016, section 3.1: the log density of the result is on average below that of the levels.
    """
    width = _levels(bins, low, high)
    check_real("x", x)
    place = (x - low) * ((bins - 1) / (high - low))
    level = place.round()
    if not bool((((place - level).abs() <= 0.01) & (level >= 0) & (level < bins)).all()):  # a NaN is on none
        raise ConfigError(f"the values to dequantise are not on {bins} equally spaced levels from {low} to {high}")
    u = torch.special.ndtr(as_noise(generator, len(x)).draw(0, "dequantise", x)).clamp(0, 1 - 1e-6)
    return low + width * (level + u)


def _levels(bins: int, low: float, high: float) -> float:
    """Width of each of the cells that fill [low, high]."""
    number("high - low", number("high", high) - number("low", low), above=0)
    return (high - low) / whole("bins", bins, least=2)


def bits_per_dim(
    log_p: Tensor, dims: Tensor | int, bins: int = 256, low: float = -1.0, high: float = 1.0, alpha: float = 1.0
) -> Tensor:
    r"""Bits per dimension of levels whose dequantised values have a log density.

    .. math:: -\frac{\log p + d\log\alpha}{d\,\ln 2} - \log_2\frac{high - low}{bins}

    ``log_prob`` gives the density of states at t_min: hand it alpha(t_min) times the dequantised data and give that
    ``alpha`` here. What is then measured is data with noise of sigma(t_min)/alpha(t_min) added, which should be far below
    a cell, (high - low)/bins.

    Args:
        log_p: nats (b,).
        dims: d, one number or by item (``process.dims(x, mask)``).
        bins, low, high: as in ``dequantise``.
        alpha: the factor by which the data were scaled before ``log_prob``.

    Raises:
        ConfigError: dims that are not positive or not one for each item; bins, low, high or alpha out of range.
    """
    check_real("log_p", log_p)
    each = torch.as_tensor(dims).to(log_p)
    if each.shape not in ((), log_p.shape) or not bool(((each > 0) & torch.isfinite(each)).all()):
        raise ConfigError(f"dims = {shown(dims)} must be positive, one number or one for each item")
    return -(log_p / each + math.log(number("alpha", alpha, above=0))) / math.log(2) - math.log2(
        _levels(bins, low, high)
    )
