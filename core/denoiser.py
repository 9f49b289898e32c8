r"""What a network predicts, in every equivalent form, and how a plain network becomes a denoiser.

With :math:`x_t = \alpha x_0 + \sigma\varepsilon` the five fields

.. math:: x_0,\quad \varepsilon,\quad s = -\varepsilon/\sigma,\quad v = \alpha\varepsilon - \sigma x_0,\quad
          u = \alpha' x_0 + \sigma'\varepsilon

are linear in x_0 and eps (``parts``), hence in each other once x_t is known: wanted = a x_t + b given (``coefficients``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polydiff.core.errors import ConfigError, unknown
from polydiff.core.schedules import Schedule, as_time
from polydiff.core.tree import expand, leaves, tree_map

if TYPE_CHECKING:
    from polydiff.core.adapter import Condition

FIELDS = ("x0", "eps", "score", "v", "velocity")
Pair = tuple[Tensor, Tensor]
Named = Mapping[str, Tensor] | None


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient that is 0 where the denominator is 0: a conversion without a limit there returns 0."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def _unless_infinite(value: Tensor) -> Tensor:
    return torch.where(torch.isfinite(value), value, 0.0)


def parts(schedule: Schedule, t: Tensor, field: str) -> Pair:
    """Numbers l, r with ``field = l x0 + r eps``, float64 with the shape of t; the score's are 0 where sigma = 0.

    Besides the five fields, solvers integrate ``"flow"`` (eps - x0) and ``"angle"`` (v / hypot(alpha, sigma)).
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if field == "velocity":
        return schedule.dalpha(t), schedule.dsigma(t)
    if field == "angle":
        c = torch.hypot(alpha, sigma)
        return -sigma / c, alpha / c
    if field == "score":
        return zero, _over(-one, sigma)
    table = {"x0": (one, zero), "eps": (zero, one), "v": (-sigma, alpha), "flow": (-one, one)}
    if field not in table:
        raise unknown("field", field, (*FIELDS, "flow", "angle"))
    return table[field]


def coefficients(schedule: Schedule, t: Tensor, given: str, wanted: str) -> Pair:
    """Numbers a, b with ``wanted = a x_t + b given``, float64 with the shape of t; ``wanted`` is one of ``parts``.

    Where a conversion has no limit (alpha = 0 or sigma = 0) both are 0.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if given == wanted:
        return zero, one
    # x0 = x[0] x_t + x[1] given and likewise eps
    if given == "x0":
        x, eps = (zero, one), (_over(one, sigma), _over(-alpha, sigma))
    elif given == "eps":
        x, eps = (_over(one, alpha), _over(-sigma, alpha)), (zero, one)
    elif given == "score":
        x, eps = (_over(one, alpha), _over(sigma**2, alpha)), (zero, -sigma)
    else:  # solve x_t = alpha x0 + sigma eps, given = l x0 + r eps
        l, r = parts(schedule, t, given)
        d = alpha * r - sigma * l
        # at sigma = 0 sigma' may be 0 or infinite, but x_t = alpha x0 there whatever it is
        x = (torch.where(sigma == 0, _over(one, alpha), _over(r, d)), _over(-sigma, d))
        eps = (_over(-l, d), _over(alpha, d))
    if wanted in ("x0", "eps"):
        return x if wanted == "x0" else eps
    left, right = parts(schedule, t, wanted)
    return _unless_infinite(left * x[0] + right * eps[0]), _unless_infinite(left * x[1] + right * eps[1])


@functools.lru_cache(maxsize=8192)
def at_number(
    function: Callable[..., tuple[Tensor, ...]], schedule: Schedule, t: float, *rest: Any
) -> tuple[float, ...]:
    """What a function (schedule, t, ...) gives at one time, as plain numbers."""
    return tuple(float(c) for c in function(schedule, as_time(t), *rest))


class Prediction:
    """What a denoiser says about a state, built from one field and converted on demand.

    Args:
        process: its schedule and geometry give the conversions; rotations have no eps and no v.
        x_t, t: the state (b, *dims) and its time, float64, () or (b,).
        x0, eps, score, v, velocity: exactly one of them, shaped like ``x_t`` (on SO(3) all but x0 like tangents); of a
            product a dictionary by leaf, and ``prediction[name]`` is the leaf's own.
        fraction: what a second head of the network says of the reverse variance, shaped like ``x_t``; see ``fraction``.

    Attributes:
        given: name of the field it was built from.
    """

    __slots__ = ("_fraction", "given", "process", "t", "value", "x_t")

    def __init__(self, process: Any, x_t: Any, t: Tensor, *, fraction: Tensor | None = None, **field: Any) -> None:
        if len(field) != 1 or next(iter(field)) not in FIELDS:
            raise ConfigError(f"a Prediction is built from exactly one of {', '.join(FIELDS)}; got {sorted(field)}")
        self.process, self.x_t, self.t, self._fraction = process, x_t, t, fraction
        ((self.given, self.value),) = field.items()

    def field(self, wanted: str) -> Tensor:
        """Any field by name; also ``"flow"`` and ``"angle"``, see ``parts``."""
        if wanted == self.given:
            return self.value
        if self.process.kind != "gaussian":
            return self.process.convert(self, wanted)
        schedule = self.process.schedule
        if self.t.ndim == 0:
            of_x, of_given = at_number(coefficients, schedule, self.t.item(), self.given, wanted)
            out = self.value * of_given
            return torch.add(out, self.x_t, alpha=of_x) if of_x else out
        a, b = (expand(c, self.x_t) for c in coefficients(schedule, self.t, self.given, wanted))
        return a * self.x_t + b * self.value

    x0 = property(lambda self: self.field("x0"), doc="Predicted clean state.")
    eps = property(lambda self: self.field("eps"), doc="Predicted noise.")
    score = property(lambda self: self.field("score"), doc="Gradient of the log density of x_t.")
    v = property(lambda self: self.field("v"), doc="alpha eps - sigma x0.")
    velocity = property(lambda self: self.field("velocity"), doc="Velocity of the probability flow.")

    def replace(self, value: Tensor, field: str | None = None) -> Prediction:
        """The same state, time and fraction with another value of a field (default: the one given)."""
        return Prediction(self.process, self.x_t, self.t, fraction=self._fraction, **{field or self.given: value})

    def detach(self) -> Prediction:
        """The same numbers without their gradient."""
        fraction = None if self._fraction is None else self._fraction.detach()
        x_t, value = (tree_map(torch.Tensor.detach, state) for state in (self.x_t, self.value))
        return Prediction(self.process, x_t, self.t, fraction=fraction, **{self.given: value})

    def __getitem__(self, name: str) -> Prediction:
        """A leaf's own prediction, of a product."""
        process = self.process
        if process.kind != "product" or name not in self.value:
            raise unknown("leaf", name, process.processes if process.kind == "product" else ())
        t = process.time(name, self.t)
        return Prediction(process.processes[name], self.x_t[name], t, **{self.given: self.value[name]})

    @property
    def fraction(self) -> Tensor:
        """Where the reverse variance lies between its lower choice, 0, and its upper one, 1 (``core.variational``).

        Raises:
            ConfigError: there is none, or the process is mean-free.
        """
        if self._fraction is None:
            raise ConfigError(
                "a learned reverse variance needs a network with a second head: train with objective=hybrid (which sets "
                "network.variance=true), or take the solver ddpm"
            )
        if getattr(self.process, "mean_free", False):
            raise ConfigError("a variance for each element would break the symmetry of a mean-free process: take none")
        return self._fraction


Denoise = Callable[[Tensor, Tensor], Any]
_TRAJECTORY: ContextVar[object] = ContextVar("trajectory", default="")


@contextmanager
def trajectory(own: object) -> Iterator[None]:
    """What a bound Denoise remembers inside belongs to this object; to None: nothing is remembered. See ``Denoiser.bind``."""
    token = _TRAJECTORY.set(own)
    try:
        yield
    finally:
        _TRAJECTORY.reset(token)


def as_prediction(process: Any, x_t: Any, t: Tensor, output: Any) -> Prediction:
    """A Denoise may return a bare state, which means x0_hat."""
    return output if isinstance(output, Prediction) else Prediction(process, x_t, t, x0=output)


PRECONDITIONS = ("edm", *FIELDS)


def preconditioning(schedule: Schedule, t: Tensor, name: str, sigma_data: float) -> tuple[Tensor, ...]:
    r"""c_skip, c_out, c_in, c_noise of a network F, float64 with the shape of t.

    With :math:`S^2 = \alpha^2\sigma_d^2 + \sigma^2`: c_in = 1/S and c_noise = ln(sigma/alpha)/4, clamped to [-5, 5].
    ``"edm"`` predicts :math:`\hat x_0 = (\alpha\sigma_d^2/S^2)\,x_t + (\sigma\sigma_d/S)\,F`; the other names predict the
    field of that name as c_out F, where c_out is the field's root mean square, so that every target has unit variance.

    Source: Karras 2022, eq. 7 and table 1, generalised from alpha = 1 to any path.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    size = torch.hypot(alpha * sigma_data, sigma)
    c_noise = (-0.25 * schedule.log_snr(t)).clamp(-5, 5)
    if name == "edm":
        return alpha * sigma_data**2 / size**2, sigma * sigma_data / size, 1 / size, c_noise
    of_x0, of_eps = parts(schedule, t, name)
    c_out = _unless_infinite(torch.hypot(of_x0 * sigma_data, of_eps))
    return torch.zeros_like(alpha), c_out, 1 / size, c_noise


def _heads(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """A network's output like x_t, and the fraction v of the reverse variance where it has twice the channels."""
    if output.shape == x_t.shape:
        return output, None
    if output.ndim == x_t.ndim:
        axes = [axis for axis, (m, n) in enumerate(zip(output.shape, x_t.shape, strict=True)) if m != n]
        if len(axes) == 1 and output.shape[axes[0]] == 2 * x_t.shape[axes[0]]:
            output, head = output.chunk(2, dim=axes[0])
            return output, 0.5 * (head + 1)
    raise ConfigError(
        f"the network made {tuple(output.shape)} of a state {tuple(x_t.shape)}: it must keep that shape, or double its "
        "channels for a second head"
    )


class Denoiser(nn.Module):
    """A network with its preconditioning: (x_t, t, mask, cond) -> Prediction.

    Args:
        network: ``(x_t, c_noise, mask, cond, present) -> tensor like x_t``, or twice as long along one axis (its channels):
            then the second half is a head for the reverse variance, (1 + head)/2 its fraction (Nichol 2021, eq. 15).
            Of rotations it returns either x0_hat itself or the tangent at x_t that leads there, (b, n, 3), in units of
            ``process.spread(t)``; of a product x_t, c_noise and what it returns are dictionaries by leaf.
        process: the process it denoises.
        precondition: one of ``PRECONDITIONS``.
        sigma_data: standard deviation of the normalised data.
        conditions: the declared conditions by name; each that is not given is passed as zeros with ``present`` false,
            a setting with ``present`` true, whatever is asked.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Any,
        precondition: str = "edm",
        sigma_data: float = 1.0,
        conditions: Mapping[str, Condition] | None = None,
    ) -> None:
        super().__init__()
        if precondition not in PRECONDITIONS:
            raise unknown("precondition", precondition, PRECONDITIONS)
        if process.kind != "gaussian" and precondition != "edm":
            raise ConfigError(f"precondition = {precondition!r} is for Gaussian processes alone; here it must be 'edm'")
        if not sigma_data > 0:
            raise ConfigError(f"sigma_data = {sigma_data} must be positive: the data set seems to be constant")
        self.network, self.process, self.precondition = network, process, precondition
        self.sigma_data, self.conditions = float(sigma_data), dict(conditions or {})

    def forward(
        self, x_t: Tensor, t: Tensor, mask: Tensor | None = None, cond: Named = None, present: Named = None
    ) -> Prediction:
        """Predict from states (b, *dims) at times () or (b,), float64.

        Args:
            mask: valid elements, bool (b, n).
            cond: conditions by name, each (b, ...); absent ones count as not present.
            present: which items use a condition, bool (b,); default: all items of each condition in ``cond``.

        Raises:
            ConfigError: a condition that was not declared, or an output of the network that fits no state.
        """
        t = as_time(t)
        cond, present = self._complete(cond, present, x_t)
        if self.process.kind != "gaussian":
            return self._by_leaf(x_t, t, mask, cond, present)
        c_skip, c_out, c_in, c_noise = self._coefficients(self.process, t, x_t)
        output, fraction = _heads(self.network(c_in * x_t, c_noise, mask, cond, present).to(x_t.dtype), x_t)
        output = c_out * self.process.project(output, mask, cond.get("fixed"))
        if self.precondition == "edm":
            return Prediction(self.process, x_t, t, fraction=fraction, x0=c_skip * x_t + output)
        return Prediction(self.process, x_t, t, fraction=fraction, **{self.precondition: output})

    def _by_leaf(self, x_t: Any, t: Tensor, mask: Tensor | None, cond: Any, present: Any) -> Prediction:
        """What the network is told of each leaf, and the x0_hat of each that follows from its output."""
        process, product, fixed = self.process, self.process.kind == "product", cond.get("fixed")
        own = (
            {name: (process.processes[name], process.time(name, t)) for name in x_t} if product else {"": (process, t)}
        )
        states, given, level, x0 = x_t if product else {"": x_t}, {}, {}, {}
        factors: dict[str, tuple[Any, Any]] = {}
        for name, (leaf, at) in own.items():
            x = given[name] = states[name]
            if leaf.kind == "gaussian":
                skip, out, into, level[name] = self._coefficients(leaf, at, x)
                given[name], factors[name] = into * x, (skip, out)
            else:
                level[name] = leaf.level(at).to(device=x.device, dtype=torch.float32).expand(len(x))
        output = self.network(*((given, level) if product else (x_t, level[""])), mask, cond, present)
        for name, (leaf, at) in own.items():
            x, said = states[name], output[name] if product else output
            if name in factors:
                skip, out = factors[name]
                x0[name] = skip * x + out * leaf.project(_heads(said.to(x.dtype), x)[0], mask, fixed)
            else:
                x0[name] = leaf.reach(x, at, said.to(x.dtype), mask, fixed)
        return Prediction(process, x_t, t, x0=x0 if product else x0[""])

    def _coefficients(self, process: Any, t: Tensor, x_t: Tensor) -> tuple[Any, Any, Any, Tensor]:
        """c_skip, c_out and c_in as factors of x_t, and c_noise (b,)."""
        b, schedule, own = x_t.shape[0], process.schedule, (self.precondition, self.sigma_data)
        if t.ndim == 0:  # a solver's time, on the host: as plain numbers none of them is transferred
            skip, out, into, level = at_number(preconditioning, schedule, t.item(), *own)
            return skip, out, into, torch.full((b,), level, dtype=torch.float32, device=x_t.device)
        c_skip, c_out, c_in, c_noise = preconditioning(schedule, t, *own)
        c_noise = c_noise.to(device=x_t.device, dtype=torch.float32).expand(b)
        return expand(c_skip, x_t), expand(c_out, x_t), expand(c_in, x_t), c_noise

    def _complete(self, cond: Named, present: Named, state: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every declared condition, zeros where it is not given, and which items use it."""
        cond, present, x_t = cond or {}, present or {}, leaves(state)[0]
        for name in cond:
            if name not in self.conditions:
                raise unknown("condition", name, self.conditions)
        b, device = x_t.shape[0], x_t.device
        full, there = {}, {}
        for name, condition in self.conditions.items():
            there[name] = torch.full((b,), name in cond or condition.kind == "setting", device=device)
            if name in cond and name in present and condition.kind != "setting":
                there[name] = present[name]
            shape, dtype = condition.shape_in(x_t.shape[1:]), condition.dtype
            if name == "x0_hat":
                full[name] = cond[name] if name in cond else tree_map(torch.zeros_like, state)
                continue
            if name == "fixed":
                shape, dtype = (x_t.shape[self.process.mask_axis],), torch.bool
            full[name] = cond[name] if name in cond else torch.zeros((b, *shape), dtype=dtype, device=device)
        return full, there

    def bind(self, mask: Tensor | None = None, cond: Named = None) -> Denoise:
        """Fix mask and conditions: what solvers and guides see is a function of state and time.

        A network that declares ``x0_hat`` (self-conditioning) is given its own last prediction, none at first: of the
        same run of ``sample``, or since it was bound in a loop of one's own. In ``encode``, in likelihoods and at times by
        item (b,), as adaptive integration has them, none is used or left: there the prediction must be a function of state
        and time alone.
        """
        given, memory, owner = dict(cond or {}), dict[str, Tensor](), _TRAJECTORY.get()

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            nonlocal owner
            if (now := _TRAJECTORY.get()) is not owner:
                memory.clear()
                owner = now
            alone = t.ndim or now is None
            prediction = self(x_t, t, mask, given if alone else {**given, **memory})
            if "x0_hat" in self.conditions and not alone:
                memory["x0_hat"] = prediction.detach().x0
            return prediction

        return denoise
