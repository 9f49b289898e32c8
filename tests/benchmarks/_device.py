"""What benchmarks share: their words, how long a step takes on a device, how much work it is, and what the device could do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 TFLOP/s of the matrix units by a part of the device's name, from the makers' data sheets; TF32 runs at half.
PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def options(words: list[str], defaults: Mapping[str, str], on_cuda: Mapping[str, str]) -> dict[str, str]:
    """``key=value`` words over the defaults of the device.

    Raises:
        SystemExit: an unknown word; it names the valid ones.
    """
    given = dict(word.partition("=")[::2] for word in words)
    if wrong := given.keys() - defaults:
        raise SystemExit(f"unknown option {min(wrong)!r}; valid: {', '.join(defaults)}")
    device = given.get("device", defaults["device"])
    return {**defaults, **(on_cuda if device.startswith("cuda") else {}), **given}


def peak(device: torch.device, dtype: torch.dtype, given: str = "") -> float | None:
    """Operations a second that the device's matrix units could do, or None where nobody has said.

    Args:
        device, dtype: float32 convolutions run in TF32 on CUDA devices, as they do by default.
        given: TFLOP/s that replace the table's.
    """
    if given:
        return float(given) * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((value for part, value in PEAKS.items() if part in name), None)
    return None if found is None else found * 1e12 / (2 if dtype is torch.float32 else 1)


def utilisation(work: float, seconds: float, most: float | None) -> str:
    """Model FLOPs utilisation in words: counted operations over time over the peak."""
    return "unknown" if most is None else f"{work / seconds / most:.1%}"


def operations(run: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions of one call, backward ones included where it has them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a busy machine slows all alike, after some rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(rounds + warmup):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if k >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
