"""Bar "resume": kill -9 at random moments, resume to the end, and compare with a run that nobody disturbed.

    python tests/bars/resume.py [kills=30] [steps=120] [seed=0]

Half of the kills come at any moment, half inside a save. After each the run is resumed to its end, and the weights, their
average, the optimizer, and step, loss, lr and grad_norm of every line must be bit-identical; what was lost is never more
than one checkpoint interval. The model has dropout, augmentation, accumulation, an average and two loader workers in every
third run; half of the runs log every step, which shows what was lost, half every third, which shows that sums of an
unfinished interval survive. Processes are forked from one that has imported everything, so that 30 kills take minutes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import accelerate  # noqa: F401  (imported here once rather than after every fork)
import torch
import torch._dynamo
import toy  # type: ignore[import-not-found]
from _bars import arguments, machine

from polydiff.core.training import checkpoint

EVERY = 10  # steps between checkpoints


def start(folder: Path, steps: int, workers: int, log_every: int) -> int:
    """Train in a forked process; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        changes = {"steps": steps, "save_every": EVERY, "workers": workers, "log_every": log_every}
        code = toy.run(folder, **{f"trainer__{name}": value for name, value in changes.items()}).exit_code
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_somewhere(child: int, folder: Path, chance: random.Random, duration: float, inside_save: bool) -> bool:
    """Kill -9 a training process; False if it had ended before."""
    began, deadline = time.monotonic(), chance.uniform(0.05, 0.95) * duration
    while time.monotonic() - began < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    while inside_save and not any(folder.glob("checkpoints/*.tmp")):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
    if inside_save:
        time.sleep(chance.uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def logged(folder: Path) -> int:
    """The last step that a killed run wrote down."""
    log = folder / "metrics.jsonl"
    whole = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def differences(folder: Path, reference: Path, steps: int) -> list[str]:
    """What is not bit-identical between two finished runs."""
    found = []
    name = f"checkpoints/step-{steps:08d}"
    for part in ("model", "ema", "train"):
        file = f"{name}/{part}.safetensors"
        if (folder / file).read_bytes() != (reference / file).read_bytes():
            found.append(file)
    keys = ("step", "loss", "lr", "grad_norm", "skipped")
    logs = [[{key: line[key] for key in keys} for line in toy.lines(run)] for run in (folder, reference)]
    if logs[0] != logs[1]:
        found.append("metrics.jsonl")
    if (folder / "heldout.jsonl").read_bytes() != (reference / "heldout.jsonl").read_bytes():
        found.append("heldout.jsonl")
    if list(folder.glob("checkpoints/*.tmp")):
        found.append("a .tmp folder is left")
    return found


def main(kills: int, steps: int, seed: int) -> int:
    """Run the bar; 0 if it is met."""
    torch.set_num_threads(1)  # a forked process must not inherit a pool of threads
    home, chance = Path(tempfile.mkdtemp(prefix="polydiff-resume-")), random.Random(seed)
    try:
        began = time.monotonic()
        references = {log_every: home / f"reference-{log_every}" for log_every in (1, 3)}
        for log_every, folder in references.items():
            if code := wait(start(folder, steps, 0, log_every)):
                print(folder.with_suffix(".log").read_text())
                return code
        duration = (time.monotonic() - began) / 2
        identical, inside, most_lost, failures = 0, 0, 0, []
        for k in range(kills):
            workers, inside_save, log_every = (2 if k % 3 == 2 else 0), k % 2 == 1, 1 if k % 4 < 2 else 3
            folder = home / f"run-{k}"
            while not kill_somewhere(start(folder, steps, workers, log_every), folder, chance, duration, inside_save):
                shutil.rmtree(folder)
            inside += any(folder.glob("checkpoints/*.tmp"))
            with warnings.catch_warnings(action="error"):  # falling back to an older one would be a failure
                newest = checkpoint.newest(folder / "checkpoints")
            most_lost = max(most_lost, logged(folder) - (0 if newest is None else newest.step))
            code = wait(start(folder, steps, workers, log_every))
            wrong = [f"exit code {code}"] if code else differences(folder, references[log_every], steps)
            identical += not wrong
            failures += [f"kill {k} ({workers} workers, {'saving' if inside_save else 'anywhere'}): {w}" for w in wrong]
            shutil.rmtree(folder)
        for failure in failures:
            print(failure)
        met = identical == kills and most_lost <= EVERY
        print(
            f"resume: {identical} of {kills} bit-identical (bar: all), {inside} of them killed inside a save, "
            f"most lost {most_lost} steps (bar: {EVERY}), {time.monotonic() - began:.0f} s; "
            f"{machine()}: {'met' if met else 'MISSED'}"
        )
        return 0 if met else 1
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    given = arguments()
    raise SystemExit(main(int(given.get("kills", 30)), int(given.get("steps", 120)), int(given.get("seed", 0))))
