"""The best denoiser that is linear in its input: what a network has to beat before it has learned any structure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from polydiff.core.adapter import Item
from polydiff.core.errors import DataError
from polydiff.core.evaluation.features import stack
from polydiff.core.noise import Noise
from polydiff.core.schedules import as_time
from polydiff.core.tree import move

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # sigma / (alpha sigma_data)
ROWS = 1000  # items held at a time


class LinearDenoiser:
    r"""The Wiener filter of a data set: the affine function of x_t with the least mean squared error.

    .. math:: \hat x_0 = \mu + C (C + r^2 I)^{-1} (x_t / \alpha - \mu), \qquad r = \sigma/\alpha

    Exact for Gaussian data; otherwise it knows mean and covariance of the data and nothing else.

    Args:
        batches: states (b, *dims) of all items it is fitted to, in parts; any float type, computed in float64.
    Attributes:
        mean: mu (d,), the states flattened.
        values, vectors: eigenvalues (d,) and eigenvectors (d, d) of C, the covariance divided by n.
    Raises:
        DataError: fewer than two items.
    Source:
        Kay 1993, eq. 12.20, for a signal of known mean and covariance in white noise.
    """

    def __init__(self, batches: Iterable[Tensor]) -> None:
        n, total, products = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            x = batch.flatten(1).double()
            n, total, products = n + len(x), total + x.sum(0), products + x.T @ x
        if n < 2:
            raise DataError(f"a covariance needs at least 2 items, got {n}")
        self.mean = total / n
        values, self.vectors = torch.linalg.eigh(products / n - torch.outer(self.mean, self.mean))
        self.values = values.clamp_min(0)  # round-off of directions without variance

    def __call__(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """x0_hat, float64, of states (b, *dims) at one level; at sigma = 0 directions without variance are the mean's."""
        gain = self.values / (self.values + (sigma / alpha) ** 2).clamp_min(1e-300)
        offset = x_t.flatten(1).double() / alpha - self.mean
        return (self.mean + (offset @ self.vectors * gain) @ self.vectors.T).view(x_t.shape)

    def error(self, ratio: float) -> float:
        """Mean squared error per number on the data it was fitted to, at sigma/alpha = ``ratio``, in closed form."""
        return float((self.values * ratio**2 / (self.values + ratio**2).clamp_min(1e-300)).mean())


def ratios(
    run: Any,
    levels: Sequence[float] = LEVELS,
    n: int = 2000,
    *,
    conditions: bool = True,
    linear: LinearDenoiser | None = None,
    seed: int = 0,
    batch: int = 250,
) -> dict[float, float]:
    """Held-out error of a run's x0_hat over that of the best linear denoiser, on the same items and the same noise.

    Below 1 the network beats every linear map; noise is per item, so two runs of one data set are compared on equal terms.

    Args:
        run: an opened run (``polydiff.load``) with a Gaussian process.
        levels: noise levels as sigma / (alpha sigma_data).
        n: held-out items, spread evenly over the test split.
        conditions: give the network each item's own conditions.
        linear: fitted before to the training split, to save the time; see ``fitted``.
        seed: of the noise.
        batch: items in a network call.

    Returns:
        The ratio by level.
    """
    linear = linear or fitted(run)
    held_out, schedule = run.dataset("test"), run.process.schedule
    n = min(n, len(held_out))
    chosen = [i * len(held_out) // n for i in range(n)]
    result = {}
    for level in levels:
        t = schedule.t_of_log_snr(as_time(-math.log(level * run.denoiser.sigma_data)))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        errors = torch.zeros(2, dtype=torch.float64)
        for start in range(0, n, batch):
            rows = chosen[start : start + batch]
            item: Item = run.adapter.collate([held_out[i] for i in rows])
            x0: Any = item.x
            x_t = alpha * x0 + sigma * Noise(seed, rows).draw(0, "held-out", x0)
            cond = move(item.cond, run.device) if conditions else {}
            with torch.no_grad():
                x0_hat = run.denoiser(x_t.to(run.device), t, None, cond).x0.cpu()
            guesses = (x0_hat.double(), linear(x_t, alpha, sigma))
            errors += torch.stack([(guess - x0).square().flatten(1).mean(1).sum() for guess in guesses])
        result[level] = float(errors[0] / errors[1])
    return result


def fitted(run: Any) -> LinearDenoiser:
    """The linear denoiser of a run's training split, without augmentation."""
    return LinearDenoiser(stack(part) for part in _parts(run.dataset("train")))


def _parts(items: Sequence[Item]) -> Iterator[list[Item]]:
    remaining = (items[i] for i in range(len(items)))
    while part := list(islice(remaining, ROWS)):
        yield part
