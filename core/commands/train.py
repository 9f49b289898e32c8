"""``polydiff train``: compose a configuration, train or go on, say where everything is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from polydiff.core.commands import options
from polydiff.core.commands.compose import Config, choices, compose, jobs
from polydiff.core.errors import ConfigError, DataError, PolydiffError, unknown


@dataclass(frozen=True)
class Options:
    """What ``polydiff train`` takes besides the configuration."""

    run: Annotated[Path | None, "folder of the run; null: runs/EXPERIMENT (with -m: a folder in it for each)"] = None
    init: Annotated[Path | None, "start from the averaged weights of this run"] = None
    restart: Annotated[bool, "put the old run aside and begin anew"] = False


@dataclass(frozen=True)
class Flags:
    """Words that begin with a dash."""

    multirun: bool = False
    print_only: bool = False
    config_dir: Path | None = None


def explain() -> str:
    """Help text."""
    groups = ("experiment", "data", "network", "process", "objective", "objective/time", "sampling", "logger")
    table = "\n".join(f"  {group:26}{', '.join(choices(group))}" for group in groups)
    text = options.explain(
        Options,
        "polydiff train experiment=toy2d",
        "polydiff train experiment=toy2d data=rings objective=velocity process=rectified_flow run=runs/flow",
        "polydiff train experiment=image-digits trainer.steps=4000 optim.lr=5e-4",
        "polydiff train -m experiment=toy2d optim.lr=1e-3,3e-4",
        "torchrun --nproc-per-node 2 -m polydiff train experiment=image-digits",
    )
    own, _, examples = text.partition("\n\n")
    return (
        f"{own}\n  -m                        train every combination of values given as key=a,b\n"
        "  --config-dir DIR          further configurations\n"
        "  --cfg                     print the configuration and stop\n\n"
        f"groups:\n{table}\n\nvalues: any key of the configuration that --cfg prints\n\n"
        "The same command goes on with a run that was interrupted (exit code 75).\n\n" + examples
    )


def main(words: list[str]) -> int:
    """Run the verb; returns the exit code."""
    flags, words = _flags(words)
    names = options.declared(Options)
    own = [word for word in words if word.partition("=")[0] in names]
    words = [word for word in words if word.partition("=")[0] not in names]
    chosen = options.parse(Options, own)
    if flags.multirun:
        split = jobs(words, flags.config_dir)
    else:
        split = [(words, "")]
    planned = [(compose(job, flags.config_dir), name) for job, name in split]
    if flags.print_only:
        print("---\n".join(_yaml(config) for config, _ in planned), end="")
        return 0
    work = [(config, _folder(chosen.run, config, name)) for config, name in planned]
    for config, run in work:
        _prepare(config, run)
    if chosen.init is not None and not chosen.init.is_dir():
        raise ConfigError(f"init={chosen.init}: no such run")
    for number, (config, run) in enumerate(work, 1):
        if len(work) > 1:
            _say(f"[{number}/{len(work)}] {run}")
        code = _train(config, run, chosen)
        if code:
            return code
    return 0


def _train(config: Config, run: Path, chosen: Options) -> int:
    from polydiff.core.training.loop import train
    from polydiff.core.training.resume import move_aside

    if chosen.restart and run.is_dir() and _is_main():
        _say(f"the old run is now {move_aside(run)}")
    result = train(config, run, init=chosen.init)
    if result.finished:
        _say(
            f"{run}: step {result.step}, checkpoints and metrics.jsonl are there. Next:\n"
            f"  polydiff sample run={run}\n  polydiff evaluate run={run}\n  polydiff report run={run}"
        )
    return result.exit_code


def _prepare(config: Config, run: Path) -> None:
    """Find the data and everything that can be found wrong before training; makes ``data.path`` absolute.

    Raises:
        PolydiffError: what is wrong, in one line.
    """
    from polydiff import data
    from polydiff.core import adapter as adapters
    from polydiff.core.build import check_options, construct, find_network
    from polydiff.core.grids import make_grid
    from polydiff.core.request import sampling_settings
    from polydiff.core.solvers.base import resolve
    from polydiff.core.training.loop import check_numbers

    check_numbers(config)
    adapter = adapters.load(config["adapter"])
    find_network(adapter, config["network"], local=True)
    check_options("data.options", adapter.dataset, 2, config["data"]["options"])
    settings = sampling_settings(config["sampling"])
    process = construct("process", adapter.process, (), config["process"])
    try:
        resolve(settings.solver).plan(process, make_grid(settings.grid, settings.steps, process))
    except PolydiffError as error:
        raise ConfigError(f"sampling.solver={settings.solver} sampling.grid={settings.grid}: {error}") from error
    if run.exists() and not run.is_dir():
        raise ConfigError(f"run={run} is a file: choose a folder")
    if run.is_dir() and any(run.iterdir()) and not any((run / name).exists() for name in ("config.yaml", "lock")):
        raise ConfigError(f"run={run} exists and holds no run: choose another folder")
    section = config["data"]
    if not section["path"]:
        data.locate(section["name"])  # prepares an embedded set; the run remembers the name, not the place
        return
    path = Path(section["path"]).expanduser()
    if not path.is_file():
        raise DataError(f"data.path={path}: no such file")
    section["path"] = str(path.absolute())


def _folder(given: Path | None, config: Config, job: str) -> Path:
    base = Path("runs", config["experiment"]) if given is None else given
    return base / job.replace("/", "-") if job else base


def _flags(words: list[str]) -> tuple[Flags, list[str]]:
    found: dict[str, Any] = {}
    rest = []
    remaining: Iterator[str] = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if word in ("-m", "--multirun"):
            found["multirun"] = True
        elif name in ("--config-dir", "-cd"):
            value = value if equals else next(remaining, "")
            if not value:
                raise ConfigError("--config-dir needs a folder")
            found["config_dir"] = Path(value).expanduser()
        elif word == "--cfg":
            found["print_only"] = True
        elif word.startswith("-"):
            raise unknown("flag", word, ("-m", "--multirun", "--config-dir", "--cfg", "--help"))
        else:
            rest.append(word)
    return Flags(**found), rest


def _yaml(config: Config) -> str:
    import yaml

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _is_main() -> bool:
    """Whether this is the process that speaks and moves folders, of several that torchrun may have started."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)
