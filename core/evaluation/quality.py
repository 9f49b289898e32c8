"""The standard measures of a set of samples against a set of real data, each with its interval and its real value."""

from __future__ import annotations

import torch
from torch import Tensor

from polydiff.core.adapter import Metric
from polydiff.core.errors import DataError
from polydiff.core.evaluation import neighbours
from polydiff.core.evaluation.bootstrap import Statistic, interval, mean_interval
from polydiff.core.evaluation.frechet import KernelStatistic, frechet_distance, moments

SMALLEST = 6  # items: coverage asks for a fifth neighbour
LIMIT = 10_000  # reference items in measures that compare every pair; larger references are thinned at random


def quality(
    samples: Tensor,
    reference: Tensor,
    held_out: Tensor | None = None,
    *,
    classes: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Metric]:
    """Frechet and kernel distance, precision, recall, density and coverage on features.

    ``real`` is the same measure of the held-out items against the same reference, at the same count (a random subset
    of them where there are more), because most of these depend on the count. Intervals are 95 %. Those of the
    distances resample the samples; the other four resample the items whose mean they are (samples for precision
    and density, reference items for recall and coverage) and hold the other set fixed.

    Args:
        samples: features (n, d), n >= 6.
        reference: features (m, d) of the training split, m >= 6.
        held_out: features (h, d) of real items that were not trained on; None or fewer than 6 leave ``real`` empty.
        classes: int64 (n,), classes that were asked for; resamples of the samples then keep their shares.
        seed: of resampling and subsets.
    Returns:
        ``frechet_distance``, ``kernel_distance`` (0 is best, in squared units of the features), ``precision``,
        ``recall``, ``coverage`` (0 to 1, 1 is best) and ``density`` (1 is like the reference).
    Raises:
        DataError: fewer than 6 samples or reference items.
    """
    for name, features in (("samples", samples), ("reference items", reference)):
        if len(features) < SMALLEST:
            raise DataError(f"quality measures need at least {SMALLEST} {name}, got {len(features)}")
    n, fitted = len(samples), moments(reference)
    thin = subset(reference, LIMIT, seed)
    kernel, near = KernelStatistic(samples, thin), neighbours.to_others(thin, 5)
    each = neighbours.manifold(samples, thin, near=near)._asdict()
    values = {
        "frechet_distance": frechet_distance(samples, fitted),
        "kernel_distance": kernel(torch.arange(n)),
        **{name: float(value.mean()) for name, value in each.items()},
    }

    def resampled(name: str, statistic: Statistic) -> tuple[float, float]:
        return interval(statistic, n, seed=seed, estimate=values[name], strata=classes)

    low, high = resampled("frechet_distance", lambda index: frechet_distance(samples[index], fitted))
    intervals = {
        "frechet_distance": (max(low, 0.0), high),
        "kernel_distance": resampled("kernel_distance", kernel),
        **{name: mean_interval(value, seed=seed) for name, value in each.items()},
    }
    real: dict[str, float] = {}
    if held_out is not None and len(held_out) >= SMALLEST:
        fresh = subset(held_out, n, seed)
        real = {
            "frechet_distance": frechet_distance(fresh, fitted),
            "kernel_distance": KernelStatistic(fresh, thin, reference=kernel.reference)(torch.arange(len(fresh))),
            **{name: float(v.mean()) for name, v in neighbours.manifold(fresh, thin, near=near)._asdict().items()},
        }
    return {name: Metric(value, *intervals[name], real.get(name), n) for name, value in values.items()}


def spacing(train: Tensor, held_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How near real data comes to the training data: what ``originality`` compares samples with.

    Args:
        train: (m, *dims), m >= 2.
        held_out: (h, *dims), or None.
    Returns:
        Distance to the nearest other training item of up to 10,000 training items, chosen at random but always the same;
        and of the held-out items to the nearest training item, the former again without them. Float64.
    """
    rows = subset(torch.arange(len(train)), LIMIT, 0)
    within = neighbours.to_others(train.flatten(1), 1, rows)[:, 0]
    return within, within if held_out is None else neighbours.nearest(held_out.flatten(1), train.flatten(1))[0]


def originality(
    samples: Tensor,
    train: Tensor,
    held_out: Tensor | None = None,
    *,
    seed: int = 0,
    known: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Metric]:
    """How near samples come to the training data, in units of how near new real data comes.

    Distances are Euclidean between normalised states, not features: a classifier maps all of a class close together.

    Args:
        samples: (n, *dims).
        train: (m, *dims), m >= 2.
        held_out: (h, *dims), data like the training data that the model has not seen. Without it the unit is the
            distance of the training items to one another.
        seed: of resampling.
        known: ``spacing(train, held_out)``, where it is known already.
    Returns:
        ``nearest_train_ratio``: median distance to the nearest training item over that of the held-out items; 1 is
        like new data, towards 0 copies. ``near_copies``: share of samples nearer to a training item than 99 % of the
        training items are to their nearest other one; about 0.01 for new data.
    """
    to_train, _ = neighbours.nearest(samples.flatten(1), train.flatten(1))
    within, fresh = spacing(train, held_out) if known is None else known
    unit = max(float(fresh.median()), 1e-12)
    low, high = interval(lambda index: float(to_train[index].median()) / unit, len(to_train), seed=seed)
    threshold = within.sort().values[len(within) // 100]
    return {
        "nearest_train_ratio": Metric(
            float(to_train.median()) / unit, low, high, None if held_out is None else 1.0, len(to_train)
        ),
        "near_copies": share(to_train < threshold, None if held_out is None else fresh < threshold, seed=seed),
    }


def share(correct: Tensor, real: Tensor | None = None, *, seed: int = 0) -> Metric:
    """Metric of a yes-or-no measure.

    Args:
        correct: bool (n,), one for each sample.
        real: bool (h,), the same for held-out items.
        seed: of resampling.
    """
    low, high = mean_interval(correct.double(), seed=seed)
    return Metric(
        float(correct.double().mean()), low, high, None if real is None else float(real.double().mean()), len(correct)
    )


def subset(x: Tensor, n: int, seed: int) -> Tensor:
    """At most n of x (m, ...), drawn without repetition."""
    if len(x) <= n:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]]


def matched(classes: Tensor | None, available: Tensor | None, n: int, m: int, seed: int = 0) -> Tensor:
    """Which of the held-out items to compare with the samples: of every class as many as there are samples.

    Distances between sets depend on their counts and class shares; ``real`` should differ in neither. A class with too
    few held-out items gives all it has.

    Args:
        classes, available: of the n samples and of the m held-out items, int64; without both, n items at random.
        n, m: how many samples and held-out items there are.
        seed: of the choice.
    Returns:
        Indices into the held-out items, ascending.
    """
    if classes is None or available is None:
        return subset(torch.arange(m), n, seed).sort().values
    chosen = [subset((available == c).nonzero()[:, 0], int((classes == c).sum()), seed) for c in classes.unique()]
    return torch.cat(chosen).sort().values
