"""What every bar prints: the measured number, the bar, and the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


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
