"""``polydiff evaluate``: compare what a run generates, or a folder of files, with real data."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Options:
    """What ``polydiff evaluate`` takes."""

    run: Annotated[Path | None, "folder of a trained model"] = None
    n: Annotated[int | None, "samples of each seed; null: one for each held-out item, with its condition"] = None
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
    device: Annotated[str, "auto, cpu, cuda"] = "auto"
    network: Annotated[str | None, "import path of the network, for a run trained with one"] = None


def explain() -> str:
    """Help text."""
    return options.explain(
        Options,
        "polydiff evaluate run=runs/image-digits",
        "polydiff evaluate run=runs/image-digits seeds=5 guidance=1.5 solver=heun steps=20",
        "polydiff evaluate samples=generated reference=real adapter=image",
    )


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    chosen = options.parse(Options, words)
    if (chosen.run is None) == (chosen.samples is None):
        raise ConfigError("give either run=DIR, or samples=DIR reference=DIR adapter=NAME")
    return _evaluate_run(chosen, chosen.run) if chosen.run is not None else _evaluate_files(chosen)


def _evaluate_run(chosen: Options, path: Path) -> int:
    from polydiff.core.build import data_path
    from polydiff.core.request import positive
    from polydiff.core.run import Run

    positive(seeds=chosen.seeds, batch=chosen.batch, **({} if chosen.n is None else {"n": chosen.n}))
    run = Run.load(path, chosen.device, chosen.network)
    settings = run.settings(chosen.solver, chosen.grid, chosen.steps, chosen.guidance)
    file = chosen.data or data_path(run.config["data"])
    train, held_out = (_items(run.dataset(split, file)) for split in ("train", chosen.split))
    folder = chosen.out or path / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    n = chosen.n or len(held_out)
    cond = {name: [item.cond.get(name) for item in held_out] for name in run.denoiser.conditions}
    results = []
    for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        samples = run.sample(
            n,
            cond=cond,
            solver=settings.solver,
            steps=settings.steps,
            grid=settings.grid,
            guidance=chosen.guidance,
            seed=seed,
            batch=chosen.batch,
        )
        extra = {"held_out": held_out, "facts": run.facts, "store": Path(file).parent, "seed": seed}
        results.append(run.adapter.metrics(samples, train, extra))
    metrics = _mean(results)
    seeds = f"seed {chosen.seed}" if chosen.seeds == 1 else f"mean of {chosen.seeds} seeds"
    title = (
        f"{path}, step {run.step}: {n} samples, {settings.solver} on {settings.grid}, {settings.steps} steps, "
        f"guidance {settings.guidance:g}, {seeds}"
    )
    record = {
        "checkpoint_step": run.step,
        **asdict(settings),
        "n": n,
        "split": chosen.split,
        "seeds": list(range(chosen.seed, chosen.seed + chosen.seeds)),
        "metrics": _plain(metrics),
        "by_seed": [_plain(result) for result in results] if chosen.seeds > 1 else [],
    }
    return _finish(title, metrics, record, folder)


def _evaluate_files(chosen: Options) -> int:
    if chosen.samples is None or chosen.reference is None or chosen.adapter is None:
        raise ConfigError("samples=DIR also needs reference=DIR and adapter=NAME")
    from polydiff.core import adapter as adapters

    adapter = adapters.load(chosen.adapter)
    samples, reference = (_read(adapter, folder) for folder in (chosen.samples, chosen.reference))
    folder = chosen.out or chosen.samples
    folder.mkdir(parents=True, exist_ok=True)
    metrics = adapter.metrics(samples, reference, {"held_out": None, "facts": {}, "store": None, "seed": chosen.seed})
    title = f"{len(samples)} files in {chosen.samples} against {len(reference)} in {chosen.reference}"
    record = {"samples": str(chosen.samples), "reference": str(chosen.reference), "metrics": _plain(metrics)}
    return _finish(title, metrics, record, folder)


def _items(dataset: Any) -> list[Item]:
    return [dataset[index] for index in range(len(dataset))]


def _read(adapter: Adapter, folder: Path) -> list[Item]:
    """The files of a folder that the codec can read, in order of their names, with the classes samples.json records."""
    from polydiff.core.adapter import Item

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    codec = adapter.codec({})
    endings = tuple(f".{name}" for name in codec.formats)
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
    replace_text(path, json.dumps(record, indent=1) + "\n")
    print(title)
    rows = [("metric", "value", "95 % interval", "real data")]
    for name, metric in metrics.items():
        interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4g} to {metric.high:.4g}"
        rows.append((name, f"{metric.value:.4g}", interval, "" if metric.real is None else f"{metric.real:.4g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"wrote {path}")
    return 0
