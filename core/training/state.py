"""Everything that changes while training, and its way into a checkpoint and back, bit for bit."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from polydiff.core.errors import CheckpointError
from polydiff.core.training.checkpoint import Checkpoint
from polydiff.core.training.ema import EMA
from polydiff.core.training.optimizer import Optimizer
from polydiff.core.training.runtime import Runtime
from polydiff.core.training.stream import derive


class Meter:
    """Means over the steps since the last line of the log, and counts of skipped steps, all on the device.

    Args:
        names: what is averaged, e.g. ``("loss", "grad_norm")``.
        device: of the values.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names), dtype=dtype, device=device)
        self.counts = torch.zeros(
            4, dtype=dtype, device=device
        )  # good steps since the last line, skipped, in a row, most

    def add(self, values: Tensor, skipped: Tensor) -> None:
        """Count one step; the values of a skipped one are left out.

        Args:
            values: one per name.
            skipped: () 0 or 1.
        """
        self.sums += torch.where(skipped.bool(), 0.0, values.to(self.sums.dtype))
        bad = skipped.to(self.counts.dtype)
        in_a_row = (self.counts[2] + 1) * bad
        self.counts = torch.stack(
            (self.counts[0] + 1 - bad, self.counts[1] + bad, in_a_row, torch.maximum(self.counts[3], in_a_row))
        )

    def read(self) -> dict[str, float | None]:
        """Means by name (None without a single good step) and ``skipped``; starts a new interval. Waits for the device."""
        good, skipped, *_ = self.counts.tolist()
        means = {
            name: total / good if good else None for name, total in zip(self.names, self.sums.tolist(), strict=True)
        }
        self.sums.zero_()
        self.counts[0] = 0
        return {**means, "skipped": int(skipped)}

    def most_in_a_row(self) -> int:
        """Longest row of skipped steps so far. Waits for the device."""
        return int(self.counts[3])


class TrainState:
    """Weights, average, optimizer, random states and sums of the log after ``step`` steps."""

    def __init__(self, module: nn.Module, ema: EMA, optimizer: Optimizer, meter: Meter) -> None:
        self.module, self.ema, self.optimizer, self.meter = module, ema, optimizer, meter
        self.step = 0

    def tensors(self, runtime: Runtime) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint stores; every process must call it, because each has its own random state."""
        train = {**self.optimizer.tensors(), "ema/items": self.ema.items}
        train |= {"log/sums": self.meter.sums, "log/counts": self.meter.counts}
        for name, value in rng_state(runtime.device).items():
            for rank, state in enumerate(runtime.gather(value)):
                train[f"rng/{rank}/{name}"] = state
        return {"model": self.module.state_dict(), "ema": self.ema.state_dict(), "train": train}

    def load(self, found: Checkpoint, runtime: Runtime, seed: int) -> None:
        """Continue from a checkpoint.

        A process that did not exist when it was written, or a kind of device that was not used, starts its random state
        from (seed, step, rank); one that should be there and is not is an error.

        Raises:
            CheckpointError: a tensor is missing, left over or has another shape; the message names it.
        """
        load_weights(self.module, found.model, f"{found.path}/model.safetensors")
        load_weights(self.ema.module, found.ema, f"{found.path}/ema.safetensors")
        self.optimizer.load(found.train)
        for name, target in (
            ("ema/items", self.ema.items),
            ("log/sums", self.meter.sums),
            ("log/counts", self.meter.counts),
        ):
            if name not in found.train or found.train[name].shape != target.shape:
                raise CheckpointError(f"{found.path}: train.safetensors has no {name!r} of shape {tuple(target.shape)}")
            target.copy_(found.train[name])
        self.step = found.step
        seed_rng(seed, runtime, found.step)
        given = {}
        for name in rng_state(runtime.device):
            key = f"rng/{runtime.rank}/{name}"
            expected = runtime.rank < found.state.get("processes", 1) and name in (*RNG, found.state.get("device"))
            if key in found.train:
                given[name] = found.train[key]
            elif expected:
                raise CheckpointError(
                    f"{found.path}: train.safetensors has no random state {key!r}, so the run cannot go on"
                )
        set_rng_state(given, runtime.device)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights by name.

    Raises:
        CheckpointError: one is missing, unknown or has another shape; the message names the first.
    """
    own = module.state_dict()
    for name, value in own.items():
        if name not in tensors:
            raise CheckpointError(f"{source}: parameter {name!r} of the network is missing")
        if tensors[name].shape != value.shape:
            raise CheckpointError(
                f"{source}: parameter {name!r} has shape {tuple(tensors[name].shape)}, but this network needs "
                f"{tuple(value.shape)}; build it with the options of the other run"
            )
    extra = [name for name in tensors if name not in own]
    if extra:
        raise CheckpointError(f"{source}: parameter {extra[0]!r} does not exist in this network")
    module.load_state_dict(dict(tensors))


RNG = ("cpu", "numpy", "python")  # stored for every process; "cuda" beside them where it is used


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The global random states of this process as tensors."""
    kept = np.random.get_state(legacy=False)
    keys, position = kept["state"]["key"], kept["state"]["pos"]
    _, words, next_gauss = random.getstate()
    state = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, kept["has_gauss"], _bits(kept["gauss"])]),
        "python": torch.tensor([*words, next_gauss is not None, _bits(next_gauss or 0.0)]),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore those of the states that are given."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"].cpu())
    if "numpy" in state:
        *keys, position, has_gauss, gauss = state["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, _float(gauss)))
    if "python" in state:
        *words, there, gauss = state["python"].tolist()
        random.setstate((3, tuple(words), _float(gauss) if there else None))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def seed_rng(seed: int, runtime: Runtime, step: int = 0) -> None:
    """Seed the global random states, which only dropout and code outside of polydiff read, from (seed, step, rank)."""
    number = derive(seed, "dropout", step, runtime.rank)
    torch.manual_seed(number)  # all devices
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Put the global random states back afterwards, so that looking at a model does not change its training."""
    before = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(before, device)


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
