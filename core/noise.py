"""Random draws that belong to items, not to batches.

Item i draws from its own stream, so what it gets depends neither on the number of items nor on how they are batched, and
not on the device: draws are made on the CPU in float32, at the item's own valid length, then padded and moved.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from polydiff.core.checks import shown
from polydiff.core.errors import ConfigError
from polydiff.core.schedules import as_time

_REACH, _CELL = 64.0, 2.0**-20  # Brownian paths run over log-SNR -64 to 64 and are known at places one cell apart


class Noise:
    """Per-item streams of standard normal numbers.

    With ``brownian`` the draws that name an interval of log-SNR are normalised increments of one Brownian path for each
    item and purpose, whatever the grid, so that an SDE solver converges to one sample as its steps are made smaller.

    Args:
        seed: the run's seed.
        items: the number of each item of the batch; item 7 draws the same whether it stands in a batch of 1 or of 64.
        brownian: draw along Brownian paths; about a hundred times as slow.
        mask_axis: axis of the batch along which masks run.
    """

    def __init__(self, seed: int, items: Iterable[int], brownian: bool = False, *, mask_axis: int = 1) -> None:
        self.seed, self.items = int(seed), [int(item) for item in items]
        self.brownian, self.mask_axis = brownian, mask_axis

    def generator(self, row: int, k: int, purpose: str) -> torch.Generator:
        """The CPU generator of draw k for one purpose of the item in a row of the batch."""
        key = f"{self.seed}/{self.items[row]}/{purpose}/{k}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(seed)

    def draw(self, k: int, purpose: str, like: Any, t: Any = None, s: Any = None, mask: Tensor | None = None) -> Any:
        """Standard normal draws with the shape, dtype and device of a state ``like`` (b, *dims), zero on padding.

        Args:
            k: number of the draw, usually the interval.
            purpose: what for; each purpose has its own stream, and each leaf of a product its own purpose.
            t, s: log-SNR at the interval's ends, for Brownian noise; not used where it does not rise from t to s.
            mask: valid elements, bool (b, n); an item's draw has the shape of its valid part.
        """
        if isinstance(like, dict):
            return {name: self.draw(k, f"{purpose}/{name}", leaf, t, s, mask) for name, leaf in like.items()}
        if like.shape[0] != len(self.items):
            raise ConfigError(f"noise for {len(self.items)} items was asked for a batch of {like.shape[0]}")
        ends = _places(t, s) if self.brownian and t is not None and s is not None else None
        shape, axis = tuple(like.shape[1:]), self.mask_axis % like.ndim - 1
        out, valid = torch.zeros(like.shape), None if mask is None else mask.cpu()
        for row, target in enumerate(out):
            index = None if valid is None else valid[row].nonzero()[:, 0]
            own = shape if index is None else (*shape[:axis], len(index), *shape[axis + 1 :])
            if ends is None:
                z = torch.randn(own, generator=self.generator(row, k, purpose))
            else:
                first, last = (self._path(row, purpose, place, own) for place in ends)
                z = ((last - first) / math.sqrt((ends[1] - ends[0]) * _CELL)).float()
            target.copy_(z) if index is None else target.index_copy_(axis, index, z)
        return out.to(device=like.device, dtype=like.dtype)

    def _path(self, row: int, purpose: str, place: int, shape: tuple[int, ...]) -> Tensor:
        """Brownian motion from 0 at log-SNR -64, by bisection: every middle of two known places has its own stream."""

        def normal(k: int) -> Tensor:
            return torch.randn(shape, generator=self.generator(row, k, f"{purpose}/brownian"), dtype=torch.float64)

        low, high = 0, round(2 * _REACH / _CELL)
        at_low, at_high = torch.zeros(shape, dtype=torch.float64), math.sqrt(2 * _REACH) * normal(high)
        while low < place < high:
            middle = (low + high) // 2
            at_middle = 0.5 * (at_low + at_high) + 0.5 * math.sqrt((high - low) * _CELL) * normal(middle)
            if place < middle:
                high, at_high = middle, at_middle
            else:
                low, at_low = middle, at_middle
        return at_low if place == low else at_high


def _places(t: Any, s: Any) -> tuple[int, int] | None:
    """Where an interval of log-SNR lies on the lattice of Brownian paths; None if it is empty there or does not rise."""
    first, last = (round((min(max(float(end), -_REACH), _REACH) + _REACH) / _CELL) for end in (t, s))
    return (first, last) if first < last else None


class Projected:
    """A noise whose draws go through ``process.project``, of purposes with a suffix; what the loop hands to solvers."""

    def __init__(self, noise: Noise, process: Any, mask: Tensor | None, fixed: Tensor | None, suffix: str = "") -> None:
        self.noise, self.process, self.mask, self.fixed, self.suffix = noise, process, mask, fixed, suffix

    def draw(self, k: int, purpose: str, like: Any, t: Tensor | None = None, s: Tensor | None = None) -> Any:
        """As ``Noise.draw`` for an interval of time from t to s, projected."""
        if self.noise.brownian and t is not None and s is not None:
            t, s = (self.process.schedule.log_snr(as_time(end)) for end in (t, s))
        return self.project(self.noise.draw(k, purpose + self.suffix, like, t, s, self.mask))

    def project(self, z: Any) -> Any:
        """``process.project`` with the mask and the fixed elements of the state that is sampled."""
        return self.process.project(z, self.mask, self.fixed)

    def again(self, suffix: str) -> Projected:
        """Fresh draws for the same items, for an interval that is gone through once more; the same ones without suffix."""
        suffix = self.suffix + (suffix and f"/{suffix}")
        return Projected(self.noise, self.process, self.mask, self.fixed, suffix)


def as_noise(
    source: Noise | torch.Generator | Sequence[torch.Generator] | int | None, n: int, mask_axis: int = 1
) -> Noise:
    """Make streams for n items from what a caller has.

    That is a Noise; a generator, from which one seed per item is drawn once; one generator per item; a seed; or None for a
    seed from the operating system.

    Raises:
        ConfigError: anything else, or as many generators or streams as do not fit.
    """
    if isinstance(source, Noise):
        return source
    if source is None or (isinstance(source, Integral) and not isinstance(source, bool)):
        seed = int.from_bytes(os.urandom(8), "little") if source is None else int(source)
        return Noise(seed, range(n), mask_axis=mask_axis)
    generators = [source] * n if isinstance(source, torch.Generator) else source
    if not isinstance(generators, list | tuple) or not all(isinstance(g, torch.Generator) for g in generators):
        raise ConfigError(
            f"generator = {shown(source)} must be a seed, a Noise, a torch.Generator, one for each item, or None"
        )
    if len(generators) != n:
        raise ConfigError(f"{len(generators)} generators for a batch of {n}: give one generator, or one per item")
    seeds = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generators]
    return Noise(0, seeds, mask_axis=mask_axis)
