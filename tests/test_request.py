from typing import Any

import pytest
import torch

from polydiff.core.adapter import Condition
from polydiff.core.errors import ConfigError
from polydiff.core.request import asked as ask
from polydiff.core.request import enough, positive, sampling_settings

DECLARED = {"label": Condition("class"), "place": Condition("tensor", (2,)), "size": Condition("tensor")}
FACTS = {"classes": {"label": [7, 8, 9]}}


def asked(n: int = 3, **cond: Any) -> list[dict[str, Any]]:
    return [{name: value.tolist() for name, value in item.cond.items()} for item in ask(DECLARED, cond, n, FACTS)]


def test_numbers_and_arrays_are_for_all_items_or_cycle() -> None:
    assert asked(place=[1, 2.5], size=4) == [{"place": [1, 2.5], "size": 4}] * 3
    assert asked(place=[[1, 2], [3, 4]]) == [{"place": [1, 2]}, {"place": [3, 4]}, {"place": [1, 2]}]
    assert asked(place=torch.eye(2), size=[1.0, 2.0, 3.0])[1] == {"place": [0, 1], "size": 2}
    assert asked(place=None) == [{}, {}, {}]
    assert asked(place=[[1, 2], None]) == [{"place": [1, 2]}, {}, {"place": [1, 2]}]
    assert asked(place=[torch.ones(2), torch.zeros(2)])[1] == {"place": [0, 0]}
    assert ask(DECLARED, {"place": [1, 2]}, 1, FACTS)[0].cond["place"].dtype == torch.float32


def test_names_of_classes_that_look_like_numbers_are_told_from_indices() -> None:
    assert asked(1, label=2) == asked(1, label="9") == [{"label": 2}]
    with pytest.raises(ConfigError, match="valid are the indices 0 to 2 and the names 7, 8, 9"):
        asked(label=7)


@pytest.mark.parametrize("value", [[1, 2, 3], [[1, 2], [3]], "here", 5, {"x": 1}, [1, float("nan")], ["here", [1, 2]]])
def test_a_value_of_another_shape_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"cond\.place=.* must be 2 finite number\(s\)"):
        asked(place=value)


def test_settings_are_the_sections_with_changes_over_them() -> None:
    section = {"solver": "heun", "grid": "karras", "steps": 9, "guidance": 1.5, "interval": [-1, 2]}
    settings = sampling_settings(section, solver="ddim", steps=3)
    assert (settings.solver, settings.grid, settings.steps, settings.guidance) == ("ddim", "karras", 3, 1.5)
    assert settings.interval == (-1, 2)
    assert sampling_settings(section, guidance=0).guidance == 0
    with pytest.raises(ConfigError, match="b=0 must be at least 1"):
        positive(a=1, b=0)


@pytest.mark.parametrize("interval", [3, [], [1], [2, -1], [1, 1], [0, float("nan")], ["a", "b"], [False, True], "ab"])
def test_an_interval_that_is_none_is_named(interval: Any) -> None:
    section = {"solver": "heun", "grid": "karras", "steps": 9, "interval": interval}
    with pytest.raises(ConfigError, match=r"sampling\.interval=.* must be \[low, high\] in log-SNR"):
        sampling_settings(section)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (0, "at least 1"),
        (10**9, "steps=1000000000 must be at most 100000"),
        (2.5, "steps=2.5 must be a whole number"),
        (True, "steps=True must be a whole number"),
        ("4", "steps='4' must be a whole number"),
        (float("nan"), "steps=nan must be a whole number"),
    ],
)
def test_steps_have_bounds(steps: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        sampling_settings({"solver": "heun", "grid": "karras", "steps": 9}, steps=steps)


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), "2", True, [1.0]])
def test_guidance_is_a_finite_number(guidance: Any) -> None:
    with pytest.raises(ConfigError, match=r"guidance=.* must be a finite number"):
        sampling_settings({"solver": "heun", "grid": "karras", "steps": 9, "guidance": guidance})


def test_a_class_is_one_number() -> None:
    with pytest.raises(ConfigError, match=r"cond\.label=a tensor of 2 x 2: valid are the indices 0 to 2"):
        asked(label=torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("like", "n"),
    [
        (torch.zeros(2), 1000),
        ({"a": torch.zeros(8), "b": torch.zeros(8)}, 1000),
        (torch.zeros(17), 58),
        (torch.zeros(1, 4), 1000),
        ({"a": torch.zeros(100), "b": torch.zeros(100)}, 5),
        (torch.zeros(999), 4),
    ],
)
def test_small_states_are_drawn_often_and_large_ones_seldom(like: Any, n: int) -> None:
    assert enough(like, many=1000, numbers=1000) == n
    assert enough(like, many=1000, numbers=10**9) in (64, 1000)
