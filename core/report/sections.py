"""The sections of a page that hold for every run; each is empty where the run has nothing to say."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from polydiff.core.errors import ConfigError
from polydiff.core.report.charts import Series, chart, gauge, number, smooth
from polydiff.core.report.offline import embed
from polydiff.core.report.record import Record, is_number, shown

T = TypeVar("T")

MOST_PREVIEWS = 60
MOST_CURVES = 9
PREVIEW_BYTES = 6_000_000  # previews that together are heavier stay files, which the page shows from where they lie


def numbers(record: Record) -> str:
    """Measured values beside those of real data."""
    rows = []
    for name, metric in record.evaluation.items():
        interval = ""
        if metric.low is not None and metric.high is not None:
            interval = f"{number(metric.low)} to {number(metric.high)}"
        rows.append(
            f'<tr><td>{escape(name.replace("_", " "))}</td><td class="n key">{number(metric.value)}</td>'
            f'<td class="n">{"" if metric.real is None else number(metric.real)}</td><td>{gauge(metric)}</td>'
            f'<td class="n">{interval}</td><td class="n">{f"{metric.n:,}" if metric.n else ""}</td></tr>'
        )
    if not rows:
        return ""
    told = record.measured
    settings = [
        f"step {told['checkpoint_step']:,}" if isinstance(told.get("checkpoint_step"), int) else "",
        f"{told['n']:,} samples" if isinstance(told.get("n"), int) else "",
        str(told.get("solver", "")),
        f"{told['steps']} steps" if is_number(told.get("steps")) else "",
        f"guidance {told['guidance']:g}" if is_number(told.get("guidance")) else "",
    ]
    measured = escape(", ".join(part for part in settings if part))
    return (
        '<p class="note">Each number measured on generated samples beside the value that real held-out data has: '
        "the closer the two, the harder the samples are to tell from real ones."
        f"{f' Measured at {measured}.' if measured else ''}</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Table of measured numbers"><table><thead><tr><th>Measure'
        '</th><th class="n">Generated</th><th class="n">Real</th><th><span class="key-dot"></span>generated'
        '<span class="key-ring"></span>real</th><th class="n">95 % interval</th><th class="n">Samples</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def previews(record: Record) -> str:
    """The same samples as training went on."""
    chosen = _spread(record.previews, MOST_PREVIEWS)
    if not chosen:
        return ""
    heavy = sum(path.stat().st_size for _, path in chosen) > PREVIEW_BYTES
    figures = "".join(
        f'<figure><img alt="Samples at step {step:,}" src="{f"previews/{quote(path.name)}" if heavy else embed(path)}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
        for step, path in chosen
    )
    return (
        '<p class="note">The same noise, drawn into samples by the model as it was at each step.</p>'
        f'<div class="timeline" tabindex="0">{figures}</div>'
    )


def training(record: Record) -> str:
    """Loss, gradient norm, learning rate and speed."""
    charts = []
    for name, title, log in (
        ("loss", "Loss", True),
        ("grad_norm", "Gradient norm", True),
        ("lr", "Learning rate", False),
        ("items_per_s", "Items per second", False),
    ):
        lines = [line for line in record.metrics if name in line]
        steps, values = [line["step"] for line in lines], _floats([line[name] for line in lines])
        log = log and any(value > 0 for value in values)
        curves = [Series("", steps, values)]
        if len(values) >= 20 and name != "lr":
            curves = [Series("", steps, values, faint=True), Series("", steps, smooth(values, log=log))]
        charts.append(chart(curves, title, log=log))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def heldout(record: Record) -> str:
    """Held-out loss at each noise level, over time."""
    # A process without a schedule has no log-SNR; its levels are times.
    key, word = ("t", "t") if any(line.get("log_snr") is None for line in record.heldout) else ("log_snr", "log-SNR")
    lines = [(line["step"], _floats(line.get(key)), _floats(line.get("loss"))) for line in record.heldout]
    lines = [(step, levels, losses) for step, levels, losses in lines if losses and len(levels) == len(losses)]
    if not lines:
        return ""
    over_time = []
    every = sorted({level for _, levels, _ in lines for level in levels if math.isfinite(level)})
    for level, tone in _toned(_spread(every, MOST_CURVES)):
        points = [(step, loss) for step, *pair in lines for at, loss in zip(*pair, strict=True) if at == level]
        over_time.append(
            Series(f"{level:.2g}".replace("-", "−"), [step for step, _ in points], [loss for _, loss in points], tone)
        )
    across = [
        Series(f"step {step:,}", levels, losses, tone) for (step, levels, losses), tone in _toned(_spread(lines, 4))
    ]
    meaning = "A low log-SNR means much noise, a high one little. " if key == "log_snr" else ""
    return (
        '<p class="note">Mean squared error of the predicted clean state on held-out data. '
        f"{meaning}A level whose error rises again is overfitted.</p>"
        f'<div class="charts">{chart(over_time, f"One curve for each {word}", log=True)}'
        f"{chart(across, 'One curve for each moment', word, log=True)}</div>"
    )


def _floats(values: Any) -> list[float]:
    return [float(v) if is_number(v) else math.nan for v in values] if isinstance(values, list) else []


def _spread(values: Sequence[T], count: int) -> list[T]:
    """At most ``count`` values, evenly from the first to the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _toned(values: Sequence[T]) -> list[tuple[T, float]]:
    """Each value with its place in [0, 1]."""
    return [(value, place / max(len(values) - 1, 1)) for place, value in enumerate(values)]


def files(record: Record) -> str:
    """Sample folders and the other files of the run."""

    def link(path: Path, text: str = "") -> str:
        relative = path.relative_to(record.folder).as_posix() + ("/" if path.is_dir() else "")
        return f'<a href="{quote(relative)}">{escape(text or relative)}</a>'

    rows = []
    for path, told in record.samples:
        count = len(told["samples"]) if isinstance(told.get("samples"), list) else sum(1 for _ in path.iterdir())
        cells = "".join(f"<td>{escape(str(told.get(key, '')))}</td>" for key in ("solver", "steps", "guidance", "seed"))
        rows.append(f'<tr><td>{link(path, path.name)}</td>{cells}<td class="n">{count}</td></tr>')
    table = ""
    if rows:
        table = (
            '<div class="wide" tabindex="0" role="region" aria-label="Sample folders"><table><thead><tr><th>Sample folder</th>'
            f'<th>Solver</th><th>Steps</th><th>Guidance</th><th>Seed</th><th class="n">Files</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        )
    names = (
        "metrics.jsonl",
        "heldout.jsonl",
        "evaluation/metrics.json",
        "checkpoints",
        "previews",
        "tensorboard",
        "environment.json",
    )
    present = [link(record.folder / name) for name in names if (record.folder / name).exists()]
    more = f'<p class="note after">Also in this run: {", ".join(present)}.</p>' if present else ""
    return table + more


def configuration(record: Record) -> str:
    """Configuration and environment, folded."""
    environment = ""
    if record.environment:
        text = escape(json.dumps(record.environment, indent=2, ensure_ascii=False))
        environment = f'<details><summary>environment.json</summary><pre tabindex="0">{text}</pre></details>'
    return (
        f'<details><summary>config.yaml</summary><pre tabindex="0">{escape(record.text)}</pre></details>{environment}'
    )


def _overrides(record: Record) -> list[str]:
    """What was chosen on top of the experiment, as words of the command line."""
    try:
        usual = dict(_usual(str(record.get("experiment"))))
    except ConfigError:  # an experiment of somebody's own folder
        return []
    # A run notes where its data set was found; only a file of another name was somebody's choice.
    if Path(str(record.get("data", "path"))).stem == record.get("data", "name"):
        usual["data.path"] = record.get("data", "path")
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in _flat(record.config).items()
        if usual.get(key, usual) != value
    ]


@cache
def _usual(experiment: str) -> dict[str, Any]:
    from polydiff.core.commands.compose import compose

    return _flat(compose([f"experiment={experiment}"]))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, entry in value.items() for k, v in _flat(entry, f"{path}.{key}" if path else key).items()}
    return {path: value}


def commands(record: Record) -> str:
    """The commands that make the run and its numbers again."""
    run = shlex.quote(f"run={shown(record.folder)}")
    commit, experiment = str(record.environment.get("commit") or ""), record.get("experiment")
    lines = []
    if commit:
        changed = " with local changes" if commit.endswith("+") else ""
        lines += [f"# the code as it was{changed}", f"git checkout {shlex.quote(commit.rstrip('+'))}"]
    if experiment:
        lines += [
            "# train it again",
            shlex.join(["polydiff", "train", f"experiment={experiment}", *_overrides(record)]),
        ]
    lines += [
        "# draw, measure and look",
        f"polydiff sample {run} n=64 seed=0",
        f"polydiff evaluate {run}",
        f"polydiff report {run}",
    ]
    text = "".join(
        f"<i>{escape(line)}</i>\n" if line.startswith("# ") else f"<code>{escape(line)}</code>" for line in lines
    )
    return f'<pre class="commands" tabindex="0">{text}</pre>'
