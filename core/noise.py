"""Random draws that belong to items, not to batches.

Item i draws from its own stream, so what it gets depends neither on the number of items nor on how they are batched, and
not on the device: draws are made on the CPU in float32, at the item's own valid length, then padded and moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from polydiff.core.errors import ConfigError


class Noise:
    """Per-item streams of standard normal numbers.

    Args:
        seed: the run's seed.
        items: the number of each item of the batch; item 7 draws the same whether it stands in a batch of 1 or of 64.
        mask_axis: axis of the batch along which masks run.
    """

    def __init__(self, seed: int, items: Iterable[int], *, mask_axis: int = 1) -> None:
        self.seed = int(seed)
        self.items = [int(item) for item in items]
        self.mask_axis = mask_axis

    def __len__(self) -> int:
        return len(self.items)

    def generator(self, row: int, k: int, purpose: str) -> torch.Generator:
        """The CPU generator of draw k for one purpose of the item in a row of the batch."""
        key = f"{self.seed}/{self.items[row]}/{purpose}/{k}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(seed)

    def draw(self, k: int, purpose: str, like: Any, t: Any = None, s: Any = None, mask: Tensor | None = None) -> Any:
        """Standard normal draws shaped like a state (b, *dims), zero on padding.

        Args:
            k: number of the draw, usually the interval.
            purpose: what for; each purpose has its own stream, and each leaf of a product its own purpose.
            like: gives shape, dtype and device.
            t, s: the interval's ends, for noise that depends on them; unused by independent draws.
            mask: valid elements, bool (b, n); an item's draw has the shape of its valid part.
        """
        if isinstance(like, dict):
            return {name: self.draw(k, f"{purpose}/{name}", leaf, t, s, mask) for name, leaf in like.items()}
        if like.shape[0] != len(self.items):
            raise ConfigError(f"noise for {len(self.items)} items was asked for a batch of {like.shape[0]}")
        shape = tuple(like.shape[1:])
        axis = self.mask_axis % like.ndim - 1
        out = torch.zeros((len(self.items), *shape))
        valid = None if mask is None else mask.cpu()
        for row, target in enumerate(out):
            generator = self.generator(row, k, purpose)
            if valid is None:
                torch.randn(shape, generator=generator, out=target)
            else:
                index = valid[row].nonzero()[:, 0]
                own = [*shape[:axis], len(index), *shape[axis + 1 :]]
                target.index_copy_(axis, index, torch.randn(own, generator=generator))
        return out.to(device=like.device, dtype=like.dtype)


class Projected:
    """A noise whose draws go through ``process.project``; what the sampling loop hands to solvers."""

    def __init__(self, noise: Noise, process: Any, mask: Tensor | None, fixed: Tensor | None) -> None:
        self.noise, self.process, self.mask, self.fixed = noise, process, mask, fixed

    def draw(self, k: int, purpose: str, like: Any, t: Any = None, s: Any = None) -> Any:
        """As ``Noise.draw``, projected."""
        return self.process.project(self.noise.draw(k, purpose, like, t, s, self.mask), self.mask, self.fixed)


def as_noise(
    source: Noise | torch.Generator | Sequence[torch.Generator] | int | None, n: int, mask_axis: int = 1
) -> Noise:
    """Make per-item streams from what a caller has.

    Args:
        source: a Noise; a generator, from which one seed per item is drawn once; one generator per item; a seed; or None
            for a seed from the operating system.
        n: batch size.
        mask_axis: as in ``Noise``.
    """
    if isinstance(source, Noise):
        return source
    if isinstance(source, int):
        return Noise(source, range(n), mask_axis=mask_axis)
    if source is None:
        return Noise(torch.Generator().seed(), range(n), mask_axis=mask_axis)
    generators = [source] * n if isinstance(source, torch.Generator) else list(source)
    if len(generators) != n:
        raise ConfigError(f"{len(generators)} generators for a batch of {n}: give one generator, or one per item")
    seeds = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generators]
    return Noise(0, seeds, mask_axis=mask_axis)
