"""Bar "loop overhead": items/s through the training loop against a bare loop with the same parts.

    python tests/bars/loop_overhead.py [steps=100] [device=cpu] [only=digits|large]

Both train at the same time, a few steps of one and a few steps of the other in turn, so that a busy machine slows both.
The bare loop indexes a tensor for its batches, and has the same network, objective, clipping, fused AdamW and average, and
nothing else; the training loop loads items one by one, logs, counts, skips and can resume. Saves, held-out losses and
previews come every few hundred steps and are stated beside, spread over their interval.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _bars import arguments, machine
from torch import Tensor

from polydiff import data
from polydiff.core.adapter import Item
from polydiff.core.build import build
from polydiff.core.commands.compose import compose
from polydiff.core.training.loop import Parts, fit

BLOCK = 4  # steps in a row of each loop


class Patterns:
    """Random pictures of 3 x 16 x 16."""

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))
        size = {"height": 16, "width": 16, "channels": 3}
        self.facts: dict[str, Any] = {"sigma_data": 1.0, "size": size, "classes": {"label": ["a", "b"]}}

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Item:
        return Item(self.x[index], None, {"label": torch.tensor(index % 2)}, index)


class Bare:
    """A training loop as one would write it down in five minutes."""

    def __init__(self, parts: Parts, config: dict[str, Any], device: torch.device) -> None:
        self.denoiser = copy.deepcopy(parts.denoiser).to(device).train()
        if device.type == "cuda":
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average, self.objective, self.batch = (
            copy.deepcopy(self.denoiser),
            parts.objective,
            config["trainer"]["batch"],
        )
        items = [parts.dataset[i] for i in range(min(2048, len(parts.dataset)))]
        whole = parts.adapter.collate(items)
        self.x, self.label = whole.x.to(device), whole.cond["label"].to(device)  # type: ignore[union-attr]
        optim = config["optim"]
        self.adamw = torch.optim.AdamW(
            self.denoiser.parameters(), lr=optim["lr"], betas=tuple(optim["betas"]), fused=True
        )
        self.generator = torch.Generator(device).manual_seed(0)
        self.device = device

    def steps(self, n: int) -> None:
        for _ in range(n):
            index = torch.randint(len(self.x), (self.batch,), generator=self.generator, device=self.device)
            item = Item(self.x[index], None, {"label": self.label[index]})
            self.objective(self.denoiser, item, self.generator)["loss"].mean().backward()
            torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), 1e-3)


class Alternating:
    """An objective that lets the bare loop run between blocks of the training loop, and measures both."""

    def __init__(self, parts: Parts, config: dict[str, Any], device: torch.device) -> None:
        self.inner, self.bare, self.device = parts.objective, Bare(parts, config, device), device
        self.at, self.terms = self.inner.at, self.inner.terms
        self.calls, self.resumed = 0, 0.0
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, denoiser: Any, item: Any, generator: torch.Generator) -> dict[str, Tensor]:
        if self.calls % BLOCK == 0:
            began = self.now()
            if self.calls:
                self.ours.append(began - self.resumed)
            self.bare.steps(BLOCK)
            self.resumed = self.now()
            self.theirs.append(self.resumed - began)
        self.calls += 1
        return self.inner(denoiser, item, generator)


def measure(name: str, bar: float, words: list[str], dataset: Any, held_out: Any, steps: int, device: str) -> bool:
    """Train, compare, print; True if the bar is met."""
    config = compose(["experiment=image-digits", *words])
    built = build(config, dataset.facts, seed=0)
    interval = min(config["trainer"]["save_every"], config["trainer"]["preview_every"])
    config["trainer"] |= {"steps": steps, "save_every": steps, "preview_every": steps, "device": device}
    parts = Parts(built.adapter, built.process, built.denoiser, built.objective, dataset, held_out, dataset.facts)
    watch = Alternating(parts, config, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        fit(replace(parts, objective=watch), config, Path(folder) / "run", quiet=True)
        last = watch.now() - watch.resumed
    blocks = list(zip(watch.ours, watch.theirs[1:], strict=False))[
        2:
    ]  # a block of ours and the bare one right after it
    ratio = statistics.median(theirs / ours for ours, theirs in blocks)
    ours, theirs = (statistics.median(column) / BLOCK for column in zip(*blocks, strict=True))
    extra = (
        (last - BLOCK * ours) / interval / ours
    )  # the last save, held-out loss and preview, spread over their interval
    parameters = sum(p.numel() for p in built.denoiser.parameters()) / 1e6
    print(
        f"loop overhead, {name} ({parameters:.2f} M, batch {config['trainer']['batch']}): {config['trainer']['batch'] / ours:,.0f} "
        f"against {config['trainer']['batch'] / theirs:,.0f} items/s: {ratio:.1%} (bar: {bar:.0%}), saves and previews every "
        f"{interval} steps cost {extra:.1%} more; {len(blocks)} blocks: {'met' if ratio >= bar else 'MISSED'}"
    )
    return ratio >= bar


def main(steps: int, device: str, only: str) -> int:
    """Run the bar; 0 if it is met."""
    met = []
    if only in ("", "digits"):
        path = data.locate("digits")
        config = compose(["experiment=image-digits"])
        from polydiff.core import adapter as adapters

        adapter = adapters.load(config["adapter"])
        train, test = (adapter.dataset(str(path), split, **config["data"]["options"]) for split in ("train", "test"))
        met.append(measure("digits", 0.90, [], train, test, steps, device))
    if only in ("", "large"):
        words = ["network.channels=96", "network.multipliers=[1,2,2]", "network.blocks=2", "trainer.batch=16"]
        met.append(measure("large", 0.95, words, Patterns(512), Patterns(32), max(24, steps // 2), device))
    print(machine(device))
    return 0 if all(met) else 1


if __name__ == "__main__":
    given = arguments()
    raise SystemExit(main(int(given.get("steps", 100)), given.get("device", "cpu"), given.get("only", "")))
