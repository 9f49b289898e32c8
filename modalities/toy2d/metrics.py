"""Measures of generated points in the plane against real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polydiff.core.adapter import Item, Metric
from polydiff.core.evaluation.bootstrap import interval
from polydiff.core.evaluation.features import labels, stack
from polydiff.core.evaluation.frechet import KernelStatistic, energy_kernel, kernel_distance
from polydiff.core.evaluation.neighbours import nearest, to_others
from polydiff.core.evaluation.quality import matched, share
from polydiff.core.evaluation.transport import SlicedStatistic, directions, sliced_wasserstein

LINES = directions(2, 32)


def metrics(samples: Sequence[Item], reference: Sequence[Item], options: Mapping[str, Any]) -> dict[str, Metric]:
    """Score points against the training split; ``real`` is the held-out split against the same.

    ===================  ==============================================================================  ====
    sliced_wasserstein   over 32 evenly spaced lines, in units of the normalised points                  0
    energy_distance      2 E|x-y| - E|x-x'| - E|y-y'|, unbiased, same units                              0
    outliers             share farther from the training points than 99 % of these are from one another  0.01
    class_accuracy       the nearest training point has the class that was asked for                     1
    ===================  ==============================================================================  ====

    The last column is the best value; with finite sets even real points miss it, so read ``real``.

    Args:
        samples: generated items, x (2,) normalised.
        reference: the training split.
        options: ``held_out`` (items or None) and ``seed`` of the intervals.
    Raises:
        DataError: fewer than 2 points in a set, or values that are not finite.
    """
    held_out, seed = options.get("held_out") or None, options.get("seed", 0)
    x, train = stack(samples), stack(reference)
    asked, classes, truth = labels(samples), labels(reference), labels(held_out)
    fresh = None if held_out is None else stack(held_out)
    if fresh is not None:
        chosen = matched(asked, truth, len(x), len(fresh), seed)
        fresh, truth = fresh[chosen] if len(chosen) > 1 else None, None if truth is None else truth[chosen]
    near, index = nearest(x, train)
    far = to_others(train, 1).quantile(0.99)
    sliced, energy = SlicedStatistic(x, train, LINES), KernelStatistic(x, train, energy_kernel)
    everything = torch.arange(len(x))

    def distance(statistic: Callable[[Tensor], float], real: float | None) -> Metric:
        value = statistic(everything)
        ends = interval(statistic, len(x), seed=seed, estimate=value, strata=asked)
        return Metric(value, *ends, real, len(x))

    out = {
        "sliced_wasserstein": distance(sliced, None if fresh is None else sliced_wasserstein(fresh, train, LINES)),
        "energy_distance": distance(energy, None if fresh is None else kernel_distance(fresh, train, energy_kernel)),
        "outliers": share(near > far, None if fresh is None else nearest(fresh, train)[0] > far, seed=seed),
    }
    if asked is not None and classes is not None:
        right = None if fresh is None or truth is None else classes[nearest(fresh, train)[1]] == truth
        out["class_accuracy"] = share(classes[index] == asked, right, seed=seed)
    return out
