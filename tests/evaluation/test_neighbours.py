"""Neighbour measures against brute force."""

from __future__ import annotations

import pytest
import torch

from polydiff.core.errors import DataError
from polydiff.core.evaluation import neighbours
from polydiff.core.evaluation.neighbours import blocks, manifold, nearest, to_others
from polydiff.core.evaluation.quality import originality


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute(samples: torch.Tensor, reference: torch.Tensor, k: int, k_density: int) -> list[list[float]]:
    """The definitions, one pair at a time."""

    def radius(points: torch.Tensor, k: int) -> list[float]:
        return [
            sorted(float((p - q).double().norm()) for j, q in enumerate(points) if j != i)[k - 1]
            for i, p in enumerate(points)
        ]

    def d(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).double().norm())

    r, rd, s = radius(reference, k), radius(reference, k_density), radius(samples, k)
    return [
        [float(any(d(x, y) <= r[j] for j, y in enumerate(reference))) for x in samples],
        [float(any(d(x, y) <= s[i] for i, x in enumerate(samples))) for y in reference],
        [sum(d(x, y) <= rd[j] for j, y in enumerate(reference)) / k_density for x in samples],
        [float(any(d(x, y) <= rd[j] for x in samples)) for j, y in enumerate(reference)],
    ]


@pytest.mark.parametrize("block", [1, 100, 4_000_000])
def test_manifold_is_the_definition(monkeypatch, block: int):
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", block)
    samples, reference = 0.8 * normal(30, 3) + 0.4, normal(41, 3, seed=1)
    result = manifold(samples, reference, k=3, k_density=4)
    for name, value, expected in zip(result._fields, result, brute(samples, reference, 3, 4), strict=True):
        assert value.tolist() == pytest.approx(expected), name
        assert 0 < float(value.mean()) < 1.5, name


def test_known_manifolds():
    reference = normal(200, 4)
    same, far = manifold(reference, reference), manifold(reference + 100, reference)
    assert [float(v.mean()) for v in (same.precision, same.recall, same.coverage)] == [1.0, 1.0, 1.0]
    assert float(same.density.mean()) == pytest.approx(6 / 5)  # a ball holds its centre and its five neighbours
    assert [float(v.mean()) for v in far] == [0.0] * 4
    collapsed = manifold(reference[:1].repeat(50, 1), reference)
    assert float(collapsed.precision.mean()) == 1.0
    assert float(collapsed.recall.mean()) == pytest.approx(1 / 200)


def test_distances_and_copies(monkeypatch):
    """Blocks equal the whole matrix; exact copies are at distance 0 also far from the origin."""
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 70)
    train = normal(33, 10) + 1000
    x = torch.cat([normal(12, 10, seed=1) + 1000, train[5:8]])
    whole = torch.cat([d for _, d in blocks(x, train)])
    direct = (x.double()[:, None] - train.double()[None]).norm(dim=-1)
    assert torch.allclose(whole, direct, rtol=1e-9, atol=1e-6)
    distance, index = nearest(x, train)
    assert index[12:].tolist() == [5, 6, 7]
    assert distance[12:].tolist() == [0.0] * 3
    assert torch.equal(index, direct.argmin(1))


def test_own_distance_is_left_out_but_duplicates_count():
    x = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    assert to_others(x, 2).tolist() == [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [2.0, 3.0]]
    assert to_others(x, 1, torch.tensor([3, 0])).tolist() == [[2.0], [0.0]]
    with pytest.raises(DataError, match="more than 4 items"):
        to_others(x, 4)


def test_originality_sees_copies():
    train, fresh, new = (normal(n, 3, 4, seed=seed) for n, seed in ((400, 0), (150, 1), (150, 2)))
    honest = originality(new, train, fresh)
    assert honest["nearest_train_ratio"].value == pytest.approx(1, abs=0.08)
    assert honest["nearest_train_ratio"].real == 1.0
    assert honest["near_copies"].value < 0.05
    assert 0 < honest["near_copies"].real < 0.05
    some = originality(torch.cat([new[:120], train[:30] + 1e-3]), train, fresh)
    assert some["near_copies"].value == pytest.approx(0.2, abs=0.04)
    copied = originality(train[:150] + 1e-3 * new, train, fresh)
    assert copied["nearest_train_ratio"].value < 0.01
    assert copied["near_copies"].value == 1.0
    unknown = originality(new, train)
    assert unknown["near_copies"].real is None
    assert unknown["nearest_train_ratio"].real is None


@pytest.mark.slow
def test_ten_thousand_in_bounded_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = manifold(normal(10_000, 64), normal(10_000, 64, seed=1))
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 400
    assert float(result.precision.mean()) > 0.3


def test_a_near_copy_is_nearer_than_99_percent_of_training_items_are_to_each_other():
    """500 far pairs with distances 1..500: the first percentile of the 1,000 nearest distances is 6."""
    i = torch.arange(500, dtype=torch.float32)
    first = torch.stack([1e4 * i, torch.zeros(500)], 1)
    train = torch.cat([first, first + torch.stack([torch.zeros(500), i + 1], 1)])
    below = first[300:400] - torch.tensor([0.0, 5.5])
    above = first[300:400] - torch.tensor([0.0, 6.5])
    assert originality(torch.cat([below, above]), train)["near_copies"].value == 0.5


@pytest.mark.parametrize("copies", [1, 3])
def test_many_dimensions_give_the_same_neighbours_in_float32_blocks(monkeypatch, copies):
    """Against SciPy, with offsets that float32 does not survive, duplicates, and several blocks."""
    from scipy.spatial.distance import cdist

    monkeypatch.setattr(neighbours, "WIDE_ELEMENTS", 1000)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(120, neighbours.WIDE, generator=generator)
    y = torch.cat([y * 0.1 + 3] * copies)
    x = torch.cat([torch.randn(30, neighbours.WIDE, generator=generator) * 0.1 + 3, y[:5], y[5:10] + 1e-5])
    distance, index = nearest(x, y)
    expected, where = torch.from_numpy(cdist(x.double(), y.double())).min(1)
    torch.testing.assert_close(distance, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(index, where % 120)  # of ties the first
    assert (distance[30:35] == 0).all()

    rows = torch.arange(119, -1, -7)  # more than a block
    own = to_others(y, 2, rows)
    every = torch.cdist(y.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    torch.testing.assert_close(own, every[rows].sort(1).values[:, :2], rtol=1e-9, atol=1e-9)
    assert bool((own[:, 0] == 0).all()) == (copies > 1)


def test_what_float32_cannot_tell_apart_is_sought_in_float64(monkeypatch):
    """300 near copies of one item: their distances differ by less than round-off of products as long as these."""
    monkeypatch.setattr(neighbours, "WIDE_ELEMENTS", 4000)
    base = 2 * normal(1, 2000)
    y = torch.cat([normal(80, 2000, seed=1), base + 1e-4 * normal(300, 2000, seed=2)])
    x = torch.cat([y[100:120], normal(3, 2000, seed=3)])
    true = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance, index = nearest(x, y)
    torch.testing.assert_close(distance, true.min(1).values, rtol=1e-12, atol=0)
    assert torch.equal(index, true.argmin(1))
    rows = torch.arange(100, 120)
    true[torch.arange(20), rows] = torch.inf
    torch.testing.assert_close(to_others(y, 5, rows), true[:20].sort(1).values[:, :5], rtol=1e-12, atol=0)


def test_copies_are_at_distance_zero_beside_an_outlier():
    """Whose norm sets the round-off of products."""
    train = torch.cat([normal(40, 8), torch.full((1, 8), 1e6)])
    assert nearest(train[:40], train)[0].tolist() == [0.0] * 40
