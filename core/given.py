"""What tasks of most modalities share: filling in, inverse problems, variation and denoising of any states.

An adapter's task reads what it was given, says which elements are known or what an observation is, and calls one of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from polydiff.core.adapter import Item
from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.guidance import Guide, Replacement
from polydiff.core.inverse import DPS, MMPS, Linear, PiGDM, Select
from polydiff.core.schedules import as_time
from polydiff.core.solvers.resample import MOST_REPEATS, Resample
from polydiff.core.tasks import Task
from polydiff.core.tree import leaves

if TYPE_CHECKING:
    from polydiff.core.run import Run


@dataclass(frozen=True)
class Inverse:
    """Options of tasks that are given y = A(x0) + noise."""

    method: Annotated[str, "mmps, pigdm or dps"] = "mmps"
    noise: Annotated[float, "standard deviation of the noise in what is given, normalised"] = 0.0
    zeta: Annotated[float | None, "step of dps; null: 5 times the root of the number of elements"] = None


@dataclass(frozen=True)
class Known(Inverse):
    """Options of tasks in which elements are known."""

    method: Annotated[str, "mmps, pigdm, dps, repaint or replacement"] = "mmps"
    repeats: Annotated[int, "how often repaint goes up again and takes each step once more"] = 4


@dataclass(frozen=True)
class Vary:
    """Options of ``vary``."""

    strength: Annotated[float, "share of noise that sampling starts with, above 0; 1 keeps nothing of the input"] = 0.5


def needed(given: Item | None, task: str) -> Item:
    """What a task works on, which it cannot do without."""
    if given is None:
        raise ConfigError(f"task={task} needs something to work on: add input=FILE or input=FOLDER")
    return given


def needed_like(given: Item | None, task: str, run: Run) -> Tensor:
    """The state of an input, which must have the size that is sampled."""
    x = leaves(needed(given, task).x)[0]
    like = leaves(run.adapter.shape(run.facts["size"], {})[0])[0]
    if x.shape != like.shape:
        own, wanted = (" x ".join(map(str, shape)) for shape in (x.shape, like.shape))
        raise ConfigError(f"input={named(given)} is {own}, samples of this size are {wanted}: change it, or size.<key>")
    return x


def named(given: Item | None) -> str:
    """How messages call an input."""
    return "" if given is None else str(given.meta.get("file", given.id))


def inverse(
    operator: Linear, y: Tensor, options: Inverse, run: Run, reference: Item, further: tuple[str, ...] = ()
) -> Task:
    """Draw x0 given y = A(x0) + noise.

    Args:
        operator: A, linear; acts on batches.
        y: what is given, without batch axis.
        options: how.
        run: the model.
        reference: what is shown beside the samples.
        further: methods of the task beside those here, for the message.

    Raises:
        ConfigError: an unknown method or a number that cannot be used.
    """
    if options.noise < 0:
        raise ConfigError(f"task.noise={options.noise} must be 0 or more: it is a standard deviation")
    if options.zeta is not None and options.method != "dps":
        raise ConfigError(f"task.zeta={options.zeta:g} is the step of dps alone: leave it out, or take task.method=dps")
    elements = sum(leaf.numel() for leaf in leaves(run.adapter.shape(run.facts["size"], {})[0]))
    zeta = 5 * elements**0.5 if options.zeta is None else options.zeta
    guides = {
        "mmps": lambda: MMPS(y, operator, sigma_y=options.noise),
        "pigdm": lambda: PiGDM(y, operator, sigma_y=options.noise, variance=run.facts["sigma_data"] ** 2),
        "dps": lambda: DPS(y, operator, zeta=zeta),
    }
    if options.method not in guides:
        raise unknown("task.method", options.method, (*guides, *further))
    return Task(guide=guides[options.method](), reference=reference)


@dataclass(frozen=True, eq=False)
class _Both(Guide):
    """One guide, then another."""

    first: Guide
    second: Guide

    def __call__(self, denoise: Denoise) -> Denoise:
        return self.second(self.first(denoise))


def inpaint(x0: Tensor, known: Tensor, options: Known, run: Run) -> Task:
    """Fill in what is not known of x0; ``known`` is bool, shaped like it. What is known without noise is kept."""
    x0 = torch.where(known, x0, 0)
    replacement, reference = Replacement(x0, known), Item(x0, meta={"kept": known})
    if options.method in ("replacement", "repaint") and options.noise:
        raise ConfigError(
            f"task.method={options.method} keeps what is known as it is, task.noise={options.noise:g} needs mmps, pigdm or dps"
        )
    if options.method == "replacement":
        return Task(like=x0, guide=replacement, reference=reference)
    if options.method == "repaint":
        if not 0 <= options.repeats <= MOST_REPEATS:
            raise ConfigError(f"task.repeats={options.repeats} must be 0 to {MOST_REPEATS}")
        return Task(
            like=x0, guide=replacement, wrap=lambda solver: Resample(solver, options.repeats), reference=reference
        )
    task = inverse(Select(known), x0, options, run, Item(x0), further=("repaint", "replacement"))
    if options.noise:
        return replace(task, like=x0)
    return replace(task, like=x0, guide=_Both(task.guide, replacement), reference=reference)


def vary(x0: Tensor, options: Vary, run: Run) -> Task:
    r"""Perturb x0 part of the way towards noise and sample from there.

    .. math:: \sigma_t = s\,(\alpha_t\sigma_{data} + \sigma_t), \qquad s = \text{strength}

    Source: Meng 2022 (SDEdit), section 3; the share of noise, unlike its t0, means the same on every schedule.
    """
    if not 0 < options.strength <= 1:
        raise ConfigError(f"task.strength={options.strength:g} must be above 0, at most 1")
    low, high = noise_levels(run)
    level = run.facts["sigma_data"] * options.strength / (1 - options.strength) if options.strength < 1 else high
    if level >= high:  # nothing would be left of x0
        return Task(reference=Item(x0))
    if level <= low:
        least = low / (low + run.facts["sigma_data"])
        raise ConfigError(f"task.strength={options.strength:g} is less noise than this model knows: above {least:.2g}")
    t = time_of(level, run)
    return Task(x_start=x0, t_start=t, reference=Item(x0), meta={"t_start": t})


def denoise(y: Tensor, noise: float, run: Run) -> Task:
    r"""Take off noise of a known standard deviation: y is a state of the process at the time with that noise.

    .. math:: x_t = \alpha_t y, \qquad \sigma_t / \alpha_t = \text{noise}

    A stochastic solver draws from p(x0 | y), a deterministic one gives a single answer to each y.
    """
    low, high = noise_levels(run)
    if not low < noise < high:
        raise ConfigError(
            f"task.noise={noise:g} must be between {low:.3g} and {high:.3g}, the noise that this model knows"
        )
    t = time_of(noise, run)
    x_t = float(run.process.schedule.alpha(as_time(t))) * y
    return Task(x_start=x_t, t_start=t, noised=True, reference=Item(y), meta={"t_start": t})


def noise_levels(run: Run) -> tuple[float, float]:
    """sigma/alpha at the process's t_min and t_max."""
    low, high = run.process.schedule.log_snr(as_time([run.process.t_min, run.process.t_max])).neg().exp().tolist()
    return low, high


def time_of(level: float, run: Run) -> float:
    """The time at which sigma/alpha has a value."""
    return float(run.process.schedule.t_of_log_snr(-as_time(level).log()))
