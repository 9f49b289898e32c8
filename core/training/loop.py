"""Train a model: from a configuration, or from objects already built; start, go on, or find it finished."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from polydiff.core.adapter import Adapter
from polydiff.core.errors import ConfigError, DataError
from polydiff.core.training import checkpoint
from polydiff.core.training.optimizer import learning_rate
from polydiff.core.training.resume import Lock, check_same, move_aside
from polydiff.core.training.runtime import EXIT_INTERRUPTED, Interrupt, Runtime
from polydiff.core.training.trainer import Parts, Trainer, TrainResult

__all__ = ["EXIT_INTERRUPTED", "Parts", "TrainResult", "fit", "move_aside", "train"]

POSITIVE = ("steps", "batch", "accumulate", "log_every", "save_every", "preview_every", "keep_last", "max_skipped")


def train(config: Mapping[str, Any], run: Path, *, init: Path | None = None, quiet: bool | None = None) -> TrainResult:
    """Train the model that a configuration describes, or go on with it.

    Args:
        config: a resolved configuration; without ``data.path`` the prepared data set of that name is found.
        run: the run folder.
        init: start from the averaged weights of this other run.
        quiet: True for no output, False for a progress bar in any case, None to let the terminal decide.
    Returns:
        How it ended.
    Raises:
        ConfigError: a value that cannot be used, or a run folder that holds a run of another configuration.
        CheckpointError: a folder that cannot be read or written, or that another process uses.
        DataError: the data file is missing or damaged.
        DivergenceError: too many steps in a row had a non-finite loss or gradient.
    """
    from polydiff.core import adapter as adapters
    from polydiff.core.build import build, data_path

    check_numbers(config)
    adapter = adapters.load(config["adapter"])
    data = {**config["data"], "path": data_path(config["data"])}
    dataset = adapter.dataset(data["path"], "train", **data["options"])
    built = build(config, dataset.facts, local=True, seed=config["trainer"]["seed"])
    parts = Parts(
        built.adapter, built.process, built.denoiser, built.objective, dataset, _held_out(adapter, data), dataset.facts
    )
    return fit(parts, config, run, init=init, quiet=quiet)


def fit(
    parts: Parts, config: Mapping[str, Any], run: Path, *, init: Path | None = None, quiet: bool | None = None
) -> TrainResult:
    """As ``train``, with objects already built. Of the configuration it reads ``optim``, ``trainer``, ``logger``."""
    check_numbers(config)
    run, options = Path(run), config["trainer"]
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        runtime = Runtime(options["device"], options["precision"])
        lock = Lock(run) if runtime.main else None
        if lock is not None:
            stack.callback(lock.release)
            checkpoint.clean(run / "checkpoints")
        runtime.barrier()
        with warnings.catch_warnings(action="default" if runtime.main else "ignore"):
            found = checkpoint.newest(run / "checkpoints")
        if found is not None:
            check_same(found, config, parts.facts)
            wall, seconds = float(found.state.get("wall_s", 0.0)), options.get("seconds") or math.inf
            if found.step >= options["steps"] or wall >= seconds:
                more = "; trainer.steps=N" if found.step >= options["steps"] else f" in {wall:.0f} s; trainer.seconds=N"
                if runtime.main and not quiet:
                    print(f"{run} is finished: {found.step} steps are done{more} goes on, restart=true begins anew")
                return TrainResult(run, found.step, options["steps"], found.step, timed_out=wall >= seconds)
        trainer = Trainer(parts, config, run, runtime, interrupt, () if lock is None else (lock.descriptor,))
        trainer.restore(found, init)
        try:
            return trainer.train(quiet)
        finally:
            trainer.close()


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse numbers with which nothing can be trained.

    Raises:
        ConfigError: naming the first key and the values it may have.
    """
    options = config["trainer"]
    for name in POSITIVE:
        if not isinstance(options[name], int) or isinstance(options[name], bool) or options[name] < 1:
            raise ConfigError(f"trainer.{name}={options[name]} must be a whole number of at least 1")
    for name in ("workers", "seed"):
        if not isinstance(options[name], int) or options[name] < 0:
            raise ConfigError(f"trainer.{name}={options[name]} must be a whole number of at least 0")
    if options["seed"] >= 2**63:  # torch seeds its generators with 64 bits
        raise ConfigError(f"trainer.seed={options['seed']} must be below 2^63")
    seconds = options.get("seconds")
    if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise ConfigError(f"trainer.seconds={seconds} must be a positive number of seconds, or null for no limit")
    optim = config["optim"]
    for name in ("lr", "ema_halflife"):
        if not 0 < optim[name] < math.inf:
            raise ConfigError(f"optim.{name}={optim[name]} must be positive and finite")
    least = {f"optim.{name}": optim[name] for name in ("warmup", "eps", "weight_decay", "ema_warmup")}
    for key, value in {**least, "trainer.clip": options["clip"]}.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"{key}={value} must be at least 0")
    if len(optim["betas"]) != 2 or not all(0 <= beta < 1 for beta in optim["betas"]):
        raise ConfigError(f"optim.betas={list(optim['betas'])} must be two numbers of at least 0 and below 1")
    learning_rate(0, options["steps"], lr=1.0, decay=optim["decay"])


def _held_out(adapter: Adapter, data: Mapping[str, Any]) -> Any:
    """The validation split, else the test split, else None."""
    for split in ("valid", "test"):
        try:
            found = adapter.dataset(data["path"], split, **data["options"])
        except DataError:
            continue
        if len(found):
            return found
    return None
