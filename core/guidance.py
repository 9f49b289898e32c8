"""Guides: functions that make a new Denoise from others. Solvers cannot tell them apart, and they compose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from polydiff.core.denoiser import Denoise, Prediction, as_prediction
from polydiff.core.errors import ConfigError


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


def cfg(
    conditional: Denoise, unconditional: Denoise, scale: float, interval: tuple[float, float] | None = None
) -> Denoise:
    r"""Classifier-free guidance, optionally only inside a window of the log signal-to-noise ratio.

    .. math:: \hat x_0 = \hat x_0^u + w\,(\hat x_0^c - \hat x_0^u)

    The same holds in every other field. Where the effective scale is 1 only ``conditional`` is called, where it is 0 only
    ``unconditional``.

    Args:
        conditional, unconditional: two Denoise of the same network, with and without the condition.
        scale: w; 1 is no guidance.
        interval: (low, high) in log-SNR; outside of it w = 1.

    Raises:
        ConfigError: scale not finite, an interval whose ends are out of order, or one with a Denoise of bare states.

    Source: Ho 2022, eq. 6 (their w is ours minus 1); Kynkaanniemi 2024 for the interval.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"guidance = {scale} must be a finite number")
    if interval is not None and not interval[0] < interval[1]:
        raise ConfigError(f"guidance interval {tuple(interval)} must be (low, high) in log-SNR with low < high")

    def inside(prediction: Prediction | Tensor) -> bool:
        if interval is None:
            return True
        if not isinstance(prediction, Prediction):
            raise ConfigError("guidance on an interval needs a Denoise that returns a Prediction, not a bare state")
        log_snr = prediction.process.schedule.log_snr(prediction.t)
        return bool((log_snr >= interval[0]).all() and (log_snr <= interval[1]).all())

    def denoise(x_t: Tensor, t: Tensor) -> Prediction | Tensor:
        if scale == 0 and interval is None:
            return unconditional(x_t, t)
        with_condition = conditional(x_t, t)
        if scale == 1 or not inside(with_condition):
            return with_condition
        without = unconditional(x_t, t)
        if not isinstance(with_condition, Prediction):  # a bare state is x0_hat
            base = without.x0 if isinstance(without, Prediction) else without
            return base + scale * (with_condition - base)
        base = as_prediction(with_condition.process, x_t, t, without).field(with_condition.given)
        return with_condition.replace(base + scale * (with_condition.value - base))

    return denoise
