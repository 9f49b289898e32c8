"""``polydiff evaluate``: compare what a run generates, or a folder of files, with real data."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from polydiff.core.commands import options
from polydiff.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from polydiff.core.adapter import Adapter, Item, Metric

RESULT = "metrics.json"
MEASURED = ("metrics", "by_seed", "seconds", "device", "notes")  # the rest of a result are its settings


@dataclass(frozen=True)
class Options:
    """What ``polydiff evaluate`` takes."""

    run: Annotated[Path | None, "folder of a trained model"] = None
    n: Annotated[
        int | None, "samples of each seed; null: one for each held-out item; conditions as those are shared"
    ] = None
    seeds: Annotated[int, "repeat with this many seeds and give the mean"] = 1
    seed: Annotated[int, "the first seed"] = 0
    solver: Annotated[str | None, "null: the run's own"] = None
    grid: Annotated[str | None, "null: the run's own"] = None
    steps: Annotated[int | None, "null: the run's own"] = None
    guidance: Annotated[float | None, "null: the run's own"] = None
    split: Annotated[str, "held-out split"] = "test"
    data: Annotated[Path | None, "the data file, when it is no longer where the run says"] = None
    samples: Annotated[Path | None, "instead of run=: a folder of generated files"] = None
    reference: Annotated[Path | None, "with samples=: a folder of real files"] = None
    adapter: Annotated[str | None, "with samples=: who reads them"] = None
    out: Annotated[Path | None, f"folder of {RESULT}; null: RUN/evaluation, or the folder of samples"] = None
    batch: Annotated[int, "samples drawn at a time"] = 64
    inception: Annotated[str, "FID and KID where the adapter has them: auto (if all they need is here) or off"] = "auto"
    inception_weights: Annotated[Path | None, "their weights file; null: where torch keeps downloads"] = None
    device: Annotated[str, "auto, cpu, cuda"] = "auto"
    network: Annotated[str | None, "import path of the network, for a run trained with one"] = None


def explain() -> str:
    """Help text."""
    return options.explain(
        Options,
        "polydiff evaluate run=runs/image-digits",
        "polydiff evaluate run=runs/image-digits seeds=5 guidance=1.5 solver=heun steps=20",
        "polydiff evaluate run=runs/image-mnist n=10000 batch=256",
        "polydiff evaluate samples=generated reference=real adapter=image",
    )


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    chosen = options.parse(Options, words)
    if (chosen.run is None) == (chosen.samples is None):
        raise ConfigError("give either run=DIR, or samples=DIR reference=DIR adapter=NAME")
    if chosen.inception not in ("auto", "off"):
        raise ConfigError(f"inception={chosen.inception} must be auto or off")
    if chosen.inception_weights is not None and not chosen.inception_weights.is_file():
        raise ConfigError(f"inception_weights={chosen.inception_weights}: no such file")
    return _evaluate_run(chosen, chosen.run) if chosen.run is not None else _evaluate_files(chosen)


def _evaluate_run(chosen: Options, path: Path) -> int:
    from polydiff.core.build import data_path
    from polydiff.core.progress import progress
    from polydiff.core.request import lend, positive
    from polydiff.core.run import Run

    positive(seeds=chosen.seeds, batch=chosen.batch, **({} if chosen.n is None else {"n": chosen.n}))
    run = Run.load(path, chosen.device, chosen.network)
    settings = run.settings(chosen.solver, chosen.grid, chosen.steps, chosen.guidance)
    run.check_count(chosen.n or 1)
    file = chosen.data or data_path(run.config["data"])
    train, held_out = (_items(run.dataset(split, file)) for split in ("train", chosen.split))
    folder = chosen.out or path / "evaluation"
    _make(folder)
    n = chosen.n or len(held_out)
    lenders = representative([item.cond for item in held_out], n)
    cond = lend(run.denoiser.conditions, [held_out[i] for i in lenders])
    seeds = list(range(chosen.seed, chosen.seed + chosen.seeds))
    results, notes, seconds = [], dict[str, None](), {"sampling": 0.0, "features": 0.0, "measures": 0.0}
    for seed in seeds:
        began = time.monotonic()
        with progress("sample" if len(seeds) == 1 else f"sample, seed {seed}", n) as advance:
            samples = run.sample(
                n,
                cond=cond,
                solver=settings.solver,
                steps=settings.steps,
                grid=settings.grid,
                guidance=chosen.guidance,
                seed=seed,
                batch=chosen.batch,
                advance=advance,
            )
        sampled = time.monotonic()
        told = _told(chosen, str(run.device), seed)
        known = {"held_out": held_out, "facts": run.facts, "store": Path(file).parent}
        results.append(run.adapter.metrics(samples, train, told | known | {"data": run.config["data"]["options"]}))
        seconds["sampling"] += sampled - began
        seconds["features"] += told["seconds"].get("features", 0.0)
        seconds["measures"] += time.monotonic() - sampled - told["seconds"].get("features", 0.0)
        notes |= dict.fromkeys(told["notes"])
    metrics = _mean(results)
    title = (
        f"{path}, step {run.step}: {n} samples, {settings.solver} on {settings.grid}, {settings.steps} steps, "
        f"guidance {settings.guidance:g}, {f'seed {seeds[0]}' if len(seeds) == 1 else f'mean of {len(seeds)} seeds'}\n"
        f"distances to the training split ({len(train)} items), real data: the {chosen.split} split ({len(held_out)})"
    )
    record = {
        "checkpoint_step": run.step,
        **asdict(settings),
        "n": n,
        "split": chosen.split,
        "reference": "train",
        "n_reference": len(train),
        "n_held_out": len(held_out),
        "seeds": seeds,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "device": str(run.device),
        "notes": list(notes),
        "metrics": _plain(metrics),
        "by_seed": [_plain(result) for result in results] if chosen.seeds > 1 else [],
    }
    return _finish(title, metrics, record, folder)


def _told(chosen: Options, device: str, seed: int) -> dict[str, Any]:
    """What metrics are told beside the data; they add to ``seconds`` and ``notes``."""
    return {
        "seed": seed,
        "device": device,
        "inception": chosen.inception,
        "inception_weights": chosen.inception_weights,
        "seconds": dict[str, float](),
        "notes": list[str](),
    }


def representative(conditions: Sequence[Mapping[str, Any]], n: int) -> list[int]:
    """Which of the held-out items' conditions n samples get: all in turn, or, for fewer, classes in the same shares.

    Args:
        conditions: of each held-out item; a 0-dim tensor is a class.
        n: how many samples.
    Returns:
        Indices into the items: 0, 1, ... for n of at least their number, starting again; else n different ones,
        ascending, evenly spaced through the items in order of their classes: no class is off by more than one.
    """
    m = len(conditions)
    if n >= m:
        return [i % m for i in range(n)]

    def classes(index: int) -> list[tuple[str, int]]:
        return [(name, int(value)) for name, value in sorted(conditions[index].items()) if not value.ndim]

    ordered = sorted(range(m), key=classes)
    return sorted(ordered[(2 * i + 1) * m // (2 * n)] for i in range(n))


def _evaluate_files(chosen: Options) -> int:
    if chosen.samples is None or chosen.reference is None or chosen.adapter is None:
        raise ConfigError("samples=DIR also needs reference=DIR and adapter=NAME")
    from polydiff.core import adapter as adapters
    from polydiff.core.run import pick_device

    adapter = adapters.load(chosen.adapter)
    samples, reference = (_read(adapter, folder) for folder in (chosen.samples, chosen.reference))
    folder = chosen.out or chosen.samples
    _make(folder)
    began = time.monotonic()
    told = _told(chosen, str(pick_device(chosen.device)), chosen.seed)
    metrics = adapter.metrics(samples, reference, {**told, "held_out": None, "facts": {}, "store": None})
    features = told["seconds"].get("features", 0.0)
    title = f"{len(samples)} files in {chosen.samples} against {len(reference)} in {chosen.reference}"
    record = {
        "samples": str(chosen.samples),
        "reference": str(chosen.reference),
        "n": len(samples),
        "n_reference": len(reference),
        "seconds": {"features": round(features, 3), "measures": round(time.monotonic() - began - features, 3)},
        "notes": told["notes"],
        "metrics": _plain(metrics),
    }
    return _finish(title, metrics, record, folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: {error.strerror}; choose another folder") from error


def _items(dataset: Any) -> list[Item]:
    return [dataset[index] for index in range(len(dataset))]


def _read(adapter: Adapter, folder: Path) -> list[Item]:
    """The files of a folder that the codec can read, in order of their names, with the classes samples.json records."""
    from polydiff.core.adapter import Item

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    codec = adapter.codec({})
    endings = tuple(f".{name}" for name in (*codec.formats, *getattr(codec, "endings", ())))
    paths = sorted(path for path in folder.iterdir() if path.name.lower().endswith(endings))
    if not paths:
        raise DataError(f"{folder}: no files that the adapter {adapter.name!r} reads ({', '.join(endings)})")
    cond = _conditions(folder)
    return [Item(codec.encode(codec.read(path)), None, cond.get(path.name, {}), path.name) for path in paths]


def _conditions(folder: Path) -> dict[str, dict[str, Any]]:
    import torch

    try:
        entries = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["samples"]
        return {
            entry["file"]: {
                name: torch.tensor(value["index"] if isinstance(value, dict) else value)
                for name, value in entry["cond"].items()
                if not isinstance(value, dict) or "index" in value  # else it was read from a file
            }
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _mean(results: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Metric by metric, the mean over seeds of every field."""
    from polydiff.core.adapter import Metric

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if known else None

    out = {}
    for name, first in results[0].items():
        columns = zip(*(result[name][:4] for result in results), strict=True)
        value, low, high, real = (mean(list(column)) for column in columns)
        out[name] = Metric(first.value if value is None else value, low, high, real, first.n)
    return out


def _plain(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: dict(metric._asdict()) for name, metric in metrics.items()}


def _finish(title: str, metrics: Mapping[str, Metric], record: dict[str, Any], folder: Path) -> int:
    from polydiff.core.training.checkpoint import replace_text

    path = folder / RESULT
    earlier = _earlier(path, record)
    replace_text(path, json.dumps({**record, "earlier": earlier}, indent=1) + "\n")
    print(title)
    rows = [("metric", "value", "95 % interval", "real data")]
    for name, metric in metrics.items():
        interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4g} to {metric.high:.4g}"
        rows.append((name, f"{metric.value:.4g}", interval, "" if metric.real is None else f"{metric.real:.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in record["notes"]:
        print(note)
    print(", ".join(f"{name} {value:.1f} s" for name, value in record["seconds"].items()))
    print(f"wrote {path}{f' ({len(earlier)} earlier results of other settings are kept in it)' if earlier else ''}")
    return 0


def _earlier(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results in a file that a new one does not replace: those of other settings, newest first."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        entries = [{key: value for key, value in old.items() if key != "earlier"}, *old.get("earlier", [])]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return []

    def settings(entry: Mapping[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps({key: value for key, value in entry.items() if key not in MEASURED}))

    return [entry for entry in entries if isinstance(entry, dict) and entry and settings(entry) != settings(record)]
