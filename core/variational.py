r"""The variational bound of a discrete chain, and the reverse variance that is learned with it.

A chain takes ``steps`` times, uniform in t from t_max to t_min, and one last step to the data. Between two of its times
t > s, with :math:`\lambda` the log-SNR, :math:`h = \lambda_s - \lambda_t` and :math:`\mathrm{SNR} = e^{2\lambda}`, the
reverse transition q(x_s | x_t, x0) has the variance

.. math:: \tilde\beta = \sigma_s^2\,(1 - e^{-2h}).

That is the best a model can take when the data are one point. For data N(0, I) the best is

.. math:: \beta = \tilde\beta\,\frac{1 + \mathrm{SNR}_s}{1 + \mathrm{SNR}_t},

which on a variance-preserving path is the variance of the forward step. A network may choose between the two, element by
element, by a fraction v: :math:`\log\Sigma = v \log\beta + (1 - v)\log\tilde\beta`. With
:math:`w = v\,(\log\beta - \log\tilde\beta)` its divergence from the truth is, for each element,

.. math:: \mathrm{KL} = \tfrac12\left(w + e^{-w} - 1 + (\mathrm{SNR}_s - \mathrm{SNR}_t)\,(x_0 - \hat x_0)^2 e^{-w}\right).

Source: Ho 2020, section 3.2 and eq. 5 to 13; Nichol 2021, eq. 14 to 17; Kingma 2021, eq. 13 and 14.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polydiff.core.checks import whole
from polydiff.core.denoiser import Denoise, Prediction, as_prediction, trajectory
from polydiff.core.errors import ConfigError
from polydiff.core.noise import as_noise
from polydiff.core.schedules import Schedule, as_time
from polydiff.core.tree import expand

if TYPE_CHECKING:
    from polydiff.core.processes.gaussian import GaussianProcess


def log_posterior_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Log of the variance of q(x_s | x_t, x0) for s < t, float64; -inf where sigma_s = 0."""
    return 2 * torch.log(schedule.sigma(s)) + torch.log(-torch.expm1(2 * (schedule.log_snr(t) - schedule.log_snr(s))))


def log_range(log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """log beta - log beta_tilde, the range that the fraction v spans, from the log-SNR at both ends."""
    zero = torch.zeros_like(log_snr_t)
    return torch.logaddexp(2 * log_snr_s, zero) - torch.logaddexp(2 * log_snr_t, zero)


def _log_normal_cdf(z: Tensor) -> Tensor:
    """Of z standard deviations. Below -20 its asymptotic series: there torch's own has a wrong derivative, later NaN."""
    far = z.clamp_max(-20.0)
    inverse = far**-2
    series = torch.log1p(-inverse * (1 - 3 * inverse * (1 - 5 * inverse)))
    tail = -0.5 * (far**2 + math.log(2 * math.pi)) - torch.log(-far) + series
    return torch.where(z < -20, tail, torch.special.log_ndtr(z.clamp_min(-20.0)))


def log_bin_probability(x0: Tensor, mean: Tensor, log_variance: Tensor, bins: int) -> Tensor:
    """Log probability, in nats, that a Gaussian falls into the bin of x0; the bins at both ends are open.

    The centres of the 2 or more equal ``bins`` run from -1 to 1; the three tensors are of one shape. Source: Ho 2020, eq. 13.
    """
    half, scale = 1 / (bins - 1), torch.exp(-0.5 * log_variance)
    upper, lower = (x0 - mean + half) * scale, (x0 - mean - half) * scale
    right = x0 > mean  # there the same difference is taken in the left tail, where it keeps its digits
    high, low = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
    log_high = _log_normal_cdf(high)
    gap = (_log_normal_cdf(low) - log_high).clamp_max(-torch.finfo(x0.dtype).eps)
    inside = log_high + torch.log(-torch.expm1(gap))
    inside = torch.where(x0 < half - 1, _log_normal_cdf(upper), inside)
    return torch.where(x0 > 1 - half, _log_normal_cdf(-lower), inside)


class VariationalBound:
    """The bound on the negative log-likelihood of data under a chain, whose reverse variance a network may give.

    Args:
        process: a Gaussian process on the whole of R^d.
        steps: of the chain, the last one to the data; 2 or more.
        bins: the data take that many equally spaced values on [-1, 1], and the last step gives each a probability; or
            None: they are real numbers, and the last step is a density.
        learned: the fraction v comes from the network; otherwise it is 0 (beta_tilde, as ``ddpm`` has it), and 1 in the
            last step, where beta is finite: the variance of x0 given x_t for data N(0, I).

    Raises:
        ConfigError: fewer than 2 steps or bins, or a mean-free process, whose noise cannot differ by element.

    Source: Nichol 2021, section 3.1. In the last step beta_tilde is 0; as in their program, that of the step before
    stands in for it.
    """

    def __init__(
        self, process: GaussianProcess, steps: int = 1000, bins: int | None = None, learned: bool = True
    ) -> None:
        section = "objective.variance." if learned else ""
        steps = whole(f"{section}steps", steps, least=2)
        bins = None if bins is None else whole(f"{section}bins", bins, least=2)
        if process.mean_free:
            raise ConfigError(
                "a variance for each element would break the symmetry of a mean-free process: take none"
                if learned
                else "the bound of a chain counts every element as a dimension; on a mean-free process take log_prob"
            )
        self.process, self.steps, self.bins, self.learned = process, steps, bins, learned
        schedule = process.schedule
        self._start, self._width = schedule.t_min, schedule.t_max - schedule.t_min
        first, second = as_time(self._start), as_time(self._start + self._width / (steps - 1))
        self._low = float(log_posterior_variance(schedule, second, first))
        self._high = -float(torch.logaddexp(2 * schedule.log_snr(first), torch.zeros_like(first)))

    def snap(self, t: Tensor) -> Tensor:
        """Move times to the chain's: [t_min, t_max] is cut into ``steps`` equal parts, one for each."""
        place = ((t - self._start) / self._width * self.steps).floor().clamp(0, self.steps - 1)
        return self._start + place / (self.steps - 1) * self._width

    def nats(self, prediction: Prediction, x0: Tensor) -> Tensor:
        """One step's part of the bound, in nats for each element of x0 (b, *dims), float32 or wider.

        It is the divergence of the model's p(x_s | x_t) from q(x_s | x_t, x0), where x_t and t, on the chain, are those of
        the prediction; for t = t_min -log p(x0 | x_t). The mean of p takes no gradient: only v learns from it.

        Raises:
            ConfigError: the prediction has no variance, and it is to be learned.
        """
        t, schedule = prediction.t, self.process.schedule
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        place = ((t - self._start) / self._width * (self.steps - 1)).round()
        v = prediction.fraction.to(x0.dtype) if self.learned else expand((place < 0.5).to(t.dtype), x0)
        mean = prediction.x0.detach().to(x0.dtype)
        log_snr_t = schedule.log_snr(t)
        log_snr_s = schedule.log_snr(self._start + (place - 1).clamp_min(0) / (self.steps - 1) * self._width)
        gain = expand(torch.exp(2 * log_snr_s) - torch.exp(2 * log_snr_t), x0)
        w = v * expand(log_range(log_snr_t, log_snr_s), x0)
        divergence = 0.5 * (w + torch.expm1(-w) + gain * (x0 - mean) ** 2 * torch.exp(-w))
        log_variance = self._low + v * (self._high - self._low)
        if self.bins is None:
            last = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean) ** 2 * torch.exp(-log_variance))
        else:
            last = -log_bin_probability(x0, mean, log_variance, self.bins)
        return torch.where(expand(place, x0) < 0.5, last, divergence)

    def __call__(self, prediction: Prediction, x0: Tensor) -> Tensor:
        """``nats`` times ``steps`` in bits: for t uniform on the chain its mean is the bound in bits per element."""
        return self.nats(prediction, x0) * (self.steps / math.log(2))

    @torch.no_grad()
    def total(self, denoise: Denoise, x0: Tensor, generator: Any = None, mask: Tensor | None = None) -> Tensor:
        """The whole bound in bits per valid element, (b,): every step once with its own noise, and the prior's part.

        Args:
            denoise: called ``steps`` times; of a network with a second head where the variance is learned.
            x0, mask: clean states (b, *dims) and their valid elements, bool (b, n).
            generator: of the noise, as in ``sample``.
        """
        process, schedule = self.process, self.process.schedule
        end, noise = as_time(schedule.t_max), as_noise(generator, len(x0), process.mask_axis)
        bound = 0.5 * (x0 * float(torch.exp(schedule.log_snr(end)))) ** 2  # both have the variance sigma(t_max)^2
        for place in range(self.steps):
            t = as_time(self._start + place / (self.steps - 1) * self._width)
            x_t = process.perturb(x0, t, noise.draw(place, "chain", x0, mask=mask), mask)
            with trajectory(None):  # what was said of a cleaner state would tell of the data
                output = denoise(x_t, t)
            bound = bound + self.nats(as_prediction(process, x_t, t, output), x0)
        return process.mean(bound, mask) / math.log(2)
