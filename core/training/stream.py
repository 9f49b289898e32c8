"""The sequence of training samples as a pure function of (seed, step): nothing to store, nothing to lose on resume.

Sample number j = 0, 1, 2, ... belongs to epoch j // N; inside an epoch the order is a permutation drawn from
(seed, epoch). Step s consumes the numbers [s B, (s+1) B), cut into ``processes * accumulate`` equal chunks. So the same
items come in the same order whatever the number of processes, micro-batches or loader workers, and from any step on.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError
from polydiff.core.tree import State

Batch = tuple[State, Tensor | None, dict[str, Tensor]]


def derive(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed that is a pure function of the run's seed, what it is for, and any counters.

    Args:
        seed: the run's seed.
        purpose: streams of different purposes have different seeds.
        keys: counters such as step, epoch, index.
    """
    words = "/".join(map(str, (seed, purpose, *keys)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


class Stream:
    """Which items each step trains on.

    Args:
        n: items in the training split.
        batch: items per step over all processes and micro-batches.
        seed: the run's seed.
        chunks: processes * accumulate; must divide ``batch``.
    Raises:
        ConfigError: an empty data set, or a batch that cannot be divided.
    """

    def __init__(self, n: int, batch: int, seed: int, chunks: int = 1) -> None:
        if n < 1:
            raise ConfigError("the training split is empty: nothing to train on")
        if batch < 1 or chunks < 1 or batch % chunks:
            raise ConfigError(
                f"trainer.batch={batch} cannot be divided into {chunks} equal parts (processes x trainer.accumulate); "
                f"use a multiple of {chunks}, e.g. trainer.batch={max(1, math.ceil(batch / chunks)) * chunks}"
            )
        self.n, self.batch, self.seed, self.chunk = n, batch, seed, batch // chunks
        self._permutation = lru_cache(maxsize=4)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64(derive(self.seed, "order", epoch))).permutation(self.n)

    def keys(self, step: int, chunk: int) -> list[tuple[int, int]]:
        """(epoch, index) of the items of one chunk of step ``step`` (0-based)."""
        first = step * self.batch + chunk * self.chunk
        return [
            (j // self.n, int(self._permutation(j // self.n)[j % self.n])) for j in range(first, first + self.chunk)
        ]


class Chunks(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one process: its micro-batches of every step in [start, stop), in order."""

    def __init__(self, stream: Stream, start: int, stop: int, chunks: range) -> None:
        self.stream, self.start, self.stop, self.chunks = stream, start, stop, chunks

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.chunks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for chunk in self.chunks:
                yield self.stream.keys(step, chunk)


class Keyed(Dataset[Item]):
    """A map-style data set addressed by (epoch, index), which applies the data set's own ``augment``.

    The augmentation of an item is seeded from (seed, epoch, index), so it does not depend on who loads it or when.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Item]:
        """The items of several keys, in one call where the data set offers that."""
        indices = [index for _, index in keys]
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch is not None else [self.dataset[index] for index in indices]
        augment = getattr(self.dataset, "augment", None)
        if augment is None:
            return items
        generator = torch.Generator()
        return [
            augment(item, generator.manual_seed(derive(self.seed, "augment", *key)))
            for item, key in zip(items, keys, strict=True)
        ]


def loader(
    dataset: Any,
    stream: Stream,
    start: int,
    stop: int,
    *,
    chunks: range,
    collate: Callable[[list[Item]], Item],
    workers: int = 0,
    pin: bool = False,
    close: tuple[int, ...] = (),
) -> DataLoader[Batch]:
    """Micro-batches of this process, as (x, mask, cond), from step ``start`` (0-based) up to ``stop``.

    Args:
        dataset: map-style, of Items; may offer ``__getitems__`` and ``augment(item, generator)``.
        stream: which items.
        start: first step.
        stop: one past the last step.
        chunks: this process's chunks of each step, ``accumulate`` many.
        collate: the adapter's.
        workers: loader processes; 0 loads in this one.
        pin: page-locked memory, for copies to a CUDA device that overlap with computing.
        close: file descriptors that workers must not inherit (the run's lock, which would outlive a killed run).
    """
    # A worker that is forked shares the lock of the run; one that is spawned does not, and has other descriptors.
    shared = close if multiprocessing.get_start_method() == "fork" else ()
    return DataLoader(
        Keyed(dataset, stream.seed),  # type: ignore[arg-type]
        batch_sampler=Chunks(stream, start, stop, chunks),
        collate_fn=partial(_pack, collate),
        num_workers=workers,
        worker_init_fn=partial(_begin, shared) if workers else None,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # otherwise the loader draws from the global state
    )


def _begin(close: tuple[int, ...], _worker: int) -> None:
    # A Ctrl-C or a scheduler's signal reaches the whole process group; the trainer decides, workers keep serving.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    for descriptor in close:
        os.close(descriptor)


def _pack(collate: Callable[[list[Item]], Item], items: list[Item]) -> Batch:
    """Plain tensors: what the loader can page-lock, and send between processes at little cost."""
    batch = collate(items)
    return batch.x, batch.mask, batch.cond
