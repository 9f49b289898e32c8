"""What bars share: their words, the trained run, its scores, and what they print: the number, the bar, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from polydiff.core.adapter import Item, Metric
from polydiff.core.build import data_path
from polydiff.core.commands.evaluate import representative
from polydiff.core.progress import progress
from polydiff.core.request import lend
from polydiff.core.run import Run

Metrics = Mapping[str, Metric]


def arguments() -> dict[str, str]:
    """The ``key=value`` words of the command line."""
    return dict(word.split("=", 1) for word in sys.argv[1:])


def trained_run(folder: str, experiment: str = "image-digits", device: str = "auto") -> Run:
    """The run in a folder; one that is missing is trained first with the shipped configuration."""
    if not Path(folder).exists():
        train = [sys.executable, "-m", "polydiff", "train", f"experiment={experiment}", f"run={folder}"]
        subprocess.run(train, check=True)
    return Run.load(folder, device)


@cache
def splits(model: Run) -> tuple[list[Item], list[Item]]:
    """The training and the test split of a run's data."""
    file = data_path(model.config["data"])
    train, test = ([d[i] for i in range(len(d))] for d in (model.dataset(split, file) for split in ("train", "test")))
    return train, test


def draw(model: Run, n: int | None, seed: int = 0, **settings: Any) -> list[Item]:
    """n samples with the conditions of the test split, see ``representative``; None for one of each of its items."""
    _, test = splits(model)
    n = n or len(test)
    cond = lend(model.denoiser.conditions, [test[i] for i in representative([item.cond for item in test], n)])
    with progress("sample", n) as advance:
        return model.sample(n, cond=cond, seed=seed, advance=advance, **settings)


def score(model: Run, samples: Sequence[Item], seed: int = 0) -> Metrics:
    """What ``polydiff evaluate`` measures: against the training split, the test split as the real data."""
    train, test = splits(model)
    store = data_path(model.config["data"]).parent
    given = {"held_out": test, "facts": model.facts, "store": store, "data": model.config["data"]["options"]}
    return model.adapter.metrics(samples, train, {**given, "seed": seed})


@dataclass(frozen=True)
class Bar:
    """A promise: what is measured at which guidance, and the bound it must keep."""

    name: str
    guidance: float
    measure: Callable[[Metrics], float]
    bound: float
    at_least: bool = True


def frechet_ratio(metrics: Metrics) -> float:
    """Frechet distance of the samples in units of that of the real test split."""
    distance = metrics["frechet_distance"]
    return distance.value / (distance.real or float("nan"))


def intended_class(metrics: Metrics) -> float:
    """Share of the samples that the stored classifier takes for what was asked for."""
    return metrics["class_accuracy"].value


def classifier_accuracy(metrics: Metrics) -> float:
    """Accuracy of the stored classifier on the real test split."""
    real = metrics["class_accuracy"].real
    return float("nan") if real is None else real


def judge(bars: Sequence[Bar], results: Mapping[float, Sequence[Metrics]]) -> bool:
    """Print every bar beside the mean over seeds; whether all are met.

    Args:
        bars: what is promised.
        results: by guidance, the metrics of each seed.
    """
    met = []
    for bar in bars:
        values = [bar.measure(metrics) for metrics in results[bar.guidance]]
        name, spread = f"guidance {bar.guidance:g}, {bar.name}", f"{min(values):.4g} to {max(values):.4g}"
        met.append(check(name, fmean(values), bar.bound, at_least=bar.at_least, note=spread))
    return all(met)


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
