"""Measures of generated pictures against real ones, on features of a classifier trained on the real training split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from polydiff.core.adapter import Item, Metric
from polydiff.core.errors import DataError
from polydiff.core.evaluation.classifier import classify, extract
from polydiff.core.evaluation.features import labels, obtain, principal, stack
from polydiff.core.evaluation.quality import matched, originality, quality, share


def metrics(samples: Sequence[Item], reference: Sequence[Item], options: Mapping[str, Any]) -> dict[str, Metric]:
    """Score pictures against the training split; ``real`` is the held-out split against the same.

    =====================  =========================================================  =====
    frechet_distance       between Gaussians fitted to the features                   0
    kernel_distance        unbiased, cubic kernel, on the features                    0
    precision, recall      samples among real ones, real ones among samples (k = 3)   1
    density, coverage      the same less sensitive to outliers (k = 5)                1
    class_accuracy         the classifier sees the class that was asked for           1
    nearest_train_ratio    distance to the nearest training picture, 1 = as for new   1
    near_copies            share nearer to one than training pictures are (1 %)       0.01
    =====================  =========================================================  =====

    The last column is the best value; with finite sets even real pictures miss it, so read ``real``. The classes of
    a set weigh heavily in both distances: compare sets with the class shares of the training split. Features are
    the penultimate layer of a small classifier trained once on the training split and kept in ``store``; for data
    without classes they are its 64 first principal components, and there is no ``class_accuracy``. Nor is there one
    for samples that were not asked to be of a class. Pictures are clipped to [-1, 1], as they are when written.

    Args:
        samples: generated items, x (c, h, w) normalised to [-1, 1].
        reference: the training split.
        options: ``held_out`` (items or None), ``store`` (folder or None: the classifier is not kept), ``seed`` of the
            intervals. The classifier's own seed is fixed: every evaluation of a data set uses the same one.
    Raises:
        DataError: fewer than 6 items in a set, other sizes than the reference, or values that are not finite.
    """
    held_out, seed = options.get("held_out") or None, options.get("seed", 0)
    x, train = stack(samples).clamp(-1, 1), stack(reference)
    fresh = None if held_out is None else stack(held_out)
    for name, part in (("samples", x), ("held-out pictures", fresh)):
        if part is not None and part.shape[1:] != train.shape[1:]:
            raise DataError(
                f"{name} of size {tuple(part.shape[1:])} cannot be compared with a reference of {tuple(train.shape[1:])}"
            )
    asked, known, truth = labels(samples), labels(reference), labels(held_out)
    model = None if known is None else obtain(options.get("store"), reference, held_out)[0]
    features = principal(train) if model is None else partial(extract, model)
    real = None if fresh is None else features(fresh[matched(asked, truth, len(x), len(fresh), seed)])
    out = quality(features(x), features(train), real, classes=asked, seed=seed)
    if model is not None and asked is not None:
        right = None if fresh is None or truth is None else classify(model, fresh) == truth
        out["class_accuracy"] = share(classify(model, x) == asked, right, seed=seed)
    return {**out, **originality(x, train, fresh, seed=seed)}
