"""Langevin steps at a fixed noise level, after the intervals of another solver or alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from polydiff.core.checks import number, whole
from polydiff.core.denoiser import Denoise
from polydiff.core.errors import ConfigError
from polydiff.core.grids import Grid
from polydiff.core.solvers.base import Plan, Solver, State, is_end, predict, resolve, settle
from polydiff.core.solvers.multistep import Multistep
from polydiff.core.solvers.resample import one_way
from polydiff.core.tree import expand


class _Step(NamedTuple):
    inner: Plan  # of the predictor
    own: Any  # its record of this interval
    scale: float | None  # of x, where there is no predictor
    size: float | None  # e, or what multiplies (|z|/|s|)^2; None for an interval without Langevin steps


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    r"""A solver whose every interval is followed by Langevin steps at its end; without a solver, annealed Langevin.

    .. math:: x \leftarrow x + e\,s(x, t) + \sqrt{2e}\,z

    keeps the marginal of t but for an error of the order of :math:`e/\sigma_t^2`. Where ``snr`` = r is given
    :math:`e = 2a\,(r\,|z|/|s|)^2`, with norms of each item over its generated elements and :math:`a = (\alpha_t/\alpha_s)^2`
    of the interval [s, t] that comes next; where ``size`` = q is given :math:`e = q\,\sigma_t^2`. Norms of a handful of
    numbers vary widely: prefer ``size`` there.

    Without a predictor an interval multiplies x by :math:`\alpha_s/\alpha_t`, which keeps x/alpha and calls nothing. The
    first level gets no Langevin steps, for x_T is a draw from it, and neither does x0_hat.

    Args:
        predictor: the solver of the intervals, by name or itself, or None.
        corrections: Langevin steps after each interval.
        snr: r; exactly one of it and ``size`` is given.
        size: q; the published dynamics have :math:`q = \epsilon/(2\sigma_L^2)`.

    Raises:
        ConfigError: no correction, both or none of ``snr`` and ``size``, one that is not positive and finite, a size of 2
            or more, at which the steps diverge, or a predictor that goes up again.

    Source: Song 2021, algorithms 4 and 5, whose predictor ("reverse diffusion") is another discretisation of the reverse
    SDE, of the same order as ``ddpm``; Song 2019 (NCSN), algorithm 1, whose final denoising is a grid's final interval.
    """

    predictor: Any
    corrections: int = 1
    snr: float | None = None
    size: float | None = None
    stochastic = True
    _solver: ClassVar[Solver]

    def __post_init__(self) -> None:
        settle(self, corrections=whole("corrections", self.corrections))
        if (self.snr is None) == (self.size is None):
            raise ConfigError("Langevin steps need exactly one of snr and size")
        name = "snr" if self.size is None else "size"
        settle(self, **{name: number(name, getattr(self, name), above=0.0)})
        if self.size is not None and self.size >= 2:
            raise ConfigError(f"size = {self.size} must be below 2, from where on the steps diverge")
        if self.predictor is not None:
            settle(self, predictor=resolve(self.predictor))
        stages = self.predictor.stages if self.predictor else 0
        solver = self.predictor or Multistep(1)  # without a predictor, for intervals with an infinite end
        settle(self, _solver=solver, order=solver.order)
        settle(self, stages=None if stages is None else stages + self.corrections)

    def calls(self, plan: Plan) -> int | None:
        """Calls of the predictor, and of the corrections of the intervals that have them."""
        own = self._solver.calls(replace(plan, steps=tuple(step.own for step in plan.steps if step.scale is None)))
        return None if own is None else own + self.corrections * sum(step.size is not None for step in plan.steps)

    def make_plan(self, process: Any, grid: Grid) -> Plan:
        """The predictor's plan and the corrector's numbers of each interval."""
        inner = one_way(self, self._solver, process, grid)
        points, steps = inner.points, []
        for k, own in enumerate(inner.steps):
            start, end, i = points[k], points[k + 1], min(k + 1, len(inner) - 1)
            scale = None if self.predictor or is_end(start, end) else end.alpha / start.alpha
            size = 2 * ((self.snr or 0.0) * points[i].alpha / points[i + 1].alpha) ** 2
            size = self.size * end.sigma**2 if self.size else size
            steps.append(_Step(inner, own, scale, None if is_end(end, end) else size))
        return Plan(process, points, tuple(steps))

    def init(self, x: Any, plan: Plan) -> State:
        """Start as the predictor does."""
        return self._solver.init(x, plan.steps[0].inner)

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """One interval of the predictor, then the Langevin steps."""
        now: _Step = plan.steps[k]
        if now.scale is None:
            state = self._solver.step(state, k, now.inner, denoise, noise)
        else:
            state = State(state.x * now.scale)
        for j in range(0 if now.size is None else self.corrections):
            z = noise.draw(k, f"langevin/{j}", state.x)
            score = noise.project(predict(denoise, plan.process, state.x, plan.points[k + 1]).score)
            e: Any = now.size
            if self.snr is not None:
                z_norm, norm = z.flatten(1).norm(dim=1), score.flatten(1).norm(dim=1)
                e = expand(e * (z_norm / norm.where(norm > 0, math.inf)) ** 2, z)  # 0 with nothing to generate
            state = state._replace(x=state.x + e * score + (2 * e) ** 0.5 * z)
        return state
