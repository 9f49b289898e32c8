"""Looks at the averaged model while it trains: held-out loss per noise level, and samples from a fixed seed.

Neither touches the random states of training, and neither can stop it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polydiff.core.adapter import Item
from polydiff.core.request import SHOWN, enough, lend, lent
from polydiff.core.training.state import preserved_rng
from polydiff.core.training.stream import derive
from polydiff.core.tree import move

LEVELS = 8
HELD_OUT = 256  # items
MANY = 1000  # samples of a preview of tiny states
NUMBERS = 1 << 18  # in all samples of a preview together


def noise_levels(process: Any, n: int = LEVELS) -> tuple[list[float], list[float] | None]:
    """Times across the range of a process: midpoints of n equal parts in log-SNR, or in t where it has no schedule.

    Returns:
        The times, and their log-SNR or None.
    """
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    schedule = getattr(process, "schedule", None)
    if schedule is None or not hasattr(schedule, "t_of_log_snr"):
        return (process.t_min + middles * (process.t_max - process.t_min)).tolist(), None
    high, low = schedule.log_snr(torch.tensor([process.t_min, process.t_max], dtype=torch.float64)).tolist()
    levels = high + middles * (low - high)
    return schedule.t_of_log_snr(levels).tolist(), levels.tolist()


class Previews:
    """Held-out loss and preview samples of one run.

    Args:
        parts: adapter, process, denoiser, objective, facts and the held-out split (or None).
        config: the resolved configuration.
        run: the run folder.
        module: the averaged denoiser, on ``device``.
        device: where it is.
    """

    def __init__(
        self, parts: Any, config: Mapping[str, Any], run: Path, module: nn.Module, device: torch.device
    ) -> None:
        self.parts, self.config, self.run, self.module, self.device = parts, config, run, module, device
        self.seed = config["trainer"]["seed"]
        split = parts.held_out
        self._items: list[Item] = [] if split is None else [split[i] for i in range(min(HELD_OUT, len(split)))]
        self._times, self._levels = noise_levels(parts.process)

    def held_out(self, step: int) -> dict[str, Any] | None:
        """The line of ``heldout.jsonl``: mean squared error of x0_hat over the same items, noise and levels every time.

        Conditions are present. None without a held-out split, or with a warning when it fails.
        """
        if not self._items:
            return None
        with preserved_rng(self.device), torch.no_grad():
            try:
                loss = [self._loss(level, t) for level, t in enumerate(self._times)]
            except Exception as error:  # noqa: BLE001  (whatever an adapter's code may raise)
                warnings.warn(f"no held-out loss at step {step}: {error}", RuntimeWarning, stacklevel=2)
                return None
        return {"step": step, "loss": loss, "t": self._times, "log_snr": self._levels, "n": len(self._items)}

    def _loss(self, level: int, t: float) -> float:
        generator = torch.Generator(self.device).manual_seed(derive(self.seed, "held-out", level))
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(self._items), 64):
            batch = self.parts.adapter.collate(self._items[start : start + 64])
            item = Item(*(move(part, self.device) for part in (batch.x, batch.mask, batch.cond)))
            error = self.parts.objective.at(self.module, item, torch.tensor(t, dtype=torch.float64), generator)
            total += error.double().sum().cpu()
        return float(total) / len(self._items)

    def write(self, step: int) -> Path | None:
        """Sample and write ``previews/step-XXXXXXXX.png``; None, with a warning, when that fails."""
        with preserved_rng(self.device):
            try:
                samples = self.samples(step)
                fragment = self.parts.adapter.view(samples, self._items[: len(samples)])
                if fragment.png is None:
                    return None
                path = self.run / "previews" / f"step-{step:08d}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(fragment.png)
                return path
            except Exception as error:  # noqa: BLE001  (whatever an adapter's code may raise)
                warnings.warn(
                    f"no preview at step {step}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2
                )
                return None

    def samples(self, step: int) -> list[Item]:
        """Samples from the seed of the run, with its own sampling settings; classes take turns."""
        from polydiff.core.build import Built
        from polydiff.core.run import Run

        parts = self.parts
        built = Built(parts.adapter, parts.process, self.module, parts.objective)  # type: ignore[arg-type]
        run = Run(self.run, dict(self.config), parts.facts, built, step)
        run.device = self.device
        like, _ = parts.adapter.shape(parts.facts.get("size") or {}, {})
        n = enough(like, MANY, NUMBERS)
        return run.sample(n, cond=self._conditions(), seed=derive(self.seed, "preview"), batch=n)

    def _conditions(self) -> dict[str, Any]:
        declared: Any = self.module.conditions
        if self._items and lent(declared, self._items[0]):
            return lend(declared, self._items[:SHOWN])
        kinds = {name: condition.kind for name, condition in declared.items()}
        return {name: range(len(self.parts.facts["classes"][name])) for name in kinds if kinds[name] == "class"}
