"""The page of a run: what its files say, around the pictures that its adapter draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from polydiff import __version__
from polydiff.core.adapter import Fragment
from polydiff.core.report import sections
from polydiff.core.report.charts import number
from polydiff.core.report.offline import inline, policy
from polydiff.core.report.record import Record, is_number, read


def page(folder: Path, fragments: Sequence[tuple[str, Fragment]] = ()) -> str:
    """The HTML of a run's page: one text that loads nothing from outside.

    Every part is optional: a run that was never evaluated, has no previews or just began gives a shorter page.

    Args:
        folder: the run.
        fragments: (title, what a view drew), one section each. They may use the page's colours, ``var(--ink)``,
            ``--soft``, ``--line``, ``--wash`` and ``--accent``, and its classes ``note``, ``wide`` and ``charts``.
            Scripts come through ``Fragment.scripts``: each name is put in once, others do not run.
    Raises:
        CheckpointError: there is no such folder, or it is not a run.
    """
    record = read(folder)
    name = str(record.get("experiment", default=folder.resolve().name))
    parts = [
        ("Key numbers", sections.numbers(record)),
        *((title, fragment.html) for title, fragment in fragments),
        ("Previews while training", sections.previews(record)),
        ("Training", sections.training(record)),
        ("Held-out loss by noise level", sections.heldout(record)),
        ("Files", sections.files(record)),
        ("Configuration", sections.configuration(record)),
        ("How to reproduce", sections.commands(record)),
    ]
    body: list[str] = []
    links: list[str] = []
    for title, content in parts:
        if content:
            anchor = f"part-{len(links) + 1}"
            links.append(f'<a href="#{anchor}">{escape(title)}</a>')
            body.append(
                f'<section id="{anchor}" aria-label="{escape(title)}"><h2>{escape(title)}</h2>{content}</section>'
            )
    here = files("polydiff.core.report")
    scripts = {key: inline(text) for _, fragment in fragments for key, text in fragment.scripts.items()}
    scripts["page"] = inline(here.joinpath("page.js").read_text(encoding="utf-8"))
    tags = "".join(f"<script>{text}</script>\n" for text in scripts.values())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)} · polydiff</title>\n"
        f"<style>\n{here.joinpath('page.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f'<header>{_header(record, name)}<nav aria-label="Contents">{"".join(links)}</nav></header>\n'
        f"<main>{''.join(body)}</main>\n<footer>Written by polydiff {__version__}. "
        f"This page works offline and loads nothing from outside.</footer>\n{tags}</body>\n</html>\n"
    )


def _header(record: Record, name: str) -> str:
    """Title, one sentence, and the facts that tell this run from another."""
    wall, commit = _wall(record), str(record.environment.get("commit") or "")
    facts, env = record.state.get("facts") or {}, record.environment
    data = str(record.get("data", "name", default=""))
    device = env.get("device") or record.get("trainer", "device", default="")
    sentence = [f"A model of <b>{escape(data)}</b>" if data else "A model"]
    if record.parameters:
        sentence.append(f" with <b>{_short(record.parameters)} parameters</b>")
    if record.step is not None:
        sentence.append(f", trained for <b>{record.step:,} steps</b>")
    if wall:
        sentence.append(f" in <b>{_duration(wall)}</b>")
    planned = record.get("trainer", "steps")
    step = "" if record.step is None else f"{record.step:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    network, process = record.get("network", "name"), record.get("process", "schedule")
    rates = sorted(m["items_per_s"] for m in record.metrics if is_number(m.get("items_per_s")))
    rows = {
        "Adapter": record.get("adapter"),
        "Data": f"{data} ({facts['n']:,} training items)" if isinstance(facts.get("n"), int) else data,
        "Network": network,
        "Parameters": f"{record.parameters:,}" if record.parameters else None,
        "Process": process,
        "Sampling": _sampling(record),
        "Step": step,
        "Wall time": _duration(wall) if wall else None,
        "Speed": f"{number(rates[len(rates) // 2])} items/s" if rates else None,
        "Device": device,
        "Date": f"{record.date:%Y-%m-%d %H:%M} UTC",
        "Commit": commit[:12] + ("+" if commit.endswith("+") else ""),
        "Versions": _versions(env),
    }
    cells = "".join(
        f"<div><dt>{key}</dt><dd>{escape(str(value))}</dd></div>"
        for key, value in rows.items()
        if value not in (None, "")
    )
    return (
        f'<p class="eyebrow">polydiff run</p><h1>{escape(name)}</h1>'
        f'<p class="lede">{"".join(sentence)}.</p><dl>{cells}</dl>'
    )


def _wall(record: Record) -> float:
    seconds = [record.state.get("wall_s"), record.metrics[-1].get("wall_s") if record.metrics else None]
    return max((float(s) for s in seconds if s is not None and is_number(s)), default=0.0)


def _versions(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages")
    known = {**environment, **(packages if isinstance(packages, Mapping) else {})}
    return ", ".join(f"{name} {known[name]}" for name in ("polydiff", "python", "torch") if known.get(name))


def _sampling(record: Record) -> str:
    solver, steps = record.get("sampling", "solver"), record.get("sampling", "steps")
    guidance = record.get("sampling", "guidance")
    parts = [str(solver or ""), f"{steps} steps" if steps else ""]
    if is_number(guidance) and guidance != 1:
        parts.append(f"guidance {guidance:g}")
    return ", ".join(part for part in parts if part)


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _duration(seconds: float) -> str:
    minutes, hours = divmod(round(seconds), 60)[0], round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.3g} s"
