"""The published methods by name: each is one class with parameters."""

from __future__ import annotations

from typing import NamedTuple

from polydiff.core.errors import ConfigError, unknown
from polydiff.core.solvers.adaptive import Adaptive
from polydiff.core.solvers.base import Solver
from polydiff.core.solvers.euler_maruyama import EulerMaruyama
from polydiff.core.solvers.langevin import PredictorCorrector
from polydiff.core.solvers.multistep import Multistep
from polydiff.core.solvers.resample import Resample
from polydiff.core.solvers.runge_kutta import Churn, RungeKutta


class Entry(NamedTuple):
    """A named solver and where it was published."""

    solver: Solver
    source: str

    @property
    def order(self) -> int:
        """Order of accuracy."""
        return self.solver.order

    @property
    def stages(self) -> int | None:
        """Calls of the denoiser per interval; None where the solver chooses."""
        return self.solver.stages

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise."""
        return self.solver.stochastic


_ddim = Entry(
    Multistep(1, "x0"), "Song 2020 (DDIM), eq. 12 with eta = 0; Karras 2022, algorithm 1 without its correction"
)
_ddpm = Entry(Multistep(1, "x0", eta=1.0, noise_form="ancestral"), "Ho 2020, algorithm 2, with the posterior variance")

NAMES: dict[str, Entry] = {
    "ddpm": _ddpm,
    "euler-ancestral": _ddpm,
    "ddpm-learned": Entry(
        Multistep(1, "x0", eta=1.0, noise_form="learned"), "Nichol 2021, eq. 15: ddpm with the network's own variance"
    ),
    "ddim": _ddim,
    "euler": _ddim,
    "dpm-1": _ddim,
    "euler-v": Entry(
        RungeKutta("euler", "v"),
        "Euler in the angle of Salimans 2022, appendix D (whose DDIM turns by it exactly); ours",
    ),
    "heun": Entry(RungeKutta("heun", "eps"), "Karras 2022, algorithm 1"),
    "heun-v": Entry(RungeKutta("heun", "v"), "Heun in the angle; ours"),
    "edm": Entry(RungeKutta("heun", "eps", Churn()), "Karras 2022, algorithm 2"),
    "midpoint": Entry(RungeKutta("midpoint", "eps"), "Karras 2022, algorithm 3 (appendix D.2) with alpha = 1/2"),
    "rk4": Entry(RungeKutta("rk4", "v"), "classical fourth order in the angle; ours"),
    "dpm-2": Entry(RungeKutta("dpm2", "eps"), "Lu 2022 (DPM-Solver), algorithm 1"),
    "dpm-3": Entry(RungeKutta("dpm3", "eps"), "Lu 2022 (DPM-Solver), algorithm 2"),
    "dpmpp-2s": Entry(RungeKutta("dpm2", "x0"), "Lu 2022 (DPM-Solver++), algorithm 1"),
    "dpmpp-2m": Entry(Multistep(2, "x0", rule="midpoint"), "Lu 2022 (DPM-Solver++), algorithm 2"),
    "dpmpp-2m-sde": Entry(
        Multistep(2, "x0", rule="midpoint", eta=1.0), "Lu 2022 (DPM-Solver++), section 5: SDE-DPM-Solver++(2M)"
    ),
    "euler-maruyama": Entry(EulerMaruyama(), "Song 2021, eq. 6: the reverse SDE in t"),
    "pc": Entry(
        PredictorCorrector(Multistep(1, "x0", eta=1.0, noise_form="ancestral"), snr=0.16),
        "Song 2021, algorithms 4 and 5, with r = 0.16; the predictor is ddpm in place of reverse diffusion",
    ),
    "langevin": Entry(
        PredictorCorrector(None, 100, size=0.1), "Song 2019 (NCSN), algorithm 1 with the values of its section 5"
    ),
    "restart": Entry(
        Resample(RungeKutta("heun", "eps"), 2, 2, low=0.06, high=0.3),
        "Xu 2023, algorithm 2, with the least window of its table 3; 18 steps of it take 43 calls",
    ),
    "rk45": Entry(Adaptive(), "Dormand 1980, table 2, in the angle; the tolerance is Adaptive's"),
    "dpmpp-3m": Entry(
        Multistep(3, "x0", rule="midpoint", blend=0.5),
        "Lu 2022 (DPM-Solver++), section 4.2 with the third-order terms of its program",
    ),
    "dpmpp-3m-sde": Entry(
        Multistep(3, "x0", blend=0.5, eta=1.0), "Lu 2022 (DPM-Solver++), section 5, with three predictions"
    ),
    "unipc": Entry(Multistep(2, "x0", corrector="bh2"), "Zhao 2023 (UniPC), algorithms 1 and 2: UniPC-2, B2"),
    "unipc-3": Entry(Multistep(3, "x0", corrector="bh2"), "Zhao 2023 (UniPC), algorithms 1 and 2: UniPC-3, B2"),
    "deis": Entry(Multistep(4, "eps", "t"), "Zhang 2023 (DEIS), eq. 14: tAB3, a cubic in t"),
    "lms": Entry(Multistep(4, "eps", "sigma_over_alpha"), "Adams-Bashforth of order 4 in Karras 2022, eq. 4"),
    "ipndm": Entry(Multistep(4, "eps", "index"), "Zhang 2023 (DEIS), section 4: iPNDM"),
    "pndm": Entry(Multistep(4, "eps", "index", startup="full"), "Liu 2022 (PNDM), eq. 11 to 13"),
    "sa-solver": Entry(
        Multistep(3, "x0", corrector="exact", eta=1.0), "Xue 2023 (SA-Solver), algorithm 1: 3-step predictor, corrector"
    ),
    "ab2-v": Entry(Multistep(2, "v", "angle"), "Adams-Bashforth in the angle; ours"),
    "ab3-v": Entry(Multistep(3, "v", "angle"), "Adams-Bashforth in the angle; ours"),
    "ab3-v-t": Entry(Multistep(3, "v", "t"), "polynomials in t, integrated over the angle; ours"),
    "ab4-v-t": Entry(
        Multistep(4, "v", "t"), "polynomials in t, integrated over the angle; default of EDM with the grid karras; ours"
    ),
    "ab3-v-index": Entry(Multistep(3, "v", "index"), "classical Adams weights in the angle; ours"),
    "ab3-eps-log_snr": Entry(
        Multistep(3, "eps"), "Lu 2022 (DPM-Solver), eq. 3.4 with polynomials through the last predictions; ours"
    ),
    "unipc-eps": Entry(
        Multistep(2, "eps", corrector="bh1", lower_final=True),
        "Zhao 2023 (UniPC): UniPC-2 in eps, B1, lowered at the end",
    ),
    "unipc-3-final": Entry(
        Multistep(3, "x0", corrector="bh1", lower_final=True), "Zhao 2023 (UniPC): UniPC-3, B1, lowered at the end"
    ),
    "rk38": Entry(RungeKutta("rk38", "velocity"), "Kutta's 3/8 rule in x and t"),
    "ab3-eps-angle": Entry(Multistep(3, "eps", "angle"), "polynomials in the angle, integrated over sigma/alpha; ours"),
    "ab4-eps-log_snr": Entry(Multistep(4, "eps"), "as ab3-eps-log_snr with four predictions; ours"),
    "ab4-x0-log_snr": Entry(
        Multistep(4, "x0"), "Lu 2022 (DPM-Solver++), eq. 9 with polynomials through the last four predictions; ours"
    ),
    "ab4-flow": Entry(Multistep(4, "flow", "flow"), "Adams-Bashforth in sigma/(alpha + sigma); ours"),
    "ab4-flow-log_snr": Entry(
        Multistep(4, "flow"), "polynomials in log-SNR, integrated over sigma/(alpha + sigma); ours"
    ),
    "abm4-v": Entry(Multistep(4, "v", "angle", corrector="exact"), "Adams-Bashforth-Moulton in the angle; ours"),
    "ab2-x0-angle": Entry(
        Multistep(2, "x0", "angle", lower_final=True), "polynomials in the angle, lowered at the end; ours"
    ),
    "abm2-v": Entry(Multistep(2, "v", "angle", corrector="exact"), "Adams-Bashforth-Moulton in the angle; ours"),
    "abm3-v": Entry(
        Multistep(3, "v", "angle", corrector="exact"),
        "Adams-Bashforth-Moulton in the angle; default of rectified flow with the grid uniform; ours",
    ),
    "abm3-v-log_snr": Entry(
        Multistep(3, "v", corrector="exact", lower_final=True), "polynomials in log-SNR, lowered at the end; ours"
    ),
    "abm4-v-log_snr": Entry(
        Multistep(4, "v", corrector="exact"), "polynomials in log-SNR, integrated over the angle; ours"
    ),
    "abm2-flow-t": Entry(
        Multistep(2, "flow", "t", corrector="exact"), "polynomials in t, integrated over sigma/(alpha + sigma); ours"
    ),
    "abm3-flow": Entry(
        Multistep(3, "flow", "flow", corrector="exact"), "Adams-Bashforth-Moulton in sigma/(alpha + sigma); ours"
    ),
    "abm4-flow-t": Entry(
        Multistep(4, "flow", "t", corrector="exact"),
        "polynomials in t, integrated over sigma/(alpha + sigma); default of VP with the grid log_snr; ours",
    ),
}


def resolve(solver: str | Solver) -> Solver:
    """A solver from its name, or itself.

    Raises:
        ConfigError: unknown name (the nearest are named), or not a solver.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise ConfigError(f"a solver is a name or a Solver, not {type(solver).__name__}")
    if solver not in NAMES:
        raise unknown("solver", solver, NAMES)
    return NAMES[solver].solver
