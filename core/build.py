"""From a resolved configuration, a plain dictionary, to objects; names are looked up in tables, never imported.

The one exception: while training, ``network.name`` may be an import path ``package.module:attribute`` of an allow-listed
package, because then the configuration is the user's own. A configuration that comes out of a run folder is data from
anywhere: it may hold names and numbers only.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from polydiff.core import adapter as adapters
from polydiff.core.adapter import Adapter, Lazy
from polydiff.core.denoiser import Denoiser
from polydiff.core.errors import CheckpointError, ConfigError, unknown
from polydiff.core.objectives import Objective

SECTIONS = (
    "experiment",
    "adapter",
    "data",
    "network",
    "process",
    "objective",
    "sampling",
    "optim",
    "trainer",
    "logger",
)
LARGEST_CONFIG = 1 << 20  # bytes
DEEPEST_CONFIG = 32  # levels
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


@dataclass(frozen=True)
class Built:
    """The objects of a run."""

    adapter: Adapter
    process: Any
    denoiser: Denoiser
    objective: Objective


def build(
    config: Mapping[str, Any], facts: Mapping[str, Any], *, local: bool = False, seed: int | None = None
) -> Built:
    """Build adapter, process, denoiser and objective.

    Args:
        config: a resolved configuration; see ``configs/train.yaml`` for its sections.
        facts: what the data set says about itself: sigma_data, size, classes.
        local: the configuration is the user's own, so that ``network.name`` may be an import path.
        seed: draw the initial weights from this seed, leaving torch's global random state as it was.

    Raises:
        ConfigError: an unknown name or option, or an import path where none is allowed.
    """
    missing = [section for section in SECTIONS if section not in config]
    if missing:
        raise ConfigError(f"the configuration has no section {missing[0]!r}")
    if bool(config["network"].get("variance")) != bool(config["objective"].get("variance")):
        raise ConfigError(
            "network.variance=true, a second head for the reverse variance, and objective.variance, the loss that trains "
            "it, need each other: take objective=hybrid for both, or neither"
        )
    adapter = adapters.load(config["adapter"])
    process = construct("process", adapter.process, (), config["process"])
    sigma_data = float(facts.get("sigma_data", 1.0))
    constructor, options = find_network(adapter, config["network"], local)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        network = construct("network", constructor, (dict(facts),), options)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network {config['network']['name']!r} is no torch module but a {type(network).__name__}")
    wanted = dict(config["objective"])
    precondition = wanted.pop("precondition", "edm")
    terms = {
        name: (_entry("loss term", name, adapter.terms), w) for name, w in (wanted.pop("terms", None) or {}).items()
    }
    conditions = adapters.conditions_of(adapter.conditions, facts)
    denoiser = Denoiser(network, process, precondition, sigma_data, conditions)
    objective = construct("objective", Objective, (process,), {**wanted, "terms": terms, "sigma_data": sigma_data})
    return Built(adapter, process, denoiser, objective)


def data_path(section: Mapping[str, Any]) -> Path:
    """File of a ``data`` section; where it has moved, the prepared one of the same name, which embedded sets always have.

    Raises:
        DataError: it is not there; the message names the command that prepares it.
    """
    from polydiff import data

    path = Path(section["path"]) if section.get("path") else None
    if path is not None and (path.is_file() or section["name"] not in data.catalogue()):
        return path
    return data.locate(section["name"])


def open_data(config: Mapping[str, Any], split: str, path: Path | None = None) -> Any:
    """One split of the data set that a configuration names; ``path`` stands in for a file that has moved."""
    section = config["data"]
    adapter = adapters.load(config["adapter"])
    return construct("data.options", adapter.dataset, (path or data_path(section), split), section["options"])


def construct(
    section: str, function: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> Any:
    """Call a constructor with a section of the configuration.

    Args:
        section: its name, for messages.
        function: what to call.
        arguments: positional ones that the configuration does not hold.
        options: the section.

    Raises:
        ConfigError: an option that the constructor does not know, that is missing or that it refuses.
    """
    check_options(section, function, len(arguments), options)
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        strange = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        text = f"it takes no option {strange[1]!r}" if strange else str(error)
        raise ConfigError(f"{section}: {text}") from error


def check_options(section: str, function: Callable[..., Any], n_arguments: int, options: Mapping[str, Any]) -> None:
    """Refuse options that are not arguments of ``function`` beyond its first ``n_arguments``, and missing ones.

    Raises:
        ConfigError: naming the option and the nearest valid ones.
    """
    target = function.load() if isinstance(function, Lazy) else function
    parameters = inspect.signature(target).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][n_arguments:]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in options:
            if name not in [p.name for p in named]:
                raise unknown("option", f"{section}.{name}", (f"{section}.{p.name}" for p in named))
    for p in named:
        if p.default is p.empty and p.name not in options:
            raise ConfigError(f"{section}.{p.name} has no value: give {section}.{p.name}=...")


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.yaml`` out of a run folder: names, numbers, lists and dictionaries, nothing else.

    Raises:
        CheckpointError: missing, too large, not YAML, with aliases or tags, or naming something to import.
    """
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"larger than {LARGEST_CONFIG} bytes")
        config = plain_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not a configuration: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a configuration")
    return check_stored(config, path)


def plain_yaml(text: str) -> Any:
    """Read YAML that may come from anywhere, in time and memory that its length bounds.

    Raises:
        ValueError: it has aliases, a few of which can unfold to gigabytes, or is nested so deeply that reading it would
            take hours. YAMLError: it is no YAML, or has tags that make objects.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_CONFIG or isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases" if depth <= DEEPEST_CONFIG else f"nested more than {DEEPEST_CONFIG} deep")
    return yaml.safe_load(text)


def check_stored(config: dict[str, Any], path: Path | str, network: str | None = None) -> dict[str, Any]:
    """Refuse a stored configuration that wants something imported or computed.

    Args:
        config: the configuration.
        path: where it stands, for the message.
        network: an import path that the user has named again on the command line, allowed as ``network.name``.

    Raises:
        CheckpointError: a ``_target_``, an interpolation ``${...}`` or an import path; the message names the key.
    """
    for key, value in _walk(config):
        hidden = any(part.startswith("_") for part in key.split("."))
        if hidden or (isinstance(value, str) and "${" in value):
            raise CheckpointError(f"{path}: {key} = {value!r} is not allowed in a run: names and numbers only")
        if isinstance(value, str) and _IMPORT_PATH.match(value) and not (key == "network.name" and value == network):
            again = f"; if you trust it, repeat it: network={value}" if key == "network.name" else ""
            raise CheckpointError(f"{path}: {key} = {value!r} is an import path, which a run may not hold{again}")
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two configurations, with both values."""
    before, after = dict(_walk(old)), dict(_walk(new))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key} ({before.get(key, 'absent')} -> {after.get(key, 'absent')})"
        for key in keys
        if before.get(key, keys) != after.get(key, keys)
    ]


def resolve(target: str) -> Any:
    """Import ``package.module:attribute`` if both its path and what it resolves to belong to an allow-listed package.

    Raises:
        ConfigError: another package, also behind an alias; a module or attribute that does not exist.
    """
    allowed = {"polydiff", *(point.value.partition(".")[0].partition(":")[0] for point in _adapter_points())}
    module, _, attribute = target.partition(":")

    def inside(name: str) -> bool:
        return name.partition(".")[0] in allowed or name == "torch.optim" or name.startswith("torch.optim.")

    if not inside(module):
        raise ConfigError(
            f"{target!r} is outside the packages that may be named: {', '.join(sorted(allowed))}, torch.optim"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{target!r} cannot be imported: {error}") from error
    home = getattr(found, "__module__", None)
    if not callable(found) or not isinstance(home, str) or not inside(home):
        raise ConfigError(f"{target!r} leads to {home or type(found).__name__}, outside the packages that may be named")
    return found


def find_network(
    adapter: Adapter, section: Mapping[str, Any], local: bool
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Constructor and options of a ``network`` section; see ``build`` for the errors."""
    options = dict(section)
    name = options.pop("name", None)
    if isinstance(name, str) and _IMPORT_PATH.match(name):
        if not local:
            raise ConfigError(f"network.name = {name!r}: an import path is accepted only while training")
        return resolve(name), options
    return _entry("network", name, adapter.network), options


def _entry(kind: str, name: Any, table: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in table:
        raise unknown(kind, name, table)
    return table[name]


def _walk(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of nested dictionaries and lists with their dotted keys; an empty one is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _walk(entry, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for place, entry in enumerate(value):
            yield from _walk(entry, f"{prefix}[{place}]")
    else:
        yield prefix, value


def _adapter_points() -> Any:
    return entry_points(group=adapters.GROUP)
