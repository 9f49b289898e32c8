"""Tasks: where sampling starts, what guides it, what is batched; and that a draw belongs to its design alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from polydiff.core import given, tasks
from polydiff.core.adapter import Item
from polydiff.core.errors import ConfigError, DataError
from polydiff.core.guidance import Replacement
from polydiff.core.inverse import MMPS, identity
from polydiff.core.noise import Noise
from polydiff.core.processes import GaussianProcess
from polydiff.core.run import Run
from polydiff.core.sampling import sample
from polydiff.core.schedules import EDM, VP, RectifiedFlow
from polydiff.core.solvers import Multistep
from polydiff.core.solvers.resample import Resample
from polydiff.core.tasks import Task
from polydiff.core.tree import leaves

POINTS = [Item(torch.tensor([0.5, -0.3]), id="a"), Item(torch.tensor([-1.0, 0.4]), id="b")]


@pytest.fixture
def run(moons_run: Path) -> Run:
    return Run.load(moons_run, "cpu")


def own(run: Run, make: Callable[..., Task]) -> dict[str, str]:
    """Give a run one more task; the words that sample with it."""
    run.adapter = replace(run.adapter, tasks={"own": make})
    return {"task": "own"}


def states(items: list[Item]) -> Tensor:
    return torch.stack([leaves(item.x)[0] for item in items])


@pytest.mark.parametrize("method", ["replacement", "repaint", "mmps", "pigdm", "dps"])
def test_a_draw_belongs_to_its_design_alone(run: Run, method: str) -> None:
    words: dict[str, Any] = {"task": "inpaint", "input": POINTS, "options": {"method": method}, "steps": 5, "seed": 3}
    many = states(run.sample(7, batch=3, **words))
    assert float((states(run.sample(2, **words)) - many[:2]).abs().max()) < 1e-5
    padded = states(run.sample(7, deterministic_batch=4, **words))
    assert torch.equal(states(run.sample(3, deterministic_batch=4, **words)), padded[:3])
    assert torch.equal(many[:, 0], torch.tensor([0.5, -1.0] * 4)[:7])
    assert len(set(many[:, 1].tolist())) == 7


def test_equal_settings_share_a_batch_and_others_run_apart(run: Run) -> None:
    known = torch.tensor([True, False])

    def make(input: Item, options: Any, run: Run, noise: Noise, k: int) -> Task:
        x0 = torch.tensor([k / 4, 0.0])
        return Task(guide=Replacement(x0, known) if k % 3 else MMPS(x0, identity, sigma_y=0.1), meta={"k": k})

    seen: list[int] = []
    run.denoiser.network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    items = run.sample(6, steps=1, **own(run, make))
    assert seen == [2, 4]
    assert [item.meta["task"]["k"] for item in items] == [*range(6)]
    assert states(items)[[1, 2, 4, 5], 0].tolist() == [0.25, 0.5, 1.0, 1.25]
    assert float((states(items)[[0, 3], 0] - torch.tensor([0.0, 0.75])).abs().max()) < 0.1


def test_a_clean_start_is_perturbed_to_its_time_with_the_items_own_noise(run: Run) -> None:
    t_start = 0.4
    seen: list[Tensor] = []

    def watch(denoise: Any) -> Any:
        def watched(x_t: Tensor, t: Tensor) -> Any:
            seen.append(torch.cat([t.reshape(1), x_t.flatten().double()]))
            return denoise(x_t, t)

        return watched

    @dataclass(frozen=True, eq=False)
    class Watch:
        def __call__(self, denoise: Any) -> Any:
            return watch(denoise)

        def stack(self, others: Any) -> Any:
            return self

    own(run, lambda input, options, run, noise, k: Task(x_start=input.x, t_start=t_start, guide=Watch()))
    run.sample(2, input=POINTS, seed=5, steps=3, solver="ddim", task="own")
    schedule, t = run.process.schedule, torch.tensor(t_start, dtype=torch.float64)
    z = Noise(5, [0, 1]).draw(0, "start", torch.zeros(2, 2))
    expected = float(schedule.alpha(t)) * states(POINTS) + float(schedule.sigma(t)) * z
    assert float(seen[0][0]) == t_start
    assert torch.allclose(seen[0][1:].float(), expected.flatten(), atol=1e-6)
    assert len(seen) == 3


def test_without_a_time_a_start_is_the_first_state(run: Run) -> None:
    x_T = torch.tensor([3.0, -4.0])  # noqa: N806
    own(run, lambda input, options, run, noise, k: Task(x_start=x_T))
    first, second = states(run.sample(2, seed=1, steps=4, solver="ddim", task="own"))
    assert torch.equal(first, second)
    denoise = run.denoiser.bind(None, {})
    assert torch.equal(first, sample(denoise, run.process, x_T.expand(2, 2), "ddim", 4, "karras")[0])


def test_a_wrapped_solver_takes_every_pass_into_the_trajectory(run: Run) -> None:
    solvers: list[Any] = []

    def wrap(solver: Any) -> Any:
        solvers.append(solver)
        return Resample(solver, 3)

    own(run, lambda input, options, run, noise, k: Task(wrap=wrap))
    (item,) = run.sample(1, steps=4, solver="ddim", trajectory=5, task="own")
    assert solvers[0] == Multistep(1, "x0")
    assert item.meta["trajectory"].shape == (5, 2)
    assert torch.equal(item.meta["trajectory"][-1], leaves(item.x)[0])


def test_a_task_gives_conditions_and_the_shape(run: Run) -> None:
    own(run, lambda input, options, run, noise, k: Task(cond={"label": torch.tensor(k % 2)}))
    items = run.sample(3, steps=2, task="own", seed=2)
    asked = run.sample(3, {"label": [0, 1]}, steps=2, seed=2)
    assert [int(item.cond["label"]) for item in items] == [0, 1, 0]
    assert torch.equal(states(items), states(asked))


@pytest.mark.parametrize("schedule", [VP(), EDM(), RectifiedFlow()])
def test_denoising_draws_from_the_posterior(schedule: Any) -> None:
    n, s, noise, y = 20_000, 0.7, 0.4, 0.9
    process = GaussianProcess(schedule)
    model: Any = SimpleNamespace(process=process, facts={"sigma_data": s})
    task = given.denoise(torch.full((n,), y), noise, model)

    def exact(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return alpha * s**2 / (alpha**2 * s**2 + sigma**2) * x_t

    assert task.t_start is not None
    t = torch.tensor(task.t_start, dtype=torch.float64)
    assert math.isclose(float(schedule.sigma(t) / schedule.alpha(t)), noise, rel_tol=1e-9)
    start = tasks.x_start_of(task, process, task.x_start[None], Noise(0, [0]), None)  # type: ignore[index]
    grid = tasks.grid_of(task, "karras", 40, process)
    x0 = sample(exact, process, start, Multistep(2, "x0", eta=1.0), grid=grid, generator=0)
    variance = s**2 * noise**2 / (s**2 + noise**2)
    assert abs(float(x0.mean()) - y * s**2 / (s**2 + noise**2)) < 4.2 * math.sqrt(variance / n)
    assert abs(float(x0.var()) / variance - 1) < 4.2 * math.sqrt(2 / n) + 0.01  # 40 steps of second order
    with pytest.raises(ConfigError, match=r"task.noise=-1 must be between"):
        given.denoise(torch.zeros(1), -1.0, model)


@pytest.mark.parametrize("schedule", [VP(), EDM(), RectifiedFlow()])
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_strength_is_the_share_of_noise_on_every_schedule(schedule: Any, strength: float) -> None:
    model: Any = SimpleNamespace(process=GaussianProcess(schedule), facts={"sigma_data": 0.6})
    task = given.vary(torch.ones(2), given.Vary(strength), model)
    t = torch.tensor(task.t_start, dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    assert math.isclose(sigma / (0.6 * alpha + sigma), strength, rel_tol=1e-6)
    assert given.vary(torch.ones(2), given.Vary(1.0), model).x_start is None
    for wrong in (0.0, -0.1, 1.1, 1e-6):
        with pytest.raises(ConfigError, match=r"task.strength="):
            given.vary(torch.ones(2), given.Vary(wrong), model)


@dataclass(frozen=True)
class Words:
    size: Annotated[int, "how large"]
    name: Annotated[str | None, "what it is called"] = None
    path: Annotated[Path | None, "where"] = None
    numbers: Annotated[list[float | None] | None, "which"] = None


def worded(input: Item | None, options: Words, run: Run, noise: Noise, k: int) -> Task:
    return Task(meta=vars(options))


def unworded(input: Item | None, options: Any, run: Run, noise: Noise, k: int) -> Task:
    return Task()


def test_options_are_the_annotated_dataclass(run: Run) -> None:
    own(run, worded)
    words = {"size": 3, "path": "~/x", "numbers": [1, None, 2.5]}
    (item,) = run.sample(1, steps=1, task="own", options=words)
    assert item.meta["task"] == {"size": 3, "name": None, "path": Path.home() / "x", "numbers": [1.0, None, 2.5]}
    wrong: dict[str, dict[str, Any]] = {
        "missing task.size=...: how large": {},
        "unknown option 'task.siez': did you mean task.size": {"siez": 3},
        "'task.size=3.0': size must be a whole number": {"size": 3.0},
        "'task.size=true': size must be a whole number": {"size": True},
        "'task.numbers=1': numbers must be a list, each of it a number": {"size": 3, "numbers": 1},
        "numbers must be a list": {"size": 3, "numbers": [1, "x"]},
        "path must be a path": {"size": 3, "path": 7},
    }
    for message, options in wrong.items():
        with pytest.raises(ConfigError, match=message):
            run.sample(1, steps=1, task="own", options=options)
    own(run, unworded)
    with pytest.raises(ConfigError, match=r"unknown option 'task.size': valid: \(none\)"):
        run.sample(1, steps=1, task="own", options={"size": 1})


def test_files_and_folders_are_read_by_the_codec_and_take_turns(run: Run, tmp_path: Path) -> None:
    codec = run.adapter.codec(run.facts)
    files = codec.write(POINTS, tmp_path / "points")
    (tmp_path / "points/notes.txt").write_text("x\nnot a point")
    with pytest.warns(UserWarning, match=r"input=.*points: skipped 1 of 3 files: notes.txt"):
        items = run.sample(3, steps=1, task="inpaint", input=tmp_path / "points")
    assert states(items)[:, 0].tolist() == [0.5, -1.0, 0.5]
    assert [item.meta["given"].x.tolist()[0] for item in items] == [0.5, -1.0, 0.5]
    (one,) = run.sample(1, steps=1, task="inpaint", input=str(files[1]))
    assert float(leaves(one.x)[0][0]) == -1.0
    with pytest.raises(DataError, match="not a point"):
        run.sample(1, steps=1, task="inpaint", input=tmp_path / "points/notes.txt")
    with pytest.raises(ConfigError, match="no such file or folder"):
        run.sample(1, steps=1, task="inpaint", input=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"task": "inpant"}, "unknown task of the adapter 'toy2d' 'inpant': did you mean inpaint"),
        ({"task": "inpaint"}, "task=inpaint needs something to work on: add input=FILE"),
        ({"input": POINTS}, "input and its options need a task"),
        ({"options": {"method": "dps"}}, "input and its options need a task"),
        ({"task": "inpaint", "options": {"known": [0.5, 0.5]}}, r"task.known must be \[x,null\] or \[null,y\]"),
        ({"task": "inpaint", "options": {"known": [0.5]}}, r"task.known must be"),
        ({"task": "inpaint", "options": {"known": [0.5, None]}, "input": POINTS}, r"without input="),
        (
            {"task": "inpaint", "options": {"method": "mpms"}, "input": POINTS},
            "unknown task.method 'mpms': did you mean",
        ),
        ({"task": "inpaint", "options": {"noise": -1.0}, "input": POINTS}, "task.noise=-1.0 must be 0 or more"),
        ({"task": "inpaint", "options": {"zeta": 3.0}, "input": POINTS}, "task.zeta=3 is the step of dps alone"),
        ({"task": "inpaint", "options": {"method": "repaint", "noise": 0.1}, "input": POINTS}, "noise=0.1 needs mmps"),
        ({"task": "inpaint", "options": {"method": "replacement", "noise": 1}, "input": POINTS}, "noise=1 needs mmps"),
        ({"task": "inpaint", "input": torch.zeros(2)}, "input must be an Item .* a file or a folder, not Tensor"),
        ({"task": "inpaint", "input": [*POINTS, 5]}, "input must be an Item .* not int"),
        ({"task": "inpaint", "options": {"method": "repaint", "repeats": -1}, "input": POINTS}, "task.repeats=-1 must"),
        (
            {"task": "inpaint", "options": {"method": "repaint", "repeats": 10**9}, "input": POINTS},
            "repeats=1000000000 must be 0 to 1000",
        ),
        ({"task": "inpaint", "input": Item(torch.zeros(3), id="z")}, "input=z is 3, samples of this size are 2"),
    ],
)
def test_mistakes_are_named(run: Run, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.sample(1, steps=2, **words)


def test_what_is_known_is_kept_while_noise_lets_it_move(run: Run) -> None:
    exact = run.sample(4, steps=6, task="inpaint", options={"known": [None, 0.7]})
    assert torch.equal(states(exact)[:, 1], torch.full((4,), 0.7))
    assert exact[0].meta["given"].x.tolist() == pytest.approx([0.0, 0.7])
    noisy = run.sample(4, steps=6, task="inpaint", options={"known": [None, 0.7], "noise": 0.3})
    assert 0 < float((states(noisy)[:, 1] - 0.7).abs().mean()) < 1.0
    assert "kept" not in noisy[0].meta["given"].meta
