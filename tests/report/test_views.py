"""The views cope with whatever they are given, and their distances are those of an independent program."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from polydiff.core.adapter import Item
from polydiff.core.report import outside_addresses
from polydiff.modalities.image import view as image
from polydiff.modalities.toy2d import view as toy2d
from tests.report.made import digits, items


def picture(png: bytes | None) -> Image.Image:
    assert png is not None
    return Image.open(io.BytesIO(png))


def blank(*shape: int, n: int = 5, **given: object) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    return [Item(torch.rand(shape, generator=generator) * 2 - 1, **given) for _ in range(n)]


@pytest.mark.parametrize(
    ("samples", "reference"),
    [
        (items(1), items(50)),
        (items(1, label=False), items(1, label=False)),
        (items(20, states=5), items(3)),
        (items(20), []),
        (items(20, label=False), items(20)),
        (items(3), items(20, label=False)),
        (blank(3, 8, 8), blank(3, 8, 8, n=9)),
        (blank(3, 5, 12), blank(3, 5, 12)),
        (blank(1, 16, 4), blank(1, 8, 8)),
        (blank(3, 200, 160, n=2), blank(3, 200, 160, n=2)),
        ([Item(torch.full((1, 4, 4), 3.0), cond={"label": torch.tensor(-1)})], []),
        ([Item(torch.zeros(1, 4, 4), cond={"label": torch.tensor(i)}) for i in range(40)], []),
    ],
)
def test_an_image_view_of_anything(samples: list[Item], reference: list[Item]) -> None:
    fragment = image.view(samples, reference)
    assert outside_addresses(fragment.html) == [] and fragment.html.count("<div") == fragment.html.count("</div>")
    assert fragment.html.count("Generated") >= len(samples[:1])
    assert min(picture(fragment.png).size) > 100 and max(picture(fragment.png).size) >= 512
    assert ("From noise to sample" in fragment.html) == ("trajectory" in samples[0].meta)
    fits = bool(reference) and reference[0].x.shape == samples[0].x.shape
    assert ("Nearest real neighbour" in fragment.html) == fits


def test_classes_stand_in_rows_beside_real_ones_of_the_same_class() -> None:
    html = image.view(items(30), items(200, first=100)).html
    rows = re.findall(r'iv-row"><span>(\d)</span>(.*?)</div></div>', html)
    assert [name for name, _ in rows] == list("0123456789") * 2
    for place, (name, row) in enumerate(rows):
        kind = "Generated" if place < 10 else "Real"
        assert row.count("<img") >= 2 and row.count("<img") == row.count(f'alt="{kind} {name}"')


def test_the_still_shows_every_pixel_in_the_order_of_the_classes() -> None:
    samples = items(64)
    grid = picture(image.view(samples, []).png)
    assert grid.size[0] == grid.size[1] >= 512
    x, y = digits()
    order = sorted(range(64), key=lambda i: int(y[i]))
    step = (grid.size[0] + 4) // 8  # 64 pixels of a digit and the gap
    cell = np.asarray(grid)[: step * 8, : step * 8][3 * step : 4 * step, 2 * step : 3 * step]
    shown = cell[4:64:8, 4:64:8, 0]
    assert np.array_equal(shown, ((x[order[3 * 8 + 2], 0] + 1) * 127.5).round().byte().numpy())
    assert set(np.unique(np.asarray(grid)[..., 3])) == {0, 255}  # the gaps are transparent


def test_the_nearest_neighbour_is_that_of_scikit_learn() -> None:
    x, _ = digits()
    queries, reference = list(x[:40]), list(x[40:])
    distance, index = image.nearest(queries, reference)
    tree = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(x[40:].flatten(1).double().numpy())
    expected, place = tree.kneighbors(x[:40].flatten(1).double().numpy())
    assert np.allclose(distance.numpy(), 127.5 * expected[:, 0] / 8, rtol=1e-6)
    assert np.array_equal(index.numpy(), place[:, 0])


def test_a_copy_has_distance_zero_and_an_image_is_no_neighbour_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "CHUNK", 7)
    x, _ = digits()
    distance, index = image.nearest([x[33], x[5] + 1 / 127.5], list(x[:50]))
    assert distance.tolist() == pytest.approx([0.0, 1.0], abs=1e-5) and index.tolist() == [33, 5]
    distance, index = image.nearest([x[33], x[5]], list(x[:50]), exclude=[33, 5])
    assert min(distance.tolist()) > 1 and index[0] != 33 and index[1] != 5
    html = image.view([Item(x[33])], [Item(row) for row in x[:50]]).html
    assert "<figcaption>0.0</figcaption>" in html


@pytest.mark.parametrize("n", [1, 50, 3000])
@pytest.mark.parametrize("real", [0, 3, 200])
@pytest.mark.parametrize(
    "given", [{}, {"cond": {"label": torch.tensor(1)}}, {"meta": {"trajectory": torch.rand(4, 2)}}]
)
def test_a_view_of_points(n: int, real: int, given: dict[str, object]) -> None:
    fragment = toy2d.view(blank(2, n=n, **given), blank(2, n=real))
    assert outside_addresses(fragment.html) == [] and "nan" not in fragment.html
    assert fragment.html.count("<figure>") == 1 + 4 * ("meta" in given)
    assert picture(fragment.png).size == (512, 512)


def test_points_are_drawn_where_they_are_and_by_class() -> None:
    corners = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -0.5], [float("nan"), 0.0]])
    samples = [Item(x, cond={"label": torch.tensor(i % 2)}, meta={"label": "ab"[i % 2]}) for i, x in enumerate(corners)]
    html = toy2d.view(samples, [Item(torch.tensor([2.0, 0.0]))]).html
    side = 100 / (2.0 * 1.15)
    assert html.count(f"M{side:.1f} {-side:.1f}h0") == 2  # among all, and in its class
    assert f"M{-side:.1f} {side:.1f}h0" in html and f"M{2 * side:.1f} 0.0h0" in html.replace("-0.0h0", "0.0h0")
    assert html.count("</i>a") == html.count("</i>b") == 2 and "nan" not in html
