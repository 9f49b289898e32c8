"""Adapters with planted faults: the suite finds each of them, says what to do, and complains of nothing else."""

import re
import shutil
from pathlib import Path

import pytest

from .conftest import Outside, outcome

PLANTED = Path(__file__).with_name("planted")
EXPERIMENT = "# @package _global_\ndefaults:\n  - override /data: {data}\nadapter: {name}\nnetwork: {network}\n"
SMALL = ("--polydiff-set", "network.width=32", "--polydiff-set", "network.blocks=1")


@pytest.fixture(scope="module", autouse=True)
def planted(site: Path) -> None:
    """Install the planted adapters beside the document's."""
    package, information = site / "planted", site / "planted-1.0.dist-info"
    shutil.copytree(PLANTED, package, ignore=shutil.ignore_patterns("__pycache__"))
    names = [path.stem for path in PLANTED.glob("*.py")]
    for name in names:
        data, network = ("file", "{name: sets}\ndata: {name: curves}") if name == "sets" else ("moons", "{}")
        path = package / "configs" / "experiment" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(EXPERIMENT.format(name=name, data=data, network=network))
    for folder in (package, package / "configs"):
        (folder / "__init__.py").touch()
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n\nAdapters with faults.\n"
    )
    points = "".join(f"{name} = planted.{name}:ADAPTER\n" for name in names)
    (information / "entry_points.txt").write_text(
        f"[polydiff.modalities]\n{points}[polydiff.configs]\nplanted = planted.configs\n"
    )


def check(failed: dict[str, str], expected: dict[str, str]) -> None:
    assert failed.keys() == expected.keys(), {name: failed[name] for name in failed.keys() - expected.keys()}
    for name, message in expected.items():
        assert re.search(message, failed[name]), failed[name]


def test_faults_of_data_and_outputs(outside: Outside, tmp_path: Path) -> None:
    failed, passed = outcome(outside, tmp_path, "--polydiff-adapter", "careless", *SMALL)
    refuses = r"codec.read raises \w+ on such a csv file: turn it into a DataError"
    check(
        failed,
        {
            "test_importing_is_lazy[careless]": "importing planted.careless also imports h5py.*: give parts as lazy",
            "test_codec_round_trip[careless]": r"encode\(decode\(x\)\) differs from x by 0\.\d+, codec.tolerance states 0",
            "test_files_reopen[careless]": r"a csv file gives an item back with an error of 0\.\d+, codec.tolerance states 0",
            "test_codec_refuses_other_files[careless-missing]": refuses,
            "test_codec_refuses_other_files[careless-empty]": refuses,
            "test_codec_refuses_other_files[careless-noise]": refuses,
            "test_shape_refuses_impossible_sizes[careless]": r"shape\(\{'no_such_size': 4\}, cond\) must raise ConfigError",
            "test_task[careless-forgets]": "task 'forgets' does not keep what it says is kept",
            "test_task[careless-draws]": "task 'draws': a sample changes with the number of them",
            "test_metrics[careless]": "'luck'].real is missing: the same measure of options",
            "test_view[careless]": "the view asks for 'https://cdn.example/plot.js': a report must open without a network",
        },
    )
    assert len(passed) > 10


def test_faults_of_networks(outside: Outside, tmp_path: Path) -> None:
    adapters = ("--polydiff-adapter", "clumsy", "--polydiff-adapter", "forgetful")
    failed, passed = outcome(outside, tmp_path, *adapters, *SMALL, "-k", "not data_tests")
    check(
        failed,
        {
            "test_loss_is_finite_and_reaches_every_parameter[clumsy-mlp]": "these parameters are never used: spare; remove",
            "test_items_of_a_batch_do_not_mix[clumsy-mlp-train]": "normalise within each item .*not batch norm",
            "test_symmetry[clumsy-mlp-rotation]": r"declares the symmetry 'rotation', but F\(g x\) and g F\(x\) differ",
            "test_symmetry[clumsy-mlp-mirror]": "unknown symmetry 'mirror': valid: .*reflection",
            "test_saved_model_samples_the_same[forgetful]": "must be a parameter or a persistent buffer",
            "test_noise_level_matters[forgetful-mlp]": "the network does not use c_noise: embed it",
            "test_overfits_four_items[forgetful]": "the loss on four items fell only from",
            "test_condition_has_an_effect_only_where_present[forgetful-mlp-label]": "'label' being present changes nothing",
        },
    )
    assert len(passed) > 15


def test_padding_and_order(outside: Outside, tmp_path: Path) -> None:
    failed, passed = outcome(outside, tmp_path, "--polydiff-adapter", "sets", "-k", "padding or symmetry")
    check(
        failed,
        {
            "test_padding_changes_nothing[sets-leaky]": "numbers behind the mask change valid elements by",
            "test_symmetry[sets-ordered-permutation]": "declares the symmetry 'permutation'",
            "test_symmetry[sets-ordered-reversal]": "declares the symmetry 'reversal'",
            **{f"test_symmetry[sets-{name}-translation]": "'translation'" for name in ("sets", "leaky", "ordered")},
        },
    )
    assert {"test_padding_changes_nothing[sets-sets]", "test_symmetry[sets-sets-permutation]"} <= passed
