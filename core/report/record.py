"""What a run folder says about itself, read with patience: whatever is missing, unfinished or damaged is left out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polydiff.core.adapter import Metric
from polydiff.core.build import read_config
from polydiff.core.errors import CheckpointError


@dataclass(frozen=True)
class Record:
    """A run as its files tell it.

    Args:
        folder: the run.
        config: its resolved configuration, ``text`` the same as it is written.
        environment: versions, device, commit.
        state: of the newest checkpoint: step, facts, wall_s, parameters.
        metrics: a line every few steps; ``heldout``: a line now and then.
        evaluation: measured numbers by name; ``measured`` says of which step, with which solver.
        previews: (step, file), in order; ``samples``: (folder, its samples.json).
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    heldout: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Metric] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    previews: list[tuple[int, Path]] = field(default_factory=list)
    samples: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)

    @property
    def step(self) -> int | None:
        """The newest step that any file knows of."""
        known = [self.state.get("step"), self.metrics[-1].get("step") if self.metrics else None]
        return max((step for step in known if isinstance(step, int)), default=None)

    @property
    def parameters(self) -> int | None:
        """How many numbers the network learns, or None if no checkpoint says."""
        count = self.state.get("parameters")
        return count if isinstance(count, int) else None

    @property
    def date(self) -> datetime:
        """When training last started, in UTC; of a run that does not say, when its configuration was written."""
        try:
            return datetime.fromisoformat(self.environment["date"]).astimezone(UTC)
        except (KeyError, TypeError, ValueError, OverflowError):
            return datetime.fromtimestamp((self.folder / "config.yaml").stat().st_mtime, UTC)

    def get(self, *keys: str, default: Any = None) -> Any:
        """A value of the configuration by its path of keys."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return default if value is None else value


def read(folder: Path) -> Record:
    """Read a run folder.

    Raises:
        CheckpointError: there is no such folder, or it is not a run.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder}: not a run folder (no config.yaml there); give the folder that train wrote")
    try:
        config = read_config(folder / "config.yaml")
    except CheckpointError:
        config = {}  # shown as it is written all the same
    newest, measured = _newest(folder), _dictionary(folder / "evaluation" / "metrics.json")
    return Record(
        folder=folder,
        config=config,
        text=(folder / "config.yaml").read_text(encoding="utf-8", errors="replace"),
        environment=_dictionary(folder / "environment.json"),
        state=_dictionary(newest / "state.json") if newest else {},
        metrics=_lines(folder / "metrics.jsonl"),
        heldout=_lines(folder / "heldout.jsonl"),
        evaluation=_evaluation(measured),
        measured=measured,
        previews=_previews(folder / "previews"),
        samples=_samples(folder / "samples"),
    )


def _newest(folder: Path) -> Path | None:
    steps = [path for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return max(steps, key=lambda path: int(path.name[5:]), default=None)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _dictionary(path: Path) -> dict[str, Any]:
    try:
        content = _json(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file that know their step; a run may be writing the last one right now."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = (_json(line) for line in lines)
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _evaluation(content: dict[str, Any]) -> dict[str, Metric]:
    entries = content.get("metrics")
    metrics = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        numbers = (
            {key: entry[key] for key in Metric._fields if is_number(entry.get(key))} if isinstance(entry, dict) else {}
        )
        if "value" in numbers:
            metrics[str(name)] = Metric(**numbers)
    return metrics


def is_number(value: Any) -> bool:
    """Whether it is a finite number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _previews(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(p.stem[5:]), p) for p in folder.glob("step-*.png") if p.stem[5:].isdigit())


def _samples(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    folders = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    return [(path, _dictionary(path / "samples.json")) for path in folders]


def shown(path: Path) -> str:
    """A folder as a command would name it: relative to the working directory where it lies inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
