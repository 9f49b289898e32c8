r"""The rotation group SO(3): matrices (..., 3, 3), tangents (..., 3) in the body frame, right multiplication.

A tangent u at R stands for the curve :math:`R\,\mathrm{Exp}(s u)`; its norm is the angle in radians. Both maps go through
the quaternion (w, n) with :math:`w = \cos(\theta/2)`, :math:`n = \sin(\theta/2)\,u/\theta`, which loses no digit at any
angle up to pi. Every function keeps dtype and device and has finite gradients everywhere; the maps work in float64 inside.
Products are sums of elementwise ones, which precision lowered for matrix products (TF32, autocast) does not reach.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polydiff.core.errors import DataError
from polydiff.core.noise import Noise


def exp(u: Tensor) -> Tensor:
    r"""Exponential map (..., 3) -> (..., 3, 3): Rodrigues' formula from half the angle.

    .. math:: R = I + \mathrm{sinc}(\theta)\,[u]_\times + \tfrac12\,\mathrm{sinc}^2(\theta/2)\,[u]_\times^2
    """
    v = _precise(u)
    half = 0.5 * torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return from_quaternion(torch.cat([torch.cos(half), 0.5 * torch.sinc(half / math.pi) * v], -1)).to(u.dtype)


def log(rotation: Tensor) -> Tensor:
    """Logarithm map (..., 3, 3) -> (..., 3), of norm at most pi; at pi either of the two opposite tangents."""
    w, n = to_quaternion(_precise(rotation)).split([1, 3], -1)
    norm = torch.linalg.vector_norm(n, dim=-1, keepdim=True).clamp_min(1e-15)  # so small that the quotient is 1
    return (2 * torch.atan2(norm, w) / norm * n).to(rotation.dtype)


def angle(rotation: Tensor) -> Tensor:
    """Angle of rotation (...), in [0, pi]."""
    return torch.linalg.vector_norm(log(rotation), dim=-1)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The product ``first second`` of matrices (..., 3, 3)."""
    return (first.unsqueeze(-1) * second.unsqueeze(-3)).sum(-2)


def relative(origin: Tensor, rotation: Tensor) -> Tensor:
    """What takes one rotation to the other by right multiplication, origin^T rotation."""
    return compose(origin.mT, rotation)


def retract(rotation: Tensor, u: Tensor) -> Tensor:
    """Geodesic step R Exp(u), made orthonormal again, so that long walks in float32 stay on the group."""
    return from_quaternion(to_quaternion(compose(rotation, exp(u))))


def tangent(origin: Tensor, rotation: Tensor) -> Tensor:
    """Body-frame tangent at ``origin`` that ``retract`` takes to ``rotation``: Log(origin^T rotation)."""
    return log(relative(origin, rotation))


def from_quaternion(quaternion: Tensor) -> Tensor:
    """Rotation of a quaternion (..., 4), scalar first, of any length; zero gives the identity."""
    w, n = quaternion.split([1, 3], -1)
    square = (quaternion * quaternion).sum(-1, keepdim=True)
    scale = 2 / torch.where(square > 0, square, 1.0)
    x, y, z = n.unbind(-1)
    zero = torch.zeros_like(x)
    hat = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    diagonal = torch.diag_embed((1 - scale * (n * n).sum(-1, keepdim=True)).expand_as(n))
    return diagonal + scale.unsqueeze(-1) * (w.unsqueeze(-1) * hat + n.unsqueeze(-1) * n.unsqueeze(-2))


def to_quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternion (..., 4) of a rotation, scalar first and not negative.

    The rows of the symmetric matrix 4 q q^T are linear in R. That of the largest component of q, at least 2 long, is taken,
    so that nothing is divided by a small number and no root has an infinite slope. A matrix near the group gives the
    quaternion of a rotation equally near.
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rotation.unbind(-2))
    wx, wy, wz = zy - yz, xz - zx, yx - xy
    rows = [
        [1 + xx + yy + zz, wx, wy, wz],
        [wx, 1 + xx - yy - zz, xy + yx, xz + zx],
        [wy, xy + yx, 1 - xx + yy - zz, yz + zy],
        [wz, xz + zx, yz + zy, 1 - xx - yy + zz],
    ]
    outer = torch.stack([torch.stack(row, -1) for row in rows], -2)
    largest = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = outer.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    sign = torch.where(row[..., :1] < 0, -1.0, 1.0).to(row.dtype)
    return sign * row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)


def uniform(like: Tensor, noise: Noise, mask: Tensor | None = None, k: int = 0, purpose: str = "prior") -> Tensor:
    """Draw rotations from Haar's measure: normalised normal quaternions from each item's own stream.

    Args:
        like: tensor (b, ..., 3, 3) whose shape, dtype and device the result has.
        noise, k, purpose: where the draws come from.
        mask: valid elements, bool (b, n); the others get the identity.
    """
    return from_quaternion(noise.draw(k, purpose, like.new_empty(*like.shape[:-2], 4), mask=mask))


def check_rotations(rotation: Tensor, what: str = "rotations", tolerance: float = 1e-4) -> Tensor:
    """Return (..., 3, 3) as it is if every matrix is a rotation.

    Args:
        rotation: what to look at, of floating type.
        what: how the message calls it.
        tolerance: largest entry of R^T R - I that passes.

    Raises:
        DataError: another shape or type, or a matrix that is not orthonormal or reflects: its index and its error.
    """
    if rotation.shape[-2:] != (3, 3) or not rotation.is_floating_point():
        raise DataError(
            f"{what}: matrices (..., 3, 3) of floating type are needed, not {tuple(rotation.shape)} {rotation.dtype}"
        )
    r = rotation.detach().double()
    error = (relative(r, r) - torch.eye(3, dtype=r.dtype, device=r.device)).abs().amax((-2, -1))
    reflects = (torch.linalg.cross(r[..., 0], r[..., 1], dim=-1) * r[..., 2]).sum(-1) < 0
    bad = ~(error <= tolerance) | reflects
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        fault = (
            "it reflects: its determinant is -1" if error[index] <= tolerance else f"|R^T R - I| = {error[index]:.3g}"
        )
        raise DataError(
            f"{what}: matrix {list(index)} of {tuple(bad.shape)} is no rotation, {fault}; make it orthonormal first"
        )
    return rotation


def _precise(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # where MPS has no float64, float32 it is
