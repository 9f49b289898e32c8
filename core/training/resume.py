"""Whether a run may start, go on or be put aside: its lock, its configuration, its first weights."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polydiff.core.build import differences
from polydiff.core.errors import CheckpointError, ConfigError
from polydiff.core.training import checkpoint
from polydiff.core.training.state import load_weights

FREE = ("steps", "seconds", "log_every", "workers", "device")  # of trainer: may change when a run goes on


class Lock:
    """Holds a run for this process; a second one is refused. The system gives it back when the process dies.

    Args:
        run: the run folder, created if need be.
    Raises:
        CheckpointError: another process trains there, or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        try:
            run.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"run folder {run} cannot be written: {error.strerror}; choose another one with run=DIR"
            ) from error
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self.descriptor, 64).decode(errors="replace").strip() or "unknown"
            os.close(self.descriptor)
            raise CheckpointError(
                f"{run}: another process ({owner}) is training this run; wait for it, or use run=DIR"
            ) from error
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{run}: cannot be locked ({error.strerror}); make sure that no second process trains it", stacklevel=2
            )
        os.truncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"pid {os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the run back."""
        os.close(self.descriptor)


def move_aside(run: Path) -> Path:
    """Rename a run folder to the first free ``<name>.old-<k>``, so that a new run can start in its place.

    Returns:
        Where the old run is now; ``run`` itself if there was nothing to move.
    Raises:
        CheckpointError: a process is training it, or the folder cannot be renamed.
    """
    if not run.is_dir():
        return run
    lock = Lock(run)
    try:
        k = 1
        while (aside := run.with_name(f"{run.name}.old-{k}")).exists():
            k += 1
        try:
            return run.rename(aside)
        except OSError as error:
            raise CheckpointError(f"{run} cannot be moved to {aside}: {error.strerror}") from error
    finally:
        lock.release()


def check_same(found: checkpoint.Checkpoint, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Let a run go on only as what it was.

    The data file may stand elsewhere now; its content may not have changed.

    Raises:
        ConfigError: the configuration differs in more than ``trainer.{steps,seconds,log_every,workers,device}``, or
            the data do.
    """
    before, now = found.state.get("facts") or {}, dict(facts)
    if before.get("sha256") != now.get("sha256"):
        raise ConfigError(
            f"{found.path.parents[1]} was trained on other data (SHA-256 {before.get('sha256')}, now {now.get('sha256')}): "
            "point data.path at the old file, or choose another folder with run=DIR"
        )
    known = before.get("sha256") is not None
    changed = differences(_bound(found.config, known), _bound(config, known))
    if changed:
        raise ConfigError(
            f"{found.path.parents[1]} was trained with another configuration: {', '.join(changed)}; "
            "use the old values, another folder with run=DIR, or restart=true to begin anew (the old run is kept aside)"
        )


def _bound(config: Mapping[str, Any], data_known: bool) -> dict[str, Any]:
    """The part of a configuration that must not change, as it reads after a round trip through a file."""
    bound: dict[str, Any] = json.loads(json.dumps(config))
    for name in FREE:
        bound.get("trainer", {}).pop(name, None)
    if data_known:
        bound.get("data", {}).pop("path", None)
    return bound


def load_initial(module: nn.Module, source: Path) -> int:
    """Load the averaged weights of another run, or of one of its checkpoints.

    Returns:
        The step they come from.
    Raises:
        CheckpointError: no such run, no valid checkpoint, or a parameter that does not fit; the message names it.
    """
    if (source / "manifest.json").is_file():
        found = checkpoint.load(source)
    else:
        newest = checkpoint.newest(source / "checkpoints")
        if newest is None:
            raise CheckpointError(f"init={source}: no checkpoint there; give a run folder that polydiff train wrote")
        found = newest
    with torch.no_grad():
        load_weights(module, found.ema, f"init={source}")
    return found.step
