"""An adapter's networks: every parameter redrawn around its initial value, so that nothing hides behind zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polydiff.core.adapter import Item
from polydiff.core.build import Built
from polydiff.core.contract.case import Case, distance, noised, rows, update
from polydiff.core.contract.symmetries import SYMMETRIES
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.tree import leaves, tree_map

EXACT = 1e-5  # of the output's size; what float32 leaves when only the order of sums differs
SYMMETRIC = 1e-4
NOTICED = 1e-4  # a condition or noise level that changes the output by less than this has no effect


def test_loss_is_finite_and_reaches_every_parameter(case: Case, network: str) -> None:
    """The loss of real items, with all further terms, is finite, and every parameter gets a gradient."""
    built = case.build(network, drop=0.5, terms=dict.fromkeys(case.adapter.terms, 1.0))
    generator, batch = torch.Generator().manual_seed(0), case.batch(case.items * 2)
    settings = {name: values(batch, built, name, generator) for name in kinds(built, "setting")}
    batch = Item(batch.x, batch.mask, {**batch.cond, **settings})  # zero by themselves, which teaches a weight nothing
    out = built.objective(built.denoiser, batch, generator)
    for name, value in out.items():
        assert bool(value.isfinite().all()), f"{name} of a batch of real items is not finite: {value.tolist()}"
        assert len(value) == 2 * len(case.items), f"{name} must have one value an item, it has shape {[*value.shape]}"
    out["loss"].mean().backward()
    parameters = {name: p for name, p in built.denoiser.network.named_parameters() if p.requires_grad}
    unused = [name for name, p in parameters.items() if p.grad is None]
    assert not unused, (
        f"these parameters are never used: {', '.join(unused)}; remove them, or training on several processes waits for "
        "their gradients"
    )
    without = [name for name, p in parameters.items() if p.grad is not None and not float(p.grad.abs().max()) > 0]
    assert not without, (
        f"these parameters have no influence on the loss: {', '.join(without)}; something behind them is constant or detached"
    )
    broken = [name for name, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    assert not broken, f"the gradients of these parameters are not finite: {', '.join(broken)}"


def test_noise_level_matters(case: Case, network: str) -> None:
    """The network's answer depends on ``c_noise``."""
    built, batch = case.build(network), case.batch()
    caught: list[tuple[Any, ...]] = []
    hook = built.denoiser.network.register_forward_pre_hook(lambda module, given: caught.append(given))
    first = update(built.denoiser, *noised(built, batch), batch.mask, batch.cond)
    hook.remove()
    x, c_noise, *rest = caught[0]
    with torch.no_grad():
        second = built.denoiser.network(x, tree_map(lambda c: c + 0.5, c_noise), *rest)
    assert distance(second, first) > NOTICED, (
        "the network does not use c_noise: embed it (polydiff.core.nn.embeddings.Embedding) and let it modulate the layers"
    )


def test_batch_of_one_equals_a_slice(case: Case, network: str) -> None:
    """An item alone gives what it gives in a batch of four, and the network leaves its input as it was."""
    built, batch = case.build(network), case.batch(case.items[::2])
    x_t, t = noised(built, batch)
    before = tree_map(torch.clone, x_t)
    whole = update(built.denoiser, x_t, t, batch.mask, batch.cond)
    assert distance(x_t, before) == 0, "the network changes its input in place: work on a copy"
    for i in range(len(t)):
        one, at = rows(batch, slice(i, i + 1)), slice(i, i + 1)
        alone = update(built.denoiser, tree_map(lambda x, at=at: x[at], x_t), t[at], one.mask, one.cond)
        error = distance(alone, tree_map(lambda x, at=at: x[at], whole))
        assert error <= EXACT, (
            f"item {i} alone differs by {error:.2g} from its row in a batch of {len(t)}: no layer may depend on the batch size"
        )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_items_of_a_batch_do_not_mix(case: Case, network: str, training: bool) -> None:
    """Changing the other items of a batch leaves an item's answer as it was, also while training."""
    built, batch = case.build(network), case.batch()
    built.denoiser.train(training)
    x_t, t = noised(built, batch)

    def first(x: Any, cond: dict[str, Tensor]) -> Any:
        with torch.random.fork_rng(devices=[]):  # the same dropout both times
            torch.manual_seed(0)
            return tree_map(lambda y: y[:1], update(built.denoiser, x, t, batch.mask, cond))

    def others(x: Tensor) -> Tensor:
        return torch.cat([x[:1], 3 * x[1:] + 1]) if x.is_floating_point() else torch.cat([x[:1], x[1:].flip(0)])

    error = distance(first(tree_map(others, x_t), tree_map(others, batch.cond)), first(x_t, batch.cond))
    assert error <= EXACT, (
        f"an item's answer changes by {error:.2g} with the other items of its batch: normalise within each item (group or "
        "layer norm, not batch norm) and reduce over no axis that holds the batch"
    )


def test_padding_changes_nothing(case: Case, network: str) -> None:
    """What lies behind the mask, and how much of it, has no influence on valid elements."""
    built, batch = case.build(network), case.batch()
    mask = batch.mask
    if mask is None:
        pytest.skip("the items have no mask")
    axis = getattr(built.process, "mask_axis", 1)
    generator = torch.Generator().manual_seed(0)
    x_t, t = noised(built, batch)
    longer = torch.cat([mask, mask.new_zeros(len(t), 3)], 1)

    def littered(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[axis] = 3
        x = torch.cat([x, x.new_zeros(shape)], axis)
        valid = built.process.valid(x, longer)
        return x * valid + 100 * (1 - valid) * torch.randn(x.shape, generator=generator)

    fields = {name: littered(batch.cond[name]) for name in kinds(built, "field") if name in batch.cond}

    def kept(x: Tensor) -> Tensor:
        x = x.narrow(axis, 0, mask.shape[1])
        return x * built.process.valid(x, mask)

    clean = update(built.denoiser, x_t, t, mask, batch.cond)
    dirty = update(built.denoiser, tree_map(littered, x_t), t, longer, {**batch.cond, **fields})
    error = distance(tree_map(kept, dirty), tree_map(kept, clean))
    assert error <= EXACT, (
        f"numbers behind the mask change valid elements by {error:.2g}: zero the input with the mask, and again before "
        "everything that looks at neighbours; leave padding out of attention, means and norms"
    )


def test_odd_sizes(case: Case, network: str) -> None:
    """Every size that ``shape`` accepts works, odd ones too."""
    size = case.facts["size"]
    odd = {name: n + 1 + n % 2 for name, n in size.items() if isinstance(n, int)}
    less = {name: max(1, n - 1 - n % 2) for name, n in size.items() if isinstance(n, int)}
    wanted = [{**size, **change} for one in (odd, less) for change in (*({name: one[name]} for name in one), one)]
    normal, _ = case.adapter.shape(size, {})
    tried = 0
    for asked in wanted:
        try:
            like, mask = case.adapter.shape(asked, {})
        except ConfigError:
            continue
        if [leaf.shape for leaf in leaves(like)] == [leaf.shape for leaf in leaves(normal)]:
            continue
        tried += 1
        try:
            built = case.build(network, facts={**case.facts, "size": asked})
            fields = kinds(built, "field")  # those at hand have the other size
            conds = [{n: v for n, v in item.cond.items() if n not in fields} for item in case.items[:2]]
            batch = case.batch([Item(like, mask, cond, i) for i, cond in enumerate(conds)])
            output = update(built.denoiser, *noised(built, batch), batch.mask, batch.cond)
        except (RuntimeError, ValueError, IndexError, ConfigError) as error:
            pytest.fail(
                f"shape accepts {asked}, but the network fails there: {error}; pad inside of the network, or refuse the size"
            )
        shapes = [leaf.shape for leaf in leaves(output)], [leaf.shape for leaf in leaves(batch.x)]
        assert shapes[0] == shapes[1], f"size {asked}: the network returns shape {shapes[0]} for a state of {shapes[1]}"
    if not tried:
        pytest.skip("shape accepts no other size")


def test_condition_has_an_effect_only_where_present(case: Case, network: str, condition: str) -> None:
    """Two values give two answers; where ``present`` is false, every value gives the answer of the placeholder."""
    built, batch = case.build(network), case.batch()
    if condition not in built.denoiser.conditions:
        pytest.skip(f"the data set has no {condition!r}")
    declared = built.denoiser.conditions[condition]
    x_t, t = noised(built, batch)
    there = {condition: torch.ones(len(t), dtype=torch.bool)}
    if declared.kind == "class":
        n = len(case.facts["classes"][condition])
        one, other = (((torch.arange(len(t)) + shift) % n) for shift in (0, 1))
    else:
        n = 2
        generator = torch.Generator().manual_seed(0)
        one, other = (values(batch, built, condition, generator) for _ in range(2))
    rest = {name: value for name, value in batch.cond.items() if name != condition}

    def answer(value: Tensor, present: dict[str, Tensor]) -> Any:
        return update(built.denoiser, x_t, t, batch.mask, {**rest, condition: value}, present)

    absent = {condition: ~there[condition]}
    placeholder = update(built.denoiser, x_t, t, batch.mask, rest)
    if declared.kind == "setting":
        assert distance(answer(torch.zeros_like(one), there), placeholder) <= EXACT, (
            f"setting {condition!r}: nothing said must be the same as zero"
        )
    for value in (one, other) if declared.kind != "setting" else ():
        error = distance(answer(value, absent), placeholder)
        assert error <= EXACT, (
            f"condition {condition!r} changes the answer by {error:.2g} where present is false: use "
            "torch.where(present, embedding, null) with a learned null, so that guidance compares with a model without it"
        )
    assert distance(answer(one, there), placeholder) > NOTICED, (
        f"condition {condition!r} being present changes nothing: give its absence an embedding of its own"
    )
    assert n < 2 or distance(answer(one, there), answer(other, there)) > NOTICED, (
        f"two values of condition {condition!r} give the same answer: the network does not use it"
    )


def test_symmetry(case: Case, network: str, symmetry: str) -> None:
    """The network commutes with each group action that the adapter declares."""
    if symmetry not in SYMMETRIES:
        pytest.fail(f"ADAPTER.symmetries: {unknown('symmetry', symmetry, SYMMETRIES)}")
    built, batch = case.build(network), case.batch()
    x_t, t = noised(built, batch)
    axis, generator = getattr(built.process, "mask_axis", 1), torch.Generator().manual_seed(1)
    plain = update(built.denoiser, x_t, t, batch.mask, batch.cond)
    for _ in range(3):
        action = SYMMETRIES[symmetry](leaves(x_t)[0], axis, generator)
        mask = None if batch.mask is None else action.mask(batch.mask)
        moved = update(built.denoiser, tree_map(action.state, x_t), t, mask, batch.cond)
        expected = tree_map(action.output, plain)
        error = distance(_valid(built, moved, mask), _valid(built, expected, mask))
        assert error <= SYMMETRIC, (
            f"ADAPTER declares the symmetry {symmetry!r}, but F(g x) and g F(x) differ by {error:.2g}: "
            f"{(SYMMETRIES[symmetry].__doc__ or '').strip()} Change the network, or take the name out"
        )


def _valid(built: Any, x: Any, mask: Tensor | None) -> Any:
    return x if mask is None else tree_map(torch.mul, x, built.process.valid(x, mask))


def kinds(built: Built, kind: str) -> list[str]:
    """Names of a model's conditions of one kind."""
    return [name for name, condition in built.denoiser.conditions.items() if condition.kind == kind]


def values(batch: Item, built: Built, name: str, generator: torch.Generator) -> Tensor:
    """Random values of a condition that is no class, for the items of a batch."""
    state = leaves(batch.x)[0].shape
    return torch.randn((state[0], *built.denoiser.conditions[name].shape_in(state[1:])), generator=generator)
