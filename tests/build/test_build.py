"""From a configuration to objects, by names in tables."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polydiff.core.build import build, check_stored, differences, read_config, resolve
from polydiff.core.commands.compose import compose
from polydiff.core.errors import CheckpointError, ConfigError, PolydiffError

FACTS = {"sigma_data": 0.7, "size": {}, "classes": {"label": ["a", "b", "c"]}}


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return compose(["experiment=toy2d", "network.width=16", "network.blocks=1"])


@pytest.fixture
def config(composed: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(composed)


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *path, last = key.split(".")
    section = config
    for name in path:
        section = section[name]
    section[last] = value
    return config


def test_every_section_reaches_its_object(config: dict[str, Any]) -> None:
    config["process"] = {"schedule": "vp", "beta_max": 15.0}
    config["objective"] |= {"precondition": "v", "weight": "x0", "drop": 0.3, "time": {"name": "uniform"}}
    built = build(config, FACTS)
    assert built.adapter.name == "toy2d"
    assert built.process.schedule.beta_max == 15.0
    assert (built.denoiser.precondition, built.denoiser.sigma_data) == ("v", 0.7)
    assert built.denoiser.process is built.objective.process is built.process
    assert (built.objective.sigma_data, built.objective.drop) == (0.7, 0.3)
    assert built.objective.weight(torch.tensor([0.2, 0.9], dtype=torch.float64)).tolist() == [1, 1]
    assert sum(p.shape[0] == 16 for p in built.denoiser.parameters()) > 3


def test_a_second_head_and_the_loss_that_trains_it_need_each_other(config: dict[str, Any]) -> None:
    hybrid = compose(["experiment=toy2d", "objective=hybrid", "objective.variance.bins=null"])
    built = build(hybrid, FACTS)
    assert {*built.objective.terms} == {"vlb"}
    assert built.objective.terms["vlb"][1] == 0.001
    assert (built.objective.bound.steps, built.objective.bound.bins) == (1000, None)
    assert built.denoiser(torch.zeros(2, 2), torch.tensor(0.5)).fraction.tolist() == [[0.5, 0.5]] * 2
    for broken in (changed(hybrid, "network.variance", False), changed(config, "network.variance", True)):
        with pytest.raises(ConfigError, match="need each other: take objective=hybrid"):
            build(broken, FACTS)


def test_conditions_are_those_the_data_have(config: dict[str, Any]) -> None:
    assert {*build(config, FACTS).denoiser.conditions} == {"label"}
    assert {*build(config, {**FACTS, "classes": {}}).denoiser.conditions} == set()


def test_a_seed_fixes_the_weights_and_leaves_the_global_state_alone(config: dict[str, Any]) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in build(config, FACTS, seed=seed).denoiser.parameters()])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(7)
    torch.manual_seed(2)
    assert torch.equal(weights(7), first)
    assert not torch.equal(weights(8), first)
    torch.manual_seed(1)
    weights(7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("adapter", "toy3d", "unknown adapter 'toy3d': did you mean toy2d"),
        ("network.name", "mpl", "unknown network 'mpl': did you mean mlp"),
        ("network.widht", 3, "network: it takes no option 'widht'"),
        ("network.name", None, "unknown network 'None'"),
        ("process.schedule", "vpp", "unknown schedule 'vpp': did you mean vp"),
        ("process.beta_max", 3.0, "unknown parameter of the schedule 'edm' 'beta_max'"),
        ("process.sigma_max", "big", "process.sigma_max = 'big' must be a number"),
        ("objective.precondition", "edn", "unknown precondition 'edn': did you mean edm"),
        ("objective.weight", "mins_nr", "unknown weight 'mins_nr': did you mean min_snr"),
        ("objective.stratify", True, "unknown option 'objective.stratify': did you mean objective.stratified"),
        ("objective.time", {"name": "unifrom"}, "unknown time sampler 'unifrom': did you mean uniform"),
        ("objective.time", {"name": "uniform", "mean": 1.0}, "objective.time 'uniform' does not take"),
        ("objective.drop", 1.5, "objective.drop = 1.5 must be a probability"),
        ("objective.terms", {"bond": 1.0}, "unknown loss term 'bond'"),
    ],
)
def test_what_does_not_exist_is_named(config: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(PolydiffError) as caught:
        build(changed(config, key, value), FACTS)
    assert message in str(caught.value)


def test_a_missing_section_is_named(config: dict[str, Any]) -> None:
    del config["process"]
    with pytest.raises(ConfigError, match="no section 'process'"):
        build(config, FACTS)


def test_an_import_path_is_for_training_only(config: dict[str, Any]) -> None:
    config["network"]["name"] = "polydiff.modalities.toy2d.network:mlp"
    with pytest.raises(ConfigError, match="an import path is accepted only while training"):
        build(config, FACTS)
    assert build(config, FACTS, local=True).denoiser.conditions


@pytest.mark.parametrize(
    "target",
    [
        "os:system",
        "subprocess:run",
        "builtins:print",
        "torch:load",
        "torch.hub:load",
        "torch.optimx:f",
        "polydiffx:f",
        "logging:os.system",
        "polydiff.core.build:importlib.import_module",  # an allowed module, but what it leads to is not its own
        "polydiff.core.build:yaml.load",
        "polydiff.core.cli:os.system",
        "polydiff.core.build:Path",
        "polydiff.core.build:SECTIONS",
        "polydiff:__version__",
        "polydiff.core.adapter:names.__globals__",
        "torch.optim.adam:torch.hub.load",
    ],
)
def test_an_import_path_outside_the_allow_list_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="outside the packages that may be named"):
        resolve(target)


def test_an_import_path_inside_the_allow_list_resolves() -> None:
    assert resolve("torch.optim:AdamW") is torch.optim.AdamW
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve("polydiff.core.nn.nothing:Net")
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve("polydiff.core.build:nothing")


def test_differences_name_each_key_with_both_values() -> None:
    old = {"a": {"b": 1, "c": [1, 2], "e": {}}, "d": "x"}
    assert differences(old, copy.deepcopy(old)) == []
    assert differences(old, {"a": {"b": 2, "c": [1, 3], "e": {"f": None}}}) == [
        "a.b (1 -> 2)",
        "a.c[1] (2 -> 3)",
        "a.e ({} -> absent)",
        "d (x -> absent)",
        "a.e.f (absent -> None)",
    ]


def test_a_written_configuration_reads_back(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network._target_", "os.system"),
        ("network.nested", {"deep": [{"_target_": "os.system"}]}),
        ("_partial_", True),
        ("data.path", "${oc.env:HOME}"),
        ("data.options", {"x": ["a${b}"]}),
        ("network.name", "os:system"),
        ("network.name", "polydiff.modalities.toy2d.network:mlp"),
        ("network.activation", "torch.nn:SiLU"),
        ("objective.time.name", "os:system"),
    ],
)
def test_a_stored_configuration_holds_names_and_numbers_only(config: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"run/config\.yaml: ") as caught:
        check_stored(changed(config, key, value), "run/config.yaml")
    assert key.split(".")[0] in str(caught.value)


def test_an_import_path_of_a_run_can_be_allowed_by_naming_it_again(config: dict[str, Any]) -> None:
    config["network"]["name"] = "polydiff.modalities.toy2d.network:mlp"
    assert check_stored(config, "x", "polydiff.modalities.toy2d.network:mlp") is config
    with pytest.raises(CheckpointError, match=r"if you trust it, repeat it: network=polydiff\.modalities"):
        check_stored(config, "x", "polydiff.modalities.toy2d.network:other")
