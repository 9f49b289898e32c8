"""How well pictures that were made of others keep to them, and how near they come to the true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polydiff.core.adapter import Item, Metric
from polydiff.core.evaluation.bootstrap import mean_interval
from polydiff.core.tree import leaves
from polydiff.modalities.image.codec import Codec
from polydiff.modalities.image.condition import NAME, described, key, same_condition

PAIRS = 2000  # pictures compared one by one
BEST_DB = 100.0  # what equal pictures get, whose ratio is infinite
WINDOW = 7  # pixels, of SSIM


def fidelity(
    samples: Sequence[Item], held_out: Sequence[Item] | None, facts: Mapping[str, Any], seed: int = 0
) -> dict[str, Metric]:
    r"""Measures of samples that were given a picture as condition; none for others.

    ===========  ==========================================================================================  ====
    consistency  mean squared error between the samples degraded again and what they were given              0
    psnr         :math:`-10 \log_{10}` of the mean squared error to the true picture, in dB, mean over them  high
    ssim         structural similarity with the true picture, window of 7 pixels, mean over them             1
    ===========  ==========================================================================================  ====

    Pixels count from 0 to 1, after rounding to 8 bits. ``psnr`` and ``ssim`` reward blur: many pictures agree with a
    condition, and their mean is nearest to the true one of them. Real pictures are their own truth, so ``psnr`` has no
    finite ``real``.

    Args:
        samples: generated pictures with their conditions.
        held_out: real ones; the truth of a sample is the one whose condition it was given, if there is but one.
        facts: of the data set.
        seed: of the intervals.
    Source:
        Saharia et al. 2021 (SR3), table 1 for the three; Wang et al. 2004 for SSIM.
    """
    degrade = described(facts)
    if degrade is None:
        return {}
    given = [item for item in samples if NAME in item.cond]
    if not given:
        return {}
    errors = torch.cat([_mse(degrade(_rounded(item)), item.cond[NAME]) for item in given])
    out = {"consistency": _mean(errors, 0.0, seed)}
    truths = {same: items[0] for same, items in same_condition(held_out or ()).items() if len(items) == 1}
    pairs = [(item, truths[key(item)]) for item in given if key(item) in truths][:PAIRS]
    if pairs:
        mse = torch.cat([_mse(_rounded(item), leaves(truth.x)[0]) for item, truth in pairs])
        out["psnr"] = _mean((-10 * mse.log10()).clamp(max=BEST_DB), None, seed)
        if min(leaves(pairs[0][1].x)[0].shape[1:]) >= WINDOW:
            out["ssim"] = _mean(torch.tensor([_ssim(item, truth) for item, truth in pairs]), 1.0, seed)
    return out


def _rounded(item: Item) -> Tensor:
    codec = Codec()
    return codec.encode(codec.decode(item.x))


def _mse(x: Tensor, y: Tensor) -> Tensor:
    """(1,), for normalised pictures (c, h, w), whose range of 2 counts as 1."""
    return ((x - y).double() / 2).square().mean().reshape(1)


def _ssim(item: Item, truth: Item) -> float:
    from skimage.metrics import structural_similarity

    ours, theirs = (Codec().decode(one.x) for one in (item, truth))
    return float(structural_similarity(ours, theirs, win_size=WINDOW, channel_axis=2, data_range=255))


def _mean(values: Tensor, real: float | None, seed: int) -> Metric:
    low, high = mean_interval(values.double(), seed=seed)
    return Metric(float(values.double().mean()), low, high, real, len(values))
