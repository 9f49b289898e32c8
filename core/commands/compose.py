"""Compose the configuration of a training run with hydra, and say what is wrong with it in one line.

Configurations come from ``pkg://polydiff.configs``, from installed packages that declare the entry-point group
``polydiff.configs``, and from ``--config-dir``. Hydra writes nothing and changes no folder here.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from polydiff.core.commands.options import lex
from polydiff.core.errors import ConfigError, unknown

GROUP = "polydiff.configs"
OPEN = ("data.options.", "objective.terms.", "objective.variance.")  # sections that may be missing, or gain keys
FIXED = ("data", "objective", "sampling", "optim", "trainer", "logger")  # sections whose keys are the same everywhere
Config = dict[str, Any]
_SKELETON: Config = {}


def compose(words: Sequence[str], config_dir: Path | None = None) -> Config:
    """The resolved configuration, a plain dictionary, of ``experiment=NAME group=choice key=value ...``.

    Raises:
        ConfigError: an unknown key, group or choice, a value of the wrong type, or one that hydra cannot read.
    """
    with _composer(config_dir) as composer:
        return composer.resolve(words)


def choices(group: str, config_dir: Path | None = None) -> list[str]:
    """Names of a config group's choices, e.g. all experiments."""
    with _composer(config_dir) as composer:
        return composer.options(group)


def jobs(words: Sequence[str], config_dir: Path | None = None) -> list[tuple[list[str], str]]:
    """Split ``-m`` words such as ``optim.lr=1e-3,1e-4`` into one list of words for each combination, with its name."""
    with _composer(config_dir) as composer:
        axes = []
        for word in words:
            override = lex(word)
            if override.is_sweep_override():
                override.config_loader = composer.loader
                axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
            else:
                axes.append([word])
    swept = [place for place, axis in enumerate(axes) if len(axis) > 1]
    return [
        (list(job), ",".join(job[place] for place in swept if not job[place].startswith("experiment=")))
        for job in itertools.product(*axes)
    ]


class _Composer:
    def __init__(self, loader: Any, search: list[str]) -> None:
        self.loader, self.search = loader, search

    def options(self, group: str) -> list[str]:
        return list(self.loader.get_group_options(group, config_name="train", overrides=self.search))

    def compose(self, words: Sequence[str]) -> Config:
        import yaml
        from hydra import compose as hydra_compose
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            config = hydra_compose("train", [*words, *self.search])
            return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            cause = error.__cause__ if not str(error).strip() and error.__cause__ else error
            raise ConfigError("; ".join(line.strip() for line in str(cause).strip().splitlines())) from error

    def skeleton(self) -> Config:
        """What ``train.yaml`` holds by itself: nobody else's configuration can change that, so it is composed once."""
        if not _SKELETON:
            _SKELETON.update(self.compose(["~experiment"]))
        return _SKELETON

    def resolve(self, words: Sequence[str]) -> Config:
        choices, values = self._sort(words)
        if "experiment" not in choices:
            raise ConfigError(f"missing experiment=NAME: one of {', '.join(self.options('experiment'))}")
        selected = [f"{group}={choice}" for group, choice in choices.items()]
        base = self.compose(selected)
        values = {key: self._placed(key, word, base) for key, word in values.items()}
        config = self.compose([*selected, *values.values()]) if values else base
        skeleton = self.skeleton()
        for key in sorted({*config} - {*skeleton}):
            raise unknown(f"section of experiment {choices['experiment']!r}:", key, skeleton)
        for section in FIXED:
            _like(section, skeleton[section], config[section], closed=True)
        config = _like("", base, config)
        missing = [key for key, value in _leaves(config) if value == "???"]
        if missing:
            raise ConfigError(f"{missing[0]} has no value: give {missing[0]}=...")
        return {"experiment": choices["experiment"], "adapter": config.pop("adapter"), **config}

    def _sort(self, words: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Separate choices of groups from values of keys."""
        chosen, values = {}, {}
        for word in words:
            override = lex(word)
            key = override.get_key_element().lstrip("+~")
            text = word.partition("=")[2]
            if override.is_hydra_override():
                raise ConfigError(f"{word!r}: hydra's own settings have no effect here")
            if override.is_delete():
                raise ConfigError(f"{word!r}: nothing can be removed from a configuration")
            if override.is_sweep_override():
                raise ConfigError(f"{word!r} names several values: add -m to train each, or write {key}=[{text}]")
            if key in chosen or key in values:
                raise ConfigError(f"{key} is given twice")
            options = self.options(key) if "." not in key else []
            if not options:
                values[key] = word
            elif text not in options:
                raise unknown(key, text, options)
            else:
                chosen[key] = text
        return chosen, values

    def _placed(self, key: str, word: str, base: Config) -> str:
        """The word as hydra wants it, after checking that its key exists."""
        keys = {name for name, _ in _branches(base)}
        if key in keys:
            return "++" + word.lstrip("+")
        if key.startswith(OPEN) or (
            word.startswith("+") and key.startswith(("network.", "process.", "objective.time."))
        ):
            return "++" + word.lstrip("+")
        last = key.rpartition(".")[2]
        groups = self.loader.list_groups("") if "." not in key else []
        names = sorted({*keys, *(group for group in groups if group != "hydra"), "run", "restart", "init"})
        near = [name for name in names if name.rpartition(".")[2] == last]
        near += [name for name in difflib.get_close_matches(key, names, n=3, cutoff=0.6) if name not in near]
        parent = key.rpartition(".")[0]
        while parent and parent not in keys:
            parent = parent.rpartition(".")[0]
        inside = f"{parent}." if parent else ""
        valid = [name for name in names if name.startswith(inside) and "." not in name[len(inside) :]]
        hint = f"did you mean {' or '.join(near[:3])}? " if near else ""
        raise ConfigError(f"unknown key {key!r}: {hint}valid: {', '.join(valid)}")


@contextmanager
def _composer(config_dir: Path | None) -> Iterator[_Composer]:
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    places = [f"pkg://{package}" for package in _packages()]
    if config_dir is not None:
        _check_folder(config_dir)
        places.append(f"file://{config_dir.resolve()}")
    quoted = ",".join("'" + place.replace("'", "\\'") + "'" for place in places)
    GlobalHydra.instance().clear()
    with initialize_config_module("polydiff.configs", version_base="1.3"):
        yield _Composer(GlobalHydra.instance().config_loader(), [f"hydra.searchpath=[{quoted}]"] if places else [])


def _packages() -> list[str]:
    """Packages of configurations that installed adapters declare; one that cannot be found is left out, and said."""
    found = []
    for point in entry_points(group=GROUP):
        names = [f"{point.value}.configs", point.value]
        try:
            found.append(next(name for name in names if importlib.util.find_spec(name)))
        except (StopIteration, ImportError, ValueError):
            print(f"polydiff: the configurations {point.value!r} of {point.name!r} cannot be found", file=sys.stderr)
    return found


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"--config-dir {folder}: no such folder")
    own = Path(__file__).resolve().parents[2] / "configs"
    for path in sorted(folder.rglob("*.yaml")):
        if (own / path.relative_to(folder)).is_file():
            raise ConfigError(f"{path} has the name of a configuration that polydiff brings: rename it")


def _branches(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _branches(value, f"{prefix}{key}.")


def _leaves(config: Config) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in _branches(config) if not isinstance(value, dict))


def _like(key: str, base: Any, value: Any, closed: bool = False) -> Any:
    """``value`` if it has the type of ``base``, where null stands for any; whole numbers become floats where need be.

    Args:
        key: where it stands, for the message.
        base: the value that the configuration files hold.
        value: the value after all overrides.
        closed: refuse keys that ``base`` lacks.
    """
    dot = f"{key}." if key else ""
    if isinstance(base, dict) and isinstance(value, dict):
        if closed and not dot.startswith((*OPEN, "objective.time.")):
            for name in value:
                if name not in base and f"{dot}{name}." not in OPEN:
                    raise unknown("key", dot + name, [dot + other for other in base])
        return {n: _like(dot + n, base[n], v, closed) if n in base else v for n, v in value.items()}
    if base is None or base == "???" or value == "???" or (value is None and key in NULLABLE) or key in FREE:
        return value
    if isinstance(base, float) and type(value) is int:
        return float(value)
    if key.startswith("network.") and isinstance(value, list) != isinstance(base, list):
        return value  # one number for all levels, or one for each: the network knows
    if type(value) is not type(base):
        raise ConfigError(f"{key}={value!r} must be {_KINDS[type(base)]}, as in {key}={base}")
    if isinstance(base, list) and base:
        return [_like(f"{key}[{place}]", base[0], entry) for place, entry in enumerate(value)]
    return value


NULLABLE = ("trainer.clip", "trainer.seconds", "optim.ema_warmup", "data.path", "objective.variance.bins")
FREE = ("objective.drop",)  # one number, or one for each condition
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
    list: "a list",
    dict: "a section",
}
