"""Run folders made of real digits and made-up numbers, as training, sampling and evaluation leave them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from polydiff.core.adapter import Item, Metric


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Real digits (1797, 1, 8, 8) in [-1, 1] and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target)


def items(n: int, first: int = 0, states: int = 0, seed: int = 0, label: bool = True) -> list[Item]:
    """Digits as if drawn: real ones, a little noisy, with a way from noise if ``states`` is given."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(first, first + n):
        noise = torch.randn(x[i].shape, generator=generator)
        meta = {}
        if states:
            meta["trajectory"] = torch.stack([x[i] + (1 - k / states) * noise for k in range(states)]).clamp(-1, 1)
        made.append(Item(x[i] + 0.05 * noise * bool(states), cond={"label": y[i]} if label else {}, meta=meta))
    return made


def make_run(folder: Path, name: str = "image-digits", classes: Sequence[str] = tuple("0123456789")) -> Path:
    """A run folder as training, sampling and evaluation leave it, with made-up numbers."""
    from polydiff.modalities.image.view import still

    generator = torch.Generator().manual_seed(0)

    def noise() -> float:
        return float(torch.randn((), generator=generator))

    for part in ("previews", "evaluation", "checkpoints/step-00002000", "samples/dpmpp-2m-20-seed0", "tensorboard"):
        (folder / part).mkdir(parents=True)
    config = {
        "experiment": name,
        "adapter": "image",
        "data": {"name": "digits", "path": None, "options": {}},
        "network": {"name": "unet", "channels": 32},
        "process": {"schedule": "edm"},
        "sampling": {"solver": "dpmpp-2m", "grid": "karras", "steps": 20, "guidance": 1.75},
        "trainer": {"steps": 2000, "batch": 128, "seed": 0, "device": "cpu"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    packages = {"torch": "2.12.0", "numpy": "2.3.0"}
    environment = {
        "date": "2026-03-01T09:30:00+00:00",
        "polydiff": "0.1.0",
        "python": "3.11.7",
        "packages": packages,
        "device": "cpu",
        "commit": "4f4ba39" * 6,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 0.18 + 1.4 * math.exp(-step / 220) * math.exp(0.12 * noise()) + 0.012 * noise(),
            "lr": 1e-3 * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / 2000)),
            "grad_norm": 0.3 + 2 * math.exp(-step / 150) * math.exp(0.4 * noise()),
            "items_per_s": 1290 + 30 * noise(),
            "wall_s": step * 0.0993,
        }
        for step in range(10, 2001, 10)
    ]
    lines[40]["loss"] = None  # a skipped step
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20')
    levels = [8.1, 5.9, 3.7, 1.5, -0.7, -2.9, -5.1, -7.3]
    heldout = [
        {
            "step": s,
            "log_snr": levels,
            "t": [0.5] * 8,
            "loss": [0.9 / (1 + math.exp(v)) + math.exp(-s / 300) * 0.2 for v in levels],
        }
        for s in range(0, 2001, 125)
    ]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in heldout))
    metrics = {
        "frechet": Metric(3.41, 3.1, 3.8, 2.9, 360),
        "kernel_distance": Metric(0.00021, -0.0001, 0.0006, 0.00012, 360),
        "precision": Metric(0.941, 0.92, 0.96, 0.952, 360),
        "recall": Metric(0.902, 0.87, 0.93, 0.931, 360),
        "class_accuracy": Metric(0.978, 0.961, 0.989, 0.986, 360),
        "nearest_copy": Metric(1234567.0),
    }
    measured = {"checkpoint_step": 2000, "solver": "dpmpp-2m", "grid": "karras", "steps": 20, "guidance": 1.5, "n": 360}
    measured["metrics"] = {key: metric._asdict() for key, metric in metrics.items()}
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(measured))
    real = digits()[0][:64]
    for step in range(0, 2001, 250):
        grain = torch.randn(real.shape, generator=generator) * math.exp(-step / 400)
        pictures = [Item((x + g).clamp(-1, 1)) for x, g in zip(real, grain, strict=True)]
        (folder / "previews" / f"step-{step:08d}.png").write_bytes(still(pictures))
    newest = folder / "checkpoints" / "step-00002000"
    facts = {"name": "digits", "n": 1437, "sigma_data": 0.75, "classes": {"label": list(classes)}}
    state = {"step": 2000, "wall_s": 198.6, "facts": facts, "parameters": 351_000}
    (newest / "state.json").write_text(json.dumps(state))
    told = {
        "solver": "dpmpp-2m",
        "steps": 20,
        "seed": 0,
        "guidance": 1.5,
        "samples": [{"file": "sample-00000.png"}] * 16,
    }
    (folder / "samples" / "dpmpp-2m-20-seed0" / "samples.json").write_text(json.dumps(told))
    return folder
