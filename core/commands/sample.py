"""``polydiff sample``: draw samples from a run and write them as files with a ``samples.json`` beside them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from polydiff.core.commands import options
from polydiff.core.commands.options import Prefix
from polydiff.core.errors import ConfigError, unknown

if TYPE_CHECKING:
    from polydiff.core.adapter import Item
    from polydiff.core.run import Run

RECORD = "samples.json"
GIVEN = "given"  # folder of what a task was given
SECONDS_TO_LOCK = 60.0  # a draft younger than this may belong to a process that is about to lock it


@dataclass(frozen=True)
class Options:
    """What ``polydiff sample`` takes."""

    run: Annotated[Path, "folder of a trained model"]
    n: Annotated[int, "how many"] = 16
    solver: Annotated[str | None, "a solver's name; null: the run's own (polydiff list solvers)"] = None
    grid: Annotated[str | None, "how its steps are spread; null: the run's own (polydiff list grids)"] = None
    steps: Annotated[int | None, "number of steps; null: the run's own"] = None
    seed: Annotated[int, "sample k depends on seed and k alone"] = 0
    guidance: Annotated[float | None, "classifier-free guidance, 1 is none; null: the run's own"] = None
    cond: Annotated[
        dict[str, Any], "a condition: index, name, file or folder, a list that cycles, null for without"
    ] = field(default_factory=dict)
    size: Annotated[dict[str, Any], "another size than in training"] = field(default_factory=dict)
    task: Annotated[str | None, "work on something given instead of on nothing (polydiff list tasks)"] = None
    input: Annotated[Path | None, "what the task works on: a file, or a folder whose files take turns"] = None
    task_options: Annotated[dict[str, Any], "an option of the task; polydiff list tasks has them", Prefix("task")] = (
        field(default_factory=dict)
    )
    out: Annotated[Path | None, "folder to write; null: RUN/samples/[TASK-]SOLVER-STEPS-seedSEED"] = None
    format: Annotated[str | None, "file format; null: the adapter's first"] = None
    batch: Annotated[int, "samples drawn at a time"] = 64
    deterministic_batch: Annotated[int | None, "pad every network call to this many: same bits for any n"] = None
    device: Annotated[str, "auto, cpu, cuda"] = "auto"
    network: Annotated[str | None, "import path of the network, for a run trained with one"] = None


def explain() -> str:
    """Help text."""
    return options.explain(
        Options,
        "polydiff sample run=runs/image-digits",
        "polydiff sample run=runs/image-digits n=10 'cond.label=[0,1,2]' solver=heun steps=50 guidance=1.5",
        "polydiff sample run=runs/image-digits task=inpaint input=photo.png 'task.box=[2,2,4,4]'",
    )


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    chosen = options.parse(Options, words)

    from polydiff.core.progress import progress
    from polydiff.core.request import positive
    from polydiff.core.run import Run

    positive(n=chosen.n, batch=chosen.batch)
    run = Run.load(chosen.run, chosen.device, chosen.network)
    settings = run.settings(chosen.solver, chosen.grid, chosen.steps, chosen.guidance)
    codec = run.adapter.codec(run.facts)
    if chosen.format is not None and chosen.format not in codec.formats:
        raise unknown("format", chosen.format, codec.formats)
    if chosen.task is None and (chosen.input is not None or chosen.task_options):
        raise ConfigError("input= and task.<key>= say how a task works: add task=NAME")
    record = {
        "format_version": 1,
        "adapter": run.adapter.name,
        "experiment": run.config["experiment"],
        "checkpoint_step": run.step,
        "seed": chosen.seed,
        **asdict(settings),
        "n": chosen.n,
        "cond": chosen.cond,
        "size": chosen.size,
        "format": chosen.format or codec.formats[0],
        "deterministic_batch": chosen.deterministic_batch,
        "facts": run.facts,
    }
    if chosen.task is not None:
        record["task"] = _task(run, chosen)
    run.check_count(chosen.n, chosen.size)
    folder = choose_folder(run.path, chosen.out, record)
    with replacing(folder) as draft, progress("sample", chosen.n) as advance:
        items = run.sample(
            chosen.n,
            cond=chosen.cond,
            size=chosen.size,
            solver=chosen.solver,
            steps=chosen.steps,
            grid=chosen.grid,
            guidance=chosen.guidance,
            seed=chosen.seed,
            batch=chosen.batch,
            deterministic_batch=chosen.deterministic_batch,
            advance=advance,
            task=chosen.task,
            input=chosen.input,
            options=chosen.task_options,
        )
        files = codec.write(items, draft, chosen.format)
        given = write_given(codec, items, draft, chosen.format)
        record["samples"] = [
            _entry(run, item, file, k, given.get(k)) for k, (item, file) in enumerate(zip(items, files, strict=True))
        ]
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"{chosen.n} samples of step {run.step}, {settings.solver} on {settings.grid}, {settings.steps} steps, on {run.device}"
    )
    print(f"wrote {folder}{os.sep} ({record['format']} files and {RECORD})")
    return 0


def choose_folder(run: Path, out: Path | None, record: dict[str, Any]) -> Path:
    """Where samples with these settings go: a folder that is new, empty, or holds samples of the same settings alone.

    Without ``out`` a number is added to the name while another set of samples has it: nothing is overwritten.

    Raises:
        ConfigError: ``out`` holds something else; the message names it.
    """
    if out is not None:
        differing = _occupied(out, record)
        if differing:
            raise ConfigError(f"out={out} {differing}: choose another folder")
        return out
    task = f"{record['task']['name']}-" if "task" in record else ""
    name = f"{task}{record['solver']}-{record['steps']}-seed{record['seed']}"
    number = 1
    while True:
        folder = run / "samples" / (name if number == 1 else f"{name}-{number}")
        if not _occupied(folder, record):
            return folder
        number += 1


def _occupied(folder: Path, record: dict[str, Any]) -> str:
    """Why a folder cannot take these samples; empty when it can."""
    if folder.exists() and not folder.is_dir():
        return "is a file"
    if not folder.is_dir() or not any(folder.iterdir()):
        return ""
    try:
        old = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"exists and has no {RECORD}, so it is no folder of samples"
    same = isinstance(old, dict) and json.loads(json.dumps(record)) == {k: v for k, v in old.items() if k != "samples"}
    if not same:
        return "holds samples of other settings"
    entries = old.get("samples")
    own = {entry.get("file") for entry in entries if isinstance(entry, dict)} if isinstance(entries, list) else set()
    own |= {RECORD, *([GIVEN] if "task" in record else [])}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    return f"also holds {others[0]}" if others else ""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A draft folder beside ``folder`` that takes its name when the block ends, and vanishes when it fails.

    What a killed process left behind vanishes too: a draft is locked, and a lock dies with its process.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{escape(folder.name)}.????????"):
        if left.is_dir() and time.time() - left.stat().st_mtime > SECONDS_TO_LOCK:
            _remove_abandoned(left)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    lock = _lock(draft)
    try:
        draft.chmod(0o777 & ~_umask())
        yield draft
        if folder.exists():
            old = draft.with_name(draft.name + ".old")
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None if another process has it, or where there are no such locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


def _remove_abandoned(draft: Path) -> None:
    lock = _lock(draft)
    if lock is not None:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_given(codec: Any, items: Sequence[Item], folder: Path, format: str | None) -> dict[int, str]:
    """Write what a task was given into a folder beside its samples, equal things once; the file of each sample."""
    from polydiff.core.tree import leaves

    distinct: dict[tuple[bytes, ...], Item] = {}
    keys: dict[int, tuple[bytes, ...]] = {}
    for k, item in enumerate(items):
        if (given := item.meta.get("given")) is not None:
            keys[k] = tuple(leaf.contiguous().numpy().tobytes() for leaf in leaves(given.x))
            distinct.setdefault(keys[k], given)
    if not distinct:
        return {}
    paths = codec.write(list(distinct.values()), folder / GIVEN, format)
    files = {key: f"{GIVEN}/{Path(path).name}" for key, path in zip(distinct, paths, strict=True)}
    return {k: files[key] for k, key in keys.items()}


def _task(run: Run, chosen: Options) -> dict[str, Any]:
    """What the record says of the task: its options with their defaults, as JSON has them."""
    from polydiff.core.tasks import choose

    _, settings = choose(run.adapter, str(chosen.task), chosen.task_options)
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    return {"name": chosen.task, "input": None if chosen.input is None else str(chosen.input), "options": values}


def _entry(run: Run, item: Item, file: Path, k: int, given: str | None = None) -> dict[str, Any]:
    cond: dict[str, Any] = {}
    for name, value in item.cond.items():
        classes, read = (run.facts.get("classes") or {}).get(name), item.meta.get("files", {}).get(name)
        if read is not None:
            cond[name] = {"file": read}
        elif classes is not None:
            cond[name] = {"index": int(value), "name": str(classes[int(value)])}
        else:
            cond[name] = value.tolist()
    entry = {"file": Path(file).name, "index": k, "cond": cond}
    if "task" in item.meta:
        entry |= {"given": given, "task": item.meta["task"]}
    return entry
