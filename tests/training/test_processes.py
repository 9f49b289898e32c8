"""Several processes: the same numbers as one, the same samples after a change of their number, one will when signalled."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import toy  # type: ignore[import-not-found]

from polydiff.core.training import checkpoint
from polydiff.core.training.stream import Stream

TOY = str(Path(toy.__file__))


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    """Two processes as torchrun would start them, each by itself so that it can be signalled."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, TOY, str(folder), *words],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip


def seen(folder: Path) -> dict[int, list[int]]:
    """Indices that each process loaded, in order."""
    return {int(path.suffix[1:]): [int(word) for word in path.read_text().split()] for path in folder.glob("seen.*")}


def test_two_processes_equal_one_and_go_on_as_one(tmp_path: Path) -> None:
    words = ["trainer.accumulate=1", "trainer.steps=12", "trainer.save_every=6", "network.dropout=0.0"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        TOY,
        str(tmp_path / "two"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLYDIFF_TOY_SEEN": str(tmp_path / "seen")}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    changes = {"trainer__steps": 12, "trainer__save_every": 6, "network__dropout": 0.0}

    # one process with two micro-batches sees the same slices with the same noise
    toy.run(tmp_path / "one", **changes, trainer__accumulate=2)
    one, two = toy.lines(tmp_path / "one"), toy.lines(tmp_path / "two")
    assert [line["step"] for line in two] == list(range(1, 13))
    for key in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose([line[key] for line in two], [line[key] for line in one], rtol=1e-5)
    left, right = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("one", "two"))
    assert left is not None and right is not None
    assert all(torch.allclose(left.ema[name], right.ema[name], atol=1e-5) for name in left.ema)
    assert {"rng/0/cpu", "rng/1/cpu"} <= right.train.keys()
    assert not torch.equal(right.train["rng/0/cpu"], right.train["rng/1/cpu"])

    # and what both saw together is the one sequence, also after going on as one process
    os.environ["POLYDIFF_TOY_SEEN"] = str(tmp_path / "later")
    try:
        toy.run(tmp_path / "two", **{**changes, "trainer__steps": 20}, trainer__accumulate=1)
    finally:
        del os.environ["POLYDIFF_TOY_SEEN"]
    stream = Stream(50, 8, seed=3)
    expected = [index for step in range(20) for _, index in stream.keys(step, 0)]
    before = seen(tmp_path)
    halves = zip(blocks(before[0], 4), blocks(before[1], 4), strict=True)
    assert [index for first, second in halves for index in (*first, *second)] == expected[: 12 * 8]
    assert [int(word) for word in (tmp_path / "later.0").read_text().split()] == expected[12 * 8 :]


def blocks(values: Sequence[int], n: int) -> list[Sequence[int]]:
    return [values[start : start + n] for start in range(0, len(values), n)]


def test_a_signal_to_one_of_two_processes_stops_and_saves_both(tmp_path: Path) -> None:
    processes = ranks(tmp_path / "run", "trainer.steps=100000", "trainer.save_every=100000")
    try:
        log, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
        while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGUSR1)
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], outputs
    found = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found is not None and found.state["processes"] == 2
    assert toy.lines(tmp_path / "run")[-1]["step"] == found.step


def test_a_second_run_is_refused_in_one_line_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    command = [sys.executable, TOY, str(tmp_path / "run"), "trainer.workers=2"]
    first = subprocess.Popen([*command, "trainer.steps=100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not any((tmp_path / "run").glob("checkpoints/step-????????")):
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert second.stderr.startswith("CheckpointError") and "another process" in second.stderr
        assert len(second.stderr.splitlines()) == 1
    finally:
        first.kill()
    first.wait()
    step = checkpoint.newest(tmp_path / "run/checkpoints").step  # type: ignore[union-attr]
    assert toy.run(tmp_path / "run", trainer__steps=step + 2).finished  # at once, though its workers may still be alive
