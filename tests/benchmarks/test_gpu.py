"""The benchmark script runs on a CPU, too, and writes what it prints; what is timed beside peers is what is trained."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from polydiff.core.commands.compose import compose
from polydiff.core.nn.unet import UNet


def test_the_script_measures_training_and_sampling(root: Path, tmp_path: Path) -> None:
    words = [
        "device=cpu",
        "models=image-mnist/unet-small",
        "modes=bf16",
        "batch=2",
        "steps=1",
        "rounds=1",
        "evaluations=2",
    ]
    command = [sys.executable, str(root / "tests/benchmarks/gpu.py"), *words, "peak=1", "network.channels=8"]
    done = subprocess.run([*command, f"out={tmp_path}"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert (row["model"], row["mode"], row["batch"]) == ("image-mnist/unet-small", "bf16", 2)
    assert row["train_items_per_s"] > 0 and row["sample_items_per_s"] > 0 and row["train_bytes"] > 0
    share = row["gflop_per_item"] * 1e9 * row["train_items_per_s"] / 1e12
    assert abs(float(row["mfu"].rstrip("%")) / 100 - share) < 1e-3
    assert f"{row['parameters'] / 1e6:.2f} M" in done.stdout


def test_the_network_timed_beside_peers_is_that_of_the_experiment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(root / "tests/benchmarks")
    timed, _ = importlib.import_module("unet_peers").polydiff_unet()
    options = dict(compose(["experiment=image-cifar10-small"])["network"])
    assert options.pop("name") == "unet"
    shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (timed, UNet(2, 3, **options))]
    assert shapes[0] == shapes[1]
