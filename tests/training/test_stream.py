"""The sequence of samples is a function of (seed, step) and of nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import toy  # type: ignore[import-not-found]

from polydiff.core.adapter import Item, collate
from polydiff.core.errors import ConfigError
from polydiff.core.training.stream import Keyed, Stream, derive, loader


def flat(stream: Stream, steps: int, chunks: int) -> list[tuple[int, int]]:
    return [key for step in range(steps) for chunk in range(chunks) for key in stream.keys(step, chunk)]


@pytest.mark.parametrize(("n", "batch"), [(50, 8), (7, 20), (16, 16), (1, 3)])
def test_every_epoch_is_a_permutation(n: int, batch: int) -> None:
    steps = 3 * n // batch + 3
    keys = flat(Stream(n, batch, seed=1), steps, 1)
    assert [epoch for epoch, _ in keys] == [j // n for j in range(len(keys))]
    for epoch in range(len(keys) // n):
        assert sorted(index for e, index in keys if e == epoch) == list(range(n))


def test_chunks_only_cut_the_sequence() -> None:
    whole = flat(Stream(50, 24, seed=1), 10, 1)
    assert all(flat(Stream(50, 24, seed=1, chunks=c), 10, c) == whole for c in (2, 3, 8))
    assert flat(Stream(50, 24, seed=2), 10, 1) != whole


def test_epochs_are_shuffled_differently_and_for_ever_the_same() -> None:
    keys = flat(Stream(6, 6, seed=0), 3, 1)
    orders = [[index for e, index in keys if e == epoch] for epoch in range(3)]
    assert orders == GOLDEN  # runs of an earlier version must be able to go on


GOLDEN = [[3, 0, 2, 1, 4, 5], [2, 4, 1, 3, 0, 5], [3, 4, 2, 5, 1, 0]]


def test_seeds_of_different_purposes_and_counters_differ() -> None:
    seeds = [
        derive(seed, purpose, a, b)
        for seed in range(3)
        for purpose in ("noise", "augment")
        for a in range(9)
        for b in range(9)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_entered_with_any_number_of_workers(workers: int) -> None:
    data, stream = toy.Points(50), Stream(50, 8, seed=5, chunks=2)

    def batches(start: int, workers: int, chunks: range) -> list[torch.Tensor]:
        made = loader(data, stream, start, 12, chunks=chunks, collate=collate, workers=workers)
        return [x for x, _, _ in made]

    whole = batches(0, 0, range(2))
    assert len(whole) == 24
    assert all(torch.equal(a, b) for a, b in zip(batches(5, workers, range(2)), whole[10:], strict=True))
    second = batches(3, workers, range(1, 2))  # the other process of two
    assert all(torch.equal(a, b) for a, b in zip(second, whole[7::2], strict=True))


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(loader(toy.Points(50), Stream(50, 8, seed=5), 0, 3, chunks=range(1), collate=collate))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_depends_on_epoch_and_index_only() -> None:
    keyed = Keyed(toy.Points(50), seed=1)
    together, alone = keyed.__getitems__([(0, 3), (2, 3), (0, 4)]), keyed[(2, 3)]
    assert torch.equal(together[1].x, alone.x)
    assert not torch.equal(together[0].x, together[1].x)


def test_items_are_fetched_in_one_call_where_that_is_offered() -> None:
    calls: list[list[int]] = []

    class Bulk:
        def __len__(self) -> int:
            return 9

        def __getitems__(self, indices: list[int]) -> list[Item]:
            calls.append(indices)
            return [Item(torch.tensor([float(index)])) for index in indices]

    stream = Stream(9, 4, seed=0)
    list(loader(Bulk(), stream, 0, 2, chunks=range(1), collate=collate))
    assert calls == [[index for _, index in stream.keys(step, 0)] for step in (0, 1)]


@pytest.mark.parametrize(
    ("make", "match"),
    [(lambda: Stream(10, 10, 0, chunks=4), "trainer.batch=12"), (lambda: Stream(0, 4, 0), "empty")],
)
def test_what_cannot_be_divided_is_refused(make: Callable[[], Stream], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


def test_positions_are_uniform() -> None:
    """Each item is as often first in an epoch as any other: chi-squared over 3000 epochs, 99.9 % quantile for 9 degrees."""
    stream = Stream(10, 10, seed=0)
    counts = np.bincount([stream.keys(epoch, 0)[0][1] for epoch in range(3000)], minlength=10)
    assert float(((counts - 300) ** 2 / 300).sum()) < 27.9
