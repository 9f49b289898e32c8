"""Tasks of images: what comes out agrees with what was given, and what cannot be done is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from polydiff import data
from polydiff.core.adapter import Item
from polydiff.core.cli import main
from polydiff.core.errors import ConfigError, DataError
from polydiff.core.run import Run
from polydiff.core.tree import leaves
from polydiff.data import Table, h5
from polydiff.modalities.image.codec import Codec

SMALL = ["network.channels=8", "network.multipliers=[1]", "network.blocks=1", "logger=jsonl", "trainer.device=cpu"]
LUMA = torch.tensor([0.299, 0.587, 0.114])
METHODS = ("mmps", "pigdm", "dps")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Run:
    """A model of digits that has learned a little."""
    data.locate("digits")
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert (
        main(["train", "experiment=image-digits", f"run={path}", *SMALL, "trainer.steps=150", "trainer.batch=64"]) == 0
    )
    return Run.load(path, "cpu")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of colour pictures of 12 x 8 that has learned hardly anything."""
    folder = tmp_path_factory.mktemp("colours")
    pixels = np.random.RandomState(0).randint(0, 256, (12, 8, 12, 3)).astype(np.uint8)
    columns = {"id": np.array([f"i{i}" for i in range(12)]), "split": np.array(["train"] * 8 + ["test"] * 4)}
    h5.write(
        folder / "made.h5",
        Table({"image": pixels}, columns, attributes={"name": "made", "modality": "image", "sigma_data": 0.58}),
    )
    words = ["experiment=image-digits", "data=file", f"data.path={folder / 'made.h5'}", f"run={folder / 'run'}"]
    assert main(["train", *words, *SMALL, "trainer.steps=20", "trainer.batch=8"]) == 0
    return Run.load(folder / "run", "cpu")


def items(run: Run, n: int = 4) -> list[Item]:
    return [run.dataset("test")[i] for i in range(n)]


def states(found: list[Item]) -> Tensor:
    return torch.stack([leaves(item.x)[0] for item in found])


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def shrunk(x: Tensor, factor: int) -> Tensor:
    return x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-1, -3))


@pytest.mark.parametrize("method", [*METHODS, "replacement", "repaint"])
def test_inpainting_keeps_what_is_known(digits: Run, method: str) -> None:
    truth = states(items(digits))
    options = {"method": method, "box": [1, 2, 4, 3], "repeats": 1}
    made = digits.sample(8, task="inpaint", input=items(digits), options=options, steps=8)
    x = states(made)
    known = torch.ones(8, 8, dtype=torch.bool)
    known[1:5, 2:5] = False
    assert float((x - truth.repeat(2, 1, 1, 1))[..., known].abs().max()) < 1e-6
    assert rms((x[:4] - x[4:])[..., ~known]) > 0.02  # two draws of what is not
    given = states([item.meta["given"] for item in made])
    assert torch.equal(given[..., known], truth.repeat(2, 1, 1, 1)[..., known])
    assert not given[..., ~known].any()


@pytest.mark.parametrize(("method", "tolerance"), [("mmps", 0.01), ("pigdm", 0.01), ("dps", 0.6)])
@pytest.mark.parametrize("factor", [2, 4])
def test_super_resolution_agrees_with_the_measurement(digits: Run, method: str, tolerance: float, factor: int) -> None:
    truth = states(items(digits))
    small = [Item(x) for x in shrunk(truth, factor)]
    options = {"method": method, "factor": factor}
    x = states(digits.sample(4, task="super-resolution", input=small, options=options, steps=12))
    free = states(digits.sample(4, steps=12))
    assert rms(shrunk(x, factor) - shrunk(truth, factor)) < tolerance * rms(
        shrunk(free, factor) - shrunk(truth, factor)
    )
    full = digits.sample(4, task="super-resolution", input=items(digits), options=options, steps=12)
    assert torch.allclose(states([item.meta["given"] for item in full]), shrunk(truth, factor), atol=1e-6)


@pytest.mark.parametrize(("method", "tolerance"), [("mmps", 0.01), ("pigdm", 0.01), ("dps", 0.6)])
def test_colourisation_keeps_the_luma(colours: Run, method: str, tolerance: float) -> None:
    truth = states(items(colours))
    words: dict[str, Any] = {"task": "colourise", "options": {"method": method}, "steps": 12}
    made = colours.sample(4, input=items(colours), **words)
    luma = torch.einsum("bchw,c->bhw", states(made), LUMA)
    assert rms(luma - torch.einsum("bchw,c->bhw", truth, LUMA)) < tolerance * rms(
        truth
    )  # two draws differ by 1.4 of it
    assert made[0].meta["given"].x.shape == (1, 8, 12)
    grey = [Item(torch.einsum("chw,c->hw", leaves(item.x)[0], LUMA).expand(3, 8, 12)) for item in items(colours)]
    assert torch.allclose(states(colours.sample(4, input=grey, **words)), states(made), atol=2e-3)


def test_denoising_and_variation_stay_near_what_was_given(digits: Run) -> None:
    truth = states(items(digits))
    noisy = truth + 0.6 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    clean = digits.sample(4, task="denoise", input=[Item(x) for x in noisy], options={"noise": 0.6})
    assert rms(states(clean) - truth) < 0.9 * rms(noisy - truth)
    far = []
    for strength in (0.1, 0.5, 1.0):
        made = states(digits.sample(8, task="variation", input=items(digits), options={"strength": strength}))
        assert rms(made[:4] - made[4:]) > 0.01
        far.append(rms(made[:4] - truth))
    assert far[0] < far[1] < far[2]


def test_files_of_pictures(digits: Run, tmp_path: Path) -> None:
    picture = Codec().decode(leaves(items(digits)[0].x)[0])[..., 0]
    Image.fromarray(picture).save(tmp_path / "digit.png")
    Image.fromarray(np.where(np.arange(64).reshape(8, 8) < 40, 255, 0).astype(np.uint8)).save(tmp_path / "known.png")
    words = [
        "n=2",
        "steps=3",
        "task=inpaint",
        f"input={tmp_path / 'digit.png'}",
        f"task.known={tmp_path / 'known.png'}",
    ]
    assert main(["sample", f"run={digits.path}", *words, f"out={tmp_path / 'out'}", "device=cpu"]) == 0
    for name in ("sample-00000.png", "sample-00001.png", "given/sample-00000.png"):
        assert np.array_equal(np.array(Image.open(tmp_path / "out" / name))[:5], picture[:5])
    assert [path.name for path in (tmp_path / "out/given").iterdir()] == ["sample-00000.png"]


def mask(folder: Path) -> Path:
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(folder / "mask.png")
    return folder / "mask.png"


def broken(folder: Path) -> Path:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    return folder / "broken.png"


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "inpaint",
            {"box": [0, 0, 9, 2]},
            r"task.box=\[0, 0, 9, 2\] must be \[top,left,height,width\] of a part of a picture of 8x8",
        ),
        ("inpaint", {"box": [0, 0, 0, 2]}, "task.box="),
        ("inpaint", {"box": [-1, 0, 2, 2]}, "task.box="),
        ("inpaint", {"box": [1, 2, 3]}, "task.box="),
        ("inpaint", {"known": mask}, "mask.png is 4x5, the picture is 8x8"),
        ("inpaint", {"known": mask, "box": [0, 0, 2, 2]}, "give task.box or task.known, not both"),
        ("inpaint", {"known": broken}, "broken.png"),
        ("inpaint", {"known": Path("/nowhere.png")}, "/nowhere.png: no such file"),
        ("inpaint", {"known": lambda folder: folder}, "no such file"),
        ("inpaint", {"method": "dsp"}, "unknown task.method 'dsp': did you mean dps"),
        (
            "super-resolution",
            {"factor": 3},
            "samples are 8x8, input=digit is 8x8, 3 times larger does not fit: task.factor can be 2, 4, 8",
        ),
        ("super-resolution", {"factor": 1}, "task.factor can be 2, 4, 8"),
        ("super-resolution", {"factor": 0}, "task.factor can be 2, 4, 8"),
        ("super-resolution", {"method": "repaint"}, "unknown task.method 'repaint'"),
        ("super-resolution", {"noise": -0.5}, "task.noise=-0.5 must be 0 or more"),
        ("colourise", {}, "task=colourise needs a model of colour pictures, this one makes grey ones"),
        ("denoise", {"noise": -0.1}, "task.noise=-0.1 must be between 0.002 and 80"),
        ("variation", {"strength": 0.0}, "task.strength=0 must be above 0, at most 1"),
        ("variation", {"strength": 1.5}, "task.strength=1.5 must be above 0, at most 1"),
    ],
)
def test_what_cannot_be_done_is_named(
    digits: Run, tmp_path: Path, task: str, options: dict[str, Any], message: str
) -> None:
    made: dict[str, Any] = {
        key: value(tmp_path) if isinstance(value, Callable) else value for key, value in options.items()
    }  # type: ignore[arg-type]
    (item,) = items(digits, 1)
    with pytest.raises((ConfigError, DataError), match=message):
        digits.sample(1, task=task, input=Item(item.x, id="digit"), options=made, steps=1)


@pytest.mark.parametrize(
    ("task", "shape", "message"),
    [
        ("inpaint", (1, 8, 6), "input=odd is 1 x 8 x 6, samples of this size are 1 x 8 x 8: change it, or size.<key>"),
        ("denoise", (1, 4, 4), "input=odd is 1 x 4 x 4, samples of this size are"),
        ("variation", (3, 8, 8), "input=odd is 3 x 8 x 8, samples of this size are"),
        (
            "super-resolution",
            (1, 2, 4),
            "input=odd is 4x2; to make 8x8, 4 times larger, give a picture of 2x2, or ask for size.height=8 size.width=16",
        ),
    ],
)
def test_another_size_is_named(digits: Run, task: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits.sample(1, task=task, input=Item(torch.zeros(shape), id="odd"), steps=1)


def test_another_size_can_be_asked_for(digits: Run) -> None:
    (item,) = digits.sample(
        1, task="super-resolution", input=Item(torch.zeros(1, 2, 4)), size={"height": 8, "width": 16}, steps=6
    )
    assert leaves(item.x)[0].shape == (1, 8, 16)
    assert float(shrunk(leaves(item.x)[0], 4).abs().max()) < 0.02
