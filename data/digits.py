"""The digits of scikit-learn: the test set of UCI's Optical Recognition of Handwritten Digits, 13 writers, 8x8 pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from polydiff.core.errors import DataError
from polydiff.data.table import Table

TEST_PER_CLASS = 36


def recipe(name: str, source: Path | None) -> Table:
    """Read the 1797 digits that scikit-learn carries.

    Pixels are counts 0..16, stored as round(v 255/16); round(u 16/255) gives them back. The split is fixed and
    stratified: of each class, 36 items drawn by NumPy's frozen Mersenne stream with seed 0 are the test split, 360 in
    all, the other 1437 are for training. Training items come first; ``id`` is the index in scikit-learn's order.

    Args:
        name: the data set's name.
        source: not used, the data are embedded.
    Raises:
        DataError: scikit-learn carries other data than it did.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    counts, labels = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    if counts.shape != (1797, 8, 8) or counts.max() != 16:
        raise DataError(f"scikit-learn's digits have shape {counts.shape}, expected (1797, 8, 8); install another one")
    random = np.random.RandomState(0)
    test = [random.permutation(np.flatnonzero(labels == k))[:TEST_PER_CLASS] for k in range(10)]
    is_test = np.isin(np.arange(len(labels)), np.concatenate(test))
    order = np.argsort(is_test, kind="stable")
    return Table(
        arrays={"image": np.round(counts[order, :, :, None] * (255 / 16)).astype(np.uint8)},
        columns={
            "id": np.array([f"{i:04d}" for i in order]),
            "split": np.where(is_test[order], "test", "train"),
            "label": labels[order],
        },
        names={"label": [str(k) for k in range(10)]},
        attributes={
            "units": "grey level 0..255",
            "normalisation": "x / 127.5 - 1",
            "sha256_of_source": hashlib.sha256(counts.tobytes() + labels.astype("<i8").tobytes()).hexdigest(),
        },
    )
