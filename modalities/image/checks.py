"""What ``polydiff doctor`` says about a data set of images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from polydiff.core.adapter import Finding
from polydiff.core.errors import DataError
from polydiff.data.h5 import Reader
from polydiff.data.table import BLOCK_BYTES
from polydiff.modalities.image.dataset import Images


def checks(data: str | Path | None = None, run: Any = None) -> list[Finding]:
    """Check a data set: integrity, size, value range, classes, and that training and test items differ.

    Args:
        data: an HDF5 file, or None.
        run: not looked at, a run of images has no check of its own.
    """
    if data is None:
        return []
    try:
        train = Images(data, "train", memory_mb=0)
        reader: Reader = train.reader
        reader.verify()
    except DataError as error:
        return [Finding("fail", str(error))]
    size, n = train.facts["size"], len(reader)
    findings = [
        Finding("ok", f"{n} images of {size['height']}x{size['width']}x{size['channels']}, content equals its digest")
    ]
    low, high, seen = 255, 0, set[bytes]()
    at_once = max(1, int(BLOCK_BYTES // reader.item_bytes))
    for start in range(0, n, at_once):
        images = reader.block(np.arange(start, min(n, start + at_once)))["image"]
        low, high = min(low, int(images.min())), max(high, int(images.max()))
        seen |= {hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images}
    copies = n - len(seen)
    level = "ok" if low < 64 and high > 191 else "warn"
    findings.append(Finding(level, f"values {low}..{high}", "" if level == "ok" else "rescale the images to 0..255"))
    if copies:
        findings.append(Finding("warn", f"{copies} images occur more than once", "remove copies across the splits"))
    for name, classes in reader.names.items():
        counts = np.bincount(reader.columns[name][reader.rows("train")], minlength=len(classes))
        few = f"{classes[counts.argmin()]!r} has {counts.min()} training images, {classes[counts.argmax()]!r} {counts.max()}"
        level = "ok" if 10 * counts.min() >= counts.max() else "warn"
        findings.append(Finding(level, f"{name}: {few}", "" if level == "ok" else "add images of the rare classes"))
    return findings
