"""What a run writes down while it trains: JSON lines, TensorBoard events, one progress bar, and its environment."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from polydiff import __version__
from polydiff.core.errors import CheckpointError
from polydiff.core.progress import SECONDS_PER_LINE
from polydiff.core.training.checkpoint import replace_text
from polydiff.core.training.runtime import Runtime

PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "hydra-core", "h5py")


class JsonLines:
    """A file of one JSON object a line, each with its ``step``; every step stands in it once.

    Args:
        path: the file.
        step: steps completed; lines beyond it, doubled ones and a torn last one are dropped first, atomically.
    Raises:
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept: dict[int, str] = {}
        raw = path.read_bytes() if path.is_file() else b""
        for line in raw.decode("utf-8", errors="replace").splitlines():
            try:
                number = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(number, int) and number <= step:
                kept.setdefault(number, line)
        text = "".join(f"{kept[number]}\n" for number in sorted(kept))
        if text.encode() != raw:
            replace_text(path, text)
        self.steps = set(kept)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line that has a ``step``; it survives the death of this process at once, and that of the machine after ``sync``."""
        try:
            self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._file.flush()
            self.steps.add(line["step"])
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Progress:
    """One bar with loss, items/s and the time left; where the output is no terminal a plain line now and then.

    Args:
        start: steps done before.
        steps: steps in all.
        quiet: True for nothing at all; None decides by the terminal; False forces the bar.
        seconds: after which it ends at the latest.
    """

    def __init__(self, start: int, steps: int, quiet: bool | None = None, seconds: float = math.inf) -> None:
        self.steps, self.quiet, self._bar = steps, bool(quiet), None
        self._shown = self._begin = time.monotonic()
        self._start, self._end = start, self._begin + seconds
        if quiet is False or (quiet is None and sys.stderr.isatty()):
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self.quiet:
            (self._bar.write if self._bar is not None else print)(text, file=sys.stderr)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, loss: float | None, items_per_s: float) -> None:
        """Show the newest numbers."""
        number = "-" if loss is None else f"{loss:.4g}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {number}, {items_per_s:,.0f} items/s", refresh=False)
        now = time.monotonic()
        if self._bar is None and (now - self._shown >= SECONDS_PER_LINE or step == self.steps):
            left = (self.steps - step) * (now - self._begin) / max(1, step - self._start)
            left = max(0.0, min(left, self._end - now))
            clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            self.say(f"step {step}/{self.steps}  loss {number}  {items_per_s:,.0f} items/s  {clock} left")
            self._shown = now

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class Logs:
    """All logs of a run; made by the main process only.

    Args:
        run: the run folder.
        start: steps done before.
        steps: steps in all.
        tensorboard: also write TensorBoard events.
        quiet, seconds: see ``Progress``.
    """

    def __init__(
        self,
        run: Path,
        start: int,
        steps: int,
        *,
        tensorboard: bool,
        quiet: bool | None,
        seconds: float = math.inf,
    ) -> None:
        self.metrics = JsonLines(run / "metrics.jsonl", start)
        self.heldout = JsonLines(run / "heldout.jsonl", start)
        self.progress = Progress(start, steps, quiet, seconds)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def step(self, line: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        self.metrics.write(line)
        self._events({f"train/{name}": value for name, value in line.items() if name != "step"}, line["step"])
        self.progress.show(line["step"], line["loss"], line["items_per_s"])

    def held_out(self, line: Mapping[str, Any]) -> None:
        """One line of ``heldout.jsonl``."""
        self.heldout.write(line)
        names = (
            [f"log-SNR {level:+.1f}" for level in line["log_snr"]]
            if line["log_snr"]
            else [f"t {t:.3f}" for t in line["t"]]
        )
        self._events({f"held-out/{n}": v for n, v in zip(names, line["loss"], strict=True)}, line["step"])

    def sync(self) -> None:
        """Make sure that what a checkpoint takes for written is on the disk."""
        self.metrics.sync()
        self.heldout.sync()

    def close(self) -> None:
        """Close everything."""
        self.progress.close()
        self.metrics.close()
        self.heldout.close()
        if self._writer is not None:
            self._writer.close()

    def _events(self, values: Mapping[str, Any], step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:  # a picture of the numbers; the numbers themselves are in metrics.jsonl
            warnings.warn(f"TensorBoard events cannot be written any more: {error}", RuntimeWarning, stacklevel=2)
            self._writer = None


def environment(runtime: Runtime) -> dict[str, Any]:
    """Date, versions, device, threads and commit, as ``environment.json`` stores them."""
    cuda = runtime.device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "polydiff": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(runtime.device) if cuda else runtime.device.type,
        "cuda": torch.version.cuda if cuda else None,
        "processes": runtime.world,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str | None:
    """Git commit of the checkout that polydiff is imported from, with ``+`` for local changes; None for a wheel."""
    root, git = Path(__file__).resolve().parents[2], shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    answers = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            command = [git, "-C", str(root), *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
