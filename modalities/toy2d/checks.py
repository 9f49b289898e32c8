"""What ``polydiff doctor`` says about a set of points."""

from pathlib import Path
from typing import Any

from polydiff.core.adapter import Finding
from polydiff.core.errors import DataError
from polydiff.modalities.toy2d.dataset import Points


def checks(data: str | Path | None = None, run: Any = None) -> list[Finding]:
    """Integrity and scale of a data set."""
    if data is None:
        return []
    try:
        points = Points(data)
        points.reader.verify()
    except DataError as error:
        return [Finding("fail", str(error))]
    sigma = points.facts["sigma_data"]
    level = "ok" if 0.5 < sigma < 2 else "warn"
    text = f"{len(points.reader)} points, content equals its digest, standard deviation {sigma:.3f}"
    return [Finding(level, text, "" if level == "ok" else "divide the points by their standard deviation")]
