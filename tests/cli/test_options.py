from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from polydiff.core.commands.options import POSITIONAL, explain, parse
from polydiff.core.errors import ConfigError


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, "where"]
    what: Annotated[str, "which", POSITIONAL] = "all"
    n: Annotated[int, "how many"] = 3
    scale: Annotated[float | None, "how strong"] = None
    quick: Annotated[bool, "at once"] = False
    steps: Annotated[list[int] | None, "each"] = None
    cond: Annotated[dict[str, Any], "open"] = field(default_factory=dict)


def test_every_type_is_read_and_kept_apart() -> None:
    words = ["run=a", "solvers", "n=5", "scale=2", "quick=true", "steps=[4,8]", "cond.label=[0,up,null]", "cond.x=null"]
    expected = Options(Path("a"), "solvers", 5, 2.0, True, [4, 8], {"label": [0, "up", None], "x": None})
    parsed = parse(Options, words)
    assert parsed == expected
    assert type(parsed.scale) is float


@pytest.mark.parametrize("path", ["runs/a=b,c=d", "my runs (old)/é!", "007", "1e3", "a:b", "'quoted path'"])
def test_a_path_is_taken_as_it_is_typed(path: str) -> None:
    assert parse(Options, [f"run={path}"]).run == Path(path.strip("'"))


def test_null_gives_the_default_back() -> None:
    assert parse(Options, ["run=a", "scale=null"]).scale is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n=3"], "missing run=...: where"),
        (["run="], "run must be a path"),
        (["run=a", "n=3.0"], "n must be a whole number"),
        (["run=a", "n=true"], "n must be a whole number"),
        (["run=a", "n=null"], "n must be a whole number"),
        (["run=a", "n=[1]"], "n must be a whole number"),
        (["run=a", "scale=big"], "scale must be a number"),
        (["run=a", "scale=nan"], "scale must be a number"),
        (["run=a", "scale=inf"], "scale must be a number"),
        (["run=a", "quick=1"], "quick must be true or false"),
        (["run=a", "steps=4"], "steps must be a list"),
        (["run=a", "steps=[4,x]"], "steps must be a list"),
        (["run=a", "steps=[]"], "steps must be a list"),
        (["run=a", "n=1,2"], "write a list as n=[1,2]"),
        (["run=a", "m=1"], "unknown option 'm': valid: cond.<key>, n, quick, run, scale, steps, what"),
        (["run=a", "scael=1"], "did you mean scale?"),
        (["run=a", "con.label=1"], "unknown option 'con.label'"),
        (["run=a", "cond=1"], "unknown option 'cond': did you mean cond.<key>?"),
        (["run=a", "cond.=1"], "unknown option 'cond.'"),
        (["run=a", "+n=1"], "unknown option '+n'"),
        (["run=a", "n=1", "n=2"], "n is given twice"),
        (["run=a", "cond.x=1", "cond.x=2"], "cond.x is given twice"),
        (["run=a", "one", "two"], "cannot read 'two': write options as key=value"),
        (["run=a", "--n=3"], "unknown option '--n': did you mean n?"),
        (["run=a", "-n"], "cannot read '-n': write options as key=value"),
    ],
)
def test_a_mistake_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Options, words)
    assert message in str(caught.value)


def test_what_the_grammar_cannot_read_is_shown_quoted_and_then_works() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Options, ["run=a", 'cond.label=Ankle boot (new), "fine"!'])
    message = str(caught.value)
    shown = message[message.index("as in '") + 7 : -1]
    assert parse(Options, ["run=a", shown]).cond == {"label": 'Ankle boot (new), "fine"!'}


def test_help_names_every_option_with_its_default() -> None:
    text = explain(Options, "polydiff try run=a")
    for line in (
        "run=...",
        "what ",
        "n=3 ",
        "scale=null",
        "quick=false",
        "cond.<key>=V",
        "how strong",
        "polydiff try run=a",
    ):
        assert line in text
