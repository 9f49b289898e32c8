"""``key=value`` words of a command line -> one frozen dataclass, types checked, with the help text made from it.

The grammar is hydra's, so that quoting, lists and null are written as for ``polydiff train``; only values that are
paths or plain text are taken as typed, because a folder may have any name.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from polydiff.core.errors import ConfigError, unknown

Options = TypeVar("Options")
POSITIONAL = object()  # marks an option that may be given without its name
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
    Path: "a path",
    list: "a list",
}


class Prefix(NamedTuple):
    """Marks an open prefix whose field has another name."""

    name: str


class Declared(NamedTuple):
    """One option: a field ``name: Annotated[type, "help"] = default`` of a dataclass.

    A field of type ``dict[str, Any]`` is an open prefix: ``cond.label=3`` fills ``cond["label"]``. Its ``prefix`` is its name
    unless ``Prefix`` says another.
    """

    name: str
    kinds: tuple[Any, ...]
    text: str
    positional: bool
    default: Any
    prefix: str

    @property
    def open(self) -> bool:
        """Whether it is an open prefix."""
        return any(get_origin(kind) is dict for kind in self.kinds)

    @property
    def shown(self) -> str:
        """How messages call it."""
        return f"{self.prefix}.<key>" if self.open else self.name


def declared(kind: type[Any]) -> dict[str, Declared]:
    """The options of a dataclass by name."""
    hints = get_type_hints(kind, include_extras=True)
    table = {}
    for entry in fields(kind):
        hint, text, *marks = get_args(hints[entry.name])
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        prefix = next((mark.name for mark in marks if isinstance(mark, Prefix)), entry.name)
        table[entry.name] = Declared(entry.name, kinds, text, POSITIONAL in marks, entry.default, prefix)
    return table


def parse(kind: type[Options], words: Sequence[str]) -> Options:
    """Turn the words after a verb into its options.

    Raises:
        ConfigError: an unknown, repeated, missing or ill-typed option, or a value hydra's grammar cannot read.
    """
    table = declared(kind)
    place = next((name for name, entry in table.items() if entry.positional), None)
    opened = {entry.prefix: name for name, entry in table.items() if entry.open}
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        prefix, dot, key = name.partition(".")
        if not equals:
            if word.startswith("-") or place is None or place in given:
                names = ", ".join(entry.shown for entry in table.values())
                raise ConfigError(f"cannot read {word!r}: write options as key=value; valid: {names}")
            given[place] = word
        elif dot and key and prefix in opened:
            if key in given.setdefault(opened[prefix], {}):
                raise ConfigError(f"{name} is given twice")
            given[opened[prefix]][key] = value_of(word)
        elif name not in table or table[name].open:
            raise unknown("option", name, (entry.shown for entry in table.values()))
        elif name in given:
            raise ConfigError(f"{name} is given twice")
        else:
            given[name] = _typed(table[name], word, text)
    for name, entry in table.items():
        if name not in given and entry.default is MISSING and not entry.open:
            raise ConfigError(f"missing {entry.name}{'' if entry.positional else '=...'}: {entry.text}")
    return kind(**given)


def value_of(word: str) -> Any:
    """The value of one ``key=value`` word, read by hydra's grammar.

    Raises:
        ConfigError: it cannot be read; the message shows how to quote it.
    """
    override = lex(word)
    if override.is_sweep_override():
        name, _, text = word.partition("=")
        raise ConfigError(f"{word!r} names several values: write a list as {name}=[{text}]")
    if override.type.name != "CHANGE":
        raise ConfigError(f"cannot read {word!r}: write key=value")
    return override.value()


def lex(word: str) -> Any:
    """Hydra's ``Override`` for one word; see :func:`value_of` for the errors."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        name, equals, text = word.partition("=")
        if not equals or not re.match(r"[+~]{0,2}[\w.@/\-]+$", name):
            raise ConfigError(f"cannot read {word!r}: write key=value") from error
        quoted = text.replace('"', '\\"')
        raise ConfigError(f"""cannot read {word!r}: quote the value, as in '{name}="{quoted}"'""") from error


def explain(kind: type[Any], *examples: str) -> str:
    """The option list that ``--help`` shows, one line each, and example command lines."""
    lines = []
    for entry in declared(kind).values():
        shown = entry.shown + ("=V" if entry.open else "")
        if not entry.open and not entry.positional:
            shown += "=" + ("..." if entry.default is MISSING else show(entry.default))
        lines.append(f"  {shown:26}{entry.text}")
    text = "options:\n" + "\n".join(lines)
    return text + ("\n\nexamples:\n" + "\n".join(f"  {example}" for example in examples) if examples else "")


def _typed(entry: Declared, word: str, text: str) -> Any:
    kinds = entry.kinds
    if Path in kinds or str in kinds:  # taken as typed: a folder may have any name
        if text in ("", "null"):
            if type(None) in kinds:
                return None
            raise ConfigError(f"{word!r}: {entry.name} must be {_WORDS[kinds[0]]}")
        plain = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
        return Path(plain).expanduser() if Path in kinds else plain
    return _as_declared(entry, word, value_of(word))


def fill(kind: type[Options], given: Mapping[str, Any], prefix: str) -> Options:
    """Turn the values of an open prefix into the dataclass that declares them.

    Args:
        kind: the dataclass.
        given: values by key.
        prefix: as in ``task.<key>``, for messages.

    Raises:
        ConfigError: an unknown, missing or ill-typed key.
    """
    table = declared(kind)
    for name in given:
        if name not in table:
            raise unknown("option", f"{prefix}.{name}", (f"{prefix}.{key}" for key in table))
    for name, entry in table.items():
        if name not in given and entry.default is MISSING:
            raise ConfigError(f"missing {prefix}.{name}=...: {entry.text}")
    words = {name: f"{prefix}.{name}={show(value)}" for name, value in given.items()}
    return kind(**{name: _as_declared(table[name], words[name], value) for name, value in given.items()})


def _as_declared(entry: Declared, word: str, value: Any) -> Any:
    for kind in entry.kinds:
        found = _converted(kind, value)
        if found is not MISSING:
            return found
    expected = " or ".join(_words(kind) for kind in entry.kinds if kind is not type(None))
    raise ConfigError(f"{word!r}: {entry.name} must be {expected}")


def _words(kind: Any) -> str:
    """What a type is called, a list with what it holds."""
    if get_origin(kind) is not list:
        return _WORDS[kind]
    items = [one for one in get_args(get_args(kind)[0]) or get_args(kind) if one is not type(None)]
    return f"a list, each of it {' or '.join(_WORDS[one] for one in items)}"


def _converted(kind: Any, value: Any) -> Any:
    """The value as this type, or ``MISSING`` when it is another one."""
    if isinstance(kind, types.UnionType):
        return next((found for one in get_args(kind) if (found := _converted(one, value)) is not MISSING), MISSING)
    if kind is float:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else MISSING
    if kind is Path:
        return Path(value).expanduser() if isinstance(value, str | Path) and str(value) else MISSING
    if get_origin(kind) is list:
        found = [_converted(get_args(kind)[0], one) for one in value] if isinstance(value, list | tuple) else []
        return found if found and MISSING not in found else MISSING
    return value if type(value) is kind else MISSING


def show(default: Any) -> str:
    """A value as it is written on a command line."""
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
