"""A picture as the condition of another: from the data, from files, in the network, in metrics and view."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from polydiff import data
from polydiff.core.adapter import Condition, Item, collate
from polydiff.core.cli import main
from polydiff.core.errors import ConfigError, DataError
from polydiff.core.report import draw, lenders, real
from polydiff.core.request import asked
from polydiff.core.run import Run
from polydiff.data import Table, h5
from polydiff.modalities.image import ADAPTER
from polydiff.modalities.image.codec import Codec
from polydiff.modalities.image.condition import Grey, LowResolution, read
from polydiff.modalities.image.dataset import Images
from polydiff.modalities.image.fidelity import fidelity
from polydiff.modalities.image.view import triples

SMALL = ["network.channels=8", "network.multipliers=[1]", "network.blocks=1", "logger=jsonl", "trainer.device=cpu"]
STEPS = ["trainer.steps=3", "trainer.batch=8", "sampling.steps=2"]


@pytest.fixture(scope="module")
def digits(data_folder: Path) -> Path:
    return data.locate("digits")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.RandomState(0)
    table = Table(
        {"image": random.randint(0, 256, (12, 8, 12, 3)).astype(np.uint8)},
        {"id": np.array([f"i{i}" for i in range(12)]), "split": np.array(["train"] * 8 + ["test"] * 4)},
        attributes={"name": "made", "modality": "image", "sigma_data": 0.58},
    )
    return h5.write(tmp_path_factory.mktemp("colours") / "made.h5", table)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A super-resolution model of digits, 8 from 4, that has hardly learned anything."""
    run = tmp_path_factory.mktemp("runs") / "sr"
    options = ["data=digits", "data.options.factor=2", "data.options.augment=0.3", "data.options.flip=true"]
    words = ["experiment=image-super-resolution", f"run={run}", *options, *SMALL, *STEPS]
    assert main(["train", *words]) == 0
    return run


@pytest.fixture
def run(trained: Path) -> Run:
    return Run.load(trained, "cpu")


def halves(folder: Path, run: Run, n: int = 3) -> list[Item]:
    """Files of digits at half their size, made by another program; the items they come from."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [run.dataset("test")[i] for i in range(n)]
    for i, item in enumerate(items):
        Image.fromarray(Codec().decode(item.x)[..., 0]).reduce(2).save(folder / f"{i}.png")
    return items


@pytest.mark.parametrize("factor", [2, 4])
def test_low_resolution_is_what_pillow_makes_of_the_picture(colours: Path, factor: int) -> None:
    dataset = Images(colours, condition="low_resolution", factor=factor)
    described = {"kind": "field", "shape": [3, None, None], "name": "low_resolution", "factor": factor}
    assert dataset.facts["conditions"] == {"image": described}
    for item in dataset:
        small = np.array(Image.fromarray(Codec().decode(item.x)).reduce(factor))
        assert item.cond["image"].shape == item.x.shape
        enlarged = torch.nn.functional.interpolate(Codec().encode(small)[None], size=(8, 12), mode="bicubic")[0]
        torch.testing.assert_close(item.cond["image"], enlarged, atol=1e-6, rtol=0)


def test_grey_is_what_pillow_makes_of_the_picture(colours: Path) -> None:
    dataset = Images(colours, condition="grey")
    assert dataset.facts["conditions"]["image"]["shape"] == [1, None, None]
    for item in dataset:
        luma = np.asarray(Image.fromarray(Codec().decode(item.x)).convert("L"))
        np.testing.assert_array_equal(Codec().decode(item.cond["image"])[..., 0], luma)
    batch = collate(dataset.__getitems__([2, 0]))
    assert batch.cond["image"].shape == (2, 1, 8, 12) and torch.equal(batch.cond["image"][1], dataset[0].cond["image"])


def test_images_without_a_condition_have_the_facts_they_always_had(digits: Path) -> None:
    assert set(Images(digits).facts) == {"name", "n", "sha256", "sigma_data", "size", "classes"}
    assert Images(digits, classes=False).facts["classes"] == {} and Images(digits, classes=False)[0].cond == {}


def test_flips_and_warps_change_image_and_condition_together(colours: Path) -> None:
    flipping = Images(colours, condition="low_resolution", factor=2, flip=True)
    warping = Images(colours, condition="grey", augment=0.9)
    generator = torch.Generator().manual_seed(0)
    mirrored = 0
    for _ in range(20):
        item = flipping.augment(flipping[0], generator)
        mirrored += torch.equal(item.x, flipping[0].x.flip(-1))
        torch.testing.assert_close(item.cond["image"], LowResolution(2)(item.x[None])[0], atol=1e-5, rtol=0)
        item = warping.augment(warping[0], generator)
        assert torch.equal(item.cond["image"], Grey()(item.x))
    assert 3 < mirrored < 17


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "low_resolution", "factor": 3}, "factor=3 does not divide pictures of 12x8: use 2, 4"),
        ({"condition": "low_resolution", "factor": 1}, "factor=1 does not divide"),
        ({"condition": "low_resolution", "factor": 2.0}, "factor=2.0 does not divide"),
        ({"condition": "gray"}, "unknown value of data.options.condition 'gray': did you mean grey"),
    ],
)
def test_conditions_that_these_images_cannot_have(colours: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Images(colours, **options)  # type: ignore[arg-type]


def test_grey_pictures_have_no_colours_to_lose(digits: Path) -> None:
    with pytest.raises(ConfigError, match="condition=grey needs colour pictures"):
        Images(digits, condition="grey")


def test_a_file_is_the_condition_that_training_saw(run: Run, tmp_path: Path) -> None:
    items = halves(tmp_path, run)
    found = run.conditions({"image": str(tmp_path)}, 5)
    for i, given in enumerate(found):
        assert torch.equal(given["image"], items[i % 3].cond["image"])
    assert torch.equal(run.conditions({"image": tmp_path / "1.png"}, 1)[0]["image"], items[1].cond["image"])
    listed = run.conditions({"image": [str(tmp_path / "2.png"), None]}, 2)
    assert torch.equal(listed[0]["image"], items[2].cond["image"]) and listed[1] == {}


def test_grey_takes_grey_and_colour_files(colours: Path, tmp_path: Path) -> None:
    facts = Images(colours, condition="grey").facts
    item = Images(colours, condition="grey")[0]
    picture = Image.fromarray(Codec().decode(item.x))
    picture.save(tmp_path / "colour.png")
    picture.convert("L").save(tmp_path / "grey.png")
    for name in ("colour.png", "grey.png"):
        assert torch.equal(read(tmp_path / name, facts, facts["size"]), item.cond["image"])
    with pytest.raises(
        ConfigError, match=r"12x8 pixels; give a picture of 8x8, or ask for size.height=8 size.width=12"
    ):
        read(tmp_path / "grey.png", facts, {"height": 8, "width": 8, "channels": 3})


def test_samples_follow_a_file_a_tensor_and_nothing(run: Run, tmp_path: Path) -> None:
    items = halves(tmp_path, run)
    from_file = run.sample(4, {"image": str(tmp_path)}, steps=2)
    assert [item.meta["files"]["image"].rpartition("/")[2] for item in from_file] == [
        "0.png",
        "1.png",
        "2.png",
        "0.png",
    ]
    from_tensor = run.sample(4, {"image": torch.stack([item.cond["image"] for item in items])}, steps=2)
    for ours, theirs in zip(from_file, from_tensor, strict=True):
        assert torch.equal(ours.x, theirs.x)
    without = run.sample(1, steps=2)[0]
    assert without.cond == {} and not torch.equal(without.x, from_file[0].x)
    guided = run.sample(1, {"image": items[0].cond["image"]}, steps=2, guidance=3.0)[0]
    assert not torch.equal(guided.x, from_file[0].x)
    larger = run.sample(1, {"image": torch.zeros(1, 12, 10)}, size={"height": 12, "width": 10}, steps=2)
    assert larger[0].x.shape == (1, 12, 10)


def test_what_is_no_condition_is_one_clear_error(run: Run, moons_run: Path, tmp_path: Path) -> None:
    halves(tmp_path / "good", run, 1)
    Image.new("L", (5, 4)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("nothing to see")
    wrong: list[tuple[object, type[Exception], str]] = [
        (
            str(tmp_path / "wide.png"),
            ConfigError,
            "5x4 pixels; to make 8x8, 2 times larger, give a picture of 4x4, or ask for ",
        ),
        (str(tmp_path / "text.png"), DataError, "text.png: not a picture"),
        (str(tmp_path / "absent.png"), ConfigError, "cond.image=.*absent.png: no such file or folder"),
        (str(tmp_path / "empty"), ConfigError, "no file in this folder can be used: it is empty"),
        (str(tmp_path / "words"), ConfigError, "no file in this folder can be used; for one, notes.txt"),
        (3, ConfigError, "cond.image=3 must be a file, a folder, or 1 x any x any finite number"),
        (torch.zeros(3, 8, 8), ConfigError, "a tensor of 3 x 8 x 8 must be a file, a folder, or 1 x any x any"),
        (torch.zeros(1, 4, 4), ConfigError, "cond.image is 1 x 4 x 4, samples of this size need 1 x 8 x 8"),
        (torch.full((1, 8, 8), math.nan), ConfigError, "finite number"),
        ([], ConfigError, r"cond.image=\[\] is empty"),
    ]
    for value, kind, message in wrong:
        with pytest.raises(kind, match=message) as caught:
            run.sample(1, {"image": value}, steps=2)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"unknown condition 'image': .*valid: label"):
        Run.load(moons_run, "cpu").sample(1, {"image": str(tmp_path / "good" / "0.png")})
    with pytest.raises(ConfigError, match=r"guidance=2.0 needs a condition to guide towards: cond.image=...$"):
        run.sample(1, {"augment": torch.zeros(9)}, guidance=2.0)


def test_a_folder_is_read_as_far_as_it_can_be(run: Run, tmp_path: Path) -> None:
    halves(tmp_path, run, 2)
    (tmp_path / "README.txt").write_text("about the pictures")
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 files: README.txt \(not a picture") as caught:
        assert len({given["image"].sum().item() for given in run.conditions({"image": str(tmp_path)}, 4)}) == 2
    assert len(caught) == 1


def test_the_command_line_says_which_file_each_sample_was_made_of(trained: Path, run: Run, tmp_path: Path) -> None:
    halves(tmp_path / "small", run, 2)
    words = [f"run={trained}", "n=4", "steps=2", f"out={tmp_path / 'out'}", "device=cpu"]
    assert main(["sample", *words, f"cond.image={tmp_path / 'small'}"]) == 0
    entries = json.loads((tmp_path / "out" / "samples.json").read_text())["samples"]
    assert [Path(entry["cond"]["image"]["file"]).name for entry in entries] == ["0.png", "1.png", "0.png", "1.png"]


def test_a_bad_file_on_the_command_line_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "nine.png")
    words = ["sample", f"run={trained}", f"cond.image={tmp_path / 'nine.png'}", f"out={tmp_path / 'out'}", "device=cpu"]
    assert main(words) != 0
    error = capsys.readouterr().err
    assert "9x9 pixels" in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_evaluating_gives_samples_the_test_pictures_conditions(trained: Path, tmp_path: Path) -> None:
    words = [f"run={trained}", "n=20", "steps=2", f"out={tmp_path}", "device=cpu"]
    assert main(["evaluate", *words]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert found["consistency"]["real"] == 0 and found["psnr"]["n"] == found["ssim"]["n"] == 20


def test_fidelity_against_independent_programs(colours: Path) -> None:
    dataset = Images(colours, condition="grey")
    truths, facts = list(dataset), dataset.facts
    perfect = fidelity(truths, truths, facts)
    assert perfect["consistency"].value == 0 and perfect["ssim"].value == pytest.approx(1)
    assert perfect["psnr"].value == 100 and perfect["psnr"].real is None and perfect["ssim"].real == 1
    generator = torch.Generator().manual_seed(0)
    noisy = [replace(item, x=item.x + 0.2 * torch.randn(item.x.shape, generator=generator)) for item in truths]
    found = fidelity([*noisy, *noisy], truths, facts)
    pairs = [(Codec().decode(a.x), Codec().decode(b.x)) for a, b in zip(noisy, truths, strict=True)]
    greys = [[np.asarray(Image.fromarray(x).convert("L")) / 255 for x in pair] for pair in pairs]
    assert found["consistency"].value == pytest.approx(np.mean([((a - b) ** 2).mean() for a, b in greys]), rel=1e-5)
    assert found["psnr"].value == pytest.approx(np.mean([peak_signal_noise_ratio(b, a) for a, b in pairs]), rel=1e-5)
    ssim = [structural_similarity(a, b, channel_axis=2) for a, b in pairs]
    assert found["ssim"].value == pytest.approx(np.mean(ssim), rel=1e-5) and found["ssim"].n == 16
    assert fidelity(noisy, truths[::-1], facts)["psnr"] == fidelity(noisy, truths, facts)["psnr"]
    assert set(fidelity(noisy, list(Images(colours, "test", condition="grey")), facts)) == {"consistency"}
    assert fidelity(noisy, truths[:3] * 2 + truths[3:], facts)["psnr"].n == 5, "a condition of two pictures names none"
    assert fidelity([replace(item, cond={}) for item in noisy], truths, facts) == {}
    assert fidelity(noisy, truths, Images(colours).facts) == {}


def test_the_small_picture_enlarged_is_consistent_with_itself(colours: Path) -> None:
    dataset = Images(colours, condition="low_resolution", factor=2)
    assert torch.equal(LowResolution(2)(dataset[0].x), dataset[0].cond["image"])
    assert fidelity(list(dataset), list(dataset), dataset.facts)["consistency"].value == 0
    flat = [replace(item, x=torch.zeros_like(item.x)) for item in dataset]
    assert fidelity(flat, list(dataset), dataset.facts)["consistency"].value > 1e-3


def test_a_report_shows_held_out_pictures_four_times_each_beside_the_truth(run: Run) -> None:
    reference = real(run)
    samples = draw(run, lenders(run, reference), 8)
    held_out = {tuple(item.x.flatten().tolist()) for item in run.dataset("test")}
    assert all(tuple(item.meta["truth"].flatten().tolist()) in held_out for item in samples)
    groups = triples(samples, reference)
    assert [len(made) for _, made, _ in groups] == [4, 4] and all(len(truth) == 1 for _, _, truth in groups)
    fragment = ADAPTER.view(samples, reference)
    assert "Given and generated" in fragment.html and 'alt="True"' in fragment.html and 'alt="Given"' in fragment.html
    previews = [Item(item.x, None, item.cond) for item in reference[:3]]
    assert all(len(truth) == 1 for _, _, truth in triples(previews, reference))
    assert "Given" not in ADAPTER.view([Item(torch.zeros(1, 8, 8))], reference).html


def test_resuming_gives_the_same_bits(tmp_path: Path, digits: Path) -> None:
    options = [
        "data=digits",
        "data.options.factor=2",
        "data.options.augment=0.5",
        "trainer.batch=8",
        "trainer.save_every=2",
    ]
    words = ["train", "experiment=image-super-resolution", *options, *SMALL, "optim.decay=constant"]
    assert main([*words, f"run={tmp_path / 'whole'}", "trainer.steps=4"]) == 0
    assert main([*words, f"run={tmp_path / 'parts'}", "trainer.steps=2"]) == 0
    assert main([*words, f"run={tmp_path / 'parts'}", "trainer.steps=4"]) == 0
    whole, parts = (tmp_path / name / "checkpoints/step-00000004/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_an_empty_path_is_not_the_folder_one_is_in() -> None:
    wanted = {"image": Condition("field", (1, None, None), read=read)}
    facts = {"size": {"height": 8, "width": 8, "channels": 1}}
    with pytest.raises(ConfigError, match=r"cond\.image=: no such file or folder"):
        asked(wanted, {"image": ""}, 1, facts, facts["size"])
