"""What bars share: their words, the trained run, and what they print: the measured number, the bar, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from polydiff.core.run import Run


def arguments() -> dict[str, str]:
    """The ``key=value`` words of the command line."""
    return dict(word.split("=", 1) for word in sys.argv[1:])


def trained_run(folder: str) -> Run:
    """The run in a folder; one that is missing is trained first with the shipped configuration."""
    if not Path(folder).exists():
        train = [sys.executable, "-m", "polydiff", "train", "experiment=image-digits", f"run={folder}"]
        subprocess.run(train, check=True)
    return Run.load(folder)


def machine(device: object = "cpu") -> str:
    """The machine in words."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    accelerator = f", {torch.cuda.get_device_name()}" if "cuda" in str(device) else ""
    return f"torch {torch.__version__}, {model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{accelerator}"


def check(name: str, measured: float, bound: float, *, at_least: bool = False, note: str = "") -> bool:
    """Print one line; whether the bar is met (a value that is not a number never meets it)."""
    met = measured >= bound if at_least else measured <= bound
    sign = ">=" if at_least else "<="
    print(
        f"{name}: {measured:.4g}, bar {sign} {bound:g}{note and f' ({note})'}: {'met' if met else 'MISSED'}", flush=True
    )
    return met
