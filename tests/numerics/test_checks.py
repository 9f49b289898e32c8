"""What callers hand in and cannot be used is named in one line."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polydiff.core.checks import check_mask, check_output, check_state, interval, number, row, shown, whole
from polydiff.core.denoiser import Prediction
from polydiff.core.errors import ConfigError, DivergenceError, ScheduleError
from polydiff.core.noise import Noise, as_noise
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.schedules import VE, VP
from polydiff.core.tree import flat

PROCESS = gaussian("vp")


def same(x_t, t):
    return x_t


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)])
def test_numbers_of_any_kind_are_welcome(value):
    assert number("a", value, least=2.0, above=1.0) == whole("a", value, least=2, most=2) == 2
    assert type(number("a", value)) is float and type(whole("a", value)) is int


@pytest.mark.parametrize(
    "value", [None, "2", True, math.nan, math.inf, 1j, [2], torch.ones(2), torch.tensor(math.nan), torch.tensor(True)]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"steps = .* must be a (finite )?number"):
        number("steps", value)
    with pytest.raises(ScheduleError, match=r"steps = .* must be a whole number of at least 1"):
        whole("steps", value, error=ScheduleError)


def test_bounds_are_named():
    for refuse, reason in (
        (lambda: number("a", -1.0, least=0), "a = -1.0 must be a finite number of at least 0"),
        (lambda: number("a", 0.0, above=0), "a = 0.0 must be a finite number above 0"),
        (lambda: whole("a", 2.5), "a = 2.5 must be a whole number of at least 1"),
        (lambda: whole("a", 0), "a = 0 must be a whole number of at least 1"),
        (lambda: whole("a", 2**70, most=100_000), "must be a whole number from 1 to 100,000"),
    ):
        with pytest.raises(ConfigError, match=reason):
            refuse()


def test_rows_keep_all_digits_whatever_holds_them():
    third = 1 / 3
    for value in ([third, 1.0], (third, 1.0), np.array([third, 1.0]), torch.tensor([third, 1.0], dtype=torch.float64)):
        assert row("a", value).tolist() == [third, 1.0]
    bad: tuple[Any, ...] = (
        5,
        None,
        "ab",
        ["a"],
        [[1.0]],
        [[1.0], [1.0, 2.0]],
        {},
        torch.ones(2, dtype=torch.complex64),
    )
    for value in bad:
        with pytest.raises(ScheduleError, match="a must be one row of numbers"):
            row("a", value, ScheduleError)


def test_intervals_have_two_ends_in_order():
    assert interval("a", [-math.inf, 2]) == (-math.inf, 2.0)
    for value in (None, 5, "ab", (1,), (1, 2, 3), (None, 1), (2, 1), (1, 1), (math.nan, 1), (False, True)):
        with pytest.raises(ConfigError, match="with low < high"):
            interval("a", value)


def test_values_in_messages_stay_short():
    assert shown(torch.zeros(2, 3)) == "a tensor (2, 3) of float32" and shown(torch.tensor(2)) == "2"
    assert shown("a" * 200) == "'" + "a" * 76 + "..."


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        ({"a": torch.ones(2, 3)}, "dictionary"),
        ({}, "dictionary"),
        (torch.ones(2, 3, device="meta"), "floating-point tensor"),
        (torch.ones(2, 3).to_sparse(), "floating-point tensor"),
        (torch.ones(2, 3, dtype=torch.int64), "floating-point tensor"),
        (torch.tensor(1.0), "floating-point tensor"),
        ([1.0], "floating-point tensor"),
        (torch.tensor([[0.0], [math.nan]]), "item 1 of 2"),
    ],
)
def test_states_that_are_none_are_refused(x, reason):
    with pytest.raises(ConfigError, match=reason):
        check_state(x, PROCESS, same)


@pytest.mark.parametrize("process", [None, "vp", VP(), GaussianProcess])
def test_what_is_no_process_is_refused(process):
    with pytest.raises(ConfigError, match=r"gaussian\('vp'\)"):
        check_state(torch.ones(2, 3), process, same)


def test_what_is_no_denoiser_is_refused():
    with pytest.raises(ConfigError, match="the denoiser is None"):
        check_state(torch.ones(2, 3), PROCESS, None)


@pytest.mark.parametrize(
    "mask",
    [
        "a",
        [[True] * 3] * 4,
        torch.ones(4, 3),
        torch.ones(4, 2, dtype=torch.bool),
        torch.ones(3, 3, dtype=torch.bool),
        torch.ones(1, 3, dtype=torch.bool),
        torch.ones(4, dtype=torch.bool),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask):
    with pytest.raises(ConfigError, match=r"mask is .*a bool tensor \(4, 3\)"):
        check_mask("mask", mask, torch.zeros(4, 3, 2), 1)
    with pytest.raises(ConfigError, match="mask is"):
        PROCESS.project(torch.zeros(4, 3, 2), mask)


def test_masks_run_along_their_axis_and_on_the_device_of_the_state():
    good = torch.ones(4, 5, dtype=torch.bool)
    check_mask("mask", good, torch.zeros(4, 3, 5), -1)
    check_mask("mask", None, torch.zeros(4), 1)
    with pytest.raises(ConfigError, match="does not fit"):
        check_mask("mask", good, torch.zeros(4), 1)
    with pytest.raises(ConfigError, match="fixed is on cpu, the state on meta"):
        check_mask("fixed", good, torch.zeros(4, 5, device="meta"), 1)


def test_outputs_are_compared_leaf_by_leaf():
    x = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    check_output(x, x, "here")
    for output, reason in (
        ({"a": x["a"]}, r"leaves \['a'\]"),
        (x["a"], "a Tensor here"),
        ({**x, "b": torch.zeros(3)}, r"shape \(3,\) for a state of shape \(2,\) here"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_output(output, x, "here")
    with pytest.raises(DivergenceError, match="not finite here"):
        check_output({**x, "b": torch.tensor([1.0, math.inf])}, x, "here")
    state, t = torch.zeros(2, 3), torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(ConfigError, match="a NoneType here"):
        check_output(Prediction(PROCESS, state, t, x0=None), state, "here")


def test_noise_comes_from_what_can_give_it():
    assert as_noise(np.int64(3), 2).seed == 3
    assert as_noise(None, 2).seed != as_noise(None, 2).seed
    assert as_noise(own := Noise(0, [4, 5]), 2) is own
    one = [torch.Generator().manual_seed(k) for k in range(2)]
    assert as_noise(tuple(one), 2).items != as_noise(one, 2).items  # drawn from, they go on
    for source in (1.5, "abc", {}, True, np.random.default_rng(0), [1, 2], object()):
        with pytest.raises(ConfigError, match="must be a seed"):
            as_noise(source, 2)


def test_processes_are_made_of_what_they_say():
    for make, reason in (
        (lambda: GaussianProcess("vp"), r"gaussian\('vp'\)"),
        (lambda: gaussian("vp", mean_free="yes"), "mean_free = 'yes'"),
        (lambda: gaussian("vp", mask_axis=7), "mask_axis = 7"),
        (lambda: gaussian("vp", mask_axis="a"), "mask_axis = 'a'"),
        (lambda: gaussian(None), "unknown schedule"),
        (lambda: gaussian([]), "unknown schedule"),
    ):
        with pytest.raises(ConfigError, match=reason):
            make()
    with pytest.raises(ScheduleError, match="beta_min = 'a' must be a number above 0"):
        VP("a")
    with pytest.raises(ScheduleError, match="sigma_max = -1"):
        VE(sigma_max=-1)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (2,), (2, 3, 4)])
def test_rows_of_states_without_numbers(shape):
    assert flat(torch.zeros(shape)).shape == (shape[0], math.prod(shape[1:]))
