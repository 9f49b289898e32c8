"""Bar "posterior sampling": mean and covariance of guided samples against the closed form of a Gaussian prior.

    python tests/bars/posterior.py [solver=ab2-v] [steps=200] [samples=40000] [sde_steps=50]

MMPS on a Gaussian prior with a full covariance (d = 12), PiGDM on an isotropic one, a random A with m = 5 and noise 0.3, on
every schedule; grid uniform in log-SNR from t_max to t_min with the final interval. On a Gaussian prior the sampler is
affine in x_T, so that d + 1 states pushed through it give the mean and the covariance of all samples without
Monte-Carlo error; samples drawn with it and with dpmpp-2m-sde check this on VP (their own error is about a fifth of the bar). Errors are relative: of the
mean's norm, and of the Frobenius norm of the covariance.
"""

from __future__ import annotations

import torch
from _bars import arguments, check, machine
from torch import Tensor

from polydiff.core.denoiser import Denoise, Prediction
from polydiff.core.inverse import MMPS, Matrix, PiGDM, Posterior
from polydiff.core.processes import GaussianProcess, gaussian
from polydiff.core.sampling import sample
from polydiff.core.schedules import SCHEDULES, as_time

D, M, SIGMA_Y = 12, 5, 0.3
Moments = tuple[Tensor, Tensor]


def prior(isotropic: bool) -> Moments:
    """Mean (d) and covariance (d, d), about of unit variance; the isotropic one has variance 0.64."""
    g = torch.Generator().manual_seed(5)
    mean = torch.randn(D, generator=g, dtype=torch.float64)
    root = torch.randn(D, D, generator=g, dtype=torch.float64) / D**0.5
    identity = torch.eye(D, dtype=torch.float64)
    return mean, 0.64 * identity if isotropic else root @ root.mT + 0.01 * identity


def exact_denoiser(process: GaussianProcess, mean: Tensor, covariance: Tensor) -> Denoise:
    """E[x_0 | x_t] of N(mean, covariance)."""

    def denoise(x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        gain = alpha * torch.linalg.solve(
            alpha**2 * covariance + sigma**2 * torch.eye(D, dtype=torch.float64), covariance
        )
        return Prediction(process, x_t, t, x0=mean + (x_t - alpha * mean) @ gain)

    return denoise


def posterior(mean: Tensor, covariance: Tensor, a: Tensor, y: Tensor) -> Moments:
    """Closed form for y = a x + SIGMA_Y z."""
    gain = covariance @ a.mT @ torch.linalg.inv(a @ covariance @ a.mT + SIGMA_Y**2 * torch.eye(M, dtype=torch.float64))
    return mean + gain @ (y - a @ mean), covariance - gain @ a @ covariance


def pushed(denoise: Denoise, process: GaussianProcess, solver: str, steps: int) -> Moments:
    """Mean and covariance of the end of an affine deterministic sampler whose x_T is N(0, sigma^2)."""
    sigma = float(process.schedule.sigma(as_time(process.t_max)))
    x_T = torch.cat([torch.zeros(1, D, dtype=torch.float64), sigma * torch.eye(D, dtype=torch.float64)])  # noqa: N806
    out = sample(denoise, process, x_T, solver, steps, "log_snr")
    matrix = out[1:] - out[0]
    return out[0], matrix.mT @ matrix


def drawn(denoise: Denoise, process: GaussianProcess, solver: str, steps: int, n: int) -> Moments:
    """The same from n samples."""
    g = torch.Generator().manual_seed(0)
    sigma = float(process.schedule.sigma(as_time(process.t_max)))
    x_T = sigma * torch.randn(n, D, generator=g, dtype=torch.float64)  # noqa: N806
    out = sample(denoise, process, x_T, solver, steps, "log_snr", generator=0)
    return out.mean(0), out.mT.cov()


def judge(name: str, found: Moments, truth: Moments) -> list[bool]:
    """Print both errors beside their bars."""
    errors = [float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)]
    return [
        check(f"{name}: {what}", error, bound)
        for what, error, bound in zip(("mean", "covariance"), errors, (0.02, 0.05), strict=True)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = {"solver": "ab2-v", "steps": "200", "samples": "40000", "sde_steps": "50", **arguments()}
    steps, solver, met = int(given["steps"]), given["solver"], []
    g = torch.Generator().manual_seed(7)
    a, y = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((M, D), (M,)))
    for isotropic in (False, True):
        moments = prior(isotropic)
        truth = posterior(*moments, a, y)
        guide: Posterior = MMPS(y, Matrix(a), sigma_y=SIGMA_Y, iterations=M + 2, tolerance=1e-10)
        if isotropic:
            guide = PiGDM(y, Matrix(a), sigma_y=SIGMA_Y, iterations=M + 2, tolerance=1e-10, variance=0.64)
        name = f"{type(guide).__name__}, {'isotropic' if isotropic else 'full'} prior"
        for schedule in SCHEDULES:
            process = gaussian(schedule)
            denoise = guide(exact_denoiser(process, *moments))
            met += judge(f"{name}, {schedule}, {solver}, {steps} steps", pushed(denoise, process, solver, steps), truth)
        process, n = gaussian("vp"), int(given["samples"])
        denoise = guide(exact_denoiser(process, *moments))
        for method, k in ((solver, steps), ("dpmpp-2m-sde", int(given["sde_steps"]))):
            found = drawn(denoise, process, method, k, n)
            met += judge(f"{name}, vp, {method}, {k} steps, {n} samples", found, truth)
    print(machine())
    raise SystemExit(0 if all(met) else 1)
