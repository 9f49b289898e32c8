"""MNIST (LeCun, Cortes, Burges): 70,000 handwritten digits of 28x28 pixels, in its four IDX files, gzipped or plain."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polydiff.core.errors import DataError
from polydiff.data import source as sources
from polydiff.data.table import Table

FILES = {"train": "train-{}", "test": "t10k-{}"}
COUNTS = {"train": 60_000, "test": 10_000}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
SIDE = 28
MD5 = {  # of the unpacked files
    f"train-{IMAGES}": "6bbc9ace898e44ae57da46a324031adb",
    f"train-{LABELS}": "a25bea736e30d166cdddb491f175f624",
    f"t10k-{IMAGES}": "2646ac647ad5339dbf082846283269ea",
    f"t10k-{LABELS}": "27ae3e4e09519cfbb04c329615203637",
}


def recipe(name: str, source: Path) -> Table:
    """Read the four files, in the original order: training images first.

    Fewer images than the public set has are accepted, as long as images and labels agree; files of full length must
    be the published ones, by their MD5 sums.

    Args:
        name: the data set's name.
        source: a folder with the files, or the folder above it.
    Returns:
        ``image`` (N, 28, 28, 1) uint8, 0 = background, and ``label``; ``id`` is the split and the place in its file.
    Raises:
        DataError: a file is missing, damaged, or not what it should be.
    """
    folder = sources.find(name, source, [f"{file}{end}" for file in MD5 for end in (".gz", "")])
    parts, digest = {}, hashlib.sha256()
    for split, pattern in FILES.items():
        count = COUNTS[split]
        images = _idx(folder, pattern.format(IMAGES), (count, SIDE, SIDE), digest)
        labels = _idx(folder, pattern.format(LABELS), (count,), digest)
        if len(images) != len(labels):
            raise DataError(f"{name}: {folder} has {len(images)} {split} images but {len(labels)} labels; get it again")
        if len(labels) and labels.max() > 9:
            raise DataError(f"{folder / pattern.format(LABELS)}: holds the label {labels.max()}, digits are 0..9")
        parts[split] = images, labels
    sizes = [len(labels) for _, labels in parts.values()]
    return Table(
        arrays={"image": np.concatenate([images for images, _ in parts.values()])[:, :, :, None]},
        columns={
            "id": np.array([f"{split}-{i:05d}" for split, n in zip(parts, sizes, strict=True) for i in range(n)]),
            "split": np.repeat(list(parts), sizes),
            "label": np.concatenate([labels for _, labels in parts.values()]).astype(np.int64),
        },
        names={"label": [str(k) for k in range(10)]},
        attributes={
            "units": "grey level 0..255",
            "normalisation": "x / 127.5 - 1",
            "sha256_of_source": digest.hexdigest(),
            "complete": [sum(sizes), sum(COUNTS.values())],
        },
    )


def _idx(folder: Path, file: str, largest: tuple[int, ...], digest: hashlib._Hash) -> np.ndarray:
    path = next((p for p in (folder / f"{file}.gz", folder / file) if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder} has no {file}.gz (nor {file}); all four files are needed, get it again")
    content = sources.read(path, 4 + 4 * len(largest) + math.prod(largest) + 1)
    values = parse(content, path, largest)
    if len(values) == largest[0] and hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[file]:
        raise DataError(f"{path}: unpacked it is not the published file (MD5 {MD5[file]}); get it again")
    digest.update(content)
    return values


def parse(content: bytes, path: Path, largest: tuple[int, ...]) -> np.ndarray:
    """The uint8 array of an IDX file: big-endian magic 0x0800 + number of axes, the axes' lengths, then the bytes.

    Args:
        content: of the unpacked file; may be cut one byte after the largest permitted length.
        path: for messages.
        largest: the permitted shape; the first axis may be shorter.
    Raises:
        DataError: another magic number or shape, or a length that the header does not give.
    """
    start = 4 + 4 * len(largest)
    magic, *shape = [int.from_bytes(content[i : i + 4], "big") for i in range(0, start, 4)]
    if len(content) < start or magic != 0x0800 + len(largest):
        raise DataError(
            f"{path}: not an IDX file of bytes with {len(largest)} axes "
            f"({len(content)} bytes, magic number {magic}, expected {0x0800 + len(largest)}); get it again"
        )
    if tuple(shape[1:]) != largest[1:] or not 0 < shape[0] <= largest[0]:
        raise DataError(f"{path}: its header says {_times(shape)}, expected at most {_times(largest)}; get it again")
    expected, found = math.prod(shape), len(content) - start
    if found != expected:
        what = "fewer" if found < expected else "more"
        raise DataError(f"{path}: its header says {_times(shape)}, {expected} bytes, but it holds {what}; get it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
