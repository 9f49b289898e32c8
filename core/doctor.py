"""What ``polydiff doctor`` looks at on this machine; a data set or a run is looked at by its adapter."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from polydiff import __version__
from polydiff.core import adapter as adapters
from polydiff.core.adapter import Finding
from polydiff.core.build import data_path
from polydiff.core.errors import PolydiffError
from polydiff.core.run import Run
from polydiff.core.training import checkpoint as checkpoints

PACKAGES = ("torch", "torchaudio", "numpy", "h5py", "hydra-core", "safetensors", "accelerate")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ENOUGH_BYTES = 2 * 10**9


def machine() -> Iterator[Finding]:
    """Versions, devices, optional parts and disk space."""
    yield Finding(
        "ok", f"polydiff {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    for name in PACKAGES:
        try:
            yield Finding("ok", f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding("fail", f"{name} is not installed", "pip install polydiff")
    yield from _devices()
    yield _imports("torchaudio", "sounds cannot be read; install the build that belongs to this torch")
    yield _imports("torch.utils.tensorboard", "train with logger=jsonl, or pip install tensorboard")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    yield Finding(
        "ok",
        f"browser for the tests of reports: {found}"
        if found
        else "no Chromium: the tests of reports in a browser are skipped",
    )
    yield _disk()


def data_set(path: Path) -> Iterator[Finding]:
    """Is a data file whole, and what its adapter says about it."""
    from polydiff.data.h5 import Reader

    try:
        reader = Reader(path)
        adapter = adapters.load(str(reader.attributes["modality"]))
        yield Finding("ok", f"{path}: {reader.attributes['name']}, {len(reader)} items for the adapter {adapter.name}")
        yield from adapter.checks(path, None)
    except PolydiffError as error:
        yield Finding("fail", str(error))


def run_folder(path: Path, network: str | None = None) -> Iterator[Finding]:
    """Are the checkpoints of a run valid, does it load, is its data there, and what its adapter says about it."""
    for step, folder in checkpoints.steps(path / "checkpoints"):
        try:
            checkpoints.verify(folder)
            yield Finding("ok", f"checkpoint of step {step} is whole")
        except PolydiffError as error:
            yield Finding("fail", str(error), "remove it; training goes on from the one before")
    try:
        run = Run.load(path, "cpu", network)
    except PolydiffError as error:
        yield Finding("fail", str(error))
        return
    yield Finding("ok", f"{path}: {run.config['experiment']}, adapter {run.adapter.name}, step {run.step}")
    data: Path | None = None
    try:
        data = data_path(run.config["data"])
        if run.dataset("train", data).facts.get("sha256") != run.facts.get("sha256"):
            yield Finding(
                "warn", f"{data} is not the data this run was trained on", "compare with the one it was trained on"
            )
    except PolydiffError as error:
        yield Finding("warn", str(error))
    yield from run.adapter.checks(data, run)


def _devices() -> Iterator[Finding]:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    yield Finding("ok", f"processor: {cores} cores, torch uses {threads} threads")
    for index in range(torch.cuda.device_count()):
        device: Any = torch.cuda.get_device_properties(index)
        yield Finding(
            "ok", f"cuda:{index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("ok", f"no CUDA device ({built}); training runs on the processor")


def _imports(name: str, remedy: str) -> Finding:
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a broken build fails in as many ways as there are linkers
        return Finding(
            "warn", f"{name} cannot be imported: {str(error).splitlines()[0] if str(error) else error!r}", remedy
        )
    return Finding("ok", f"{name} can be imported")


def _disk() -> Finding:
    from polydiff import data

    folder = data.folder()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    remedy = "set POLYDIFF_DATA to a folder with more space"
    if not os.access(there, os.W_OK):
        return Finding("warn", f"data folder {folder} cannot be written", remedy)
    return Finding("ok" if free > ENOUGH_BYTES else "warn", f"data folder {folder}: {free / 1e9:.1f} GB free", remedy)
