"""Bar "newcomer": a fresh clone, a new virtual environment, the two commands of the README; then the demo once more.

    python tests/bars/newcomer.py [python=PATH] [reuse=VENV] [only=demo] [cores=2]

The clone of the last commit stands in a folder whose name has a space. Both commands are read from README.md and run as
they stand there; ``python`` is the interpreter the environment is made from (default: PYTHON, else the one below this
environment). Then ``make demo`` trains into a fresh run folder on ``cores`` processor cores, with nothing prepared but the
installation. That takes as long as an installation and the test suite. In short: ``reuse`` takes an environment that
exists in place of a new one and lets it run the clone, ``only=demo`` leaves the first part out. TORCH_INDEX is passed on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from _bars import arguments, check, machine

ROOT = Path(__file__).resolve().parents[2]
OURS = ("MAKE", "MFLAGS", "GIT_", "PYTHON", "VIRTUAL_ENV", "VENV", "RUN", "POLYDIFF_")  # a newcomer has none of these
TAIL = 30  # lines shown of a command that failed


def promised(readme: str) -> list[str]:
    """The commands of the README's section about them."""
    block = re.search(r"^## Two commands\n```\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    return block[1].splitlines() if block else []


def surroundings(python: str, venv: Path | None, clone: Path) -> dict[str, str]:
    """The environment of a newcomer's shell: this one's without what a checkout or a make has put into it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    programs = kept.get("PATH", "").split(os.pathsep)
    kept["PATH"] = os.pathsep.join(folder for folder in programs if not Path(folder, "../pyvenv.cfg").exists())
    kept["PYTHON"] = python
    if venv is not None:
        kept |= {"VENV": str(venv), "PYTHONPATH": str(clone / "src")}  # before what the environment has installed
    return kept


def run(command: list[str], clone: Path, environment: Mapping[str, str], cores: int = 0) -> tuple[int, float]:
    """Run a command in the clone, on some of the cores; its exit code and seconds. What it says is shown if it fails."""
    began, log = time.monotonic(), clone.parent / "log"
    few = sorted(os.sched_getaffinity(0))[:cores] if cores and hasattr(os, "sched_getaffinity") else []
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=clone, env=environment, stdout=file, stderr=file) as child,
    ):
        if few:
            os.sched_setaffinity(child.pid, few)  # its children inherit it
        code = child.wait()
    if code:
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]))
    return code, time.monotonic() - began


def trained(folder: Path) -> float:
    """Seconds of training that a run noted; not a number if it noted none."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return float(json.loads(lines[-1])["wall_s"]) if lines else float("nan")


def main(python: str, reuse: Path | None, only: str, cores: int) -> int:
    """Run the bar; 0 if it is met."""
    met = []
    with tempfile.TemporaryDirectory(prefix="polydiff newcomer ") as folder:
        clone = Path(folder, "a clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = surroundings(python, reuse, clone)
        # A clone is newer than any environment: make would install it there, in place of what is installed.
        skip = ["-o", "pyproject.toml", "-o", f"{reuse}/installed"] if reuse else []
        for line in promised((clone / "README.md").read_text(encoding="utf-8")) if only != "demo" else []:
            program, *words = line.split()
            code, seconds = run([program, *skip, *words], clone, environment)
            met.append(check(f"{line}: exit code", code, 0, note=f"{seconds / 60:.1f} minutes"))
        shutil.rmtree(clone / "data/cache", ignore_errors=True)
        code, seconds = run(["make", *skip, "demo", "RUN=runs/again"], clone, environment, cores)
        met.append(check("make demo, installed: exit code", code, 0))
        met.append(check("make demo, installed: minutes", seconds / 60, 6))
        met.append(check("of which training: minutes", trained(clone / "runs/again") / 60, 4))
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=clone, text=True).strip()
    print(f"newcomer: commit {commit}, the demo on at most {cores} cores; {machine()}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    given = arguments()
    base = os.environ.get("PYTHON") or str(getattr(sys, "_base_executable", sys.executable))
    venv = Path(given["reuse"]).absolute() if "reuse" in given else None
    raise SystemExit(main(given.get("python", base), venv, given.get("only", ""), int(given.get("cores", 2))))
