import re
from collections.abc import Callable
from pathlib import Path

from polydiff import data
from polydiff.core import adapter as adapters
from polydiff.core.grids import GRIDS
from polydiff.core.schedules import SCHEDULES
from polydiff.core.solvers.names import NAMES


def names(text: str) -> dict[str, set[str]]:
    """Table -> names of its rows."""
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return {block[0]: {line.split()[0] for line in block[1:]} for block in blocks}


def test_list_shows_what_there_is(polydiff: Callable[..., tuple[int, str, str]], root: Path) -> None:
    code, out, error = polydiff("list")
    assert (code, error) == (0, "")
    assert "broken" not in out
    found = names(out)
    own = {name: adapters.load(name).tasks for name in adapters.names()}
    options = {"task.method=mmps", "task.box=null", "task.strength=0.5"}
    assert found.pop("tasks") >= {name for name, tasks in own.items() if tasks} | options
    assert found == {
        "experiments": {path.stem for path in (root / "configs/experiment").glob("*.yaml")},
        "adapters": {*adapters.names()},
        "solvers": {*NAMES},
        "grids": {*GRIDS},
        "schedules": {*SCHEDULES},
        "data": {*data.catalogue()},
    }


def test_list_takes_one_table_and_further_configurations(
    polydiff: Callable[..., tuple[int, str, str]], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /data: rings\nadapter: toy2d\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    (tmp_path / "experiment" / "bad.yaml").write_text("# @package _global_\nadapter: toy2d\ntrainer: {stepz: 3}\n")
    _, out, _ = polydiff("list", "experiments", f"config_dir={tmp_path}")
    assert [*names(out)] == ["experiments"]
    assert {"mine", "toy2d"} < names(out)["experiments"]
    assert re.search(r"mine +toy2d, rings, 2000 steps", out)
    assert "broken: unknown key 'trainer.stepz': did you mean trainer.steps " in out
    assert "did you mean solvers?" in refused("list", "solver")
