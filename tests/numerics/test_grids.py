"""Grids against their formulas, and the refusal of impossible ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polydiff.core.errors import ConfigError, ScheduleError
from polydiff.core.grids import GRIDS, Grid, as_grid, make_grid
from polydiff.core.processes import gaussian
from polydiff.core.schedules import SCHEDULES, VP

NAMED = [name for name in GRIDS if not name.startswith("ddpm")]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMED)
def test_named_grids_span_the_range_with_n_intervals(schedule, name):
    process = gaussian(schedule)
    for n in (1, 2, 7):
        open_, closed = make_grid(name, n, process), make_grid(name, n, process, final=False)
        assert open_.steps == closed.steps == n and open_.final and not closed.final
        assert len(open_.times) == n and len(closed.times) == n + 1
        assert open_.times[0] == closed.times[0] == process.t_max and closed.times[-1] == process.t_min
        if n > 1:
            assert open_.times[-1] == process.t_min


def test_karras_grid_equals_the_published_formula_on_every_path():
    n, rho = 9, 7.0
    for schedule in ("edm", "ve", "vp", "rectified_flow"):
        process = gaussian(schedule)
        times = torch.tensor(make_grid("karras", n, process).times, dtype=torch.float64)
        level = torch.exp(-process.schedule.log_snr(times))
        high, low = level[0] ** (1 / rho), level[-1] ** (1 / rho)
        i = torch.arange(n, dtype=torch.float64)
        torch.testing.assert_close(level, (high + i / (n - 1) * (low - high)) ** rho, rtol=1e-9, atol=0)
    edm = make_grid("karras", n, gaussian("edm")).times
    assert edm == pytest.approx(
        make_grid("uniform", n, gaussian("edm")).times, rel=1e-9
    )  # uniform t is the Karras grid


def test_log_snr_grid_is_uniform():
    process = gaussian("cosine")
    times = torch.tensor(make_grid("log_snr", 12, process).times, dtype=torch.float64)
    steps = torch.diff(process.schedule.log_snr(times))
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=0)


def test_discrete_grids_reproduce_the_indices_of_the_chain():
    process = gaussian("vp")

    def indices(name, n):
        return [round(t * 1000) - 1 for t in make_grid(name, n, process).times]

    assert indices("ddpm-leading", 10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert indices("ddpm-trailing", 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert indices("ddpm-linspace", 10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert indices("ddpm-leading", 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_grids_stay_between_t_max_and_t_min(schedule):
    process = gaussian(schedule)
    for n in (1, 7, 1000):
        for name in ("ddpm-leading", "ddpm-trailing", "ddpm-linspace"):
            times = make_grid(name, n, process).times
            assert len(times) == n and process.t_max + 1e-15 >= times[0] and times[-1] >= process.t_min
    assert make_grid("ddpm-linspace", 3, process).times == pytest.approx(
        [process.t_max, process.t_min + 500 / 999 * (process.t_max - process.t_min), process.t_min]
    )


@pytest.mark.parametrize(
    "times", [(0.5,), (0.5, 0.5), (0.2, 0.4), (1.2, 0.5), (0.5, -0.1), (math.nan, 0.1), (0.5, math.inf)]
)
def test_impossible_times_are_refused(times):
    with pytest.raises(ScheduleError):
        Grid(times)


def test_a_grid_can_run_upward_without_a_final_interval():
    grid = Grid((0.9, 0.5, 0.1), final=True)
    up = grid.reversed()
    assert up.times == (0.1, 0.5, 0.9) and up.upward and not up.final and up.steps == 2
    assert up.reversed() == Grid((0.9, 0.5, 0.1))
    with pytest.raises(ScheduleError, match="increase"):
        Grid((0.5, 0.1), upward=True)
    with pytest.raises(ScheduleError, match="final"):
        Grid((0.1, 0.5), final=True, upward=True)


def test_times_in_any_other_form_are_refused():
    for times in (torch.tensor(0.5), torch.tensor([[0.5, 0.1]])):
        with pytest.raises(ScheduleError, match="one row"):
            as_grid(times, 5, gaussian("vp"))


def test_impossible_requests_are_refused():
    process = gaussian("cosine")
    for n in (0, -1, 2.5, True):
        with pytest.raises(ScheduleError, match="steps"):
            make_grid("uniform", n, process)
    with pytest.raises(ConfigError, match="karras"):
        make_grid("karas", 5, process)
    for name in ("ddpm-leading", "ddpm-trailing", "ddpm-linspace"):
        with pytest.raises(ScheduleError, match="steps = 1001: a discrete chain of 1000 has no more"):
            make_grid(name, 1001, process)
    with pytest.raises(ScheduleError, match="log-SNR"):
        make_grid("log_snr", 5, process, t_start=1.0)  # alpha = 0 there
    with pytest.raises(ScheduleError, match="t_start"):
        make_grid("uniform", 5, process, t_start=0.1, t_end=0.2)


@pytest.mark.parametrize("steps", [math.nan, math.inf, None, "10", True, 2.5, 0, -1, 100_001, 2**70])
def test_numbers_of_steps_that_cannot_be_are_named(steps):
    with pytest.raises(ScheduleError, match=r"steps = .* must be a whole number from 1 to 100,000"):
        make_grid("karras", steps, gaussian("vp"))


def test_numbers_of_steps_may_be_of_any_kind():
    expected = make_grid("karras", 5, gaussian("vp"))
    for steps in (5.0, np.int64(5), torch.tensor(5)):
        assert make_grid("karras", steps, gaussian("vp")) == expected


def test_what_is_no_row_of_times_is_named():
    complex_times = torch.tensor([0.9, 0.1], dtype=torch.complex64)
    bad: tuple[Any, ...] = (["a", "b"], None, {}, 5, [[0.9, 0.1]], [[0.9], [0.5, 0.1]], complex_times)
    for times in bad:
        with pytest.raises(ScheduleError, match="the times of a grid must be one row of numbers"):
            as_grid(times, 5, gaussian("vp"))
        with pytest.raises(ScheduleError, match="the times of a grid must be one row of numbers"):
            Grid(times)
    assert as_grid(np.array([0.9, 0.1]), 5, None) == Grid([0.9, 0.1]) == Grid((0.9, 0.1))


def test_ends_and_processes_that_are_none_are_named():
    for ends in ((math.nan, 0.1), ("a", 0.1), (0.9, math.inf)):
        with pytest.raises(ScheduleError, match=r"t_(start|end) = "):
            make_grid("karras", 5, gaussian("vp"), *ends)
    for process in (None, "vp", VP()):
        with pytest.raises(ConfigError, match="the process is"):
            make_grid("karras", 5, process)
    with pytest.raises(ConfigError, match="unknown grid"):
        make_grid([], 5, gaussian("vp"))
