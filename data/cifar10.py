"""CIFAR-10 (Krizhevsky 2009): 60,000 photographs of 32x32 pixels in 10 classes, in its binary version.

A file is a row of records of 3,073 bytes: the label 0..9, then 1,024 bytes each of red, green and blue, row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from polydiff.core.errors import DataError
from polydiff.data import source as sources
from polydiff.data.table import Table

BATCHES = {**{f"data_batch_{k}.bin": "train" for k in range(1, 6)}, "test_batch.bin": "test"}
RECORDS, SIDE = 10_000, 32
RECORD = 1 + 3 * SIDE**2
META = "batches.meta.txt"
ARCHIVE = "cifar-10-binary.tar.gz"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def recipe(name: str, source: Path) -> Table:
    """Read the batches there are, in the original order: training images first.

    Missing batches and batches with fewer records than 10,000 are accepted, as long as some are for training.

    Args:
        name: the data set's name.
        source: the folder ``cifar-10-batches-bin``, the archive ``cifar-10-binary.tar.gz`` (read without unpacking it to
            the disk), or the folder that holds either.
    Returns:
        ``image`` (N, 32, 32, 3) uint8 RGB, and ``label``; ``id`` is the batch and the place in it.
    Raises:
        DataError: a file is damaged or not what it should be, or there is no training batch.
    """
    place, files = _files(name, source)
    found = {file: place / file for file in BATCHES if file in files}
    if "train" not in {BATCHES[file] for file in found}:
        raise DataError(f"{name}: {place} has no training batch (data_batch_1.bin ... data_batch_5.bin); get it again")
    images, labels, ids, splits, digest = [], [], [], [], hashlib.sha256()
    for file, path in found.items():
        content = files[file]()
        batch, label = parse(content, path)
        digest.update(content)
        images.append(batch)
        labels.append(label)
        ids += [f"{path.stem}-{i:04d}" for i in range(len(label))]
        splits += [BATCHES[file]] * len(label)
    return Table(
        arrays={"image": np.concatenate(images)},
        columns={"id": np.array(ids), "split": np.array(splits), "label": np.concatenate(labels)},
        names={"label": _names(place / META, files.get(META))},
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


def _files(name: str, source: Path) -> tuple[Path, dict[str, Callable[[], bytes]]]:
    """Where the files are, and what reads each: from a folder one by one, from an archive all at once."""
    limits = {META: 4096, **dict.fromkeys(BATCHES, RECORDS * RECORD + 1)}
    place = source if source.is_file() else sources.find(name, source, [*BATCHES, ARCHIVE])
    inside = [file for file in limits if (place / file).is_file()]
    if inside:
        return place, {file: partial(sources.read, place / file, limits[file]) for file in inside}
    place = place if source.is_file() else place / ARCHIVE
    return place, {file: partial(bytes, content) for file, content in sources.members(place, limits).items()}


def _names(path: Path, read: Callable[[], bytes] | None) -> list[str]:
    if read is None:
        return list(NAMES)
    names = read().decode("utf-8", "replace").split()
    if len(names) != 10 or len({*names}) != 10:
        raise DataError(f"{path}: names {len({*names})} classes, expected 10; get it again")
    return names
