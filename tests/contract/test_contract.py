"""Every adapter keeps the contract: those of this repository, and the one that the document builds outside of it."""

import json
from pathlib import Path

import pytest

from polydiff.core import adapter as adapters

from .conftest import Outside, documented, outcome

OWN = sorted(path.parent.name for path in Path(adapters.__file__).parents[1].glob("modalities/*/__init__.py"))


def test_every_adapter_keeps_the_contract(outside: Outside, tmp_path: Path) -> None:
    names = [*OWN, "curves"]
    failed, passed = outcome(outside, tmp_path, *(word for name in names for word in ("--polydiff-adapter", name)))
    assert failed == {}
    for name in names:
        assert sum(f"[{name}" in test for test in passed) > 20, name
    assert {"test_padding_changes_nothing[curves-unet]", "test_odd_sizes[curves-unet]"} <= passed


def test_images_keep_it_with_all_their_conditions(outside: Outside, tmp_path: Path) -> None:
    options = ("data.options.condition=low_resolution", "data.options.factor=2", "data.options.augment=0.3")
    words = [word for option in (*options, "network.channels=8") for word in ("--polydiff-set", option)]
    chosen = "well_formed or condition or every_parameter or odd_sizes or metrics or view or promises"
    failed, passed = outcome(outside, tmp_path, "--polydiff-adapter", "image", *words, "-k", chosen)
    assert failed == {}
    named = {
        f"test_condition_has_an_effect_only_where_present[image-unet-{name}]" for name in ("image", "augment", "label")
    }
    assert named <= passed


def test_the_document_builds_its_adapter_in_few_lines() -> None:
    files = documented()
    assert {Path(name).suffix for name in files} == {".toml", ".md", ".py", ".yaml"}
    lines = {name: len(text.splitlines()) for name, text in files.items() if name.endswith((".py", ".yaml"))}
    assert lines.pop("polydiff_curves/tasks.py") <= 30  # the part that many do without
    assert sum(lines.values()) <= 150, lines


COMMANDS = """
import json, sys
from polydiff.core.cli import main
for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(code)
"""


def test_the_documented_adapter_trains_and_samples_like_any_other(outside: Outside, tmp_path: Path) -> None:
    run = tmp_path / "curves"
    small = ["trainer.steps=3", "trainer.batch=8", "trainer.device=cpu", "logger=jsonl"]
    train = ["train", "experiment=curves", f"run={run}", *small]
    sample = ["sample", f"run={run}", "n=2", "steps=4", "cond.label=two", "size.points=41"]
    done = outside("-c", COMMANDS, json.dumps([["list"], train, sample]))
    assert done.returncode == 0, done.stderr
    assert "600 noisy sine waves" in done.stdout
    assert "curves, curves, 1000 steps" in done.stdout
    (folder,) = (run / "samples").iterdir()
    assert (folder / "samples.json").is_file()
    curves = [path.read_text().split() for path in sorted(folder.glob("*.csv"))]
    assert [len(curve) for curve in curves] == [41, 41]


SPY = """
import json, sys
import pytest
code = pytest.main(["--co", "-q", "-p", "no:cacheprovider"])
print(json.dumps([int(code), "torch" in sys.modules, "polydiff.core.contract" in sys.modules]))
"""


def test_without_its_option_the_plugin_adds_nothing(outside: Outside) -> None:
    done = outside("-c", SPY)
    assert json.loads(done.stdout.splitlines()[-1]) == [pytest.ExitCode.NO_TESTS_COLLECTED, False, True], done.stderr


def test_an_unknown_adapter_is_one_clear_line(outside: Outside) -> None:
    done = outside("-m", "pytest", "-q", "--polydiff-adapter", "curve")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--polydiff-adapter: unknown adapter 'curve': did you mean curves? valid:" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_contract_runs_beside_an_authors_own_tests(outside: Outside, tmp_path: Path) -> None:
    own = tmp_path / "test_own.py"
    own.write_text("def test_own(): pass\n")
    done = outside(
        "-m",
        "pytest",
        "--co",
        "-q",
        "-p",
        "no:cacheprovider",
        str(own),
        "--polydiff-adapter",
        "curves",
        "-k",
        "own or codec",
    )
    assert "test_own" in done.stdout
    assert "test_codec_round_trip[curves]" in done.stdout
    assert "test_view" not in done.stdout
