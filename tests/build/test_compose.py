"""What a command line of ``polydiff train`` composes to, and what it says about mistakes."""

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from polydiff import data
from polydiff.core import adapter as adapters
from polydiff.core.build import SECTIONS, build
from polydiff.core.commands.compose import choices, compose, jobs
from polydiff.core.errors import ConfigError

FACTS = {
    "sigma_data": 0.5,
    "size": {"height": 8, "width": 8, "channels": 1},
    "classes": {"label": ["a", "b"]},
}
TOY = "experiment=toy2d"


def test_a_configuration_is_plain_complete_and_the_same_each_time() -> None:
    config = compose([TOY])
    assert tuple(config) == ("experiment", "adapter", *[name for name in config if name in SECTIONS[2:]])
    assert {*config} == {*SECTIONS}
    assert yaml.safe_load(yaml.safe_dump(config)) == config == compose([TOY])


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_builds(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    assert config["experiment"] == experiment
    build(config, FACTS)


@pytest.mark.parametrize("group", ["process", "objective", "objective/time", "sampling", "optim", "trainer", "logger"])
def test_every_choice_of_every_group_builds(group: str) -> None:
    for choice in choices(group):
        build(compose([TOY, f"{group}={choice}"]), FACTS)


def test_every_data_set_has_a_choice_and_its_options_are_those_of_its_adapter() -> None:
    assert {*choices("data")} == {*data.catalogue(), "file"}
    for name, entry in data.catalogue().items():
        config = compose([TOY, f"data={name}"])["data"]
        assert (config["name"], config["path"]) == (name, None)
        adapter = adapters.load(entry.modality)
        path = data.locate(name if entry.embedded else adapter.default_data)
        assert len(adapter.dataset(path, "test", **config["options"]))


def test_the_network_groups_name_every_option_of_their_networks() -> None:
    import inspect

    from polydiff.core.nn.dit import DiT
    from polydiff.core.nn.mlp import MLP
    from polydiff.core.nn.unet import UNet

    for choice, network in (("mlp", MLP), ("unet", UNet), ("dit", DiT)):
        parameters = inspect.signature(network).parameters
        keys = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} - {"conditions"}
        section = compose(["experiment=toy2d", f"network={choice}"])["network"]
        assert {*section} == keys | {"name"}
        for name in keys:
            default = parameters[name].default
            assert section[name] == (list(default) if isinstance(default, tuple) else default), name


def test_values_keep_their_type() -> None:
    config = compose(
        [TOY, "optim.lr=1", "objective.drop={label: 0.2}", "trainer.clip=null", "data.options.memory_mb=1"]
    )
    assert (config["optim"]["lr"], type(config["optim"]["lr"])) == (1.0, float)
    assert config["objective"]["drop"] == {"label": 0.2}
    assert config["trainer"]["clip"] is None
    assert config["data"]["options"] == {"memory_mb": 1}
    assert compose([TOY, "optim.lr=${optim.eps}"])["optim"]["lr"] == 1e-8
    unet = compose(["experiment=image-digits", "network.blocks=[1,2]", "network.multipliers=[1,3]"])["network"]
    assert (unet["blocks"], unet["multipliers"]) == ([1, 2], [1, 3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing experiment=NAME: one of image-cifar10, "),
        (["experiment=toy2"], "unknown experiment 'toy2': did you mean toy2d?"),
        ([TOY, "data=ring"], "unknown data 'ring': did you mean rings"),
        ([TOY, "netwrk=unet"], "unknown key 'netwrk': did you mean network"),
        ([TOY, "lr=1e-3"], "unknown key 'lr': did you mean optim.lr?"),
        ([TOY, "optim.lrr=1"], "unknown key 'optim.lrr': did you mean optim.lr "),
        ([TOY, "optim.lr.x=1"], "unknown key 'optim.lr.x'"),
        ([TOY, "+optim.foo=1"], "unknown key 'optim.foo'"),
        ([TOY, "rnu=x"], "unknown key 'rnu': did you mean run?"),
        ([TOY, "trainer.steps=many"], "trainer.steps='many' must be a whole number, as in trainer.steps="),
        ([TOY, "trainer.steps=1.5"], "trainer.steps=1.5 must be a whole number"),
        ([TOY, "trainer.steps=null"], "trainer.steps=None must be a whole number"),
        ([TOY, "trainer.compile=1"], "trainer.compile=1 must be true or false"),
        ([TOY, "optim.lr=fast"], "optim.lr='fast' must be a number"),
        ([TOY, "optim.betas=[0.9,x]"], "optim.betas[1]='x' must be a number"),
        ([TOY, "network.name=[a]"], "unknown network"),
        ([TOY, "trainer=5"], "unknown trainer '5': valid: default"),
        ([TOY, "optim.lr=1e-3,1e-4"], "names several values: add -m to train each, or write optim.lr=[1e-3,1e-4]"),
        ([TOY, "experiment=image-digits"], "experiment is given twice"),
        ([TOY, "~optim"], "nothing can be removed"),
        ([TOY, "hydra.verbose=true"], "hydra's own settings have no effect"),
        ([TOY, "hydra/launcher=basic"], "hydra's own settings have no effect"),
        ([TOY, "data.path=a(b"], "quote the value, as in 'data.path=\"a(b\"'"),
        ([TOY, "nonsense"], "cannot read 'nonsense': write key=value"),
        ([TOY, "data=file"], "data.path has no value: give data.path=..."),
        ([TOY, "optim.lr=${trainer.stepz}"], "Interpolation key 'trainer.stepz' not found"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_is_valid(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config = compose(words)
        build(config, FACTS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_values_become_several_jobs_named_by_what_varies() -> None:
    split = jobs(
        ["experiment=toy2d", "data=glob(r*)", "optim.lr=1e-3,1e-4", "objective.drop=0.2", "trainer.seed=range(2)"]
    )
    words, names = zip(*split, strict=True)
    assert len(split) == 1 * 2 * 2
    assert names[0] == "optim.lr=0.001,trainer.seed=0"
    assert names[3] == "optim.lr=0.0001,trainer.seed=1"
    assert words[3] == ["experiment=toy2d", "data=rings", "optim.lr=0.0001", "objective.drop=0.2", "trainer.seed=1"]
    assert [name for _, name in jobs(["experiment=toy2d,image-digits"])] == ["", ""]
    assert jobs(["experiment=toy2d"]) == [(["experiment=toy2d"], "")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of configurations as somebody else's adapter would bring it."""
    experiment = (
        "# @package _global_\ndefaults:\n  - override /network: wide\n  - override /data: rings\nadapter: toy2d\n"
    )
    files = {
        "experiment/mine.yaml": experiment + "trainer: {steps: 7}\n",
        "network/wide.yaml": "name: mlp\nwidth: 512\n",
    }
    for name, text in files.items():
        (tmp_path / "my configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my configs" / name).write_text(text)
    return tmp_path / "my configs"


def check_mine(config: dict[str, Any]) -> None:
    assert config["network"] == {"name": "mlp", "width": 512}
    assert config["data"]["name"] == "rings"
    assert config["trainer"] == {**compose([TOY])["trainer"], "steps": 7}


def test_a_folder_adds_experiments_and_choices(folder: Path) -> None:
    check_mine(compose(["experiment=mine"], folder))
    assert "wide" in choices("network", folder)
    assert "wide" not in choices("network")
    assert compose(["experiment=mine", "network.width=3"], folder)["network"]["width"] == 3
    with pytest.raises(ConfigError, match=r"did you mean network\.width"):
        compose(["experiment=mine", "network.widht=3"], folder)


def test_a_mistake_in_such_a_folder_is_named(folder: Path) -> None:
    experiment = folder / "experiment/mine.yaml"
    text = experiment.read_text()
    for addition, message in [
        ("optimm: {lr: 1.0}\n", "unknown section of experiment 'mine': 'optimm': did you mean optim"),
        ("optim: {lrr: 1.0}\n", "unknown key 'optim.lrr': did you mean optim.lr"),
        ("optim: {lr: fast}\n", "optim.lr='fast' must be a number"),
        ("optim: {lr: [\n", "mine"),
    ]:
        experiment.write_text(text + addition)
        with pytest.raises(ConfigError) as caught:
            compose(["experiment=mine"], folder)
        assert message in str(caught.value)
    experiment.write_text(text.replace("rings", "ringz"))
    with pytest.raises(ConfigError, match="data/ringz"):
        compose(["experiment=mine"], folder)
    (folder / "network/unet.yaml").write_text("name: unet\n")
    with pytest.raises(ConfigError, match=r"network/unet\.yaml has the name of a configuration that polydiff brings"):
        compose([TOY], folder)
    with pytest.raises(ConfigError, match="no such folder"):
        compose([TOY], folder / "nothing")


@pytest.mark.parametrize("inner", ["", "configs/"])
def test_an_installed_package_adds_its_configurations(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    name = "polydiff_third_party" + inner.strip("/")
    package = tmp_path / "site" / name
    shutil.copytree(folder, package / inner)
    (package / "__init__.py").touch()
    (package / inner / "__init__.py").touch()
    information = tmp_path / "site" / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[polydiff.configs]\nmine = {name}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    check_mine(compose(["experiment=mine"]))


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = copy.copy(sys.path)
    compose([TOY])
    assert list(tmp_path.iterdir()) == []
    assert not GlobalHydra.instance().is_initialized()
    assert sys.path == before


@pytest.mark.parametrize("experiment", [name for name in choices("experiment") if name.startswith("image-")])
def test_an_experiment_leaves_a_network_that_is_chosen_as_it_is(experiment: str) -> None:
    for network in ("dit-small", "unet-large"):
        chosen = compose([f"experiment={experiment}", f"network={network}"])["network"]
        assert chosen == compose(["experiment=toy2d", f"network={network}"])["network"]
