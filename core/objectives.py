r"""Continuous-time denoising score matching: time sampler x weight x target.

Every parameterisation is the same loss :math:`W(t)\,|\hat x_0 - x_0|^2` with another weight. It is computed in the field
that the network predicts, where nothing cancels: :math:`W b^2 |\hat p - p|^2` with :math:`b = \partial x_0/\partial p`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polydiff.core.checks import number
from polydiff.core.denoiser import FIELDS, Prediction, coefficients, parts, preconditioning
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.schedules import Schedule, as_time
from polydiff.core.tree import batch_size, expand, leaves, tree_map
from polydiff.core.variational import VariationalBound

if TYPE_CHECKING:
    from polydiff.core.adapter import Item

RESERVED = ("fixed", "x0_hat")  # conditions that are never dropped at random


# --- time samplers: quantile functions of u in (0, 1) -> t


def _normal_quantile(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-15, 1 - 1e-15))


def uniform(u: Tensor, schedule: Schedule) -> Tensor:
    """Uniform in t on [t_min, t_max]."""
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


def uniform_log_snr(u: Tensor, schedule: Schedule) -> Tensor:
    """Uniform in log-SNR between its values at t_min and t_max."""
    # As numbers: two tensors that follow u to its device would make the host wait for it at every step.
    start, end = (float(schedule.log_snr(as_time(t))) for t in (schedule.t_min, schedule.t_max))
    return schedule.t_of_log_snr(start + u * (end - start))


def log_normal(u: Tensor, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """ln(sigma/alpha) ~ N(mean, std^2), clipped to [t_min, t_max]. Source: Karras 2022, table 1."""
    return schedule.t_of_log_snr(-(mean + std * _normal_quantile(u))).clamp(schedule.t_min, schedule.t_max)


def logit_normal(u: Tensor, schedule: Schedule, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """logit(t) ~ N(mean, std^2), stretched to [t_min, t_max]. Source: Esser 2024, eq. 19."""
    return uniform(torch.sigmoid(mean + std * _normal_quantile(u)), schedule)


TIMES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "log_snr": uniform_log_snr,
    "log_normal": log_normal,
    "logit_normal": logit_normal,
}

# --- weights W on |x0_hat - x0|^2, functions of (schedule, t, sigma_data)


def _snr(schedule: Schedule, t: Tensor) -> Tensor:
    return torch.exp(2 * schedule.log_snr(t))


def _of_field(field: str, schedule: Schedule, t: Tensor, sigma_data: float) -> Tensor:
    """The plain squared error of a field: 1 / (dx0/dfield)^2."""
    return coefficients(schedule, t, field, "x0")[1] ** -2


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    **{field: functools.partial(_of_field, field) for field in FIELDS},  # v: Salimans 2022, appendix D
    "edm": lambda schedule, t, sigma_data: (
        preconditioning(schedule, t, "edm", sigma_data)[1] ** -2
    ),  # Karras 2022, table 1
    "likelihood": lambda schedule, t, sigma_data: -schedule.dlog_snr(t) * _snr(schedule, t),  # Kingma 2021, eq. 15
    "min_snr": lambda schedule, t, sigma_data: _snr(schedule, t).clamp(max=5.0),  # Hang 2023, section 3.4
}
WEIGHTS["simple"] = WEIGHTS["eps"]  # of DDPM, Ho 2020, eq. 14: SNR


class Objective:
    """Denoising score matching on batches of items.

    Args:
        process: the process; rotations have a loss of their own, ``process.error``, and a product the sum of its leaves'.
        weight: a name in ``WEIGHTS``, for Gaussian leaves.
        time: ``{"name": a name in TIMES, **parameters}``, or just the name.
        stratified: spread the times of a batch evenly over the quantiles, which lowers the variance of the loss.
        drop: probability with which each condition is dropped per item, one number or by condition.
        terms: further loss terms by name, ``(function, weight)``.
        sigma_data: standard deviation of the normalised data.
        variance: learn the reverse variance with a second head of the network: ``weight`` of the variational bound, and
            ``steps`` and ``bins`` of ``VariationalBound``, on whose chain times are then drawn. The bound is the further
            term ``vlb``, in bits per element (an unbiased estimate where times are uniform). Nichol 2021, eq. 16.
    """

    def __init__(
        self,
        process: Any,
        weight: str = "edm",
        time: Mapping[str, Any] | str = "log_normal",
        stratified: bool = True,
        drop: float | Mapping[str, float] = 0.1,
        terms: Mapping[str, tuple[Callable[..., Tensor], float]] | None = None,
        sigma_data: float = 1.0,
        variance: Mapping[str, Any] | None = None,
    ) -> None:
        options: dict[str, Any] = {"name": time} if isinstance(time, str) else dict(time)
        name = options.pop("name", "log_normal")
        if name not in TIMES:
            raise unknown("time sampler", name, TIMES)
        if weight not in WEIGHTS:
            raise unknown("weight", weight, WEIGHTS)
        for rate in drop.values() if isinstance(drop, Mapping) else [drop]:
            if not 0 <= number("objective.drop", rate) <= 1:
                raise ConfigError(f"objective.drop = {drop} must be a probability between 0 and 1")
        for key, value in options.items():
            number(f"objective.time {name!r}: {key}", value, above=0 if key == "std" else None)
        try:
            TIMES[name](torch.full((1,), 0.5, dtype=torch.float64), process.schedule, **options)
        except TypeError as error:
            raise ConfigError(f"objective.time {name!r} does not take {sorted(options)}: {error}") from None
        self.process, self.sigma_data, self.stratified, self.drop = process, sigma_data, stratified, drop
        self._time, self._time_options, self._weight = TIMES[name], options, WEIGHTS[weight]
        self.terms = dict(terms or {})
        self.bound: VariationalBound | None = None
        if variance is not None:
            chain = {"weight": 0.001, **variance}
            factor = number("objective.variance.weight", chain.pop("weight"), least=0)
            for key in chain:
                if key not in ("steps", "bins"):
                    raise unknown("option", f"objective.variance.{key}", ("weight", "steps", "bins"))
            self.bound = bound = VariationalBound(process, **chain)
            self.terms["vlb"] = (
                lambda p, x0, t, mask, cond: process.mean(bound(p, x0), mask, cond.get("fixed")),
                factor,
            )

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n times, float64, on the generator's device."""
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        if self.stratified:
            u = (torch.arange(n, dtype=torch.float64, device=u.device) + u) / n
        t = self._time(u, self.process.schedule, **self._time_options)
        return t if self.bound is None else self.bound.snap(t)

    def weight(self, t: Tensor) -> Tensor:
        """W(t), the weight on the squared error of x0_hat."""
        return self._weight(self.process.schedule, t, self.sigma_data)

    def __call__(self, denoiser: nn.Module, item: Item, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            denoiser: ``(x_t, t, mask, cond, present) -> Prediction``.
            item: a collated batch.
            generator: source of times, noise and dropped conditions, on the batch's device.

        Returns:
            ``loss`` (b,) with all terms added, ``t`` (b,), of a product the error (b,) of each leaf, whose sum the loss is,
            and each further term (b,) by name, unweighted.
        """
        x0: Any = item.x
        mask, cond, b, device = item.mask, dict(item.cond), batch_size(item.x), leaves(item.x)[0].device
        fixed, t = cond.get("fixed"), self.times(b, generator)
        z = self.process.project(self._noise(x0, generator), mask, fixed)
        x_t = self.process.perturb(x0, t, z, mask, fixed)
        present = {}
        for name in cond:
            if name not in RESERVED:
                rate = self.drop.get(name, 0.0) if isinstance(self.drop, Mapping) else self.drop
                present[name] = torch.rand(b, generator=generator, device=device) >= rate
        if "x0_hat" in getattr(denoiser, "conditions", ()):
            with torch.no_grad():
                cond["x0_hat"] = denoiser(x_t, t, mask, cond, present).x0
            present["x0_hat"] = torch.rand(b, generator=generator, device=device) < 0.5
        prediction = denoiser(x_t, t, mask, cond, present)
        if self.process.kind == "product":
            out = {name: self._error(prediction[name], x0[name], z[name], mask, fixed) for name in x0}
            out = {"loss": torch.stack([*out.values()]).sum(0), "t": t, **out}
        else:
            out = {"loss": self._error(prediction, x0, z, mask, fixed), "t": t}
        for name, (function, factor) in self.terms.items():
            out[name] = function(prediction, x0, t, mask, cond)
            out["loss"] = out["loss"] + factor * out[name]
        return out

    def _error(
        self, prediction: Prediction, x0: Tensor, z: Tensor, mask: Tensor | None, fixed: Tensor | None
    ) -> Tensor:
        """Weighted error (b,) of a state or leaf."""
        process, given, t = prediction.process, prediction.given, prediction.t
        if process.kind != "gaussian":
            return process.error(prediction, x0, mask, fixed)
        slope = coefficients(process.schedule, t, given, "x0")[1]
        weight = self._weight(process.schedule, t, self.sigma_data)
        scale = (weight * slope**2).to(device=x0.device, dtype=x0.dtype)
        of_x0, of_eps = (expand(part, x0) for part in parts(process.schedule, t, given))
        return scale * process.mean((prediction.value - (of_x0 * x0 + of_eps * z)) ** 2, mask, fixed)

    def _noise(self, x0: Any, generator: torch.Generator) -> Any:
        def draw(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

        return tree_map(draw, self.process.tangent_like(x0))

    def at(self, denoiser: nn.Module, item: Item, t: Tensor | float, generator: torch.Generator) -> Tensor:
        """Mean squared error (b,) of x0_hat at one time, conditions present: the held-out loss per noise level."""
        x0: Any = item.x
        mask, fixed, t = item.mask, item.cond.get("fixed"), as_time(t)
        x_t = self.process.perturb(x0, t, self._noise(x0, generator), mask, fixed)
        error = self.process.tangent(x0, denoiser(x_t, t, mask, item.cond).x0)
        found = self.process.mean(tree_map(torch.square, error), mask, fixed)
        return torch.stack([*found.values()]).sum(0) if isinstance(found, dict) else found
