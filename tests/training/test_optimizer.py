"""The optimizer against torch's unfused one with its own clipping, and against planted faults."""

import math

import pytest
import torch
from torch import Tensor, nn

from polydiff.core.errors import CheckpointError, ConfigError
from polydiff.core.training.optimizer import Optimizer, learning_rate


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Conv2d(5, 2, 1)).to(
        memory_format=torch.channels_last
    )  # type: ignore[call-overload]


def gradients(module: nn.Module, seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(p.shape, generator=generator) for p in module.parameters()]


def give(module: nn.Module, grads: list[Tensor]) -> None:
    for p, grad in zip(module.parameters(), grads, strict=True):
        p.grad = torch.empty_like(p).copy_(grad)


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_equals_the_unfused_optimizer_with_clip_grad_norm(clip: float | None) -> None:
    ours, theirs = model(), model()
    optimizer = Optimizer(ours, lr=1.0, weight_decay=0.1, clip=clip)
    deep = [p for p in theirs.parameters() if p.ndim > 1]
    flat = [p for p in theirs.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}],
        lr=1.0, betas=(0.9, 0.99), fused=False, foreach=False,
    )  # fmt: skip
    for step in range(8):
        lr = 0.01 * (step + 1)
        grads = gradients(ours, step, scale=10.0 ** (step % 3 - 1))
        give(ours, grads)
        give(theirs, grads)
        norm, skipped = optimizer.step(lr, torch.tensor(1.0))
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        torch.testing.assert_close(norm, expected)
        assert skipped == 0
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("fault", ["nan gradient", "inf gradient", "nan loss", "inf loss"])
def test_a_non_finite_step_changes_no_bit(fault: str) -> None:
    module = model()
    optimizer = Optimizer(module, lr=0.1, weight_decay=0.1, clip=1.0)
    give(module, gradients(module, 0))
    optimizer.step(0.1, torch.tensor(1.0))
    before = [p.detach().clone() for p in module.parameters()]
    moments = {name: value.clone() for name, value in optimizer.tensors().items()}
    give(module, gradients(module, 1))
    bad = torch.tensor(float(fault[:3]))
    if "gradient" in fault:
        next(module.parameters()).grad[0, 0, 0].fill_(bad)  # type: ignore[index]
    _, skipped = optimizer.step(0.1, bad if "loss" in fault else torch.tensor(1.0))
    assert skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert all(torch.equal(value, moments[name]) for name, value in optimizer.tensors().items())
    give(module, gradients(module, 2))
    _, skipped = optimizer.step(0.1, torch.tensor(1.0))
    assert skipped == 0 and not torch.equal(next(module.parameters()), before[0])


def test_state_goes_into_flat_tensors_and_back() -> None:
    one, two = model(), model()
    first, second = Optimizer(one, lr=0.1, clip=1.0), Optimizer(two, lr=0.1, clip=1.0)
    for step in range(3):
        give(one, gradients(one, step))
        first.step(0.1, torch.tensor(1.0))
    with torch.no_grad():
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.copy_(p)
    second.load({name: value.contiguous().clone() for name, value in first.tensors().items()})
    for step in range(3, 6):
        for module, optimizer in ((one, first), (two, second)):
            give(module, gradients(module, step))
            optimizer.step(0.1, torch.tensor(1.0))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("fault", ["shape", "missing", "extra"])
def test_a_state_that_does_not_fit_is_named(fault: str) -> None:
    module = model()
    optimizer = Optimizer(module, lr=0.1)
    give(module, gradients(module, 0))
    optimizer.step(0.1, torch.tensor(1.0))
    tensors = dict(optimizer.tensors())
    if fault == "shape":
        tensors["optimizer/0.weight/exp_avg"] = torch.zeros(2)
    elif fault == "missing":
        del tensors["optimizer/0.weight/exp_avg"]
    else:
        tensors["optimizer/9.weight/exp_avg"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match=r"9\.weight" if fault == "extra" else r"0\.weight"):
        Optimizer(model(), lr=0.1).load(tensors)


def test_learning_rate_in_closed_form() -> None:
    def at(step: int, decay: str) -> float:
        return learning_rate(step, 110, lr=2.0, warmup=10, decay=decay)

    assert [at(0, "constant"), at(4, "constant"), at(9, "constant"), at(109, "constant")] == [0.2, 1.0, 2.0, 2.0]
    assert at(10, "cosine") == 2.0 and at(60, "cosine") == pytest.approx(1.0) and at(109, "cosine") < 1e-3
    assert at(60, "linear") == pytest.approx(1.0) and at(109, "linear") == pytest.approx(0.02)
    with pytest.raises(ConfigError, match="did you mean cosine"):
        at(0, "cosin")


def test_the_decay_follows_the_clock_where_it_is_ahead_of_the_steps() -> None:
    def at(step: int, spent: float) -> float:
        return learning_rate(step, 110, lr=2.0, warmup=10, decay="linear", spent=spent)

    assert at(60, 0.2) == at(60, 0.0) == pytest.approx(1.0)
    assert at(60, 0.75) == pytest.approx(0.5) and at(4, 0.75) == pytest.approx(0.25) and at(20, 1.3) == 0.0
