r"""Linear multistep methods in the coordinates of ``polydiff.core.solvers.coordinates``, with corrector and noise.

A step is :math:`x_s = (c_s/c_t)\,x_t + \sum_j w_j p_j`, where :math:`w_j = c_s\int \ell_j\,d\tau` integrates the Lagrange
polynomials through the last predictions. A corrector takes the step again, with a polynomial that also goes through the
prediction at its end, where the next step needs it anyway. Both are linear in x, the predictions and the noise, so that

.. math:: x_s^{\text{corrected}} = x_s + \sum_j (w'_j - w_j)\,p_j

whatever x_t and the noise were: a corrector is nothing but other weights in the step after. With noise level eta in the
x0 form, :math:`\sigma_s\sqrt{1 - e^{-2\eta^2 h}}\,z` is added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field, fields
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from polydiff.core.checks import number, whole
from polydiff.core.denoiser import Denoise, as_prediction
from polydiff.core.errors import ConfigError, unknown
from polydiff.core.schedules import Schedule
from polydiff.core.solvers import base
from polydiff.core.solvers.base import COORDINATES, Array, Plan, Point, Solver, State, checked, combine, divide
from polydiff.core.solvers.coordinates import VARIABLES, differences, from_x0, moments, noise_span, quadrature, tau_span
from polydiff.core.solvers.runge_kutta import TABLEAUS, Stage, stages, through_stages
from polydiff.core.variational import log_range

Pair = tuple[float, float]
NOISE_FORMS = ("sde", "ancestral", "learned")
CORRECTORS = ("exact", "bh1", "bh2")
_START = {1: "euler", 2: "heun", 3: "heun3", 4: "rk4"}  # tableau of an order


class _Step(NamedTuple):
    field: str  # of the Prediction to use now
    scale: float  # of x
    weights: tuple[float, ...]  # of the predictions, newest first, and 0 of those that do not exist yet
    noise: float = 0.0  # standard deviation
    own: Pair = (0.0, 1.0)  # of x and x0_hat in the prediction to remember
    spread: float = 0.0  # log of the upper over the lower choice of its variance, where the network chooses
    stages: tuple[Stage, ...] = ()  # of a Runge-Kutta start, whose scale and weights are then those of its end


@dataclass(frozen=True)
class Multistep(Solver):
    """Exponential and classical linear multistep methods; order 1 is DDIM, Euler and DDPM.

    Args:
        order: number of predictions in a step, 1 to 4, kept as ``terms``; a corrector uses one more and raises the order
            by one. The attribute ``order`` is what all the settings together reach.
        predict: the coordinate, as in ``polydiff.core.solvers.coordinates``.
        variable: what the interpolating polynomials are polynomials in; ``"index"`` gives the classical Adams weights,
            of order 2 at most unless the grid is uniform in tau.
        corrector: None; ``"exact"``; or UniPC's ``"bh1"`` and ``"bh2"``, which take B(h)/2 for the integral wherever a
            polynomial goes through two predictions. No corrector costs a call; the last interval is not corrected.
        rule: ``"exact"`` integral, or ``"midpoint"``: a line through two predictions counts by its value in the middle
            of the interval.
        blend: share of each polynomial through three or more predictions that its tangent at the newest replaces; 1/2 in
            the published third-order DPM-Solver++, whose order of accuracy it leaves at 2.
        lower_final: lower the order towards the end, so that the last interval has order 1.
        eta: noise level, a number or a function of the log-SNR, taken in the middle of each interval; 0 is the
            probability flow, 1 the full reverse SDE.
        noise_form: ``"sde"`` (constant eta over the interval) or ``"ancestral"`` (DDIM's, order 1); the same at 0 and 1.
            ``"learned"`` is ancestral at eta = 1 with the variance that the network's second head gives.
        startup: ``"low"``: the first steps use as many predictions as there are, one call each, which caps the order at
            2, or 3 with a corrector. ``"full"`` takes the first order - 2 intervals by Runge-Kutta: 1 or 4 calls more
            for order 3 or 4, 2 or 6 with a corrector; in ``"index"`` the first order - 1 intervals by the pseudo
            Runge-Kutta method of four stages, 3 calls more each.

    Raises:
        ConfigError: a combination without meaning; ancestral noise that exceeds sigma, when the plan is made.

    Source: Song 2020 (DDIM), eq. 12 and 16; Nichol 2021, eq. 15; Lu 2022 (DPM-Solver++), eq. 8 and algorithm 2; Zhang
    2023 (DEIS), eq. 14; Zhao 2023 (UniPC), algorithms 1 and 2; Xue 2023 (SA-Solver), algorithm 1; Liu 2022 (PNDM).
    """

    order: InitVar[int]
    terms: int = field(init=False)
    predict: str = "x0"
    variable: str = "log_snr"
    corrector: str | None = None
    rule: str = "exact"
    blend: float = 0.0
    lower_final: bool = False
    eta: float | Callable[[float], float] = 0.0
    noise_form: str = "sde"
    startup: str = "low"
    stages = 1

    def __post_init__(self, order: int) -> None:
        for kind, value, valid in (
            ("form (predict)", self.predict, COORDINATES),
            ("variable", self.variable, (*VARIABLES, "index")),
            ("corrector", self.corrector or "exact", CORRECTORS),
            ("rule", self.rule, ("exact", "midpoint")),
            ("noise form", self.noise_form, NOISE_FORMS),
            ("startup", self.startup, ("low", "full")),
        ):
            if value not in tuple(valid):
                raise unknown(kind, value, valid)
        base.settle(self, terms=whole("order", order, 1, 4), blend=number("blend", self.blend, 0.0))
        eta: Any = self.eta if callable(self.eta) else base.level_at("eta", self.eta)
        base.settle(self, eta=eta, stochastic=bool(eta))
        eta = "a function" if callable(eta) else eta
        bh = self.corrector in ("bh1", "bh2")
        ancestral = self.noise_form != "sde" and self.stochastic
        refused = {
            f"eta = {eta} needs predict='x0', not {self.predict!r}": self.stochastic and self.predict != "x0",
            f"noise_form={self.noise_form!r} has order 1 and no corrector; take noise_form='sde'": ancestral
            and (order > 1 or self.corrector is not None),
            f"noise_form='learned' needs eta = 1, not {eta}": self.noise_form == "learned" and self.eta != 1,
            f"startup='full' has no noise: take eta = 0 instead of {eta}": self.startup == "full" and self.stochastic,
            "rule='midpoint' has no meaning for variable='index'": self.rule == "midpoint" and self.variable == "index",
            f"corrector={self.corrector!r} brings its own rule; leave rule='exact'": bh and self.rule != "exact",
            f"corrector={self.corrector!r} is defined for predict='x0' or 'eps' and variable='log_snr'": bh
            and (self.predict not in ("x0", "eps") or self.variable != "log_snr"),
            f"blend = {self.blend} must lie between 0 and 1": self.blend > 1,
            "blend needs order 3 or 4, no corrector and another variable than 'index'": bool(self.blend)
            and (order < 3 or self.corrector is not None or self.variable == "index"),
        }
        for reason, holds in refused.items():
            if holds:
                raise ConfigError(reason)
        corrected = self.corrector is not None
        reached = (self.terms if self.startup == "full" else min(self.terms, 2)) + corrected
        low = self.lower_final or self.blend or self.variable == "index"
        base.settle(self, order=min(reached, 2) if low else reached)  # without noise, on a grid that is smooth

    def __repr__(self) -> str:
        rest = "".join(f", {own.name}={getattr(self, own.name)!r}" for own in fields(self)[1:])
        return f"Multistep(order={self.terms}{rest})"

    def coefficients(self, schedule: Schedule, table: Point, points: Sequence[Point]) -> Sequence[_Step]:
        """Scale, weights and noise of every interval."""
        low, high, outer = divide(points[:-1], points[1:])
        own = [(0.0, 1.0)] * (len(points) - 1)
        if self.predict != "x0":
            columns = from_x0(self.predict, schedule, table.cut(0, len(own)))
            own = list(zip(*[column.tolist() for column in columns], strict=True))
        steps = {k: _Step("x0", scale, (weight,), own=own[k]) for k, (scale, weight) in outer.items()}
        if low < high:
            steps.update(enumerate(self._inner(schedule, table, range(low, high), points, own), low))
        return [steps[k] for k in range(len(own))]

    def _inner(
        self, schedule: Schedule, table: Point, inner: range, points: Sequence[Point], own: Sequence[Pair]
    ) -> list[_Step]:
        start, end = table.cut(inner.start, inner.stop), table.cut(inner.start + 1, inner.stop + 1)
        h = end.log_snr - start.log_snr
        eta: Array = self.eta
        if callable(eta):
            eta = np.array([base.level_at("eta", eta, value) for value in (start.log_snr + 0.5 * h).tolist()])
        scale, total = tau_span(self.predict, start, end, eta**2)
        noise: Iterable[float] = repeat(0.0)
        spread: Iterable[float] = repeat(0.0)
        begin: list[_Step] = []
        if self.stochastic and self.noise_form != "sde":
            deviation = eta * noise_span(start, end)
            if (over := deviation > end.sigma).any():
                most = 1 / math.sqrt(-math.expm1(-2 * h[over].max()))
                raise ConfigError(f"ancestral noise has eta up to 1 (here {most:.4g}): take less or noise_form='sde'")
            scale = np.sqrt(end.sigma**2 - deviation**2) / start.sigma
            weights = (end.alpha - start.alpha * scale)[:, None]
            noise = deviation.tolist()
            if self.noise_form == "learned":
                spread = log_range(torch.from_numpy(start.log_snr), torch.from_numpy(end.log_snr)).tolist()
        else:
            weights, change = self._shares(schedule, table, inner, start, end, eta**2)
            weights = total[:, None] * weights
            if self.startup == "full":
                begin = self._begin(schedule, start, end, points[inner.start + 1 :], own[inner.start :])
            if change is not None:  # what is corrected of an interval counts in the next one
                now = slice(1 + len(begin), None)
                weights[now] += (scale[1:] * total[:-1])[len(begin) :, None] * change[len(begin) : -1]
            if self.stochastic:
                noise = noise_span(start, end, eta**2).tolist()
        form, rows = repeat(COORDINATES[self.predict]), map(tuple, weights.tolist())
        steps = list(map(_Step, form, scale.tolist(), rows, noise, own[inner.start :], spread))
        return [*begin, *steps[len(begin) :]]

    def _shares(
        self, schedule: Schedule, table: Point, inner: range, start: Point, end: Point, eta2: Array
    ) -> tuple[Array, Array | None]:
        """Share of each prediction in the integral, newest first (n, p); what the corrector adds, that at the end first.

        An interval has nodes at its start, back from there as far as it has predictions, and then at its end, so that in
        Newton's form predictor and corrector are sums of the same terms, the corrector of one more.
        """
        size = self.terms + (self.corrector is not None)
        if size == 1:
            return np.ones((len(inner), 1)), None
        index = self.variable == "index"
        u = np.arange(len(table.time)) if index else VARIABLES[self.variable][0](table.log_snr, table.time)
        ends = len(u) if self.lower_final else None
        at, beyond, there, lines, ahead = _layout(inner, self.terms, size, math.isfinite(u[0]), ends)
        first = u[inner.start : inner.stop, None]
        width = u[inner.start + 1 : inner.stop + 1, None] - first
        nodes = u[at] - first + width * beyond
        ruled = self.corrector or self.rule
        rule = ruled if ruled in ("bh1", "bh2") else self.rule
        terms = differences(nodes)
        if size == 2 and {rule, ruled} <= {"midpoint", "bh2"}:
            means, density = np.ones(nodes.shape), 1.0
        else:
            u, mass, density = quadrature(self.predict, self.variable, schedule, start, end, eta2)
            means = moments(u, mass, nodes)
        if self.blend:
            means[:, 2:] += self.blend * (means[:, 1:2] / terms[:, 0, 1:-1] - means[:, 2:])

        rules = (rule,) if self.corrector is None else (rule, ruled)
        parts = means[:, :, None] * there[:, :, : len(rules)]
        for more, name in enumerate(rules):
            if name != "exact":  # a rule takes the place of the exact integral of lines
                middle = 0.5 * (width if name != "bh1" else width * density)
                parts[lines[:, more], 1, more] = middle[lines[:, more], 0]
        found = terms @ parts
        shares = found[:, :, 0]
        if self.corrector is None:
            return shares, None
        return shares, (found[:, :, 1] - shares).take(ahead)

    def _begin(
        self, schedule: Schedule, start: Point, end: Point, ends: Sequence[Point], own: Sequence[Pair]
    ) -> list[_Step]:
        """The intervals that a full start takes by Runge-Kutta."""
        index = self.variable == "index"
        count = max(0, min(self.terms - (1 if index else 2), len(start.time)))
        tableau = TABLEAUS["pseudo-rk4" if index else _START[max(1, self.terms - (self.corrector is None))]]
        rows = stages(tableau, self.predict, schedule, start.cut(0, count), end.cut(0, count), ends[:count])
        return [
            _Step("x0", scale, weights, stages=tuple(within), own=pair)
            for (*within, (_, scale, weights)), pair in zip(rows, own, strict=False)
        ]

    def calls(self, plan: Plan) -> int:
        """One an interval, and those of a Runge-Kutta start."""
        return sum(1 + len(step.stages) for step in plan.steps)

    def step(self, state: State, k: int, plan: Plan, denoise: Denoise, noise: Any) -> State:
        """One call of the denoiser, but for a Runge-Kutta start, and one linear combination."""
        now: _Step = plan.steps[k]
        x, history, point = state.x, state.history, plan.points[k]
        keep = self.terms if self.corrector is not None else self.terms - 1
        if now.stages:
            out, x0 = through_stages(now, x, point, plan, denoise)
            return State(out, (torch.add(x0 * now.own[1], x, alpha=now.own[0]), *history)[:keep])
        output = denoise(x, point.t)
        if isinstance(output, Tensor):  # x0_hat
            own = output
            if self.predict != "x0" and (keep or now.field != "x0"):
                own = torch.add(output * now.own[1], x, alpha=now.own[0])
            used = output if now.field == "x0" else own
        else:
            used = checked(output, point).field(now.field)
            form = COORDINATES[self.predict]
            own = used if now.field == form or not keep else output.field(form)
        out = combine(x, now.scale, now.weights, (used, *history))
        if now.noise:
            z = noise.draw(k, "step", out, point.t, plan.points[k + 1].t)
            if now.spread:
                z = z * torch.exp(0.5 * now.spread * as_prediction(plan.process, x, point.t, output).fraction)
            out.add_(z, alpha=now.noise)
        return State(out, (own, *history)[:keep] if keep else ())


@functools.lru_cache(maxsize=64)
def _layout(inner: range, terms: int, size: int, started: bool, ends: int | None) -> tuple[Array, ...]:
    """Where nodes stand, whatever the times of a grid are.

    Returns:
        The points of the nodes, (n, p), those of the predictions and then the end; widths beyond it, (n, p), for those left
        over have to differ; of predictor and corrector, the nodes there are, bool (n, p, 2), and whether two, (n, 2); where
        in (n, p) numbers the end's are and then those of the predictions.
    """
    at, back = np.arange(inner.start, inner.stop)[:, None], np.arange(size)
    count = np.minimum(at + started, terms)
    if ends is not None:
        count = np.minimum(count, ends - 1 - at)
    nodes, left = count + np.arange(2), np.maximum(back - count, 0)
    ahead = (
        np.where(back == 0, count, np.where(back <= count, back - 1, size - 1)) + size * np.arange(len(inner))[:, None]
    )
    return np.where(back < count, at - back, at + 1), left, back[:, None] < nodes[:, None], nodes == 2, ahead
