"""CIFAR-10 (Krizhevsky 2009): 60,000 photographs of 32x32 pixels in 10 classes, in its binary version.

A file is a row of records of 3,073 bytes: the label 0..9, then 1,024 bytes each of red, green and blue, row by row.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from polydiff.core.errors import DataError
from polydiff.data import source as sources
from polydiff.data.table import Table

BATCHES = {**{f"data_batch_{k}.bin": "train" for k in range(1, 6)}, "test_batch.bin": "test"}
RECORDS, SIDE = 10_000, 32
RECORD = 1 + 3 * SIDE**2
META = "batches.meta.txt"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def recipe(name: str, source: Path) -> Table:
    """Read the batches there are, in the original order: training images first.

    Missing batches and batches with fewer records than 10,000 are accepted, as long as some are for training.

    Args:
        name: the data set's name.
        source: the folder ``cifar-10-batches-bin``, or the folder above it.
    Returns:
        ``image`` (N, 32, 32, 3) uint8 RGB, and ``label``; ``id`` is the batch and the place in it.
    Raises:
        DataError: a file is damaged or not what it should be, or there is no training batch.
    """
    folder = sources.find(name, source, BATCHES)
    found = {file: folder / file for file in BATCHES if (folder / file).is_file()}
    if "train" not in {BATCHES[file] for file in found}:
        raise DataError(f"{name}: {folder} has no training batch (data_batch_1.bin ... data_batch_5.bin); get it again")
    images, labels, ids, splits, digest = [], [], [], [], hashlib.sha256()
    for file, path in found.items():
        content = sources.read(path, RECORDS * RECORD + 1)
        batch, label = parse(content, path)
        digest.update(content)
        images.append(batch)
        labels.append(label)
        ids += [f"{path.stem}-{i:04d}" for i in range(len(label))]
        splits += [BATCHES[file]] * len(label)
    return Table(
        arrays={"image": np.concatenate(images)},
        columns={"id": np.array(ids), "split": np.array(splits), "label": np.concatenate(labels)},
        names={"label": _names(folder)},
        attributes={
            "units": "grey level 0..255 of red, green, blue",
            "normalisation": "x / 127.5 - 1",
            "sha256_of_source": digest.hexdigest(),
            "complete": [len(ids), RECORDS * len(BATCHES)],
        },
    )


def parse(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) int64 of one batch.

    Args:
        content: of the file; may be cut one byte after 10,000 records.
        path: for messages.
    Raises:
        DataError: no whole number of records from 1 to 10,000, or a label above 9.
    """
    if not content or len(content) % RECORD or len(content) > RECORDS * RECORD:
        size = f"more than {RECORDS * RECORD}" if len(content) > RECORDS * RECORD else len(content)
        raise DataError(f"{path}: {size} bytes are not 1 to {RECORDS} records of {RECORD} bytes; get it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise DataError(f"{path}: record {int((labels > 9).argmax())} has the label {labels.max()}, expected 0..9")
    return records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels


def _names(folder: Path) -> list[str]:
    path = folder / META
    if not path.is_file():
        return list(NAMES)
    names = sources.read(path, 4096).decode("utf-8", "replace").split()
    if len(names) != 10 or len({*names}) != 10:
        raise DataError(f"{path}: names {len({*names})} classes, expected 10; get it again")
    return names
