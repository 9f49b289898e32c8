"""Checkpoints that exist only when they are whole: folders written aside, synced, renamed, and verified before use.

``step-XXXXXXXX/`` holds ``model.safetensors``, ``ema.safetensors``, ``train.safetensors`` (optimizer, random states, sums
of the log), ``state.json``, ``config.yaml`` and ``manifest.json`` with size and SHA-256 of each. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polydiff import __version__
from polydiff.core.build import plain_yaml
from polydiff.core.errors import CheckpointError

FORMAT = 1
TENSORS = ("model", "ema", "train")
FILES = (*(f"{name}.safetensors" for name in TENSORS), "state.json", "config.yaml")
LARGEST_TEXT = 1 << 20  # bytes of manifest.json, state.json, config.yaml
_FOLDER = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, tensors on the CPU."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    train: dict[str, Tensor]
    state: dict[str, Any]
    config: dict[str, Any]
    path: Path


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    keep_last: int = 3,
) -> Path:
    """Write ``folder/step-XXXXXXXX`` atomically, point ``LATEST`` beside ``folder`` at it, then drop the oldest ones.

    Args:
        folder: ``run/checkpoints``.
        step: steps completed.
        tensors: dictionaries named ``model``, ``ema`` and ``train``.
        state: JSON-able; ``step`` is added.
        config: the resolved configuration.
        keep_last: checkpoints to keep; older ones go only after the new one was read back and verified.
    Returns:
        The new folder.
    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or what was written does not verify. Earlier
            checkpoints are untouched then, and nothing half-written is left.
    """
    final = folder / f"step-{step:08d}"
    part = final.with_suffix(".tmp")
    try:
        with _written(final, part):
            for name in TENSORS:
                save_file(_plain(tensors[name]), part / f"{name}.safetensors", metadata={"format": "pt"})
            (part / "state.json").write_text(_json({**state, "step": step}), encoding="utf-8")
            (part / "config.yaml").write_text(config_text(config), encoding="utf-8")
            _write_manifest(part, str(state.get("adapter", "")))
            for path in (*part.iterdir(), part):
                sync(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_why(final, error)) from error
    verify(final)
    replace_text(folder.parent / "LATEST", f"{folder.name}/{final.name}\n")
    for old in [path for number, path in steps(folder) if number <= step][: -max(1, keep_last)]:
        shutil.rmtree(old, ignore_errors=True)  # a folder that cannot be removed is no reason to stop training
    return final


def load(path: Path) -> Checkpoint:
    """Read one checkpoint after verifying its manifest.

    Raises:
        CheckpointError: missing, incomplete, altered, or of a later format; names the file, what was expected and found.
    """
    verify(path)
    try:
        state = json.loads(_text(path / "state.json"))
        config = plain_yaml(_text(path / "config.yaml"))
        tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSORS}
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or step < 0:
        raise CheckpointError(f"{path}: state.json or config.yaml is not what a checkpoint holds")
    return Checkpoint(step, tensors["model"], tensors["ema"], tensors["train"], state, config, path)


def newest(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint of a run; None if there is none at all.

    Warns for each newer one that had to be passed over.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    broken: list[CheckpointError] = []
    for _, path in reversed(steps(folder)):
        try:
            found = load(path)
        except CheckpointError as error:
            broken.append(error)
            continue
        for problem in broken:
            warnings.warn(f"FALLING BACK to step {found.step}: {problem}", RuntimeWarning, stacklevel=2)
        return found
    if broken:
        raise CheckpointError(f"{folder}: none of the {len(broken)} checkpoints is valid; the newest: {broken[0]}")
    return None


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest, and the manifest against itself.

    Raises:
        CheckpointError: naming the file, what was expected and what was found.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: no manifest.json, so not a (complete) checkpoint")
    try:
        manifest = json.loads(_text(manifest_path))
        claimed = manifest.pop("sha256")
        found = hashlib.sha256(_json(manifest).encode()).hexdigest()
        files, number = manifest["files"], manifest["format"]
        entries = {name: (files[name]["size"], files[name]["sha256"]) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{manifest_path}: damaged ({type(error).__name__}: {error})") from error
    if found != claimed:
        raise CheckpointError(f"{manifest_path}: damaged (expected SHA-256 {claimed}, found {found})")
    if number != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {number}, but this polydiff {__version__} reads {FORMAT}")
    for name, (size, digest) in entries.items():
        file = path / name
        try:
            if file.stat().st_size != size:
                raise CheckpointError(
                    f"{file}: truncated or altered: expected {size} bytes, found {file.stat().st_size}"
                )
            actual = _sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        if actual != digest:
            raise CheckpointError(f"{file}: altered: expected SHA-256 {digest}, found {actual}")


def steps(folder: Path) -> list[tuple[int, Path]]:
    """All finished checkpoints of a folder, oldest first; unfinished ``.tmp`` ones are not listed."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if path.is_dir() and (match := _FOLDER.match(path.name))]
    return sorted((int(match.group(1)), path) for match, path in named)


def clean(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as ``config.yaml`` holds it: plain YAML, also of tuples and of dictionaries of other kinds."""
    return str(yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True))


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_text(text, encoding="utf-8")
        sync(part)
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(_why(path, error)) from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _written(final: Path, part: Path) -> Iterator[None]:
    """Fill ``part`` in the body, then make it ``final``; on any error remove it."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield
        aside = final.with_suffix(".old.tmp")
        if final.exists():  # an invalid one that a resume passed over, or the same step once more
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        part.rename(final)
        sync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write_manifest(part: Path, adapter: str) -> None:
    files = {name: {"size": (part / name).stat().st_size, "sha256": _sha256(part / name)} for name in FILES}
    versions = {"polydiff": __version__, "torch": torch.__version__, "safetensors": version("safetensors")}
    manifest = {"format": FORMAT, "adapter": adapter, "versions": versions, "files": files}
    manifest["sha256"] = hashlib.sha256(_json(manifest).encode()).hexdigest()
    (part / "manifest.json").write_text(_json(manifest), encoding="utf-8")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Own, contiguous copies on the CPU: tied weights would otherwise share memory, which safetensors refuses."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _text(path: Path) -> str:
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path.name} is larger than {LARGEST_TEXT} bytes")
    return path.read_text(encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why(path: Path, error: Exception) -> str:
    """One line for a write that failed."""
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return f"{path} cannot be written: the disk is full; free some space and start the same command again"
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} cannot be written: {getattr(error, 'strerror', text)}; choose another folder with run=DIR"
    return f"{path} cannot be written: {getattr(error, 'strerror', None) or text}"
