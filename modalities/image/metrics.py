"""Measures of generated pictures against real ones, on features of a classifier trained on the real training split."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from polydiff.core.adapter import Item, Metric
from polydiff.core.errors import DataError
from polydiff.core.evaluation.classifier import FeatureClassifier, Settings, classify, extract
from polydiff.core.evaluation.features import digest, labels, obtain, principal, remembered, stack
from polydiff.core.evaluation.quality import SMALLEST, matched, originality, quality, share, spacing
from polydiff.modalities.image.fidelity import fidelity
from polydiff.modalities.image.inception import inception_scores, ready


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
    fid, kid               the same two distances on Inception features, if asked     0
    consistency, psnr,     how well they keep to a picture that was given, and to     0, -,
    ssim                   the true one; see ``fidelity``                             1
    =====================  =========================================================  =====

    The last column is the best value; with finite sets even real pictures miss it, so read ``real``. The classes of
    a set weigh heavily in both distances: compare sets with the class shares of the training split. Features are
    the penultimate layer of a small classifier trained once on the training split and kept in ``store``; for data
    without classes they are its 64 first principal components, and there is no ``class_accuracy``. Nor is there one
    for samples that were not asked to be of a class. Pictures are clipped to [-1, 1], as they are when written.

    Args:
        samples: generated items, x (c, h, w) normalised to [-1, 1].
        reference: the training split.
        options: ``held_out`` (items or None), ``store`` (folder or None: nothing is kept), ``seed`` of the intervals,
            ``data`` (the data set's own options: with ``flip`` the classifier learns mirrored pictures too),
            ``inception``, ``inception_weights`` and ``device`` (see ``inception.ready``). Two are filled here:
            ``seconds`` (a dictionary) with the time that features took, ``notes`` (a list) with what was left out.
            The classifier's own seed is fixed: every evaluation of a data set uses the same one.
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
    for name, part in (("samples", x), ("reference pictures", train)):
        if len(part) < SMALLEST:  # said before a classifier is trained
            raise DataError(f"quality measures need at least {SMALLEST} {name}, got {len(part)}: more are needed")
    asked, known, truth = labels(samples), labels(reference), labels(held_out)
    store, weights = options.get("store"), ready(options)
    if isinstance(weights, str) and weights:
        options.get("notes", []).append(weights)

    began = time.monotonic()
    model: FeatureClassifier | None
    features: Callable[[Tensor], Tensor]
    if known is None:
        model, features, whose = None, principal(train), "principal components"
    else:
        settings = Settings.suited(train.shape[1:], mirror=bool((options.get("data") or {}).get("flip")))
        model, info = obtain(store, reference, held_out, settings=settings)
        features, whose = partial(extract, model), info["weights_sha256"]
    identity = {"features": whose, "train": digest(train), "held_out": None if fresh is None else digest(fresh)}
    real = remembered(store, "reference", identity, partial(_real, model, features, train, fresh))
    own, classes = features(x), None if model is None or asked is None else classify(model, x)
    options.get("seconds", {})["features"] = time.monotonic() - began

    chosen = None if fresh is None else real["held_out"][matched(asked, truth, len(x), len(fresh), seed)]
    out = quality(own, real["train"], chosen, classes=asked, seed=seed)
    if classes is not None and asked is not None:
        right = None if fresh is None or truth is None else real["classes"].eq(truth)
        out["class_accuracy"] = share(classes.eq(asked), right, seed=seed)
    out |= originality(x, train, fresh, seed=seed, known=(real["within"], real["near"]))
    if isinstance(weights, Path):
        more = {"classes": asked, "available": truth, "seed": seed, "store": store}
        out |= inception_scores(x, train, fresh, weights, **more, device=options.get("device", "cpu"))
    return out | fidelity(samples, held_out, options.get("facts") or {}, seed=seed)


def _real(
    model: FeatureClassifier | None, features: Callable[[Tensor], Tensor], train: Tensor, fresh: Tensor | None
) -> dict[str, Tensor]:
    """Everything about the real pictures that takes time and depends on no sample."""
    within, near = spacing(train, fresh)
    out = {"train": features(train), "within": within, "near": near.clone()}
    if fresh is not None:
        out["held_out"] = features(fresh)
        if model is not None:
            out["classes"] = classify(model, fresh)
    return out
