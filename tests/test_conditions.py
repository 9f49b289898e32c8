"""What any modality may declare as a condition: which a data set has, of which shape, and how networks are told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from polydiff.core.adapter import Condition, Item, collate, conditions_of
from polydiff.core.denoiser import Denoiser
from polydiff.core.errors import ConfigError
from polydiff.core.guidance import cfg
from polydiff.core.nn.embeddings import condition_specs
from polydiff.core.nn.unet import UNet
from polydiff.core.objectives import Objective
from polydiff.core.processes import GaussianProcess
from polydiff.core.request import asked, lend, lent
from polydiff.core.schedules import EDM

DECLARED = {
    "label": Condition("class"),
    "place": Condition("tensor", (2,)),
    "bands": Condition("field", None),
    "speed": Condition("setting", None),
}
FACTS = {
    "classes": {"label": ["a", "b", "c"]},
    "conditions": {"bands": {"kind": "field", "shape": [4, None]}, "speed": {"kind": "setting", "shape": [3]}},
}


def test_the_data_decide_which_conditions_there_are() -> None:
    found = conditions_of(DECLARED, FACTS)
    assert [*found] == [*DECLARED] and found["bands"].shape == (4, None) and found["speed"].shape == (3,)
    assert [*conditions_of(DECLARED, {"classes": {}})] == ["place"]
    assert found["bands"].shape_in((1, 17)) == (4, 17) and found["speed"].shape_in((1, 17)) == (3,)
    assert condition_specs(FACTS) == {"label": 3, "bands": ("field", 4), "speed": ("setting", 3)}
    assert condition_specs({"classes": {"label": ["a"]}}) == {"label": 1}


@pytest.mark.parametrize(
    "described", [{"kind": "tensor", "shape": [4]}, {"kind": "field", "shape": 4}, {"kind": "field", "shape": [0]}, {}]
)
def test_facts_that_describe_something_else_are_refused(described: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="condition 'bands': the data describe"):
        conditions_of(DECLARED, {"classes": {}, "conditions": {"bands": described}})


def test_fields_of_ragged_items_are_padded_like_them() -> None:
    batch = collate([Item(torch.ones(1, n), None, {"bands": torch.ones(4, n)}) for n in (3, 5)], mask_axis=-1)
    assert batch.x.shape == (2, 1, 5) and batch.cond["bands"].shape == (2, 4, 5)
    assert torch.equal(batch.cond["bands"][0, :, 3:], torch.zeros(4, 2)) and bool(batch.cond["bands"][0, :, :3].all())


def test_real_items_lend_all_their_conditions_or_none() -> None:
    declared = conditions_of(DECLARED, FACTS)
    plain = [Item(torch.zeros(1, 3), None, {"label": torch.tensor(1)})]
    full = [Item(torch.zeros(1, 3), None, {"label": torch.tensor(k), "bands": torch.ones(4, 3)}) for k in (0, 2)]
    assert not lent(declared, plain[0]) and lent(declared, full[0])
    given = lend(declared, full)
    assert set(given) == {"label", "bands"}
    items = asked(declared, given, 3, FACTS)
    assert [int(item.cond["label"]) for item in items] == [0, 2, 0] and torch.equal(
        items[1].cond["bands"], torch.ones(4, 3)
    )


def test_a_reader_is_told_facts_and_size(tmp_path: Path) -> None:
    def read(path: Path, facts: Any, size: Any) -> torch.Tensor:
        return torch.full((4, size["points"]), float(path.read_text())) + len(facts["classes"])

    declared = {"bands": Condition("field", (4, None), read=read)}
    for k in (1, 2):
        (tmp_path / f"{k}.txt").write_text(str(k))
    (tmp_path / ".hidden").write_text("no number")
    items = asked(declared, {"bands": str(tmp_path)}, 3, FACTS, {"points": 5})
    assert [float(item.cond["bands"][0, 0]) for item in items] == [2, 3, 2]
    assert [Path(item.files["bands"]).name for item in items] == ["1.txt", "2.txt", "1.txt"]
    assert items[0].cond["bands"].shape == (4, 5)


def made() -> Denoiser:
    torch.manual_seed(0)
    network = UNet(1, 1, channels=8, multipliers=(1,), blocks=1, conditions=condition_specs(FACTS))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    declared = conditions_of({name: DECLARED[name] for name in ("label", "bands", "speed")}, FACTS)
    return Denoiser(network, GaussianProcess(EDM()), conditions=declared)


def test_neither_dropping_nor_guidance_takes_a_setting_away() -> None:
    denoiser, x = made(), torch.randn(2, 1, 6)
    seen: list[dict[str, torch.Tensor]] = []
    denoiser.network.register_forward_pre_hook(lambda module, given: seen.append(given[4]))
    cond = {"label": torch.tensor([0, 1]), "bands": torch.randn(2, 4, 6), "speed": torch.randn(2, 3)}
    Objective(denoiser.process, drop=1.0)(denoiser, Item(x, None, cond), torch.Generator().manual_seed(0))
    assert seen[-1]["speed"].all() and not seen[-1]["label"].any() and not seen[-1]["bands"].any()
    t = torch.tensor(0.5, dtype=torch.float64)
    only = {"speed": cond["speed"]}
    guided = cfg(denoiser.bind(None, only), denoiser.bind(None, only), 3.0)(x, t)
    torch.testing.assert_close(guided.x0, denoiser(x, t, cond=only).x0)
    assert seen[-1]["speed"].all()


def test_an_absent_field_is_the_learned_placeholder_of_the_states_size() -> None:
    denoiser, t = made(), torch.tensor(0.5, dtype=torch.float64)
    for n in (6, 9):
        x, absent = torch.randn(2, 1, n), {"bands": torch.zeros(2, dtype=torch.bool)}
        given = denoiser(x, t, cond={"bands": torch.randn(2, 4, n)}, present=absent).x0
        assert torch.equal(denoiser(x, t).x0, given)
