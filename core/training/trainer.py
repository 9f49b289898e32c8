"""One call of training: the objects on their device, and the loop, the same for every modality.

The device is never waited for inside a step: losses, norms and skipped steps are summed up where they arise and read when
a line of the log is due.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polydiff.core.adapter import Adapter, Item
from polydiff.core.errors import DivergenceError
from polydiff.core.nn import parameter_count
from polydiff.core.training import checkpoint
from polydiff.core.training.ema import EMA
from polydiff.core.training.logs import Logs, environment
from polydiff.core.training.optimizer import Optimizer, learning_rate
from polydiff.core.training.previews import Previews
from polydiff.core.training.resume import load_initial
from polydiff.core.training.runtime import EXIT_INTERRUPTED, Interrupt, Runtime, channels_last
from polydiff.core.training.state import Meter, TrainState, seed_rng
from polydiff.core.training.stream import Stream, derive, loader
from polydiff.core.tree import move

AGREE_EVERY = 8  # steps between two looks of several processes at each other's signals


@dataclass(frozen=True)
class Parts:
    """What a run trains: objects already built, so that code without configurations can train too.

    Args:
        adapter: of it the loop uses ``collate``; previews use ``shape`` and ``view``.
        process, denoiser, objective: as ``polydiff.core.build.build`` returns them.
        dataset: the training split; ``len``, ``[i] -> Item``, optionally ``__getitems__`` and ``augment``.
        held_out: items that are not trained on, or None.
        facts: what the data set says about itself; stored with every checkpoint.
    """

    adapter: Adapter
    process: Any
    denoiser: nn.Module
    objective: Any
    dataset: Any
    held_out: Any
    facts: dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """How a call of ``train`` ended.

    Args:
        run: the run folder.
        step: steps completed.
        steps: steps wanted.
        started: the step this call started from.
        signal: the signal that interrupted it, or None.
        timed_out: ``trainer.seconds`` are used up.
    """

    run: Path
    step: int
    steps: int
    started: int = 0
    signal: int | None = None
    timed_out: bool = False

    @property
    def finished(self) -> bool:
        """All steps are done, or all the time is spent."""
        return self.timed_out or self.step >= self.steps

    @property
    def exit_code(self) -> int:
        """0 when finished, ``EXIT_INTERRUPTED`` when the same command should be started again."""
        return 0 if self.finished else EXIT_INTERRUPTED


class _Loss(nn.Module):
    """Objective and denoiser as one module, so that several processes and autocast wrap all of the loss."""

    def __init__(self, denoiser: nn.Module, objective: Any) -> None:
        super().__init__()
        self.denoiser, self.objective = denoiser, objective

    def forward(self, item: Item, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss and terms of a batch, each (b,)."""
        return self.objective(self.denoiser, item, generator)


class Trainer:
    """One call of ``fit``: the objects on their device, and the loop."""

    def __init__(
        self,
        parts: Parts,
        config: Mapping[str, Any],
        run: Path,
        runtime: Runtime,
        interrupt: Interrupt,
        descriptors: tuple[int, ...] = (),
    ) -> None:
        self.parts, self.config, self.run, self.runtime, self.interrupt = parts, config, run, runtime, interrupt
        self.optim, self.options, self.descriptors = config["optim"], config["trainer"], descriptors
        self.seed = self.options["seed"]
        chunks = runtime.world * self.options["accumulate"]
        self.stream = Stream(len(parts.dataset), self.options["batch"], self.seed, chunks)
        first = runtime.rank * self.options["accumulate"]
        self.chunks = range(first, first + self.options["accumulate"])
        parts.denoiser.to(runtime.device).train()
        if self.options["channels_last"] and runtime.device.type == "cuda":  # slows group norms several times on CPUs
            channels_last(parts.denoiser)
        self.names = tuple(getattr(parts.objective, "terms", None) or ())
        self.logs: Logs | None = None
        self.wall = 0.0
        self.spent = 0.0  # share of the time budget, the same on every process
        self.started = 0

    def restore(self, found: checkpoint.Checkpoint | None, init: Path | None) -> None:
        """Make the state: from a checkpoint, from another run's averaged weights, or from what was built."""
        denoiser, optim = self.parts.denoiser, self.optim
        come_from = load_initial(denoiser, init) if init is not None and found is None else None
        ema = EMA(denoiser, optim["ema_halflife"], optim["ema_warmup"])
        optimizer = Optimizer(
            denoiser,
            lr=optim["lr"],
            betas=tuple(optim["betas"]),
            eps=optim["eps"],
            weight_decay=optim["weight_decay"],
            clip=self.options["clip"],
        )
        self.state = TrainState(
            denoiser, ema, optimizer, Meter(("loss", "grad_norm", *self.names), self.runtime.device)
        )
        if self.options["compile"]:
            # Batches of training have one shape; the copy that is averaged, which samples, is not compiled.
            getattr(denoiser, "network", denoiser).compile(dynamic=False)
        self.module = self.runtime.prepare(_Loss(denoiser, self.parts.objective))
        if found is None:
            seed_rng(self.seed, self.runtime)
        else:
            self.state.load(found, self.runtime, self.seed)
            self.wall, self.started = float(found.state.get("wall_s", 0.0)), found.step
        self.beginning = f"goes on from step {found.step}" if found else "starts"
        if come_from is not None:
            self.beginning += f" from {init} (step {come_from})"

    def train(self, quiet: bool | None) -> TrainResult:
        """Train up to the last step, a signal, or divergence."""
        state, options, steps = self.state, self.options, self.options["steps"]
        if self.runtime.main:
            checkpoint.replace_text(self.run / "config.yaml", checkpoint.config_text(self.config))
            checkpoint.replace_text(
                self.run / "environment.json", json.dumps(environment(self.runtime), indent=1) + "\n"
            )
            tensorboard = self.config["logger"]["tensorboard"]
            left = (options.get("seconds") or math.inf) - self.wall
            self.logs = Logs(self.run, state.step, steps, tensorboard=tensorboard, quiet=quiet, seconds=left)
            self.logs.progress.say(self._summary())
            self.previews = Previews(self.parts, self.config, self.run, state.ema.module, self.runtime.device)
        batches = self._batches()
        self.began = self.lap = time.monotonic()
        signal = self._interrupted(agree=True)
        self.lap_step = state.step
        if self.started and self.logs is not None and self.started not in self.logs.heldout.steps:
            self._look(self.started)  # a signal came when one was due
        while not self._done() and signal is None:
            lr = self._step(batches)
            state.step += 1
            step = state.step
            signal = self._interrupted(agree=step % AGREE_EVERY == 0 or step == steps)
            last = self._done()
            if self.logs is not None:
                self.logs.progress.advance()
            if step % options["log_every"] == 0 or last:
                self._log(lr)
            elif step % options["max_skipped"] == 0:
                self._check_divergence(lr)
            if signal is None or last:
                self._look(step)
            if last or signal is not None or step % options["save_every"] == 0:
                self._save()
        self._farewell(signal)
        self.runtime.finish()
        signal = None if self._done() else signal
        return TrainResult(self.run, state.step, steps, self.started, signal, self.spent >= 1)

    def _done(self) -> bool:
        return self.state.step >= self.options["steps"] or self.spent >= 1

    def _wall(self) -> float:
        """Seconds of training so far, those before the last resume included."""
        return self.wall + time.monotonic() - self.began

    def _step(self, batches: Iterator[Any]) -> float:
        """One optimizer step over all micro-batches; returns its learning rate."""
        state, chunks, device = self.state, self.chunks, self.runtime.device
        lr = learning_rate(
            state.step,
            self.options["steps"],
            lr=self.optim["lr"],
            warmup=self.optim["warmup"],
            decay=self.optim["decay"],
            spent=self.spent,
        )
        values = torch.zeros(1 + len(self.names), device=device)
        for chunk in chunks:
            item = Item(*(move(part, device, non_blocking=True) for part in next(batches)))
            generator = self.generator.manual_seed(derive(self.seed, "noise", state.step, chunk))
            with nullcontext() if chunk == chunks[-1] else self.runtime.no_sync(self.module):
                out = self.module(item, generator)
                loss = out["loss"].mean() / len(chunks)
                loss.backward()
            terms = [out[name].detach().mean() / len(chunks) for name in self.names]
            values += torch.stack([loss.detach(), *terms])
        values = self.runtime.mean(values)
        norm, skipped = state.optimizer.step(lr, values[0])
        state.ema.update(self.options["batch"], skipped)
        state.meter.add(torch.cat([values[:1], norm[None], values[1:]]), skipped)
        return lr

    def _batches(self) -> Iterator[Any]:
        self.generator = torch.Generator(self.runtime.device)
        return iter(
            loader(
                self.parts.dataset,
                self.stream,
                self.state.step,
                self.options["steps"],
                chunks=self.chunks,
                collate=self.parts.adapter.collate,
                workers=self.options["workers"],
                pin=self.runtime.device.type == "cuda",
                close=self.descriptors,
            )
        )

    def _interrupted(self, *, agree: bool) -> int | None:
        """The signal to stop for; several processes agree on it and on the time spent, at the same step."""
        spent = self._wall() / (self.options.get("seconds") or math.inf)
        if self.runtime.world == 1:
            self.spent = spent
            return self.interrupt.signal
        if not agree:
            return None
        own = torch.tensor([float(self.interrupt.signal or 0), spent], device=self.runtime.device)
        number, self.spent = torch.stack(self.runtime.gather(own)).amax(0).tolist()
        return int(number) or None

    def _log(self, lr: float) -> None:
        state = self.state
        self._check_divergence(lr)
        means, now = state.meter.read(), time.monotonic()  # the device has caught up when the means are there
        rate = (state.step - self.lap_step) * self.options["batch"] / max(1e-9, now - self.lap)
        line = {"step": state.step, "loss": means.pop("loss"), "lr": lr, "grad_norm": means.pop("grad_norm")}
        line |= {"items_per_s": round(rate, 3), "wall_s": round(self._wall(), 3), **means}
        if self.logs is not None:
            self.logs.step(line)
        self.lap, self.lap_step = time.monotonic(), state.step

    def _check_divergence(self, lr: float) -> None:
        worst = self.state.meter.most_in_a_row()
        if worst >= self.options["max_skipped"]:
            raise DivergenceError(
                f"{worst} steps in a row up to about step {self.state.step} had a non-finite loss or gradient "
                f"(lr {lr:.3g}, precision {self.options['precision']}): try a smaller optim.lr, a longer optim.warmup, "
                "trainer.clip=1 or trainer.precision=fp32 in a new run (init=RUN starts from this one's weights), "
                "and look for non-finite values in the data"
            )

    def _look(self, step: int) -> None:
        picture = step % self.options["preview_every"] == 0 or self._done()
        if self.logs is None or not (picture or step % self.options["save_every"] == 0):
            return
        began = time.monotonic()
        line = self.previews.held_out(step)
        if line is not None:
            self.logs.held_out(line)
        if picture:
            self.previews.write(step)
        self.lap += time.monotonic() - began  # items_per_s speaks of training alone

    def _save(self) -> None:
        began, state = time.monotonic(), self.state
        tensors = state.tensors(self.runtime)
        if self.logs is not None:
            self.logs.sync()
            record = {
                "facts": self.parts.facts,
                "adapter": self.config["adapter"],
                "wall_s": self._wall(),
                "epoch": state.step * self.stream.batch // self.stream.n,
                "items": state.step * self.stream.batch,
                "parameters": parameter_count(self.parts.denoiser),
                "processes": self.runtime.world,
                "device": self.runtime.device.type,
            }
            folder = self.run / "checkpoints"
            checkpoint.save(folder, state.step, tensors, record, dict(self.config), self.options["keep_last"])
        self.lap += time.monotonic() - began

    def _summary(self) -> str:
        parameters = parameter_count(self.parts.denoiser)
        where = self.runtime.device.type + (f" x {self.runtime.world}" if self.runtime.world > 1 else "")
        return (
            f"{self.run} {self.beginning}: {parameters:,} parameters, {len(self.parts.dataset):,} items, "
            f"batch {self.options['batch']}, {self.options['steps']} steps, {where}, {self.options['precision']}"
        )

    def _farewell(self, signal: int | None) -> None:
        if self.logs is not None and signal is not None and not self._done():
            self.logs.progress.say(
                f"interrupted by signal {signal} after step {self.state.step}, saved; the same command goes on from here"
            )

    def close(self) -> None:
        """Close the logs."""
        if self.logs is not None:
            self.logs.close()
