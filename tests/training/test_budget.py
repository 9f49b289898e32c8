"""A budget of seconds: it ends the run and its decay, and goes on counting after an interruption."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy  # type: ignore[import-not-found]

from polydiff.core.training.loop import EXIT_INTERRUPTED, fit


class Clock:
    """Stands in for the clock of the trainer: every batch takes a second, and nothing else takes time."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def train(self, folder: Path, stop: int = -1, **changes: Any) -> Any:
        config = toy.config(trainer__accumulate=1, optim__decay="linear", optim__warmup=0, **changes)

        def tick(call: int) -> None:
            self.now += 1.0
            if call == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        return fit(toy.watched(config, tick), config, folder, quiet=True)


def test_a_time_budget_ends_the_run_and_its_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("polydiff.core.training.trainer.time", clock)
    result = clock.train(tmp_path / "run", trainer__steps=10_000, trainer__seconds=20)
    assert (result.step, result.finished, result.exit_code, result.timed_out) == (20, True, 0, True)
    rates = [line["lr"] for line in toy.lines(tmp_path / "run")]
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(20) / 20), rtol=1e-12)
    assert (tmp_path / "run/previews/step-00000020.png").exists()
    again = clock.train(tmp_path / "run", trainer__steps=10_000, trainer__seconds=20)
    assert (again.step, again.started, again.finished) == (20, 20, True)
    longer = clock.train(tmp_path / "run", trainer__steps=10_000, trainer__seconds=25.5)
    assert (longer.started, longer.step) == (20, 26)
    steps = clock.train(tmp_path / "steps", trainer__steps=12, trainer__seconds=20)
    assert (steps.step, steps.finished, steps.timed_out) == (12, True, False)


def test_the_time_before_an_interruption_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("polydiff.core.training.trainer.time", clock)
    first = clock.train(tmp_path / "run", stop=7, trainer__steps=10_000, trainer__seconds=20)
    assert (first.step, first.finished, first.exit_code) == (7, False, EXIT_INTERRUPTED)
    clock.now += 1000.0  # nobody trains meanwhile
    second = clock.train(tmp_path / "run", trainer__steps=10_000, trainer__seconds=20)
    assert (second.started, second.step, second.finished) == (7, 20, True)
    rates = [line["lr"] for line in toy.lines(tmp_path / "run")]
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(20) / 20), rtol=1e-12)
