"""The average against its closed forms."""

import pytest
import torch
from torch import nn

from polydiff.core.training.ema import EMA


def model(value: float) -> nn.Module:
    module = nn.Linear(3, 2)
    module.register_buffer("count", torch.zeros((), dtype=torch.int64))
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


@pytest.mark.parametrize("batch", [1, 32, 128])
def test_half_of_a_step_is_gone_after_one_half_life(batch: int) -> None:
    module = model(0.0)
    ema = EMA(module, halflife_items=128, warmup=None)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1.0)
    for _ in range(128 // batch):
        ema.update(batch)
    for p in ema.module.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.5), rtol=1e-5, atol=0)


def test_constant_weights_stay_bit_for_bit() -> None:
    module = model(0.3)
    ema = EMA(module, 100.0)
    for _ in range(50):
        ema.update(7)
    assert all(bool((p == 0.3).all()) for p in ema.module.parameters())


def test_warm_up_is_the_rule_of_edm() -> None:
    module, expected, seen = model(0.0), 0.0, 0
    ema = EMA(module, halflife_items=40, warmup=0.1)
    for step in range(60):
        value = float(step % 7)
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(value)
        ema.update(10)
        beta = 0.5 ** (10 / max(min(40, 0.1 * seen), 1e-8))
        expected, seen = beta * expected + (1 - beta) * value, seen + 10
        if step == 0:
            assert all(bool((p == value).all()) for p in ema.module.parameters())
        torch.testing.assert_close(ema.module.weight, torch.full((2, 3), expected), rtol=1e-5, atol=1e-5)
    assert float(ema.items) == 600


def test_a_skipped_step_changes_nothing_and_is_not_counted() -> None:
    module = model(0.0)
    ema = EMA(module, 50.0, warmup=0.05)
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(0))
    ema.update(10, torch.tensor(0.0))
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update(10, torch.tensor(1.0))
    assert all(torch.equal(before[name], value) for name, value in ema.state_dict().items())
    assert float(ema.items) == 10


def test_buffers_are_copied_and_the_copy_is_frozen() -> None:
    module = model(0.0).train()
    ema = EMA(module, 50.0)
    module.count.fill_(3)  # type: ignore[operator, union-attr]
    ema.update(1)
    assert int(ema.module.count) == 3  # type: ignore[arg-type]
    assert not ema.module.training and module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
