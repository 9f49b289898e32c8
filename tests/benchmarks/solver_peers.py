"""Deterministic solvers of diffusers, azula and torchdiffeq behind one signature, each given its best chance.

A peer is ``run(problem, times) -> state at times[-1]``, the stages it needs per interval, and the calls that come on top. All
work in float64 with exact levels: diffusers' schedulers get theirs put in place of the tables they make (which are float32),
and where their code casts to float32, it casts to float64. Of two schedulers that are the same algorithm (EDM's Euler and
multistep DPM-Solver++, the parallel DDIM, ...) one is run.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from solver_problem import F64, Problem
from torch import Tensor

PACKAGES = ("diffusers", "azula", "torchdiffeq")


def missing(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Which of the packages are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Peer:
    """A solver of another library: ``run(problem, times)``; n intervals take ``stages * n + extra`` calls."""

    run: Callable[[Problem, Tensor], Tensor]
    stages: int = 1
    extra: int = 0

    def intervals(self, budget: int) -> int:
        """The most intervals that a number of calls is enough for."""
        return (budget - self.extra) // self.stages


class _Double:
    """The module torch with float64 in place of float32, for code that casts."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_double() -> Iterator[None]:
    """Let every scheduler of diffusers compute in float64, and keep it quiet."""
    logging.disable(logging.WARNING)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    modules = [m for name, m in sys.modules.items() if name.startswith("diffusers.schedulers.scheduling_")]
    touched = [m for m in modules if getattr(m, "torch", None) is torch]
    for module in touched:
        module.torch = _Double()  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in touched:
            module.torch = torch  # type: ignore[attr-defined]
        torch.set_default_dtype(default)
        logging.disable(logging.NOTSET)


# --- diffusers ------------------------------------------------------------------------------------------------------

# space -> alpha and sigma of its state as functions of rho = sigma/alpha
SPACES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "vp": lambda rho: (1 / torch.sqrt(1 + rho**2), rho / torch.sqrt(1 + rho**2)),
    "ve": lambda rho: (torch.ones_like(rho), rho),
    "flow": lambda rho: (1 / (1 + rho), rho / (1 + rho)),
}


def _loop(problem: Problem, times: Tensor, space: str, scheduler: Any, levels: Tensor, stamps: list[Any]) -> Tensor:
    """Scheduler.step over the levels rho of all calls, from the first time to the last, in the scheduler's own space."""
    alpha, rho = problem.levels(times)
    own, _ = SPACES[space](rho)
    x = problem.x * (own[0] / alpha[0])
    for level, stamp in zip(levels, stamps, strict=True):
        a, s = SPACES[space](level)
        x0 = problem.mixture.x0_hat(x / a, float(level))
        eps = (x - a * x0) / s
        x = scheduler.step(eps - x0 if space == "flow" else eps, stamp, x, return_dict=False)[0]
    return x * (alpha[-1] / own[-1])


def _by_sigma(make: Callable[[], Any], space: str, layout: str, problem: Problem, times: Tensor) -> Tensor:
    """A scheduler that keeps ``sigmas``: n + 1 of them ("once"), or the inner ones twice ("heun"), or with middles ("dpm2")."""
    scheduler, n = make(), len(times) - 1
    scheduler.set_timesteps(n)
    _, rho = problem.levels(times)
    sigmas = SPACES["flow"](rho)[1] if space == "flow" else rho
    levels = rho[:-1]
    if layout != "once":
        sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        levels = torch.stack([rho[:-1], rho[1:]], 1).flatten()
    if layout == "dpm2":
        middle = (rho[:-1] * rho[1:]).sqrt()
        scheduler.sigmas_interpol = torch.cat([rho[:1], middle.repeat_interleave(2)])
        levels = torch.stack([rho[:-1], middle], 1).flatten()
    scheduler.sigmas = sigmas
    scheduler.timesteps = torch.arange(len(levels), 0, -1, dtype=F64)
    scheduler.is_scale_input_called = True
    scheduler.set_begin_index(0)
    return _loop(problem, times, space, scheduler, levels, list(scheduler.timesteps))


def _by_table(make: Callable[..., Any], repeat: bool, problem: Problem, times: Tensor) -> Tensor:
    """A scheduler that looks up ``alphas_cumprod``: a chain of n + 1 places, whose indices are the times."""
    n = len(times) - 1
    scheduler = make(num_train_timesteps=n)
    scheduler.set_timesteps(n)
    _, rho = problem.levels(times)
    scheduler.alphas_cumprod = (SPACES["vp"](rho)[0] ** 2).flip(0)
    stamps = list(range(n, 0, -1))
    if repeat and n > 1:  # PNDM's second call of the first interval, which starts where that ended
        stamps.insert(1, n - 1)
    levels = rho[[n - stamp for stamp in stamps]]
    return _loop(problem, times, "vp", scheduler, levels, stamps)


def _ipndm(problem: Problem, times: Tensor) -> Tensor:
    from diffusers import IPNDMScheduler

    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(len(times) - 1)
    alpha, rho = problem.levels(times)
    scheduler.alphas, scheduler.betas = SPACES["vp"](rho)
    scheduler.set_begin_index(0)
    x = problem.x * (scheduler.alphas[0] / alpha[0])
    for k in range(len(times) - 1):
        a, s = scheduler.alphas[k], scheduler.betas[k]
        x0 = problem.mixture.x0_hat(x / a, float(rho[k]))
        v = a * (x - a * x0) / s - s * x0  # what it is for
        x = scheduler.step(v, 0, x, return_dict=False)[0]
    return x * (alpha[-1] / scheduler.alphas[-1])


def diffusers_peers() -> dict[str, Peer]:
    """Its deterministic schedulers, in every order, algorithm and ending they have."""
    import diffusers as d

    peers = {
        "DDIM": Peer(partial(_by_table, partial(d.DDIMScheduler, clip_sample=False), False)),
        "PNDM": Peer(partial(_by_table, partial(d.PNDMScheduler, skip_prk_steps=True), True), extra=1),
        "IPNDM": Peer(_ipndm),
        "Euler": Peer(partial(_by_sigma, d.EulerDiscreteScheduler, "ve", "once")),
        "Heun": Peer(partial(_by_sigma, d.HeunDiscreteScheduler, "ve", "heun"), 2),
        "KDPM2": Peer(partial(_by_sigma, d.KDPM2DiscreteScheduler, "ve", "dpm2"), 2),
        "LMS": Peer(partial(_by_sigma, d.LMSDiscreteScheduler, "ve", "once")),
        "FlowMatchEuler": Peer(partial(_by_sigma, d.FlowMatchEulerDiscreteScheduler, "flow", "once")),
        "FlowMatchHeun": Peer(partial(_by_sigma, d.FlowMatchHeunDiscreteScheduler, "flow", "heun"), 2),
    }
    for lower in (True, False):
        ending = {"final_sigmas_type": "sigma_min", "lower_order_final": lower}
        mark = "" if lower else " full"
        for order in (1, 2, 3) if lower else (2, 3):
            for algorithm in ("dpmsolver++", "dpmsolver"):
                for kind in ("midpoint", "heun") if order == 2 else ("midpoint",):
                    options = {"solver_order": order, "algorithm_type": algorithm, "solver_type": kind, **ending}
                    name = f"{algorithm} {order}{' heun' if kind == 'heun' else ''}{mark}"
                    multi = partial(d.DPMSolverMultistepScheduler, **options)
                    peers[f"{name} multi"] = Peer(partial(_by_sigma, multi, "vp", "once"))
                    if lower:  # without it the single-step form changes the setting itself
                        single = partial(d.DPMSolverSinglestepScheduler, **options)
                        peers[f"{name} single"] = Peer(partial(_by_sigma, single, "vp", "once"))
            deis = partial(d.DEISMultistepScheduler, solver_order=order, lower_order_final=lower)
            peers[f"DEIS {order}{mark}"] = Peer(partial(_by_sigma, deis, "vp", "once"))
            for kind in ("bh1", "bh2"):
                for form, x0 in (("x0", True), ("eps", False)):
                    options = {"solver_order": order, "solver_type": kind, "predict_x0": x0, **ending}
                    unipc = partial(d.UniPCMultistepScheduler, **options)
                    peers[f"UniPC {order} {kind} {form}{mark}"] = Peer(partial(_by_sigma, unipc, "vp", "once"))
            options = {"predictor_order": order, "corrector_order": order + 1, "lower_order_final": lower}
            sa = partial(d.SASolverScheduler, **options, tau_func=lambda _: 0.0)
            peers[f"SA-Solver {order}{mark}"] = Peer(partial(_by_sigma, sa, "vp", "once"))
    return {f"diffusers {name}": peer for name, peer in peers.items()}


# --- azula ----------------------------------------------------------------------------------------------------------


def _azula(name: str, options: dict[str, Any], problem: Problem, times: Tensor) -> Tensor:
    import azula.denoise
    import azula.noise
    import azula.sample

    class Path(azula.noise.Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return problem.process.schedule.alpha(t), problem.process.schedule.sigma(t)

    class Exact(azula.denoise.Denoiser):
        schedule = Path()

        def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> azula.denoise.DiracPosterior:
            return azula.denoise.DiracPosterior(problem.denoise(x_t, t))

    base = getattr(azula.sample, name)
    sampler = type("Timed", (base,), {"timesteps": times})(Exact(), silent=True, **options)
    return sampler(problem.x)


def azula_peers() -> dict[str, Peer]:
    """Its deterministic samplers, the multistep ones in orders 1 to 4."""
    peers = {
        "DDIM": Peer(partial(_azula, "DDIMSampler", {})),
        "Euler": Peer(partial(_azula, "EulerSampler", {})),
        "Heun": Peer(partial(_azula, "HeunSampler", {}), 2),
    }
    for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
        for order in (1, 2, 3, 4):
            peers[f"{name} {order}"] = Peer(partial(_azula, f"{name}Sampler", {"order": order}))
    return {f"azula {name}": peer for name, peer in peers.items()}


# --- torchdiffeq ----------------------------------------------------------------------------------------------------


def _torchdiffeq(method: str, coordinate: str, options: dict[str, Any], problem: Problem, times: Tensor) -> Tensor:
    from torchdiffeq import odeint

    schedule = problem.process.schedule
    alpha, rho = problem.levels(times)
    if coordinate == "velocity":
        grid, start, scale = times, problem.x, torch.ones(())

        def slope(t: Tensor, x: Tensor) -> Tensor:
            x0 = problem.denoise(x, t)
            eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
            return schedule.dalpha(t) * x0 + schedule.dsigma(t) * eps
    else:
        grid, start, scale = rho, problem.x / alpha[0], alpha[-1]

        def slope(t: Tensor, x: Tensor) -> Tensor:
            return (x - problem.mixture.x0_hat(x, float(t))) / t

    if options.pop("embedded", False):  # an adaptive pair made to step from time to time, whatever its error
        options |= {"step_t": grid, "first_step": float(grid[0] - grid[-1])}
        return scale * odeint(slope, start, grid[[0, -1]], method=method, rtol=1e30, atol=1e30, options=options)[-1]
    return scale * odeint(slope, start, grid, method=method, options=options)[-1]


def torchdiffeq_peers() -> dict[str, Peer]:
    """Its explicit methods at fixed steps, for dx/dt = u and for dy/drho = eps with y = x/alpha, rho = sigma/alpha."""
    peers = {}
    for coordinate in ("velocity", "rho"):
        for method, stages in {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}.items():
            peers[f"{method} {coordinate}"] = Peer(_with(method, coordinate), stages)
        for order in (4, 5, 6):  # the first three intervals are Runge-Kutta's, four calls each, and so on
            run = _with("explicit_adams", coordinate, max_order=order)
            peers[f"explicit_adams {order} {coordinate}"] = Peer(run, 1, 6)
        for method, stages in {"adaptive_heun": 1, "bosh3": 3, "dopri5": 6, "dopri8": 13}.items():
            peers[f"{method} {coordinate}"] = Peer(_with(method, coordinate, embedded=True), stages, 1)
    return {f"torchdiffeq {name}": peer for name, peer in peers.items()}


def _with(method: str, coordinate: str, **options: Any) -> Callable[[Problem, Tensor], Tensor]:
    return lambda problem, times: _torchdiffeq(method, coordinate, dict(options), problem, times)


def all_peers() -> dict[str, Peer]:
    """Every peer by name."""
    return {**diffusers_peers(), **azula_peers(), **torchdiffeq_peers()}


def k_diffusion_sampling() -> types.ModuleType:
    """``k_diffusion.sampling`` without the rest of its package, which needs much more to be installed."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        assert spec is not None and spec.submodule_search_locations is not None
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling")
