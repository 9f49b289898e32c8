"""Augmentation that does not leak: what is exact is exact, the network is told, and only in training."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polydiff import data
from polydiff.core.adapter import Condition, collate
from polydiff.core.denoiser import Denoiser
from polydiff.core.errors import ConfigError
from polydiff.core.nn.unet import UNet
from polydiff.core.processes import GaussianProcess
from polydiff.core.schedules import EDM
from polydiff.core.training.stream import Keyed
from polydiff.modalities.image.augment import DOWN, UP, Warp, draw, resample, warp
from polydiff.modalities.image.dataset import Images


@pytest.fixture
def picture() -> Tensor:
    return 2 * torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture(scope="module")
def digits(data_folder: Path) -> Path:
    return data.locate("digits")


def bump(angle: float = 0.0) -> Tensor:
    """A smooth picture: an elongated Gaussian, its axis turned clockwise by an angle about the middle."""
    y, x = torch.meshgrid(*[torch.arange(33, dtype=torch.float64) - 16] * 2, indexing="ij")
    c, s = math.cos(angle), math.sin(angle)
    return torch.exp(-(((c * x + s * y - 3) / 5) ** 2) - ((c * y - s * x) / 3) ** 2)[None].float()


def test_the_filters_reconstruct_perfectly() -> None:
    h, g = (torch.tensor([*taps[:0:-1], *taps], dtype=torch.float64) for taps in (DOWN, UP))
    g = torch.nn.functional.pad(g, (1, 1))
    for m in range(-4, 5):
        inner = sum(float(h[k] * g[k - 2 * m]) for k in range(9) if 0 <= k - 2 * m < 9)
        assert inner == pytest.approx(float(m == 0), abs=1e-12)
    assert float(h.sum()) == pytest.approx(1) and float(g.sum()) == pytest.approx(2)
    assert sum((-1) ** k * float(h[k]) for k in range(9)) == pytest.approx(0, abs=1e-12)


def test_what_moves_pixels_to_pixels_is_exact(picture: Tensor) -> None:
    torch.testing.assert_close(resample(picture, Warp()), picture, atol=1e-6, rtol=0)
    assert warp(picture, Warp()) is picture
    assert torch.equal(warp(picture, Warp(mirror=True)), picture.flip(-1))
    assert torch.equal(warp(picture, Warp(invert=True)), picture.flip(-2))
    right, down = 3, -2
    shifted = warp(picture, Warp(shift=(8 * right / 16, 8 * down / 12)))
    torch.testing.assert_close(shifted[:, :10, 3:], picture[:, 2:, :13], atol=1e-6, rtol=0)
    torch.testing.assert_close(shifted[:, :, 2], picture[:, :, 1].roll(-2, 1), atol=9, rtol=0)
    torch.testing.assert_close(shifted[:, :10, :3], picture[:, 2:, 1:4].flip(-1), atol=1e-6, rtol=0)  # mirrored edge


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_of_squares_are_exact_and_clockwise(quarters: int) -> None:
    square = torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(1))
    turned = warp(square, Warp(angle=quarters * math.pi / 2))
    torch.testing.assert_close(turned, torch.rot90(square, -quarters, (1, 2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("angle", [0.3, -1.0, 2.5])
def test_turns_agree_with_the_turned_function_and_undo_each_other(angle: float) -> None:
    there = warp(bump(), Warp(angle=angle))
    middle = (slice(None), slice(6, 27), slice(6, 27))  # the corners come from beyond the edges
    torch.testing.assert_close(there[middle], bump(angle)[middle], atol=0.01, rtol=0)
    torch.testing.assert_close(warp(there, Warp(angle=-angle))[middle], bump()[middle], atol=0.02, rtol=0)


def test_scale_stretch_and_shift_agree_with_the_function() -> None:
    y, x = torch.meshgrid(*[torch.arange(33, dtype=torch.float64) - 16] * 2, indexing="ij")

    def gaussian(wide: float, tall: float, right: float = 0.0, down: float = 0.0) -> Tensor:
        return torch.exp(-(((x - right) / wide) ** 2) - ((y - down) / tall) ** 2)[None].float()

    round_ = gaussian(4, 4)
    factor = 2**0.2
    for how, expected in (
        (Warp(scale=1.0), gaussian(4 * factor, 4 * factor)),
        (Warp(scale=-1.5), gaussian(4 * factor**-1.5, 4 * factor**-1.5)),
        (Warp(stretch=1.0), gaussian(4 * factor, 4 / factor)),
        (Warp(stretch=1.0, direction=math.pi / 2), gaussian(4 / factor, 4 * factor)),
        (Warp(shift=(0.6, -0.3)), gaussian(4, 4, 0.6 * 33 / 8, -0.3 * 33 / 8)),
    ):
        torch.testing.assert_close(warp(round_, how), expected, atol=0.01, rtol=0)


def test_shrinking_does_not_alias() -> None:
    stripes = torch.ones(1, 32, 32)
    stripes[:, :, ::2] = -1
    small = warp(stripes, Warp(scale=-4.0))  # 0.57 times as large: the stripes are finer than pixels can show
    assert small[:, 8:24, 8:24].abs().max() < 0.25


def test_what_the_network_is_told() -> None:
    assert torch.equal(Warp().told(), torch.zeros(9))
    how = Warp(True, True, 0.5, math.pi / 2, 2.0, math.pi, (0.1, -0.2))
    torch.testing.assert_close(how.told(), torch.tensor([1, 1, 0.5, -1, 1, -2, 0, 0.1, -0.2]), atol=1e-6, rtol=0)


def test_each_transformation_comes_with_its_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [draw(0.3, generator, invert=True) for _ in range(2000)]
    shares = {name: sum(bool(getattr(how, name)) for how in draws) / 2000 for name in ("scale", "angle", "stretch")}
    assert all(abs(share - 0.3) < 0.04 for share in shares.values()), shares
    assert abs(sum(how.shift != (0, 0) for how in draws) / 2000 - 0.3) < 0.04
    for name in ("mirror", "invert"):
        assert abs(sum(getattr(how, name) for how in draws) / 2000 - 0.15) < 0.03
    assert not any(draw(0.0, generator) != Warp() for _ in range(100))
    assert not any(draw(1.0, generator).invert for _ in range(100))
    scales = torch.tensor([how.scale for how in draws if how.scale])
    assert abs(float(scales.mean())) < 0.15 and abs(float(scales.std()) - 1) < 0.1


def test_training_items_are_warped_from_seed_epoch_and_index_alone(digits: Path) -> None:
    dataset = Images(digits, augment=0.5)
    assert dataset.facts["conditions"] == {"augment": {"kind": "setting", "shape": [9]}}
    assert "augment" not in dataset[0].cond
    keyed = Keyed(dataset, 7)
    batch = keyed.__getitems__([(0, i) for i in range(20)])
    alone = keyed[(0, 13)]
    assert torch.equal(alone.x, batch[13].x) and torch.equal(alone.cond["augment"], batch[13].cond["augment"])
    assert not torch.equal(alone.x, Keyed(dataset, 8)[(0, 13)].x) or not torch.equal(alone.x, keyed[(1, 13)].x)
    assert collate(batch).cond["augment"].shape == (20, 9)
    for item, plain in zip(batch, (dataset[i] for i in range(20)), strict=True):
        assert torch.equal(item.x, plain.x) == (not item.cond["augment"].any())


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "much", None])
def test_a_probability_that_is_none_is_refused(digits: Path, value: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.options\.augment=.* must be a probability between 0 and 1"):
        Images(digits, augment=value)  # type: ignore[arg-type]


def test_a_setting_is_present_whatever_is_asked_and_zero_by_default() -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, channels=8, multipliers=(1,), blocks=1, conditions={"augment": ("setting", 9)})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser = Denoiser(network, GaussianProcess(EDM()), conditions={"augment": Condition("setting", (9,))})
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    absent = {"augment": torch.zeros(2, dtype=torch.bool)}
    plain, told = denoiser(x, t).x0, torch.randn(2, 9)
    assert torch.equal(denoiser(x, t, cond={"augment": torch.zeros(2, 9)}).x0, plain)
    warped = denoiser(x, t, cond={"augment": told}).x0
    assert (warped - plain).abs().max() > 1e-3
    assert torch.equal(denoiser(x, t, cond={"augment": told}, present=absent).x0, warped)


def test_what_the_network_is_told_determines_the_warp() -> None:
    """The matrix and the shift again, from the nine numbers alone."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        how = draw(0.8, generator, invert=True)
        mirror, invert, scale, cosine, sine, along, across, right, down = how.told().double().tolist()
        stretch = math.hypot(along, across)
        again = Warp(
            mirror=bool(mirror),
            invert=bool(invert),
            scale=scale,
            angle=math.atan2(sine, cosine + 1),
            stretch=stretch,
            direction=math.atan2(across, along),
            shift=(right, down),
        )
        assert (again.mirror, again.invert) == (how.mirror, how.invert)
        torch.testing.assert_close(torch.tensor(again.matrix()), torch.tensor(how.matrix()), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(again.shift), torch.tensor(how.shift), atol=1e-6, rtol=0)


def test_transformations_apply_in_their_order() -> None:
    """All at once is one after the other: scale, turn, stretch, shift."""
    steps = Warp(scale=0.5), Warp(angle=0.6), Warp(stretch=1.0, direction=0.3), Warp(shift=(0.4, -0.2))
    one_by_one = bump()
    for how in steps:
        one_by_one = warp(one_by_one, how)
    at_once = warp(bump(), Warp(scale=0.5, angle=0.6, stretch=1.0, direction=0.3, shift=(0.4, -0.2)))
    middle = (slice(None), slice(6, 27), slice(6, 27))
    torch.testing.assert_close(at_once[middle], one_by_one[middle], atol=0.02, rtol=0)


def test_turns_and_directions_cover_the_circle_and_numbers_are_independent() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [draw(1.0, generator) for _ in range(1000)]
    for name in ("angle", "direction"):
        values = torch.tensor([getattr(how, name) for how in draws])
        for trigonometric in (values.cos(), values.sin(), (2 * values).cos(), (2 * values).sin()):
            assert abs(float(trigonometric.mean())) < 0.09  # 4 standard errors
        assert float(values.abs().max()) <= math.pi
    numbers = torch.tensor([[how.scale, how.stretch, how.angle, how.direction, *how.shift] for how in draws])
    assert float((torch.corrcoef(numbers.T) - torch.eye(6)).abs().max()) < 0.13
    assert float(numbers[:, 1].min()) > 0


@pytest.mark.parametrize("direction", [math.pi / 4, -0.5])
def test_a_stretch_goes_along_its_direction(direction: float) -> None:
    y, x = torch.meshgrid(*[torch.arange(33, dtype=torch.float64) - 16] * 2, indexing="ij")
    c, s, factor = math.cos(direction), math.sin(direction), 2**0.2
    expected = torch.exp(-(((c * x + s * y) / (4 * factor)) ** 2) - ((c * y - s * x) / (4 / factor)) ** 2)[None].float()
    round_ = torch.exp(-(x**2 + y**2) / 16)[None].float()
    torch.testing.assert_close(warp(round_, Warp(stretch=1.0, direction=direction)), expected, atol=0.01, rtol=0)
