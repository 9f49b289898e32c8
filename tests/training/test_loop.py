"""The loop as a whole, on the toy: exact resume, skipping, signals, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy  # type: ignore[import-not-found]
from torch import Tensor
from toy import Watched, watched

from polydiff.core.errors import CheckpointError, ConfigError, DivergenceError
from polydiff.core.objectives import Objective
from polydiff.core.training import checkpoint
from polydiff.core.training.loop import EXIT_INTERRUPTED, fit, move_aside
from polydiff.core.training.previews import noise_levels
from polydiff.core.training.resume import Lock
from polydiff.core.training.state import preserved_rng, rng_state, set_rng_state

CPU = torch.device("cpu")


def tensors(folder: Path, step: int) -> dict[str, bytes]:
    names = ("model", "ema", "train")
    return {name: (folder / f"checkpoints/step-{step:08d}/{name}.safetensors").read_bytes() for name in names}


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in ("step", "loss", "lr", "grad_norm", "skipped")) for line in toy.lines(folder)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    result = toy.run(folder, trainer__log_every=4)
    assert (result.step, result.finished, result.exit_code, result.signal) == (40, True, 0, None)
    return folder


def test_what_a_run_writes(reference: Path) -> None:
    lines = toy.lines(reference)
    assert [line["step"] for line in lines] == list(range(4, 41, 4))
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "items_per_s", "wall_s", "skipped"}
    assert [path.name for _, path in checkpoint.steps(reference / "checkpoints")] == [
        f"step-{s:08d}" for s in (20, 30, 40)
    ]
    assert (reference / "LATEST").read_text() == "checkpoints/step-00000040\n"
    environment = json.loads((reference / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert abs((datetime.now(UTC) - datetime.fromisoformat(environment["date"])).total_seconds()) < 3600
    held = toy.lines(reference, "heldout.jsonl")
    assert [line["step"] for line in held] == [10, 20, 30, 40]
    assert len(held[0]["loss"]) == len(held[0]["t"]) == 8 and held[0]["n"] == 9
    assert (reference / "previews/step-00000040.png").read_bytes() == toy.PNG
    state = checkpoint.load(reference / "checkpoints/step-00000040").state
    assert (state["epoch"], state["items"], state["facts"]["sigma_data"]) == (40 * 8 // 50, 320, 0.8)
    assert state["parameters"] == 12 + 128 + 272 + 34  # and not the buffer


@pytest.mark.parametrize("stop", [3, 10, 26])
def test_resumed_after_a_signal_equals_uninterrupted_bit_for_bit(reference: Path, tmp_path: Path, stop: int) -> None:
    config = toy.config(trainer__log_every=4)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    def interrupt(call: int) -> None:
        if call == 2 * stop - 1:  # two micro-batches a step
            os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)[stop % 3])

    result = fit(watched(config, interrupt), config, tmp_path / "run", quiet=True)
    assert (result.step, result.finished, result.exit_code) == (
        stop,
        False,
        EXIT_INTERRUPTED,
    ) and result.exit_code == 75
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    torch.manual_seed(stop)  # what happens between must not matter
    result = toy.run(tmp_path / "run", trainer__log_every=4, trainer__workers=1 if stop == 3 else 0)
    assert (result.started, result.step) == (stop, 40)
    assert tensors(tmp_path / "run", 40) == tensors(reference, 40)
    assert numbers(tmp_path / "run") == numbers(reference)
    assert (tmp_path / "run/heldout.jsonl").read_bytes() == (reference / "heldout.jsonl").read_bytes()
    walls = [line["wall_s"] for line in toy.lines(tmp_path / "run")]
    assert walls == sorted(walls)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    config = toy.config()

    def interrupt(call: int) -> None:
        if call in (8, 9):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(watched(config, interrupt), config, tmp_path / "run", quiet=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert toy.run(tmp_path / "run").finished  # and the lock is free again


def test_looking_changes_no_bit_of_training(reference: Path, tmp_path: Path) -> None:
    toy.run(tmp_path / "run", trainer__log_every=4, trainer__preview_every=1)
    assert len(list((tmp_path / "run/previews").iterdir())) == 40
    assert tensors(tmp_path / "run", 40) == tensors(reference, 40)


def test_a_failing_preview_warns_and_training_goes_on(reference: Path, tmp_path: Path) -> None:
    config = toy.config(trainer__log_every=4)
    parts = toy.parts(config)

    def fails(samples: Any, reference: Any) -> Any:
        torch.rand(3), random.random(), np.random.rand()  # and draws from every global state before
        raise RuntimeError("no picture today")

    broken = replace(parts, adapter=replace(parts.adapter, view=fails))
    with pytest.warns(RuntimeWarning, match="no picture today"):
        assert fit(broken, config, tmp_path / "run", quiet=True).finished
    assert tensors(tmp_path / "run", 40) == tensors(reference, 40)


def test_log_lines_beyond_the_checkpoint_and_torn_ones_are_dropped(reference: Path, tmp_path: Path) -> None:
    config = toy.config(trainer__log_every=4)

    def fail(call: int) -> None:
        if call == 2 * 29:
            raise MemoryError

    with pytest.raises(MemoryError):
        fit(watched(config, fail), config, tmp_path / "run", quiet=True)
    log = tmp_path / "run/metrics.jsonl"
    assert toy.lines(tmp_path / "run")[-1]["step"] == 28
    log.write_text(log.read_text() + '{"step": 32, "loss": 1.0}\n{"step": 4, "loss": 9.0}\n{"step": 3')
    toy.run(tmp_path / "run", trainer__log_every=4)
    assert numbers(tmp_path / "run") == numbers(reference)


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    class Plain:
        """Regression without noise, so that only the slicing of the batch can matter."""

        def __call__(self, denoiser: Any, item: Any, generator: Any) -> dict[str, Tensor]:
            x0_hat = denoiser(item.x, torch.full((len(item.x),), 0.5), item.mask, item.cond).x0
            return {"loss": ((x0_hat - item.x) ** 2).mean(1)}

        def at(self, *_: Any) -> Tensor:
            return torch.zeros(1)

    losses = []
    for accumulate in (1, 2, 4):
        config = toy.config(trainer__accumulate=accumulate, trainer__steps=20, network__dropout=0.0)
        fit(toy.parts(config, objective=Plain()), config, tmp_path / str(accumulate), quiet=True)
        losses.append([(line["loss"], line["grad_norm"]) for line in toy.lines(tmp_path / str(accumulate))])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_logged_means_are_means_and_terms_are_logged(tmp_path: Path) -> None:
    seen: list[float] = []

    def after(call: int, loss: Tensor) -> Tensor:
        seen.append(float(loss.detach().mean()))
        return loss

    config = toy.config(trainer__accumulate=1, trainer__log_every=5, trainer__steps=12)
    parts = toy.parts(config)
    objective = Objective(
        parts.process, sigma_data=0.8, terms={"size": (lambda prediction, *_: prediction.x0.square().mean(1), 0.1)}
    )
    fit(replace(parts, objective=Watched(objective, lambda call: None, after)), config, tmp_path / "run", quiet=True)
    lines = toy.lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [5, 10, 12]
    expected = [np.mean(seen[:5]), np.mean(seen[5:10]), np.mean(seen[10:])]
    np.testing.assert_allclose([line["loss"] for line in lines], expected, rtol=1e-6)
    assert all(line["size"] > 0 for line in lines)


def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    config = toy.config(trainer__steps=12, trainer__log_every=3)

    def poison(call: int, loss: Tensor) -> Tensor:
        return loss * float("nan") if call in (6, 13, 14) else loss  # steps 4, 7 and 8

    fit(watched(config, after=poison), config, tmp_path / "run", quiet=True)
    lines = toy.lines(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 3, 3]
    assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in lines)
    train = checkpoint.load(tmp_path / "run/checkpoints/step-00000012").train
    assert float(train["ema/items"]) == 9 * 8
    assert {float(value) for name, value in train.items() if name.endswith("/step")} == {9.0}


def test_divergence_is_an_error_that_says_what_to_try(tmp_path: Path) -> None:
    config = toy.config(trainer__max_skipped=4, trainer__log_every=1000)

    def poison(call: int, loss: Tensor) -> Tensor:
        return loss * float("inf") if call >= 2 * 13 else loss

    with pytest.raises(DivergenceError, match=r"(?s)step \d+.*lr 0\.0.*optim\.lr.*warmup") as error:
        fit(watched(config, after=poison), config, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert checkpoint.newest(tmp_path / "run/checkpoints").step == 10  # type: ignore[union-attr]


def test_a_finished_run_says_so(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tensors(reference, 40)
    assert toy.run(reference, quiet=None, trainer__log_every=4).finished
    assert "finished" in capsys.readouterr().out
    assert tensors(reference, 40) == before


def test_only_the_free_keys_may_change(tmp_path: Path) -> None:
    toy.run(tmp_path / "run", trainer__steps=4)
    result = toy.run(
        tmp_path / "run", trainer__steps=6, trainer__log_every=2, trainer__workers=1, trainer__device="auto"
    )
    assert (result.started, result.step) == (4, 6)
    with pytest.raises(ConfigError, match=r"network\.width \(16 -> 24\).*optim\.lr \(0\.001 -> 0\.1\)") as error:
        toy.run(tmp_path / "run", trainer__steps=8, network__width=24, optim__lr=0.1)
    assert "trainer" not in str(error.value) and "\n" not in str(error.value)


def test_other_data_are_refused_and_the_same_data_elsewhere_are_not(tmp_path: Path) -> None:
    def run(sha256: str, path: str, steps: int) -> None:
        config = toy.config(data__path=path, trainer__steps=steps)
        parts = toy.parts(config)
        fit(replace(parts, facts={**parts.facts, "sha256": sha256}), config, tmp_path / "run", quiet=True)

    run("aa", "here.h5", 2)
    run("aa", "there.h5", 4)
    with pytest.raises(ConfigError, match="other data"):
        run("bb", "there.h5", 6)


def test_two_processes_on_one_run(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another process"):
        toy.run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another process"):
        move_aside(tmp_path / "run")
    lock.release()
    assert toy.run(tmp_path / "run", trainer__steps=2).finished


def test_move_aside_keeps_every_old_run(tmp_path: Path) -> None:
    assert move_aside(tmp_path / "run") == tmp_path / "run"
    for k in (1, 2):
        toy.run(tmp_path / "run", trainer__steps=k)
        assert move_aside(tmp_path / "run") == tmp_path / f"run.old-{k}"
        assert not (tmp_path / "run").exists()
    assert [toy.lines(tmp_path / f"run.old-{k}")[-1]["step"] for k in (1, 2)] == [1, 2]


def test_init_starts_from_the_averaged_weights_of_another_run(reference: Path, tmp_path: Path) -> None:
    config = toy.config(trainer__steps=1, optim__lr=1e-30)
    fit(toy.parts(config), config, tmp_path / "run", init=reference, quiet=True)
    source = checkpoint.load(reference / "checkpoints/step-00000040")
    found = checkpoint.load(tmp_path / "run/checkpoints/step-00000001")
    assert all(torch.equal(found.model[name], value) for name, value in source.ema.items())
    assert not all(torch.equal(source.model[name], value) for name, value in source.ema.items())
    config = toy.config(network__width=24)
    with pytest.raises(CheckpointError, match=r"network\.layers\.0\.weight.*\(16, 7\).*\(24, 7\)"):
        fit(toy.parts(config), config, tmp_path / "other", init=reference, quiet=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        fit(toy.parts(config), config, tmp_path / "third", init=tmp_path, quiet=True)


def test_a_missing_random_state_is_an_error(reference: Path, tmp_path: Path) -> None:
    found = checkpoint.load(reference / "checkpoints/step-00000040")
    train = {name: value for name, value in found.train.items() if name != "rng/0/cpu"}
    made = {"model": found.model, "ema": found.ema, "train": train}
    checkpoint.save(tmp_path / "run/checkpoints", 40, made, found.state, found.config)
    with pytest.raises(CheckpointError, match="rng/0/cpu"):
        toy.run(tmp_path / "run", trainer__log_every=4, trainer__steps=50)


def test_global_random_states_survive_a_round_trip() -> None:
    random.gauss(0, 1), np.random.standard_normal()  # both now hold a second number back
    state = rng_state(CPU)

    def draw() -> list[float]:
        return [
            float(torch.rand(())),
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),
            np.random.rand(),
        ]

    first = draw()
    set_rng_state(state, CPU)
    assert draw() == first
    set_rng_state(state, CPU)
    with preserved_rng(CPU):
        draw()
    assert draw() == first


def test_bf16_trains_like_fp32_with_weights_in_float32(reference: Path, tmp_path: Path) -> None:
    toy.run(tmp_path / "run", trainer__log_every=4, trainer__precision="bf16")
    found = checkpoint.load(tmp_path / "run/checkpoints/step-00000040")
    assert {value.dtype for value in found.model.values()} == {torch.float32}
    ours, theirs = ([line["loss"] for line in toy.lines(folder)] for folder in (tmp_path / "run", reference))
    assert ours != theirs
    np.testing.assert_allclose(ours, theirs, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"trainer__steps": 0}, "trainer.steps=0"),
        ({"trainer__batch": -1}, "trainer.batch=-1"),
        ({"trainer__workers": -1}, "trainer.workers=-1"),
        ({"trainer__seconds": 0}, "trainer.seconds=0 must be"),
        ({"trainer__seconds": "10 min"}, "trainer.seconds=10 min must be"),
        ({"trainer__device": "tpu"}, "trainer.device"),
        ({"trainer__precision": "fp8"}, "trainer.precision"),
        ({"optim__decay": "cosin"}, "did you mean cosine"),
        ({"optim__lr": 0.0}, "optim.lr"),
        ({"optim__lr": float("inf")}, "optim.lr=inf must be positive and finite"),
        ({"trainer__seed": 2**63}, "trainer.seed=9223372036854775808 must be below"),
        ({"optim__betas": [0.9, 1.0]}, "optim.betas"),
        ({"optim__warmup": -1}, "optim.warmup=-1 must be at least 0"),
        ({"trainer__clip": -1.0}, "trainer.clip"),
        ({"trainer__batch": 7}, "multiple of 2"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_saved(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        toy.run(tmp_path / "run", **changes)
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/config.yaml").exists()


def test_noise_levels_lie_inside_the_range_of_the_process() -> None:
    for schedule in ("vp", "edm", "cosine", "rectified_flow", "ve", "sub_vp"):
        process = toy.gaussian(schedule)
        times, levels = noise_levels(process)
        assert len(times) == 8 and times == sorted(times) and process.t_min < times[0] and times[-1] < process.t_max
        assert levels is not None and levels == sorted(levels, reverse=True)


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        toy.run(tmp_path / "run", trainer__steps=3, logger__tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_plain_lines_where_the_output_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.run(tmp_path / "run", quiet=None, trainer__steps=3)
    error = capsys.readouterr().err
    assert (
        "starts" in error and "parameters" in error and "step 3/3" in error and "items/s" in error and "\r" not in error
    )
    toy.run(tmp_path / "bar", quiet=False, trainer__steps=3)
    assert "\r" in capsys.readouterr().err


def test_killed_at_random_moments(root: Path) -> None:
    """The fast form of the bar ``resume``."""
    command = [sys.executable, str(root / "tests/bars/resume.py"), "kills=3", "steps=40"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 of 3 bit-identical" in done.stdout, done.stdout + done.stderr
