"""Bar "U-Net quality": the networks of the bar "U-Net speed", trained side by side on MNIST for as long as each other.

    python tests/bars/peer_quality.py [seconds=900] [batch=16] [lr=5e-4] [threads=2] [slice=10] [out=runs/peer-quality]

Ours and diffusers' ``UNet2DModel`` of its fastest shape get the same number of seconds in one process, in turns of ``slice``
seconds, so that a busy machine slows both. Preconditioning, loss, batches, noise, optimiser, learning rate as a function of
the time spent, and average of the weights are the same objects of polydiff's; pictures are padded with black to 32x32, and
no classes are told. Every minute of training the held-out loss of the averaged weights, on the same test pictures with the
same times and noise, goes to ``out/result.json``; there both are saved, too, and the same command goes on from there.
The bar: at the end ours is at most the peer's. Exit code 1 on a miss, 2 where diffusers is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _bars import arguments, check, machine
from torch import Tensor, nn

from polydiff.core import adapter
from polydiff.core.adapter import Item
from polydiff.core.build import data_path
from polydiff.core.denoiser import Denoiser
from polydiff.core.evaluation.features import stack
from polydiff.core.nn import parameter_count
from polydiff.core.objectives import Objective
from polydiff.core.processes import gaussian
from polydiff.core.schedules import as_time
from polydiff.core.training import checkpoint
from polydiff.core.training.ema import EMA
from polydiff.core.training.optimizer import Optimizer, learning_rate
from polydiff.core.training.runtime import Runtime
from polydiff.core.training.state import Meter, TrainState
from polydiff.core.training.stream import Stream, derive

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from unet_peers import diffusers_unet, polydiff_unet

SHAPE = (64, 96, 128, 160)  # of the peer: the faster one of those the bar "U-Net speed" times
DEFAULTS = {
    "seconds": "900",
    "slice": "10",
    "batch": "16",
    "lr": "5e-4",
    "seed": "0",
    "n": "2000",
    "threads": "2",
    "every": "60",
    "out": "runs/peer-quality",
}
OPTIM: dict[str, Any] = {"warmup": 100, "decay": "cosine", "ema_halflife": 50_000, "ema_warmup": 0.05, "clip": 1.0}


class Peer(nn.Module):
    """A peer's network behind the signature of ours, its noise level stretched over the 0 to 1000 it was made for."""

    def __init__(self, network: nn.Module, process: Any) -> None:
        super().__init__()
        self.network = network
        ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
        low, high = (-0.25 * process.schedule.log_snr(as_time(ends))).tolist()
        self.low, self.scale = low, 1000 / (high - low)

    def forward(self, x_t: Tensor, c_noise: Tensor, mask: Any, cond: Any, present: Any) -> Tensor:
        """Apply the peer."""
        return self.network(x_t, (c_noise - self.low) * self.scale).sample


class Ours(nn.Module):
    """Our network, told the noise level alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, c_noise: Tensor, mask: Any, cond: Any, present: Any) -> Tensor:
        """Apply the network."""
        return self.network(x_t, c_noise)


class Side:
    """One of the two trainings: its state, and the seconds it has had."""

    def __init__(self, name: str, network: nn.Module, task: Task, options: dict[str, str]) -> None:
        self.name, self.task, self.seed = name, task, int(options["seed"])
        self.lr, self.seconds = float(options["lr"]), float(options["seconds"])
        self.folder = Path(options["out"]) / name
        denoiser = Denoiser(network, task.process, "edm", task.sigma_data).train()
        optimizer = Optimizer(denoiser, lr=self.lr, clip=OPTIM["clip"])
        ema = EMA(denoiser, OPTIM["ema_halflife"], OPTIM["ema_warmup"])
        self.state = TrainState(denoiser, ema, optimizer, Meter(("loss",), torch.device("cpu")))
        self.runtime, self.used = Runtime("cpu"), 0.0
        found = checkpoint.newest(self.folder / "checkpoints")
        if found is not None:
            self.state.load(found, self.runtime, self.seed)
            self.used = float(found.state["wall_s"])

    def train(self, seconds: float) -> None:
        """Train for that long, at least one step."""
        start = now = time.perf_counter()
        before = self.used
        while now - start < seconds:
            self.step()
            now = time.perf_counter()
            self.used = before + now - start

    def step(self) -> None:
        """One step."""
        state, task = self.state, self.task
        spent = self.used / self.seconds
        lr = learning_rate(
            state.step, sys.maxsize, lr=self.lr, warmup=OPTIM["warmup"], decay=OPTIM["decay"], spent=spent
        )
        rows = [index for _, index in task.stream.keys(state.step, 0)]
        generator = torch.Generator().manual_seed(derive(self.seed, "noise", state.step, 0))
        loss = task.objective(state.module, Item(task.train[rows]), generator)["loss"].mean()
        loss.backward()
        _, skipped = state.optimizer.step(lr, loss.detach())
        state.ema.update(task.stream.batch, skipped)
        state.step += 1

    @torch.no_grad()
    def held_out(self) -> float:
        """The weighted loss of the averaged weights, on the same pictures, times and noise for either side."""
        generator = torch.Generator().manual_seed(derive(0, "held-out"))
        parts = self.task.test.split(100)
        losses = [self.task.objective(self.state.ema.module, Item(x), generator)["loss"] for x in parts]
        return float(torch.cat(losses).double().mean())

    def save(self) -> None:
        """Save everything that the rest depends on."""
        record = {"wall_s": self.used, "processes": 1, "device": "cpu"}
        checkpoint.save(self.folder / "checkpoints", self.state.step, self.state.tensors(self.runtime), record, {}, 1)


class Task:
    """What both learn: MNIST padded to 32x32, the objective, and which items each step sees."""

    def __init__(self, options: dict[str, str]) -> None:
        path, data = data_path({"name": "mnist", "path": None}), adapter.load("image")
        self.train, self.test = (
            F.pad(stack(list(data.dataset(path, split))), (2, 2, 2, 2), value=-1.0) for split in ("train", "test")
        )
        self.test = self.test[:: max(1, len(self.test) // int(options["n"]))][: int(options["n"])]
        self.sigma_data = float(self.train.double().std())
        self.process = gaussian("edm")
        self.objective = Objective(self.process, sigma_data=self.sigma_data)
        self.stream = Stream(len(self.train), int(options["batch"]), int(options["seed"]))


def main() -> int:
    """Run the bar; 0 if it is met."""
    options = {**DEFAULTS, **arguments()}
    if wrong := options.keys() - DEFAULTS:
        raise SystemExit(f"unknown option {min(wrong)!r}; valid: {', '.join(DEFAULTS)}")
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed here: pip install polydiff diffusers")
        return 2
    torch.set_num_threads(int(options["threads"]))
    seconds, every = float(options["seconds"]), float(options["every"])
    task, result = Task(options), Path(options["out"]) / "result.json"
    fixed = {name: options[name] for name in ("seconds", "batch", "lr", "seed", "n")}
    record: dict[str, Any] = {"options": fixed, "machine": machine(), "rows": []}
    if result.exists():
        record = json.loads(result.read_text())
        if record["options"] != fixed:
            raise SystemExit(f"{result} is of other options, {record['options']}: choose another folder with out=DIR")
    torch.manual_seed(int(options["seed"]))
    ours = Side("polydiff", Ours(polydiff_unet(1)[0]), task, options)
    peer = Side("diffusers", Peer(diffusers_unet(*SHAPE, field=1)[0], task.process), task, options)
    sides, rows = (ours, peer), record["rows"]
    record["parameters"] = {side.name: parameter_count(side.state.module) for side in sides}
    while not rows or rows[-1]["seconds"] < seconds:
        mark = min(seconds, every * (len(rows) + 1))
        while (side := min(sides, key=lambda side: side.used)).used < mark:
            side.train(min(float(options["slice"]), mark - side.used))
        row: dict[str, Any] = {"seconds": mark}
        for side in sides:
            seen = {"steps": side.state.step, "items": side.state.step * task.stream.batch, "used": side.used}
            row[side.name] = {"loss": side.held_out(), **seen}
            side.save()
        rows.append(row)
        checkpoint.replace_text(result, json.dumps(record, indent=1) + "\n")
        words = (f"{s.name} {row[s.name]['loss']:.4f} ({row[s.name]['items']} items)" for s in sides)
        print(f"{mark:5.0f} s: held-out loss {', '.join(words)}", flush=True)
    last = rows[-1]
    for side in sides:
        print(f"  {side.name}: {record['parameters'][side.name] / 1e6:.2f} M parameters, {last[side.name]}")
    print(f"U-Net quality: {len(task.test)} test pictures, {fixed}; {record['machine']}")
    ratio = last["polydiff"]["loss"] / last["diffusers"]["loss"]
    return 0 if check("held-out loss over the peer's after equal time", ratio, 1.0) else 1


if __name__ == "__main__":
    raise SystemExit(main())
