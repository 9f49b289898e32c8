"""Guides: functions that make a new Denoise from others. Solvers cannot tell them apart, and they compose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from polydiff.core.denoiser import Denoise, Prediction, as_prediction, coefficients
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import Grid, as_grid
from polydiff.core.solvers.base import ALPHA_FLOOR
from polydiff.core.tree import expand


class Guide(Protocol):
    """A guide that holds data of its own, made for one item and stacked for a batch.

    Guides are frozen dataclasses. Their tensors have no batch axis, so that one guide serves a whole batch, or after
    ``stack`` a leading one.
    """

    def __call__(self, denoise: Denoise) -> Denoise:
        """The guided Denoise."""

    def stack(self, others: Sequence[Guide]) -> Guide:
        """One guide for a batch, whose item i is guided by ``others[i]`` (this guide is the first of them).

        Raises:
            ConfigError: the guides differ in kind, in a setting that is no tensor, or in the shape of a tensor.
        """
        return join(others, "guides")


def join(parts: Sequence[Any], kind: str) -> Any:
    """Stack the tensors of equal dataclasses along a new leading axis, through all levels; the rest must be equal."""
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        names = sorted({type(part).__name__ for part in parts})
        raise ConfigError(f"{kind} of one batch must be of one kind, not {', '.join(names)}: sample them one by one")
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        return dataclasses.replace(first, **{n: join([getattr(part, n) for part in parts], n) for n in names})
    if isinstance(first, Tensor):
        if any(part.shape != first.shape for part in parts):
            shapes = sorted({tuple(part.shape) for part in parts})
            raise ConfigError(f"{kind} of one batch must have one shape, not {shapes}: sample such items one by one")
        return torch.stack(list(parts))
    if any(part != first for part in parts):
        raise ConfigError(f"{kind} of one batch must be equal, not {list(dict.fromkeys(map(str, parts)))}")
    return first


def need_prediction(output: Prediction | Tensor, guide: str) -> Prediction:
    """The output of a Denoise for a guide that has to know the process."""
    if not isinstance(output, Prediction):
        raise ConfigError(f"{guide} needs a Denoise that returns a Prediction, not a bare state")
    return output


def finite_number(name: str, value: float) -> float:
    """A setting of a guide, refused unless it is a finite number."""
    if not math.isfinite(value):
        raise ConfigError(f"{name} = {value} must be a finite number")
    return value


def cfg(
    conditional: Denoise, unconditional: Denoise, scale: float, interval: tuple[float, float] | None = None
) -> Denoise:
    r"""Classifier-free guidance, optionally only inside a window of the log signal-to-noise ratio.

    .. math:: \hat x_0 = \hat x_0^u + w\,(\hat x_0^c - \hat x_0^u)

    The same holds in every other field. Where the effective scale is 1 only ``conditional`` is called, where it is 0 only
    ``unconditional``. The fraction of a second head is that of ``conditional``.

    Args:
        conditional, unconditional: two Denoise of the same network, with and without the condition.
        scale: w; 1 is no guidance.
        interval: (low, high) in log-SNR; outside of it w = 1, item by item.

    Raises:
        ConfigError: scale not finite, an interval whose ends are out of order, or one with a Denoise of bare states.

    Source: Ho 2022, eq. 6 (their w is ours minus 1); Kynkaanniemi 2024 for the interval.
    """
    finite_number("guidance", scale)
    if interval is None:
        return unconditional if scale == 0 else _extrapolate(conditional, unconditional, lambda _: scale)
    low, high = interval
    if not low < high:
        raise ConfigError(f"guidance interval {(low, high)} must be (low, high) in log-SNR with low < high")

    def weight(output: Prediction | Tensor) -> Tensor:
        prediction = need_prediction(output, "guidance on an interval")
        log_snr = prediction.process.schedule.log_snr(prediction.t)
        return 1 + (scale - 1) * ((log_snr >= low) & (log_snr <= high)).double()

    return _extrapolate(conditional, unconditional, weight)


def autoguidance(strong: Denoise, weak: Denoise, scale: float, interval: tuple[float, float] | None = None) -> Denoise:
    r"""Guide a network away from the mistakes of a worse version of itself, both under the same condition.

    .. math:: \hat x_0 = \hat x_0^{weak} + w\,(\hat x_0^{strong} - \hat x_0^{weak})

    It is ``cfg`` with other networks; the arguments and errors are the same.

    Args:
        strong: the network to sample from.
        weak: a smaller or less trained one for the same data.
        scale, interval: as in ``cfg``.

    Source: Karras 2024 (autoguidance), eq. 5 and section 3.
    """
    return cfg(strong, weak, scale, interval)


def cfg_pp(
    conditional: Denoise, unconditional: Denoise, scale: float, times: Grid | Tensor | Sequence[float]
) -> Denoise:
    r"""CFG++: denoise with the guided prediction and renoise with the unconditional one.

    A step of DDIM then is :math:`x_s = \alpha_s [\hat x_0^u + w(\hat x_0^c - \hat x_0^u)] + \sigma_s\hat\varepsilon^u`, which
    is DDIM under ``cfg`` with the scale :math:`w / (1 - e^{-h_k})`, where h_k is the log-SNR step of interval k. Exact for
    ``ddim`` alone.

    Args:
        conditional, unconditional: as in ``cfg``.
        scale: w, in [0, 1] from unconditional to conditional.
        times: the grid that is sampled on.

    Raises:
        ConfigError: scale not finite; a bare state; a call at a time where no interval of the grid starts, as solvers of
            several stages make.

    Source: Chung 2024 (CFG++), eq. 16 and algorithm 2.
    """
    finite_number("guidance", scale)
    grid = as_grid(times, 0, None)
    weights: dict[float, float] = {}

    def weight(output: Prediction | Tensor) -> Tensor:
        prediction = need_prediction(output, "CFG++")
        if not weights:
            log_snr = prediction.process.schedule.log_snr(torch.tensor(grid.times, dtype=torch.float64)).tolist()
            ends = [*log_snr[1:], math.inf] if grid.final else log_snr[1:]
            for time, start, end in zip(grid.times, log_snr, ends, strict=False):
                weights[time] = scale / -math.expm1(start - end)
        try:
            found = [weights[time] for time in prediction.t.flatten().tolist()]
        except KeyError as error:
            raise ConfigError(
                f"CFG++ was called at t = {error.args[0]}, where no interval of its grid starts: sample on the grid it was "
                "made for, with solver=ddim"
            ) from None
        return torch.tensor(found, dtype=torch.float64).reshape(prediction.t.shape)

    return _extrapolate(conditional, unconditional, weight)


def _extrapolate(
    conditional: Denoise, unconditional: Denoise, weight: Callable[[Prediction | Tensor], float | Tensor]
) -> Denoise:
    """u + w (c - u) in the field that ``conditional`` gives; w is a number or one for each item."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction | Tensor:
        with_condition = conditional(x_t, t)
        w = weight(with_condition)
        if bool((w == 1).all()) if isinstance(w, Tensor) else w == 1:
            return with_condition
        without = unconditional(x_t, t)
        if isinstance(w, Tensor):
            w = expand(w, x_t)
        if not isinstance(with_condition, Prediction):  # a bare state is x0_hat
            base = without.x0 if isinstance(without, Prediction) else without
            return base + w * (with_condition - base)
        base = as_prediction(with_condition.process, x_t, t, without).field(with_condition.given)
        return with_condition.replace(base + w * (with_condition.value - base))

    return denoise


LogProb = Callable[[Tensor, Tensor], Tensor]


def classifier_guidance(denoise: Denoise, log_prob: LogProb, scale: float = 1.0) -> Denoise:
    r"""Add the gradient of a classifier's log-probability to the score.

    .. math:: s(x_t) + w\,\nabla_{x_t} \log p(y \mid x_t)

    With w = 1 and the exact classifier of noisy states this is the score of the conditional density (Bayes' rule).

    Args:
        denoise: any Denoise that returns a Prediction.
        log_prob: differentiable ``(x_t, t) -> (b,)``, log p(y | x_t) of each item's own y, in nats.
        scale: w.

    Raises:
        ConfigError: scale not finite, a bare state, or a ``log_prob`` of another shape or without a gradient.
        ScheduleError: at a time where alpha is under 1e-6.

    Source: Dhariwal 2021, algorithm 1; Song 2021, eq. 14.
    """
    finite_number("guidance", scale)
    name = "classifier guidance"

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = need_signal(need_prediction(denoise(x_t, t), name), name)
        x, again = differentiable(x_t)
        with torch.enable_grad():
            value = log_prob(x, t)
            if value.shape != x_t.shape[:1]:
                raise ConfigError(f"log_prob returned {tuple(value.shape)} where ({x_t.shape[0]},) is needed")
            gradient = gradient_of(value, x, torch.ones_like(value), again, "log_prob")
        slope = coefficients(prediction.process.schedule, prediction.t, "score", prediction.given)[1]
        return prediction.replace(prediction.value + expand(scale * slope, x_t) * gradient)

    return guided


def need_signal(prediction: Prediction, guide: str) -> Prediction:
    """A prediction at a time where x0_hat follows from the score; an error where the state holds no data."""
    alpha = prediction.process.schedule.alpha(prediction.t)
    if bool((alpha < ALPHA_FLOOR).any()):
        raise ScheduleError(
            f"{guide} cannot act where alpha is {float(alpha.min()):.1g}: start the grid at a smaller t"
        )
    return prediction


def differentiable(x_t: Tensor) -> tuple[Tensor, bool]:
    """A state to differentiate by, and whether that gradient is differentiated in turn (by an outer guide)."""
    again = x_t.requires_grad and torch.is_grad_enabled()
    return (x_t if again else x_t.detach().requires_grad_()), again


def gradient_of(value: Tensor, x: Tensor, weight: Tensor, again: bool, what: str) -> Tensor:
    """Gradient by x, from ``differentiable``, of a tensor's product with a weight; an error, naming it, where there is none."""
    found: tuple[Tensor | None, ...] = (None,)
    if value.requires_grad:
        found = torch.autograd.grad(value, x, weight, retain_graph=True, create_graph=again, allow_unused=True)
    if found[0] is None:
        raise ConfigError(f"{what} has no gradient: the Denoise or the function that made it detaches its input")
    return found[0]


@dataclass(frozen=True, eq=False)
class Replacement(Guide):
    r"""Inpainting: x0_hat is what is known where it is known.

    The known elements of a state then follow :math:`\alpha_t x_0 + \sigma_t\varepsilon` by themselves under every solver,
    with the same noise all along (a flow) or with fresh noise (an SDE), as the replacement of Song 2021 and RePaint has
    it, and the network sees states that fit together. The last interval of a grid returns them exactly. RePaint is this
    guide with ``Resample`` around a stochastic solver.

    Args:
        known: clean data in normalised form, (*dims), or (b, *dims) after ``stack``; any number where unknown.
        where: bool, as many axes as ``known``, each as long or of length 1; true for the elements that are known.

    Raises:
        ConfigError: ``where`` is not bool or does not fit, or a known number is not finite; when called: a bare state, a
            state of another shape, or a mean-free process, on which elements have no place of their own.

    Source: Song 2021, appendix I.2; Lugmayr 2022 (RePaint), eq. 8.
    """

    known: Tensor
    where: Tensor

    def __post_init__(self) -> None:
        check_where(self.where)
        sizes = zip(self.where.shape, self.known.shape, strict=False)
        if self.where.ndim != self.known.ndim or any(m not in (1, n) for m, n in sizes):
            raise ConfigError(f"where {tuple(self.where.shape)} does not fit known {tuple(self.known.shape)}")
        bad = self.where & ~torch.isfinite(self.known)
        if bool(bad.any()):
            raise ConfigError(f"{int(bad.sum())} of the known numbers are not finite: leave them out of where")

    def __call__(self, denoise: Denoise) -> Denoise:
        """The guided Denoise."""

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            prediction = need_prediction(denoise(x_t, t), "replacement")
            if prediction.given in ("eps", "score"):
                need_signal(prediction, "replacement of a predicted " + prediction.given)
            if getattr(prediction.process, "mean_free", False):
                raise ConfigError("replacement needs elements that keep their place, which a mean-free process moves")
            if self.known.shape not in (x_t.shape, x_t.shape[1:]):
                raise ConfigError(f"known data {tuple(self.known.shape)} do not fit a state {tuple(x_t.shape)}")
            return prediction.replace(torch.where(self.where.to(x_t.device), self.known.to(x_t), prediction.x0), "x0")

        return guided


def check_where(where: Tensor) -> None:
    """Refuse a choice of elements that is not bool."""
    if where.dtype != torch.bool:
        raise ConfigError(f"where must be a bool tensor, not {where.dtype}")
