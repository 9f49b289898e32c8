"""Opening a run and drawing from it: weights, conditions, guidance, and which sample depends on what."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import polydiff
from polydiff.core.adapter import Item
from polydiff.core.denoiser import Prediction
from polydiff.core.errors import CheckpointError, ConfigError, DataError, DivergenceError
from polydiff.core.run import Run
from polydiff.core.solvers import Multistep, RungeKutta


@pytest.fixture
def run(moons_run: Path) -> Run:
    return Run.load(moons_run, "cpu")


def stacked(items: list[Item]) -> Tensor:
    return torch.stack([torch.as_tensor(item.x) for item in items])


def binds(
    run: Run, monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
) -> None:
    """Let ``function(x_t, cond)`` be the predicted clean state."""

    def bind(mask: Any = None, cond: Mapping[str, Tensor] | None = None) -> Callable[[Tensor, Tensor], Prediction]:
        return lambda x_t, t: Prediction(run.process, x_t, t, x0=function(x_t, cond or {}))

    monkeypatch.setattr(run.denoiser, "bind", bind)


def test_load_gives_the_averaged_weights_of_the_newest_step_frozen(moons_run: Path) -> None:
    run = polydiff.load(moons_run)
    stored = load_file(moons_run / "checkpoints/step-00000040/ema.safetensors")
    trained = load_file(moons_run / "checkpoints/step-00000040/model.safetensors")
    own = run.denoiser.state_dict()
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name].cpu(), stored[name]) for name in own)
    assert any(not torch.equal(own[name].cpu(), trained[name]) for name in own)
    assert not run.denoiser.training
    assert not any(p.requires_grad for p in run.denoiser.parameters())
    assert (run.step, run.path, run.checkpoint_path.name) == (40, moons_run, "step-00000040")
    assert run.facts["classes"] == {"label": ["upper", "lower"]}
    assert run.config["experiment"] == "toy2d"
    assert run.adapter.name == "toy2d"


def test_load_takes_one_checkpoint_too(moons_run: Path) -> None:
    run = Run.load(moons_run / "checkpoints/step-00000020")
    assert (run.step, run.path) == (20, moons_run)


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(moons_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(moons_run, tmp_path / "run")
    file = copy / "checkpoints/step-00000040/ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"FALLING BACK to step 20.*ema\.safetensors"):
        assert Run.load(copy).step == 20


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such run; train one with: polydiff train"):
        Run.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        Run.load(tmp_path)


def test_a_device_that_is_not_there_is_one_clear_error(moons_run: Path) -> None:
    with pytest.raises(ConfigError, match="device=abacus cannot be used here"):
        Run.load(moons_run, "abacus")


@pytest.mark.parametrize("device", ["meta", None, "nowhere"])
def test_a_device_that_holds_no_numbers_is_none(moons_run: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match=f"device={device} cannot be used here"):
        Run.load(moons_run, device)


@pytest.mark.parametrize("path", [None, 5])
def test_a_run_is_opened_by_its_path(path: Any) -> None:
    with pytest.raises(CheckpointError, match="opened by the path of its folder"):
        polydiff.load(path)


def test_a_solver_of_ones_own_is_taken_as_it_is(run: Run) -> None:
    words: dict[str, Any] = {"steps": 5, "seed": 1}
    assert torch.equal(
        stacked(run.sample(3, solver=RungeKutta("heun", "eps"), **words)),
        stacked(run.sample(3, solver="heun", **words)),
    )
    assert not torch.equal(
        stacked(run.sample(3, solver=Multistep(3), **words)), stacked(run.sample(3, solver="dpmpp-2m", **words))
    )


@pytest.mark.parametrize("solver", ["dpmpp-2m", "ddpm", "edm"])
def test_the_draws_of_an_item_depend_on_neither_n_nor_batch(
    run: Run, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    binds(run, monkeypatch, lambda x_t, cond: 0.5 * x_t)  # elementwise, so that all of the arithmetic is the item's own
    draw = lambda n, batch: stacked(run.sample(n, solver=solver, steps=6, seed=3, batch=batch))
    everything = draw(64, 64)
    for n, batch in ((1, 1), (7, 7), (7, 3), (64, 10)):
        assert torch.equal(draw(n, batch), everything[:n]), (n, batch)
    assert not torch.equal(stacked(run.sample(4, solver=solver, steps=6, seed=4)), everything[:4])


def test_samples_are_the_same_at_equal_batch_size_and_close_otherwise(run: Run) -> None:
    everything = stacked(run.sample(64, {"label": [0, 1]}, seed=5))
    assert torch.equal(stacked(run.sample(64, {"label": [0, 1]}, seed=5)), everything)
    for n in (1, 7):
        assert (stacked(run.sample(n, {"label": [0, 1]}, seed=5)) - everything[:n]).abs().max() < 1e-5


def test_deterministic_batch_gives_the_same_bits_for_any_n(run: Run) -> None:
    draw = lambda n: stacked(run.sample(n, {"label": [0, 1, None]}, seed=5, deterministic_batch=8))
    everything = draw(30)
    assert all(torch.equal(draw(n), everything[:n]) for n in (1, 7, 8, 9))


def test_guidance_is_the_published_combination(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(x_t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return torch.full_like(x_t, 10.0) + cond["label"][:, None] if cond else torch.full_like(x_t, 2.0)

    binds(run, monkeypatch, predicted)
    samples = stacked(run.sample(4, {"label": [0, 1, None]}, guidance=1.5))
    expected = torch.tensor([2 + 1.5 * 8, 2 + 1.5 * 9, 2, 2 + 1.5 * 8])  # u + w (c - u); without a condition u
    torch.testing.assert_close(samples, expected[:, None].expand(4, 2))
    assert run.config["sampling"]["guidance"] == 1
    torch.testing.assert_close(stacked(run.sample(2, {"label": [0, 1]})), torch.tensor([[10.0, 10.0], [11.0, 11.0]]))


def test_the_interval_of_the_run_bounds_its_guidance(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    binds(run, monkeypatch, lambda x_t, cond: torch.full_like(x_t, 3.0 if cond else 1.0))
    run.config["sampling"] |= {"guidance": 2.0, "interval": [-100, -90]}
    torch.testing.assert_close(stacked(run.sample(1, {"label": 0})), torch.full((1, 2), 3.0))
    run.config["sampling"]["interval"] = None
    torch.testing.assert_close(stacked(run.sample(1, {"label": 0})), torch.full((1, 2), 5.0))


def test_a_label_is_an_index_a_name_or_a_list_that_cycles(run: Run) -> None:
    def labels(value: Any, n: int = 5) -> list[int | None]:
        return [int(item["label"]) if item else None for item in run.conditions({"label": value}, n)]

    assert labels(1) == [1] * 5
    assert labels("lower") == [1] * 5
    assert labels(torch.tensor(1)) == [1] * 5
    assert labels([0, "lower"]) == labels(torch.tensor([0, 1])) == labels(range(2)) == [0, 1, 0, 1, 0]
    assert labels(None) == [None] * 5
    assert labels([0, None]) == [0, None, 0, None, 0]
    assert [item.cond for item in run.sample(2, {"label": ["lower", None]}, steps=1)] == [
        {"label": torch.tensor(1)},
        {},
    ]


@pytest.mark.parametrize("value", [2, -1, 12, "middle", True, 1.0, [0, 2], {"a": 1}])
def test_a_label_out_of_range_names_the_valid_ones(run: Run, value: Any) -> None:
    with pytest.raises(ConfigError, match="valid are the indices 0 to 1 and the names upper, lower"):
        run.sample(2, {"label": value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"n": -1}, "n=-1 must be at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"deterministic_batch": 0}, "batch=0 must be at least 1"),
        ({"solver": "hun"}, "unknown solver 'hun': did you mean heun"),
        ({"solver": 5}, "unknown solver '5'"),
        ({"grid": "karas"}, "unknown grid 'karas': did you mean karras"),
        ({"grid": [0.9, 0.1]}, "unknown grid .* valid: ddpm-leading"),
        ({"n": 1.5}, "n=1.5 must be a whole number"),
        ({"n": True}, "n=True must be a whole number"),
        ({"batch": "8"}, "batch='8' must be a whole number"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"trajectory": 1.5}, "trajectory=1.5 must be a whole number"),
        ({"cond": [3]}, r"cond=\[3\] must be a mapping of values by name: one of label"),
        ({"size": 8}, "size=8 must be a mapping of numbers by name"),
        ({"cond": {"lable": 0}}, "unknown condition 'lable': did you mean label"),
        ({"cond": {"label": []}}, r"cond.label=\[\] is empty"),
        ({"size": {"height": 3}}, "unknown size 'size.height'"),
        ({"guidance": 2.0}, "guidance=2.0 needs a condition to guide towards: cond.label"),
    ],
)
def test_a_bad_request_is_named(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.sample(**{"n": 2, **options})


def test_a_trajectory_holds_predicted_clean_states_up_to_the_sample(run: Run) -> None:
    plain = run.sample(3, {"label": 0}, steps=10)
    items = run.sample(3, {"label": 0}, steps=10, trajectory=4)
    for before, item in zip(plain, items, strict=True):
        assert before.meta == {}
        assert torch.equal(torch.as_tensor(item.x), torch.as_tensor(before.x))
        frames = item.meta["trajectory"]
        assert frames.shape == (4, 2)
        assert torch.equal(frames[-1], torch.as_tensor(item.x))  # the last interval returns the predicted clean state
        assert not torch.equal(frames[0], frames[-1])
    assert run.sample(1, steps=2, trajectory=9)[0].meta["trajectory"].shape == (2, 2)


def test_what_is_not_finite_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    binds(run, monkeypatch, lambda x_t, cond: x_t * float("nan"))
    with pytest.raises(DivergenceError, match="not finite"):
        run.sample(2)


def test_sampling_leaves_the_global_random_state_alone(run: Run) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run.sample(2, solver="ddpm", steps=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_data_of_a_run_are_found_by_name_also_when_their_file_has_moved(run: Run) -> None:
    for path in (None, "/gone/moons.h5"):
        run.config["data"]["path"] = path
        assert run.dataset("test").facts["sha256"] == run.facts["sha256"]
    run.config["data"] |= {"name": "mine", "path": "/gone/mine.h5"}
    with pytest.raises(DataError, match=r"/gone/mine\.h5"):
        run.dataset("test")
