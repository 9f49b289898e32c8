"""The smallest thing that trains like a real one: labelled points, a network with dropout and a buffer, augmentation.

As a program, ``python toy.py RUN section.key=value ...`` trains it; the tests start, kill and signal such processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polydiff.core.adapter import Adapter, Condition, Fragment, Item
from polydiff.core.cli import leave
from polydiff.core.denoiser import Denoiser
from polydiff.core.errors import PolydiffError
from polydiff.core.objectives import Objective
from polydiff.core.processes import gaussian
from polydiff.core.training.loop import Parts, TrainResult, fit

PNG = b"\x89PNG\r\n\x1a\n"


class Points:
    """Points on two circles; augmentation shifts each a little. POLYDIFF_TOY_SEEN names a file for what was loaded."""

    def __init__(self, n: int, augmented: bool = True) -> None:
        generator = torch.Generator().manual_seed(n)
        angle = torch.rand(n, generator=generator) * 6.2832
        self.label = torch.arange(n) % 2
        self.x = torch.stack([angle.cos(), angle.sin()], 1) * (0.5 + self.label[:, None])
        self.facts: dict[str, Any] = {"sigma_data": 0.8, "size": {"points": 1}, "classes": {"label": ["in", "out"]}}
        if augmented:
            self.augment = self._augment

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Item:
        if "POLYDIFF_TOY_SEEN" in os.environ and len(self) == 50:  # the training split
            with Path(f"{os.environ['POLYDIFF_TOY_SEEN']}.{os.environ.get('RANK', '0')}").open("a") as file:
                file.write(f"{index} ")
        return Item(self.x[index], None, {"label": self.label[index]}, index)

    def _augment(self, item: Item, generator: torch.Generator) -> Item:
        return Item(torch.as_tensor(item.x) + 0.01 * torch.randn(2, generator=generator), item.mask, item.cond, item.id)


class Net(nn.Module):
    """(x_t, c_noise, label) -> two numbers."""

    scale: Tensor

    def __init__(self, width: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.label = nn.Embedding(3, 4)
        self.layers = nn.Sequential(
            nn.Linear(7, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x_t: Tensor, c_noise: Tensor, mask: Any, cond: Any, present: Any) -> Tensor:
        label = self.label(torch.where(present["label"], cond["label"], 2))
        return self.scale * self.layers(torch.cat([x_t, c_noise[:, None], label], 1))


def view(samples: list[Item], reference: list[Item]) -> Fragment:
    """A picture of nothing, if there is something to show."""
    return Fragment(
        "",
        {},
        PNG if samples and all(bool(torch.isfinite(torch.as_tensor(item.x)).all()) for item in samples) else None,
    )


ADAPTER = Adapter(
    name="toy",
    process=gaussian,
    shape=lambda size, cond: (torch.zeros(2), None),
    dataset=lambda path, split: Points(50),
    codec=lambda facts: None,
    network={},
    metrics=lambda samples, reference, options: {},
    view=view,
    conditions={"label": Condition("class")},
)


def config(**changes: Any) -> dict[str, Any]:
    """A configuration; ``changes`` are written ``trainer__steps=3``."""
    made: dict[str, Any] = {
        "experiment": "toy",
        "adapter": "toy",
        "data": {"name": "toy", "path": None, "options": {}},
        "network": {"name": "toy", "width": 16, "dropout": 0.1},
        "process": {"schedule": "edm"},
        "objective": {"precondition": "edm", "weight": "edm", "drop": 0.1},
        "sampling": {"solver": "dpmpp-2m", "grid": "karras", "steps": 3, "guidance": 1.0, "interval": None},
        "optim": {
            "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01, "warmup": 5, "decay": "cosine",
            "ema_halflife": 500, "ema_warmup": 0.05,
        },
        "trainer": {
            "steps": 40, "seconds": None, "batch": 8, "accumulate": 2, "clip": 1.0, "precision": "fp32", "compile": False,
            "channels_last": True, "seed": 3, "device": "cpu", "workers": 0, "log_every": 1, "save_every": 10,
            "preview_every": 1000, "keep_last": 3, "max_skipped": 20,
        },
        "logger": {"tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        made[section][name] = value
    return made


def parts(config: dict[str, Any], dataset: Any = None, objective: Any = None) -> Parts:
    """The objects of a configuration."""
    process = gaussian(**config["process"])
    options = dict(config["objective"])
    torch.manual_seed(config["trainer"]["seed"])
    network = Net(config["network"]["width"], config["network"]["dropout"])
    denoiser = Denoiser(network, process, options.pop("precondition"), 0.8, ADAPTER.conditions)
    data = Points(50) if dataset is None else dataset
    return Parts(
        ADAPTER,
        process,
        denoiser,
        objective or Objective(process, sigma_data=0.8, **options),
        data,
        Points(9),
        data.facts,
    )


class Watched:
    """An objective that calls a function before each batch, counted from 0."""

    def __init__(
        self, inner: Any, before: Callable[[int], None], after: Callable[[int, Tensor], Tensor] | None = None
    ) -> None:
        self.inner, self.before, self.after, self.calls = inner, before, after, 0
        self.at, self.terms = inner.at, inner.terms

    def __call__(self, denoiser: Any, item: Any, generator: torch.Generator) -> dict[str, Tensor]:
        self.before(self.calls)
        out = self.inner(denoiser, item, generator)
        if self.after is not None:
            out["loss"] = self.after(self.calls, out["loss"])
        self.calls += 1
        return out


def watched(config: dict[str, Any], before: Callable[[int], None] = lambda call: None, after: Any = None) -> Parts:
    """The objects of a configuration, whose objective calls ``before`` ahead of each batch and lets ``after`` change its loss."""
    made = parts(config)
    return replace(made, objective=Watched(made.objective, before, after))


def run(folder: Path, quiet: bool | None = True, **changes: Any) -> TrainResult:
    """Train the toy in a folder."""
    wanted = config(**changes)
    return fit(parts(wanted), wanted, folder, quiet=quiet)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def main(words: list[str]) -> int:
    """Train as a process of its own."""
    changes = {}
    for word in words[1:]:
        key, _, value = word.partition("=")
        changes[key.replace(".", "__")] = json.loads(value)
    try:
        return run(Path(words[0]), **changes).exit_code
    except PolydiffError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(leave(main(sys.argv[1:])))
