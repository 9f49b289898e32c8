"""What the shipped picture models cost on a device: training and sampling, eager, compiled and in bf16.

    python tests/benchmarks/gpu.py [device=auto] [models=EXPERIMENT/NETWORK,...] [modes=fp32,bf16,fp32+compile,
        bf16+compile] [batch=0] [steps=20] [rounds=5] [evaluations=20] [peak=TFLOPS] [out=runs/gpu] [network.key=value ...]

Training is the loop's own step on random pictures of the right size: reading, loss, backward, clipping, AdamW, average.
Sampling draws ``batch`` items with dpmpp-2m as ``polydiff sample`` does. Images/s are medians over ``rounds`` of ``steps`` steps;
MFU counts matrix products and convolutions, forward and backward, against the device's peak (``peak=`` replaces the table's).
``batch=0``: 256 on a GPU, else the experiment's own. One line a model and mode; all numbers go to ``out/speed.json`` after each of them.

    python tests/benchmarks/gpu.py train=SECONDS [experiment=image-cifar10-small] [piece=480] [kill=60] [out=...] [key=value ...]

is the real training run that goes with it: see ``_training.py``.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _device import operations, peak, synchronize, utilisation
from _training import train

from polydiff.core.adapter import Item
from polydiff.core.build import Built, build
from polydiff.core.commands.compose import compose
from polydiff.core.run import Run, pick_device
from polydiff.core.training.checkpoint import replace_text
from polydiff.core.training.loop import Parts
from polydiff.core.training.runtime import Interrupt, Runtime
from polydiff.core.training.trainer import Trainer

SIZES = {"image-mnist": (28, 28, 1), "image-cifar10": (32, 32, 3), "image-cifar10-small": (32, 32, 3)}
MODELS = (
    "image-mnist/unet-small",
    "image-mnist/dit-small",
    "image-cifar10-small/unet-medium",
    "image-cifar10-small/dit",
    "image-cifar10/unet-large",
)
DEFAULTS = {
    "device": "auto",
    "models": ",".join(MODELS),
    "modes": "fp32,bf16,fp32+compile,bf16+compile",
    "batch": "0",
    "steps": "20",
    "rounds": "5",
    "evaluations": "20",
    "peak": "",
    "out": "runs/gpu",
    "train": "",
    "experiment": "image-cifar10-small",
    "piece": "480",
    "kill": "60",
    "points": "6",
    "n": "5000",
}


class Pictures:
    """Random pictures with classes, held in memory as a stored split is."""

    def __init__(self, size: tuple[int, int, int], n: int = 4096) -> None:
        height, width, channels = size
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(n, channels, height, width, generator=generator) * 2 - 1
        self.label = torch.arange(n) % 10
        self.facts: dict[str, Any] = {
            "name": "random",
            "n": n,
            "sigma_data": 0.58,
            "classes": {"label": [str(k) for k in range(10)]},
            "size": {"height": height, "width": width, "channels": channels},
        }

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> list[Item]:
        rows = zip(self.x[indices].unbind(), self.label[indices].unbind(), strict=True)
        return [Item(x, None, {"label": label}) for x, label in rows]


def seconds_each(run: Any, rounds: int, steps: int, device: torch.device) -> float:
    """Median over ``rounds`` of the seconds of one of ``steps`` calls, waiting for the device only between rounds."""
    took = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            run()
        synchronize(device)
        took.append((time.perf_counter() - start) / steps)
    return median(took)


def memory(device: torch.device) -> int:
    """Most bytes in use: of the device since the last reset, or of this process on a CPU, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(model: str, mode: str, options: dict[str, str], words: list[str], device: torch.device) -> dict[str, Any]:
    """Time one model in one mode."""
    experiment, network = model.split("/")
    precision, _, compiled = mode.partition("+")
    words = [f"experiment={experiment}", f"network={network}", *words, f"trainer.precision={precision}"]
    config = compose([*words, f"trainer.compile={str(bool(compiled)).lower()}", f"trainer.device={device.type}"])
    batch = int(options["batch"]) or (256 if device.type == "cuda" else config["trainer"]["batch"])
    config["trainer"] |= {"batch": batch, "steps": 10**9}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds, steps = int(options["rounds"]), int(options["steps"])
    data = Pictures(SIZES[experiment])
    built = build(config, data.facts, seed=0)
    parts = Parts(built.adapter, built.process, built.denoiser, built.objective, data, None, data.facts)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        interrupt = stack.enter_context(Interrupt())
        trainer = Trainer(parts, config, folder, Runtime(device.type, precision), interrupt)
        work = operations_of_an_item(built, data, device)
        trainer.restore(None, None)
        batches = trainer._batches()

        def step() -> None:
            trainer._step(batches)
            trainer.state.step += 1

        began = time.perf_counter()
        step()
        synchronize(device)
        first = time.perf_counter() - began  # most of it is compiling
        seconds_each(step, 1, min(steps, 10), device)  # warm-up
        seconds = seconds_each(step, rounds, steps, device)
        row = {"model": model, "mode": mode, "batch": batch, "first_step_s": round(first, 2)}
        row["parameters"] = sum(p.numel() for p in built.denoiser.parameters())
        row |= {"train_items_per_s": batch / seconds, "gflop_per_item": work / 1e9, "train_bytes": memory(device)}
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        row["mfu"] = utilisation(work * batch, seconds, peak(device, dtype, options["peak"]))
        built.denoiser.eval().requires_grad_(False)
        run = Run(folder, config, data.facts, built, 0)
        run.device = device
        evaluations = int(options["evaluations"])

        def draw() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                run.sample(batch, {"label": list(range(10))}, solver="dpmpp-2m", steps=evaluations, batch=batch)

        draw()
        row |= {"sample_items_per_s": batch / seconds_each(draw, min(rounds, 3), 1, device), "evaluations": evaluations}
    torch._dynamo.reset()
    return row


def operations_of_an_item(built: Built, data: Pictures, device: torch.device) -> float:
    """Operations of one item in training, counted before anything is compiled; leaves no gradient behind."""
    item = built.adapter.collate(data.__getitems__([0, 1]))
    x, label = torch.as_tensor(item.x).to(device), item.cond["label"].to(device)
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        built.objective(built.denoiser, Item(x, None, {"label": label}), generator)["loss"].mean().backward()

    work = operations(step) / 2
    built.denoiser.zero_grad(set_to_none=True)
    return work


def main(words: list[str]) -> int:
    """Measure, or train; the exit code."""
    own = [word for word in words if word.partition("=")[0] in DEFAULTS]
    rest = [word for word in words if word.partition("=")[0] not in DEFAULTS]
    options = {**DEFAULTS, **dict(word.split("=", 1) for word in own)}
    device = pick_device(options["device"])
    if options["train"]:
        return train(options, rest, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options}", flush=True)
    rows: list[dict[str, Any]] = []
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    for model in options["models"].split(","):
        for mode in options["modes"].split(","):
            try:
                row = measure(model, mode, options, rest, device)
            except torch.OutOfMemoryError as error:
                row = {"model": model, "mode": mode, "error": str(error).splitlines()[0]}
            rows.append(row)
            replace_text(out / "speed.json", json.dumps({"device": name, "options": options, "rows": rows}, indent=1))
            print(told(row), flush=True)
    print(f"wrote {out / 'speed.json'}")
    return 0


def told(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['model']:26s} {row['mode']:13s} {row['error']}"
    return (
        f"{row['model']:26s} {row['mode']:13s} {row['parameters'] / 1e6:6.2f} M  batch {row['batch']:4d}  "
        f"train {row['train_items_per_s']:9.1f} items/s, MFU {row['mfu']}, {row['train_bytes'] / 2**30:.2f} GiB; "
        f"sample {row['sample_items_per_s']:8.1f} items/s at {row['evaluations']} evaluations; "
        f"first step {row['first_step_s']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
