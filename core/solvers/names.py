"""The published methods by name: each is one class with parameters."""

from __future__ import annotations

from typing import NamedTuple

from polydiff.core.solvers.adaptive import Adaptive
from polydiff.core.solvers.base import Solver
from polydiff.core.solvers.coordinates import TAU
from polydiff.core.solvers.euler_maruyama import EulerMaruyama
from polydiff.core.solvers.geodesic import Geodesic
from polydiff.core.solvers.langevin import PredictorCorrector
from polydiff.core.solvers.multistep import Multistep
from polydiff.core.solvers.resample import Resample
from polydiff.core.solvers.runge_kutta import Churn, RungeKutta


class Entry(NamedTuple):
    """A named solver, where it was published, and what ``Solver`` says of order, calls per interval and noise."""

    solver: Solver
    source: str
    order: int
    stages: int | None
    stochastic: bool


_DDPM = Multistep(1, "x0", eta=1.0, noise_form="ancestral")
_DDIM = Multistep(1, "x0"), "Song 2020 (DDIM), eq. 12 with eta = 0; Karras 2022, algorithm 1 without its correction"
_UNIPC, _PP = "Zhao 2023 (UniPC), algorithms 1 and 2:", "Lu 2022 (DPM-Solver++),"
_PUBLISHED: dict[str, tuple[Solver, str]] = {
    "ddpm": (_DDPM, "Ho 2020, algorithm 2, with the posterior variance"),
    "euler-ancestral": (_DDPM, "Ho 2020, algorithm 2, with the posterior variance"),
    "ddpm-learned": (Multistep(1, "x0", eta=1.0, noise_form="learned"), "Nichol 2021, eq. 15: the network's variance"),
    "ddim": _DDIM,
    "euler": _DDIM,
    "dpm-1": _DDIM,
    "euler-v": (RungeKutta("euler", "v"), "Euler in the angle of Salimans 2022, appendix D; ours"),
    "heun": (RungeKutta("heun", "eps"), "Karras 2022, algorithm 1"),
    "heun-v": (RungeKutta("heun", "v"), "Heun in the angle; ours"),
    "edm": (RungeKutta("heun", "eps", Churn()), "Karras 2022, algorithm 2"),
    "midpoint": (RungeKutta("midpoint", "eps"), "Karras 2022, algorithm 3 (appendix D.2) with alpha = 1/2"),
    "rk4": (RungeKutta("rk4", "v"), "classical fourth order in the angle; ours"),
    "rk38": (RungeKutta("rk38", "velocity"), "Kutta's 3/8 rule in x and t"),
    "rk45": (Adaptive(), "Dormand 1980, table 2, in the angle; the tolerance is Adaptive's"),
    "dpm-2": (RungeKutta("dpm2", "eps"), "Lu 2022 (DPM-Solver), algorithm 1"),
    "dpm-3": (RungeKutta("dpm3", "eps"), "Lu 2022 (DPM-Solver), algorithm 2"),
    "dpmpp-2s": (RungeKutta("dpm2", "x0"), f"{_PP} algorithm 1"),
    "dpmpp-2m": (Multistep(2, "x0", rule="midpoint"), f"{_PP} algorithm 2"),
    "dpmpp-3m": (Multistep(3, "x0", rule="midpoint", blend=0.5), f"{_PP} section 4.2, third order as in its program"),
    "dpmpp-2m-sde": (Multistep(2, "x0", rule="midpoint", eta=1.0), f"{_PP} section 5: SDE-DPM-Solver++(2M)"),
    "dpmpp-3m-sde": (Multistep(3, "x0", blend=0.5, eta=1.0), f"{_PP} section 5, with three predictions"),
    "unipc": (Multistep(2, "x0", corrector="bh2"), f"{_UNIPC} UniPC-2, B2"),
    "unipc-3": (Multistep(3, "x0", corrector="bh2"), f"{_UNIPC} UniPC-3, B2"),
    "unipc-eps": (Multistep(2, "eps", corrector="bh1", lower_final=True), f"{_UNIPC} UniPC-2 in eps, B1, low end"),
    "unipc-3-final": (Multistep(3, "x0", corrector="bh1", lower_final=True), f"{_UNIPC} UniPC-3, B1, low end"),
    "sa-solver": (Multistep(3, "x0", corrector="exact", eta=1.0), "Xue 2023 (SA-Solver), algorithm 1, of three steps"),
    "deis": (Multistep(4, "eps", "t"), "Zhang 2023 (DEIS), eq. 14: tAB3, a cubic in t"),
    "lms": (Multistep(4, "eps", "sigma_over_alpha"), "Adams-Bashforth of order 4 in Karras 2022, eq. 4"),
    "ipndm": (Multistep(4, "eps", "index"), "Zhang 2023 (DEIS): iPNDM"),
    "pndm": (Multistep(4, "eps", "index", startup="full"), "Liu 2022 (PNDM), eq. 11 to 13"),
    "euler-maruyama": (EulerMaruyama(), "Song 2021, eq. 6: the reverse SDE in t"),
    "geodesic": (Geodesic(), "DDIM along geodesics, on any process; on a Gaussian one it is ddim"),
    "geodesic-heun": (Geodesic(2), "Heun along geodesics, on any process; on a Gaussian one it is heun-v; ours"),
    "geodesic-sde": (Geodesic(1, 1.0), "De Bortoli 2022, algorithm 1: geodesic random walk; its flat limit made exact"),
    "pc": (PredictorCorrector(_DDPM, snr=0.16), "Song 2021, algorithms 4 and 5, r = 0.16; ddpm as the predictor"),
    "langevin": (PredictorCorrector(None, 100, size=0.1), "Song 2019 (NCSN), algorithm 1 with the values of section 5"),
    "restart": (
        Resample(RungeKutta("heun", "eps"), 2, 2, low=0.06, high=0.3),
        "Xu 2023, algorithm 2, with its authors' window for CIFAR-10; 18 steps of it take 43 calls",
    ),
}
# ab or abm, order, form and variable (tau itself where there is none): Adams-Bashforth, with Moulton's corrector
_OURS = (
    *("ab2-v", "ab3-v", "ab3-v-t", "ab4-v-t", "ab3-eps-log_snr", "ab3-eps-angle", "ab4-eps-log_snr", "ab4-x0-log_snr"),
    *("ab4-flow", "ab4-flow-log_snr", "abm2-v", "abm3-v", "abm4-v", "abm3-v-log_snr", "abm4-v-log_snr"),
    *("abm2-flow-t", "abm3-flow", "abm4-flow-t"),
)
_DEFAULTS = {"abm4-flow-t": "VP (grid log_snr) and EDM (karras)", "abm3-v": "rectified flow (uniform)"}


def _adams(name: str) -> tuple[Solver, str]:
    method, form, *rest = name.split("-")
    variable, corrector = (rest or [TAU[form]])[0], "exact" if method.startswith("abm") else None
    kind, default = "Adams-Bashforth-Moulton" if corrector else "Adams-Bashforth", _DEFAULTS.get(name)
    source = f"{kind} over {TAU[form]}, polynomials in {variable}" + (f"; default of {default}" if default else "")
    lower_final = name == "abm3-v-log_snr"  # the one that wins by it
    return Multistep(int(method[-1]), form, variable, corrector, lower_final=lower_final), f"{source}; ours"


NAMES: dict[str, Entry] = {
    name: Entry(solver, source, solver.order, solver.stages, solver.stochastic)
    for name, (solver, source) in {**_PUBLISHED, **{name: _adams(name) for name in _OURS}}.items()
}
