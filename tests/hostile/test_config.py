"""A run folder comes from anywhere: what its configuration says is looked up or refused, never imported or computed."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from polydiff.core import build
from polydiff.core.cli import main
from polydiff.core.errors import CheckpointError
from polydiff.core.run import Run
from polydiff.core.training import checkpoint

Change = Callable[[dict[str, Any]], Any]

PLANTED = {
    "target": lambda c: c["network"].update(_target_="os.system", command="touch TRAP"),
    "target in a list": lambda c: c["data"]["options"].update(x=[{"_target_": "os.system", "_args_": ["touch TRAP"]}]),
    "target of a section": lambda c: c.update(_target_="os.system"),
    "interpolation": lambda c: c["data"].update(path="${oc.env:HOME}"),
    "import path as network": lambda c: c["network"].update(name="os:system"),
    "import path of ours": lambda c: c["network"].update(name="polydiff.modalities.toy2d.network:mlp"),
    "alias of ours": lambda c: c["network"].update(name="polydiff.core.cli:os.system"),
    "import path elsewhere": lambda c: c["objective"].update(weight="os:system"),
    "dotted name": lambda c: c["network"].update(name="os.system"),
    "dotted adapter": lambda c: c.update(adapter="os.path"),
    "adapter path": lambda c: c.update(adapter="../../trap"),
}

TEXTS = {
    "python tag": "!!python/object/apply:os.system ['touch TRAP']\n",
    "python tag inside": "network: !!python/name:os.system\n",
    "aliases that unfold": "a: &a [x, x]\n"
    + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(40)),
    "deep": "[" * 500_000,
    "deep blocks": "".join(" " * depth + "a:\n" for depth in range(1000)),
    "too large": "x: " + "y" * (build.LARGEST_CONFIG + 1) + "\n",
    "no dictionary": "- a\n- b\n",
    "empty": "",
    "no text": b"\xff\xfe\x00\x00",
    "no YAML": "a: [1, 2\nb: }",
    "zero byte": "a: b\0c\n",
}


@pytest.fixture
def run(moons_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POLYDIFF_DEBUG", raising=False)
    return shutil.copytree(moons_run, tmp_path / "run")


def plant(run: Path, change: Change) -> None:
    """Put a changed configuration into the newest checkpoint, with a manifest that fits, and drop the others."""
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    config = copy.deepcopy(found.config)
    change(config)
    tensors = {"model": found.model, "ema": found.ema, "train": found.train}
    checkpoint.save(run / "checkpoints", found.step, tensors, found.state, config, keep_last=1)
    checkpoint.verify(run / "checkpoints" / f"step-{found.step:08d}")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    code = main([*words])
    said = capsys.readouterr()
    assert code == 1, said
    assert said.err.count("\n") == 1, said.err
    assert not list(Path.cwd().rglob("TRAP"))
    return said.err


@pytest.mark.parametrize("change", PLANTED.values(), ids=PLANTED)
def test_a_checkpoint_that_names_something_to_import_is_refused(
    run: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(run, change)
    refused(capsys, "sample", f"run={run}", "n=1", "steps=1")
    assert not (run / "samples").exists()
    before = (run / "checkpoints/step-00000040/manifest.json").read_bytes()
    refused(capsys, "train", "experiment=toy2d", f"run={run}")
    assert (run / "checkpoints/step-00000040/manifest.json").read_bytes() == before


@pytest.mark.parametrize("change", list(PLANTED.values())[:8], ids=list(PLANTED)[:8])
def test_the_configuration_beside_the_checkpoints_is_held_to_the_same(
    run: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "run/config.yaml: " in refused(capsys, "sample", f"run={run}", "n=1", "steps=1")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_configuration_that_is_none_is_refused(
    run: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "run/config.yaml: " in refused(capsys, "sample", f"run={run}", "n=1", "steps=1")


def test_an_unknown_name_in_a_run_names_the_valid_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(run, lambda c: c["network"].update(name="mpl"))
    assert "unknown network 'mpl': did you mean mlp" in refused(capsys, "sample", f"run={run}", "n=1", "steps=1")


def test_weights_of_another_size_are_refused_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(run, lambda c: c["network"].update(width=33))
    said = refused(capsys, "sample", f"run={run}", "n=1", "steps=1")
    assert "ema.safetensors: parameter 'network." in said
    assert "has shape" in said


@pytest.mark.parametrize("section", ["sampling", "network", "facts"])
def test_a_configuration_with_something_missing_is_one_line(
    run: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    config, state = dict(found.config), dict(found.state)
    config.pop(section, None)
    state.pop(section, None)
    tensors = {"model": found.model, "ema": found.ema, "train": found.train}
    checkpoint.save(run / "checkpoints", found.step, tensors, state, config, keep_last=1)
    assert section in refused(capsys, "sample", f"run={run}", "n=1", "steps=1")


def test_an_import_path_works_when_the_user_names_it_again(run: Path) -> None:
    path = "polydiff.modalities.toy2d.network:mlp"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["network"]["name"] = path
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    plant(run, lambda c: c["network"].update(name=path))
    with pytest.raises(CheckpointError, match="repeat it: network=polydiff"):
        Run.load(run)
    assert len(Run.load(run, network=path).sample(2, steps=1)) == 2
    assert main(["sample", f"run={run}", "n=1", "steps=1", f"network={path}"]) == 0
    with pytest.raises(CheckpointError, match="is an import path, which a run may not hold"):
        Run.load(run, network="polydiff.modalities.toy2d.network:other")
