"""Checkpoints that are damaged, incomplete, hostile or half-written: one clear CheckpointError, never another model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polydiff.core.errors import CheckpointError
from polydiff.core.training import checkpoint
from polydiff.core.training.resume import Lock

FILES = ("model.safetensors", "ema.safetensors", "train.safetensors", "state.json", "config.yaml", "manifest.json")
CONFIG = {"experiment": "made", "optim": {"lr": 1e-5, "betas": (0.9, 0.99)}, "empty": None}


def tensors(step: int, n: int = 64) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(n, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    return {
        "model": {"weight": weight, "tied": weight, "count": torch.tensor(step)},
        "ema": {"weight": weight + 1},
        "train": {"rng/0/cpu": torch.arange(50, dtype=torch.uint8), "half": weight.bfloat16()},
    }


def save(folder: Path, step: int, n: int = 64, keep_last: int = 3) -> Path:
    return checkpoint.save(folder, step, tensors(step, n), {"adapter": "made", "facts": {"n": 3}}, CONFIG, keep_last)


def same(found: checkpoint.Checkpoint, step: int) -> bool:
    made = {"model": found.model, "ema": found.ema, "train": found.train}
    return found.step == step and all(
        made[part].keys() == values.keys()
        and all(
            torch.equal(made[part][name], value) and made[part][name].dtype == value.dtype
            for name, value in values.items()
        )
        for part, values in tensors(step).items()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("saved") / "run"
    for step in (10, 20):
        save(run / "checkpoints", step)
    return run


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run/checkpoints"


def test_what_was_saved_is_loaded(folder: Path) -> None:
    found = checkpoint.newest(folder)
    assert found is not None and same(found, 20) and found.path.name == "step-00000020"
    assert found.config == {"experiment": "made", "optim": {"lr": 1e-5, "betas": [0.9, 0.99]}, "empty": None}
    assert found.state["facts"] == {"n": 3}
    assert sorted(path.name for path in found.path.iterdir()) == sorted(FILES)
    assert (folder.parent / "LATEST").read_text() == "checkpoints/step-00000020\n"
    assert checkpoint.newest(folder.parent / "nothing") is None


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(folder: Path, name: str) -> None:
    file = folder / "step-00000020" / name
    whole = file.read_bytes()
    for place in {*range(0, len(whole), max(1, len(whole) // 100)), len(whole) - 1}:
        for bit in (0, 5):
            torn = bytearray(whole)
            torn[place] ^= 1 << bit
            file.write_bytes(torn)
            with pytest.raises(CheckpointError, match=r"step-00000020") as error:
                checkpoint.load(folder / "step-00000020")
            assert "\n" not in str(error.value)
    file.write_bytes(whole)
    assert same(checkpoint.load(folder / "step-00000020"), 20)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 0.75, None])
def test_truncated_empty_and_missing_files_are_passed_over_loudly(folder: Path, name: str, part: float | None) -> None:
    file = folder / "step-00000020" / name
    if part is None:
        file.unlink()
    else:
        os.truncate(file, int(file.stat().st_size * part))
    with pytest.raises(CheckpointError, match=name.partition(".")[0]):
        checkpoint.load(folder / "step-00000020")
    with pytest.warns(RuntimeWarning, match="FALLING BACK to step 10"):
        found = checkpoint.newest(folder)
    assert found is not None and same(found, 10)


def test_a_longer_file_is_noticed(folder: Path) -> None:
    with (folder / "step-00000020/ema.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes, found \d+"):
        checkpoint.load(folder / "step-00000020")


def test_all_damaged_is_an_error_and_not_a_fresh_start(folder: Path) -> None:
    for step in (10, 20):
        (folder / f"step-{step:08d}/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is valid"):
        checkpoint.newest(folder)


def forge(path: Path, change: Callable[[dict[str, Any]], None] | None = None, **texts: str) -> None:
    """Rewrite text files and make the manifest agree, as somebody would who means harm."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, text in texts.items():
        file = path / name.replace("__", ".")
        file.write_text(text)
        manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": checkpoint._sha256(file)}
    if change is not None:
        change(manifest)
    manifest.pop("sha256")
    manifest["sha256"] = checkpoint.hashlib.sha256(checkpoint._json(manifest).encode()).hexdigest()
    (path / "manifest.json").write_text(checkpoint._json(manifest))


BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"


@pytest.mark.parametrize(
    "texts",
    [
        {"config__yaml": BOMB},
        {"config__yaml": "!!python/object/apply:os.system ['true']"},
        {"config__yaml": "- a list"},
        {"config__yaml": "a: " + "[" * 5000},
        {"config__yaml": "# " + "x" * (1 << 20)},
        {"state__json": "[" * 100_000},
        {"state__json": "{}"},
        {"state__json": '{"step": -1}'},
        {"state__json": '{"step": "many"}'},
        {"state__json": '{"step": NaN}'},
        {"model__safetensors": "\xff" * 8 + "{}"},
        {"model__safetensors": "no tensors at all"},
    ],
)
def test_forged_contents_are_refused(folder: Path, texts: dict[str, str]) -> None:
    forge(folder / "step-00000020", **texts)
    checkpoint.verify(folder / "step-00000020")  # the manifest alone does not give it away
    with pytest.raises(CheckpointError, match="step-00000020") as error:
        checkpoint.load(folder / "step-00000020")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(format=99), "format 99"),
        (lambda m: m.update(files=[]), "damaged"),
        (lambda m: m["files"].pop("ema.safetensors"), "ema.safetensors"),
        (lambda m: m["files"].update({"state.json": {"size": "8", "sha256": None}}), "state.json"),
    ],
)
def test_forged_manifests_are_refused(folder: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    forge(folder / "step-00000020", change)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.load(folder / "step-00000020")


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{", "\ufffd", '{"sha256": []}'])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "step-00000020/manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.load(folder / "step-00000020")


def test_the_oldest_go_and_only_after_the_new_one_is_verified(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> list[int]:
        return [step for step, _ in checkpoint.steps(folder)]

    save(folder, 30, keep_last=2)
    assert names() == [20, 30]
    monkeypatch.setattr(checkpoint, "verify", lambda path: (_ for _ in ()).throw(CheckpointError(f"{path}: bad disk")))
    with pytest.raises(CheckpointError, match="bad disk"):
        save(folder, 40, keep_last=1)
    assert {20, 30} <= set(names())
    assert (folder.parent / "LATEST").read_text() == "checkpoints/step-00000030\n"


def test_a_damaged_one_is_replaced_when_its_step_comes_again(folder: Path) -> None:
    (folder / "step-00000020/model.safetensors").write_bytes(b"")
    save(folder, 20)
    found = checkpoint.newest(folder)
    assert found is not None and same(found, 20) and not list(folder.glob("*.tmp"))


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned(folder: Path) -> None:
    shutil.copytree(folder / "step-00000020", folder / "step-00000030.tmp")
    found = checkpoint.newest(folder)
    assert found is not None and found.step == 20
    checkpoint.clean(folder)
    assert not list(folder.glob("*.tmp"))
    (folder / "step-00000030.tmp").mkdir()
    (folder / "step-00000030.tmp/model.safetensors").write_bytes(b"torn")
    save(folder, 30)
    found = checkpoint.newest(folder)
    assert found is not None and same(found, 30)


@pytest.mark.parametrize("victim", ["save_file", "_write_manifest", "sync"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, victim, full)
        with pytest.raises(CheckpointError, match="the disk is full") as error:
            save(folder, 30, keep_last=1)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.tmp")) and [step for step, _ in checkpoint.steps(folder)] == [10, 20]
    found = checkpoint.newest(folder)
    assert found is not None and same(found, 20)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system; the same is tested above with a simulated full disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_really_full_disk(tiny_disk: Path) -> None:
    folder = tiny_disk / "run/checkpoints"
    save(folder, 10)
    for n in (6_000, 8_000, 30_000):  # full in the optimizer's file, in the average's, in the first
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(folder, 20, n=n)
        assert not list(folder.glob("*.tmp"))
        found = checkpoint.newest(folder)
        assert found is not None and same(found, 10)
    save(folder, 20)
    found = checkpoint.newest(folder)
    assert found is not None and same(found, 20)


def test_a_read_only_folder(tiny_disk: Path) -> None:
    folder = tiny_disk / "run/checkpoints"
    save(folder, 10)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"cannot be written: Read-only.*run=DIR"):
        save(folder, 20)
    with pytest.raises(CheckpointError, match=r"cannot be written: Read-only.*run=DIR"):
        Lock(tiny_disk / "other")
    found = checkpoint.newest(folder)
    assert found is not None and same(found, 10)
