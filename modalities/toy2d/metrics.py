"""Measures of generated points in the plane against real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polydiff.core.adapter import Item, Metric
from polydiff.core.evaluation.bootstrap import interval
from polydiff.core.evaluation.features import labels, stack
from polydiff.core.evaluation.frechet import KernelStatistic, energy_kernel, kernel_distance
from polydiff.core.evaluation.neighbours import nearest, to_others
from polydiff.core.evaluation.quality import share, subset
from polydiff.core.evaluation.transport import SlicedStatistic, directions, sliced_wasserstein

LABEL = "label"
LINES = directions(2, 64)


def metrics(samples: Sequence[Item], reference: Sequence[Item], options: Mapping[str, Any]) -> dict[str, Metric]:
    """Score points against the training split; ``real`` is the held-out split against the same.

    ===================  ==============================================================================  ====
    sliced_wasserstein   over 64 evenly spaced lines, in units of the normalised points                  0
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
    if held_out is not None:  # at the count of the samples: both distances depend on it
        held_out = [held_out[i] for i in subset(torch.arange(len(held_out)), len(samples), seed).tolist()]
    x, train = stack(samples), stack(reference)
    fresh = None if held_out is None else stack(held_out)
    near, index = nearest(x, train)
    far = to_others(train, 1).quantile(0.99)
    sliced, energy = SlicedStatistic(x, train, LINES), KernelStatistic(x, train, energy_kernel)
    everything = torch.arange(len(x))
    value = sliced(everything)
    out = {
        "sliced_wasserstein": Metric(
            value,
            *interval(sliced, len(x), seed=seed, estimate=value),
            None if fresh is None else sliced_wasserstein(fresh, train, LINES),
            len(x),
        ),
        "energy_distance": Metric(
            energy(everything),
            *interval(energy, len(x), seed=seed),
            None if fresh is None else kernel_distance(fresh, train, energy_kernel),
            len(x),
        ),
        "outliers": share(near > far, None if fresh is None else nearest(fresh, train)[0] > far, seed=seed),
    }
    if all(LABEL in item.cond for item in (*samples, *reference, *(held_out or ()))):
        classes = labels(reference, LABEL)
        real = None
        if held_out is not None and fresh is not None:
            real = classes[nearest(fresh, train)[1]] == labels(held_out, LABEL)
        out["class_accuracy"] = share(classes[index] == labels(samples, LABEL), real, seed=seed)
    return out
