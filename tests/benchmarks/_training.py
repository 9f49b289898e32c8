"""The real training run of ``gpu.py train=SECONDS``: trained in pieces, killed once, evaluated along the way, drawn.

Each call works for at most ``piece`` seconds, ends with code 75 while there is more to do, and goes on from the files in ``out``
when it is started again: ``run/`` (an ordinary run), ``evaluation/<step>/metrics.json``, ``result.json``, ``loss.png``,
``frechet.png``, ``grid.png``. ``kill`` seconds after its first checkpoint the training is killed without warning once, to show
that the run goes on; ``points`` checkpoints are evaluated with ``n`` samples each, the last one with all held-out items.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polydiff.core.run import Run
from polydiff.core.training import checkpoint
from polydiff.core.training.runtime import EXIT_INTERRUPTED

GRACE = 30.0  # seconds to save and leave after a signal
SPARE = 20.0  # seconds kept of a piece for its last save


def train(options: Mapping[str, str], words: list[str], device: torch.device) -> int:
    """Train, evaluate and draw for at most one piece; 0 when all is done, 75 when the same command should go on."""
    out = Path(options["out"])
    end = time.monotonic() + float(options["piece"])
    out.mkdir(parents=True, exist_ok=True)
    run = out / "run"
    state = _state(out)
    if not state["trained"]:
        budget = [f"trainer.seconds={options['train']}", "trainer.steps=100000000", "trainer.preview_every=100000000"]
        fast = ["trainer.precision=bf16", "trainer.compile=true"] if device.type == "cuda" else []
        own = [f"experiment={options['experiment']}", f"run={run}", f"trainer.device={device.type}"]
        command = [*own, *budget, "trainer.keep_last=1000", *fast, *words]
        state["trained"] = _piece(out, state, command, end, float(options["kill"]))
        _keep(out, state)
        if not state["trained"]:
            return _more(out, "training")
    steps = [step for step, _ in checkpoint.steps(run / "checkpoints")]
    points = min(int(options["points"]), len(steps))
    chosen = sorted({steps[(k + 1) * len(steps) // points - 1] for k in range(points)})
    for step in chosen:
        folder = out / "evaluation" / f"{step:08d}"
        if (folder / "metrics.json").exists():
            continue
        if state["evaluating_s"] > 0 and time.monotonic() + state["evaluating_s"] > end:
            return _more(out, "evaluation")
        began = time.monotonic()
        n = [] if step == chosen[-1] else [f"n={options['n']}"]
        run_of_step = f"run={run / 'checkpoints' / f'step-{step:08d}'}"
        _polydiff("evaluate", run_of_step, f"out={folder}", f"device={device.type}", "batch=256", "inception=off", *n)
        state["evaluating_s"] = time.monotonic() - began
        _keep(out, state)
    return _finish(out, state, chosen, device)


def _piece(out: Path, state: dict[str, Any], command: list[str], end: float, kill: float) -> bool:
    """Train until the end of this piece, or of the training; whether it has ended."""
    while True:
        process = subprocess.Popen([sys.executable, "-m", "polydiff", "train", *command])
        saved = None
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if saved is None and (out / "run" / "LATEST").exists():
                saved = now
            if not state["killed"] and saved is not None and now - saved > kill:
                state["killed"] = checkpoint.steps(out / "run" / "checkpoints")[-1][0]
                process.kill()
                process.wait()
                _keep(out, state)
            elif now > end - SPARE:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(GRACE + SPARE)
                except subprocess.TimeoutExpired:
                    process.kill()
        if process.returncode == -signal.SIGKILL and time.monotonic() < end - SPARE:
            continue  # the kill that was meant: go on at once
        if process.returncode not in (0, EXIT_INTERRUPTED, -signal.SIGKILL):
            raise SystemExit(f"polydiff train failed with exit code {process.returncode}")
        return process.returncode == 0


def _finish(out: Path, state: dict[str, Any], chosen: list[int], device: torch.device) -> int:
    log = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [line["step"] for line in log]
    curve = []
    for step in chosen:
        found = json.loads((out / "evaluation" / f"{step:08d}" / "metrics.json").read_text())
        curve.append({"step": step, "n": found["n"], "metrics": found["metrics"], "seconds": found["seconds"]})
    state["resumed_without_gap"] = numbers == sorted(set(numbers))
    state |= {"steps": numbers[-1], "wall_s": log[-1]["wall_s"], "loss": log[-1]["loss"], "skipped": log[-1]["skipped"]}
    state |= {"curve": curve, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}
    _keep(out, state)
    _plot(out / "loss.png", [(line["step"], line["loss"]) for line in log], "training loss", state["killed"])
    distances = [(point["step"], point["metrics"]["frechet_distance"]["value"]) for point in curve]
    _plot(out / "frechet.png", distances, "Frechet distance", state["killed"])
    run = Run.load(out / "run", device.type)
    samples = run.sample(100, {name: list(range(10)) for name in run.denoiser.conditions}, batch=100)
    (out / "grid.png").write_bytes(run.adapter.view(samples, []).png or b"")
    last = curve[-1]["metrics"]["frechet_distance"]
    real = "" if last["real"] is None else f", real data {last['real']:.4g}"
    print(
        f"{state['steps']} steps in {state['wall_s']:.0f} s on {state['device']}, killed after step {state['killed']} and gone on "
        f"({'each line of the log once' if state['resumed_without_gap'] else 'THE LOG HAS GAPS'}), {state['skipped']} steps "
        f"skipped; Frechet distance {last['value']:.4g}{real}\nwrote {out}/result.json, loss.png, frechet.png, grid.png"
    )
    return 0 if state["resumed_without_gap"] and state["killed"] else 1


def _plot(path: Path, points: list[tuple[int, float | None]], title: str, killed: int) -> None:
    from matplotlib.figure import Figure

    there = [(step, value) for step, value in points if value is not None]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*there, strict=True), marker="o" if len(there) < 20 else "", color="#2a6f97", linewidth=1.2)
    axes.axvline(killed, color="#bbbbbb", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel=title, yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    path.write_bytes(buffer.getvalue())


def _polydiff(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "polydiff", *words], check=True)


def _state(out: Path) -> dict[str, Any]:
    path = out / "result.json"
    return json.loads(path.read_text()) if path.exists() else {"trained": False, "killed": 0, "evaluating_s": 0.0}


def _keep(out: Path, state: Mapping[str, Any]) -> None:
    checkpoint.replace_text(out / "result.json", json.dumps(state, indent=1) + "\n")


def _more(out: Path, what: str) -> int:
    print(f"{what} is not finished: start the same command again ({out})", flush=True)
    return EXIT_INTERRUPTED
