"""Guides: functions that make a new Denoise from others. Solvers cannot tell them apart, and they compose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from polydiff.core.checks import check_bool, check_output, check_process, check_real, number, shown
from polydiff.core.checks import interval as window
from polydiff.core.denoiser import Denoise, Prediction, as_prediction, coefficients
from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import Grid, as_grid
from polydiff.core.schedules import as_time
from polydiff.core.solvers.base import ALPHA_FLOOR
from polydiff.core.tree import expand, tree_map


class Guide(Protocol):
    """A guide that holds data of its own, made for one item and stacked for a batch.

    Guides are frozen dataclasses, whose tensors have no batch axis or, after ``stack``, a leading one.
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
    if not parts:
        raise ConfigError(f"there are no {kind} to stack")
    first = parts[0]
    if len(names := sorted({type(part).__name__ for part in parts})) > 1:
        raise ConfigError(f"{kind} of one batch must be of one kind, not {', '.join(names)}: sample them one by one")
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        return dataclasses.replace(first, **{n: join([getattr(part, n) for part in parts], n) for n in names})
    if isinstance(first, Tensor):
        if len(shapes := sorted({tuple(part.shape) for part in parts})) > 1:
            raise ConfigError(f"{kind} of one batch must have one shape, not {shapes}: sample such items one by one")
        return torch.stack(list(parts))
    if any(part != first for part in parts):
        raise ConfigError(f"{kind} of one batch must be equal, not {list(dict.fromkeys(map(str, parts)))}")
    return first


def predicted(
    output: Prediction | Tensor, guide: str, signal: bool = False, kinds: tuple[str, ...] = ("gaussian",)
) -> Prediction:
    """A Denoise's output for a guide that has to know the process, of these kinds; with ``signal`` also that the state holds data."""
    if not isinstance(output, Prediction):
        raise ConfigError(f"{guide} needs a Denoise that returns a Prediction, not a bare state")
    check_process(output.process, guide, gaussian=output.process.kind not in kinds)
    if signal and bool(((alpha := output.process.schedule.alpha(output.t)) < ALPHA_FLOOR).any()):
        least = float(alpha.min())
        raise ScheduleError(f"{guide} cannot act where alpha is {least:.1g}: start the grid at a smaller t")
    return output


def cfg(
    conditional: Denoise, unconditional: Denoise, scale: float, interval: tuple[float, float] | None = None
) -> Denoise:
    r"""Classifier-free guidance, optionally only inside a window of the log signal-to-noise ratio.

    .. math:: \hat x_0 = \hat x_0^u + w\,(\hat x_0^c - \hat x_0^u)

    The same holds in every other field; rotations are guided by their velocity. Where the scale is 1 for all items only ``conditional`` is called, where it is 0
    without an interval only ``unconditional``. The fraction of a second head is that of ``conditional``.

    Args:
        conditional, unconditional: two Denoise of the same network, with and without the condition.
        scale: w; 1 is no guidance.
        interval: (low, high) in log-SNR; outside of it w = 1, item by item.

    Raises:
        ConfigError: scale not finite, an interval whose ends are out of order, or one with a Denoise of bare states.

    Source: Ho 2022, eq. 6 (their w is ours minus 1); Kynkaanniemi 2024 for the interval.
    """
    scale = number("guidance", scale)
    if interval is None:
        return unconditional if scale == 0 else _extrapolate(conditional, unconditional, lambda _: scale)
    low, high = window("guidance interval", interval)

    def weight(output: Prediction | Tensor) -> Tensor:
        prediction = predicted(output, "guidance on an interval", kinds=("gaussian", "so3", "product"))
        log_snr = prediction.process.schedule.log_snr(prediction.t)
        return 1 + (scale - 1) * ((log_snr >= low) & (log_snr <= high)).double()

    return _extrapolate(conditional, unconditional, weight)


def autoguidance(strong: Denoise, weak: Denoise, scale: float, interval: tuple[float, float] | None = None) -> Denoise:
    """``cfg`` away from the mistakes of a smaller or less trained network, both under the same condition.

    Source: Karras 2024 (autoguidance), section 4.
    """
    return cfg(strong, weak, scale, interval)


def cfg_pp(
    conditional: Denoise, unconditional: Denoise, scale: float, times: Grid | Tensor | Sequence[float]
) -> Denoise:
    r"""CFG++: denoise with the guided prediction and renoise with the unconditional one.

    A step of DDIM then is :math:`x_s = \alpha_s [\hat x_0^u + w(\hat x_0^c - \hat x_0^u)] + \sigma_s\hat\varepsilon^u`, which
    is DDIM under ``cfg`` with the scale :math:`w / (1 - e^{-h_k})`, where h_k is the log-SNR step of interval k. A Denoise
    cannot tell who calls: under another solver than ``ddim`` this is ``cfg`` with that scale, and not CFG++.

    Args:
        conditional, unconditional: as in ``cfg``.
        scale: w, in [0, 1] from unconditional to conditional.
        times: the grid that is sampled on, or its times.

    Raises:
        ConfigError: a scale outside of [0, 1], a bare state, or a call at a time where no interval of the grid starts.

    Source: Chung 2024 (CFG++), algorithm 2.
    """
    if not 0 <= (scale := number("guidance", scale)) <= 1:
        raise ConfigError(f"guidance = {scale} of CFG++ must lie in [0, 1]: it is no scale of cfg, but its own w")
    if isinstance(times, str):
        raise ConfigError(f"CFG++ needs the grid itself, not its name: give make_grid({times!r}, steps, process)")
    grid = as_grid(times, 0, None)
    starts = as_time(grid.times[: grid.steps])

    def weight(output: Prediction | Tensor) -> Tensor:
        prediction = predicted(output, "CFG++")
        log_snr = prediction.process.schedule.log_snr(as_time(grid.times))
        ends = torch.cat([log_snr[1:], as_time([math.inf])])
        here = prediction.t.cpu().reshape(-1, 1) == starts
        if not bool(here.any(1).all()):
            raise ConfigError(
                f"CFG++ was called at t = {prediction.t.tolist()}, where no interval of its grid starts: sample on the grid "
                "it was made for, with solver=ddim"
            )
        k = here.int().argmax(1).reshape(prediction.t.shape)
        return -scale / torch.expm1(log_snr[k] - ends[k])

    return _extrapolate(conditional, unconditional, weight)


def _extrapolate(conditional: Denoise, unconditional: Denoise, weight: Callable[[Any], float | Tensor]) -> Denoise:
    """u + w (c - u) in the field that ``conditional`` gives, on SO(3) a tangent; w is a number or one for each item."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction | Tensor:
        with_condition = conditional(x_t, t)
        w = weight(with_condition)
        if bool((w == 1).all()) if isinstance(w, Tensor) else w == 1:
            return with_condition
        without = unconditional(x_t, t)
        for output, which in ((with_condition, "with"), (without, "without")):  # their sum would broadcast
            check_output(output, x_t, f"{which} its condition, at t = {shown(t)}", numbers=False)

        def between(u: Tensor, c: Tensor) -> Tensor:
            return u + (expand(w, u) if isinstance(w, Tensor) else w) * (c - u)

        if not isinstance(with_condition, Prediction):  # a bare state is x0_hat
            return tree_map(between, without.x0 if isinstance(without, Prediction) else without, with_condition)
        process, field = with_condition.process, with_condition.given
        if process.kind != "gaussian" and field == "x0":
            field = "velocity"  # rotations have no sums, tangents at one of them have
        base = as_prediction(process, x_t, t, without).field(field)
        return with_condition.replace(tree_map(between, base, with_condition.field(field)), field)

    return denoise


def classifier_guidance(denoise: Denoise, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Denoise:
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
    scale = number("guidance", scale)

    def guided(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = predicted(denoise(x_t, t), "classifier guidance", signal=True)
        x, again = differentiable(x_t)
        with torch.enable_grad():
            value = log_prob(x, t)
            if not isinstance(value, Tensor) or value.shape != x_t.shape[:1]:
                raise ConfigError(f"log_prob returned {shown(value)} where a tensor ({len(x_t)},) is needed")
            gradient = gradient_of(value, x, torch.ones_like(value), again, "log_prob")
        slope = coefficients(prediction.process.schedule, prediction.t, "score", prediction.given)[1]
        return prediction.replace(prediction.value + expand(scale * slope, x_t) * gradient)

    return guided


def differentiable(x_t: Tensor) -> tuple[Tensor, bool]:
    """A state to differentiate by, and whether that gradient is differentiated in turn (by an outer guide)."""
    again = x_t.requires_grad and torch.is_grad_enabled()
    return (x_t if again else x_t.detach().requires_grad_()), again


def gradient_of(value: Tensor, x: Tensor, weight: Tensor, again: bool, what: str) -> Tensor:
    """Gradient of a tensor's product with a weight; x, ``again`` are from ``differentiable``, ``what`` names the tensor."""
    options: Any = {"retain_graph": True, "create_graph": again, "allow_unused": True}
    if not value.requires_grad or (found := torch.autograd.grad(value, x, weight, **options)[0]) is None:
        raise ConfigError(f"{what} has no gradient: the Denoise or the function that made it detaches its input")
    return found


@dataclass(frozen=True, eq=False)
class Replacement(Guide):
    r"""Inpainting: x0_hat is what is known where it is known.

    The known elements of a state then follow :math:`\alpha_t x_0 + \sigma_t\varepsilon` under every solver, and the last
    interval of a grid returns them exactly. With ``Resample`` around a stochastic solver this is RePaint.

    Args:
        known: clean data in normalised form, (*dims), or (b, *dims) after ``stack``; any number where unknown.
        where: true for the elements that are known; bool, as many axes as ``known``, each as long or of length 1.

    Raises:
        ConfigError: tensors that do not fit each other or a known number that is not finite; when called: a bare state, a
            state of another shape, or a mean-free process, on which elements have no place of their own.

    Source: Song 2021, appendix I.2; Lugmayr 2022 (RePaint), eq. 8.
    """

    known: Tensor
    where: Tensor

    def __post_init__(self) -> None:
        where, known = self.where, self.known
        check_real("known", known)
        check_bool("where", where)
        fits = where.ndim == known.ndim and all(m in (1, n) for m, n in zip(where.shape, known.shape, strict=True))
        if not fits:
            raise ConfigError(f"where {tuple(where.shape)} must fit known {tuple(known.shape)}")
        if bad := int((where & ~torch.isfinite(known)).sum()):
            raise ConfigError(f"{bad} of the known numbers are not finite: leave them out of where")

    def __call__(self, denoise: Denoise) -> Denoise:
        """The guided Denoise."""

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            prediction = predicted(denoise(x_t, t), "replacement", kinds=("gaussian", "so3"))
            signal = prediction.given in ("eps", "score")
            predicted(prediction, "replacement", signal, kinds=("gaussian", "so3"))
            if getattr(prediction.process, "mean_free", False):
                raise ConfigError("replacement needs elements that keep their place, which a mean-free process moves")
            if self.known.shape not in (x_t.shape, x_t.shape[1:]):
                raise ConfigError(f"known data {tuple(self.known.shape)} do not fit a state {tuple(x_t.shape)}")
            return prediction.replace(torch.where(self.where.to(x_t.device), self.known.to(x_t), prediction.x0), "x0")

        return guided
