"""An adapter at work: training on four items, saving, sampling, writing, scoring, showing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from polydiff.core.adapter import Finding, Fragment, Item, Metric
from polydiff.core.build import Built
from polydiff.core.contract.case import Case, difference
from polydiff.core.errors import ConfigError
from polydiff.core.report.offline import outside_addresses
from polydiff.core.run import Run
from polydiff.core.training import checkpoint
from polydiff.core.tree import leaves, tree_map

STEPS = 200
FALL = 2.0  # at least by this factor; what remains is the noise that nobody can predict
SAMPLES = 3
SPLIT = 96  # items on each side of a comparison


class Trained(NamedTuple):
    """A model after a few steps on four items, with its loss before and after."""

    built: Built
    before: float
    after: float


@pytest.fixture(scope="session")
def trained(case: Case) -> Trained:
    """The experiment's network after 200 steps on four items."""
    built = case.build(redrawn=False, drop=0.0)
    denoiser, generator = built.denoiser, torch.Generator().manual_seed(0)
    batch = case.batch(case.items[::2] * 4)

    def loss() -> float:
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            values = [built.objective(denoiser, batch, draws)["loss"].mean() for _ in range(8)]
        return float(torch.stack(values).mean())

    before = loss()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=case.config["optim"]["lr"])
    denoiser.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(STEPS):
            for group in optimizer.param_groups:  # a short warm-up and a decay, as in every run
                group["lr"] = case.config["optim"]["lr"] * min(1.0, (step + 1) / 10, 2 * (STEPS - step) / STEPS)
            optimizer.zero_grad()
            built.objective(denoiser, batch, generator)["loss"].mean().backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
    denoiser.eval().requires_grad_(False)
    return Trained(built, before, loss())


@pytest.fixture(scope="session")
def run(case: Case, trained: Trained) -> Run:
    """The trained model as a run that never was on disk."""
    return Run(case.folder / "run", case.config, case.facts, trained.built, STEPS)


@pytest.fixture(scope="session")
def samples(case: Case, run: Run) -> list[Item]:
    """A few samples with a trajectory."""
    return run.sample(SAMPLES, cond=_asked(case), steps=6, trajectory=3)


def _asked(case: Case) -> dict[str, Any]:
    """The conditions of a real item, as a user would give them."""
    cond = case.items[0].cond.items()
    return {
        name: int(value) if case.adapter.conditions[name].kind == "class" else value.tolist() for name, value in cond
    }


def test_overfits_four_items(case: Case, trained: Trained) -> None:
    """200 steps on four items lower the loss by a factor."""
    assert trained.after < trained.before / FALL, (
        f"the loss on four items fell only from {trained.before:.3g} to {trained.after:.3g} in {STEPS} steps, it must fall "
        f"{FALL} times: look for a missing skip connection, an output that cannot leave zero, or an optim.lr that does not fit"
    )


def test_saved_model_samples_the_same(case: Case, run: Run) -> None:
    """A checkpoint, loaded again, gives bitwise the same samples."""
    weights = run.denoiser.state_dict()
    tensors = {"model": weights, "ema": weights, "train": {"ema/items": torch.zeros(1)}}
    state = {"facts": case.facts, "adapter": case.name, "wall_s": 0.0}
    checkpoint.save(run.path / "checkpoints", STEPS, tensors, state, case.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)  # weights or buffers that are not saved would be drawn anew from here
        loaded = Run.load(run.path, device="cpu")
    settings: dict[str, Any] = {"cond": _asked(case), "steps": 6, "seed": 1}
    for ours, theirs in zip(run.sample(2, **settings), loaded.sample(2, **settings), strict=True):
        error = difference(theirs.x, ours.x)
        assert error == 0, (
            f"a saved and loaded model samples something else (by {error:.2g}): every tensor that the network computes with "
            "must be a parameter or a persistent buffer, and nothing may be drawn anew in its constructor or in eval mode"
        )


def test_samples_are_what_shape_promises(case: Case, samples: list[Item]) -> None:
    """Samples have the announced shape and can be written and read, whatever values a model gives."""
    like, _ = case.adapter.shape(case.facts["size"], samples[0].cond)
    for item in samples:
        assert difference(tree_map(torch.zeros_like, item.x), like) == 0, (
            "a sample has not the shape that shape() promised"
        )
    wild = [*samples, replace(samples[0], x=tree_map(lambda x: 10 * x, samples[0].x))]
    for path in case.codec.write(wild, case.folder / "samples"):
        state = case.codec.encode(case.codec.read(path))
        shapes = [leaf.shape for leaf in leaves(state)], [leaf.shape for leaf in leaves(samples[0].x)]
        assert shapes[0] == shapes[1], (
            f"{path.name}: a written sample reads back with another shape; decode must clip, not fail"
        )


def test_unknown_names_are_refused(case: Case, run: Run) -> None:
    """Asking for a condition or a size that does not exist is a ConfigError."""
    asked: tuple[dict[str, Any], ...] = ({"cond": {"no_such_condition": 0}}, {"size": {"no_such_size": 3}})
    for words in asked:
        with pytest.raises(ConfigError, match="no_such_"):
            run.sample(1, steps=2, **words)


def test_task(case: Case, run: Run, task: str) -> None:
    """A task works on real items with the options it has by default, and keeps what it says is kept."""
    words: dict[str, Any] = {"steps": 2, "task": task, "cond": _asked(case)}
    try:
        samples = run.sample(SAMPLES, input=case.items[:2], **words)
    except ConfigError as error:
        pytest.skip(f"not for {case.adapter.default_data!r}: {error}")
    for item, other in zip(samples, run.sample(1, input=case.items[:2], **words), strict=False):
        assert difference(item.x, other.x) < 1e-4, (
            f"task {task!r}: a sample changes with the number of them; draw with the noise a task is given, and from nothing else"
        )
    for k, item in enumerate(samples):
        json.dumps(item.meta["task"], allow_nan=False)
        given = item.meta["given"]
        assert isinstance(given, Item), f"task {task!r} must show what it was given, as Task.reference"
        shapes = case.adapter.shape(case.facts["size"], item.cond)[0], given.x, case.items[k % 2].x
        zeros = tree_map(torch.zeros_like, item.x)
        assert any(difference(zeros, tree_map(torch.zeros_like, own)) == 0 for own in shapes), (
            f"task {task!r}: a sample has neither the shape that shape() promised nor that of what was given"
        )
        assert case.codec.write([given], case.folder / "given" / f"{task}-{k}"), f"task {task!r}: reference has no file"
        if "kept" in given.meta:
            moved = tree_map(lambda x, y, kept: ((x - y) * kept).abs().max(), item.x, given.x, given.meta["kept"])
            assert max(float(leaf) for leaf in leaves(moved)) < 1e-4, (
                f"task {task!r} does not keep what it says is kept"
            )
    with pytest.raises(ConfigError, match="no_such_option"):
        run.sample(1, options={"no_such_option": 1}, **words)


def test_metrics(case: Case) -> None:
    """Metrics of real items are finite numbers with the value of held-out data beside them, and noise scores otherwise."""
    train, held_out = case.train, case.dataset("test")
    stride = max(1, len(train) // (3 * SPLIT))
    chosen = [train[i] for i in range(0, len(train), stride)]
    fresh, reference = chosen[::3][:SPLIT], [item for i, item in enumerate(chosen) if i % 3]
    real = [held_out[i] for i in range(0, len(held_out), max(1, len(held_out) // SPLIT))][:SPLIT]
    options = {"held_out": real, "facts": case.facts, "store": case.folder / "store", "seed": 0}
    found = case.adapter.metrics(fresh, reference, options)
    assert found, "metrics returned nothing"
    for name, metric in found.items():
        assert isinstance(metric, Metric), f"metrics[{name!r}] must be a polydiff.core.adapter.Metric"
        assert math.isfinite(metric.value), f"metrics[{name!r}] of real items is {metric.value}"
        assert metric.real is not None, (
            f"metrics[{name!r}].real is missing: the same measure of options['held_out'], so that a reader knows what good is"
        )
        assert math.isfinite(metric.real), f"metrics[{name!r}].real is {metric.real}"
        assert metric.n > 0, f"metrics[{name!r}].n is {metric.n}: say how many items it stands on"
    generator = torch.Generator().manual_seed(0)
    noise = [replace(item, x=tree_map(lambda x: torch.randn(x.shape, generator=generator), item.x)) for item in fresh]
    worse = case.adapter.metrics(noise, reference, options)
    same = [abs(worse[name].value - found[name].value) <= 1e-3 * abs(found[name].value) for name in found]
    assert not all(same), "no metric tells noise from real items"
    case.adapter.metrics(fresh[:20], reference, {**options, "held_out": None})


def test_view(case: Case, samples: list[Item]) -> None:
    """The view shows many samples or one, with and without real items, and asks for nothing from outside."""
    real = case.items
    for shown, reference in ((samples, real), (samples[:1], real), (samples[:1], []), (real, real)):
        fragment = case.adapter.view(shown, reference)
        assert isinstance(fragment, Fragment), "view must return a polydiff.core.adapter.Fragment"
        assert fragment.html.strip(), f"view gives no HTML for {len(shown)} samples and {len(reference)} real items"
        scripts = "".join(f"<script>{text}</script>" for text in fragment.scripts.values())
        outside = outside_addresses(fragment.html + scripts)
        assert not outside, (
            f"the view asks for {outside[0]!r}: a report must open without a network; embed it as a data: address"
        )
        png = fragment.png
        assert png is None or png.startswith(b"\x89PNG\r\n\x1a\n"), "Fragment.png must be the bytes of a PNG, or None"


def test_doctor_finds_the_small_data_set_healthy(case: Case) -> None:
    """``checks`` gives findings and none of them is a failure."""
    for finding in case.adapter.checks(case.path, None):
        assert isinstance(finding, Finding), "checks must return a list of polydiff.core.adapter.Finding"
        assert finding.level in ("ok", "warn"), (
            f"checks of {case.adapter.default_data!r}: {finding.level} {finding.text}"
        )
