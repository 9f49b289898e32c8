"""AdamW with warm-up and decay, clipping and skipping that never wait for the device, and its state as flat tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polydiff.core.errors import CheckpointError, ConfigError, unknown

DECAYS = ("constant", "cosine", "linear")
STATE = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(
    step: int, steps: int, *, lr: float, warmup: int = 0, decay: str = "cosine", spent: float = 0.0
) -> float:
    r"""Learning rate of step ``step`` (0-based): a linear rise, then constant, half a cosine or a line to zero.

    .. math:: \text{lr} \cdot \min(1, (s+1)/w) \cdot \{1,\; (1+\cos\pi u)/2,\; 1-u\}, \quad
              u = \max((s-w)^+ / (S-w),\; \text{spent})

    Args:
        step, steps: s and S.
        lr: the peak.
        warmup: w, steps of the rise.
        decay: one of ``DECAYS``.
        spent: share of a time budget that is used up, 0 without one.
    Raises:
        ConfigError: an unknown decay.
    """
    if decay not in DECAYS:
        raise unknown("optim.decay", decay, DECAYS)
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    u = min(1.0, max(max(0, step - warmup) / max(1, steps - warmup), spent))
    return lr * rise * {"constant": 1.0, "cosine": 0.5 * (1.0 + math.cos(math.pi * u)), "linear": 1.0 - u}[decay]


class Optimizer:
    """Fused AdamW over a module's named parameters.

    A step whose loss or gradient is not finite changes nothing: the fused kernel reads ``found_inf`` on the device, and
    the same kernel applies the clipping through ``grad_scale``, so neither costs a pass over memory or a wait. Weight
    decay acts on matrices and kernels only, not on biases and gains.

    Args:
        module: what to train; parameters with ``requires_grad``.
        lr, betas, eps, weight_decay: AdamW's.
        clip: largest global gradient norm; 0 or None for no clipping.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float | None = None,
    ) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("the network has no parameter to train")
        self.clip = float(clip or 0.0)
        flat = [p for p in self.parameters.values() if p.ndim < 2]
        deep = [p for p in self.parameters.values() if p.ndim >= 2]
        groups = [{"params": deep, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)

    def step(self, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, update, clear the gradients.

        Args:
            lr: learning rate of this step.
            loss: () loss of the whole batch, the same on every process; only its finiteness matters here.
        Returns:
            The gradient norm before clipping and 0 or 1 for a skipped step, both () float32 on the device.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        skipped = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.found_inf = skipped  # type: ignore[attr-defined]
        if self.clip:
            self.adamw.grad_scale = (norm / self.clip).clamp_min(1.0)  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm, skipped

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by ``optimizer/<parameter>/<field>``; empty before the first step."""
        state: Mapping[Tensor, dict[str, Any]] = self.adamw.state
        return {
            f"optimizer/{name}/{field}": state[p][field]
            for name, p in self.parameters.items()
            if p in state
            for field in STATE
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors`` returned.

        Raises:
            CheckpointError: a tensor is missing, left over, or has another shape; the message names it.
        """
        given = {name: value for name, value in tensors.items() if name.startswith("optimizer/")}
        if not given:
            return
        for name, p in self.parameters.items():
            fields = {}
            for field in STATE:
                key = f"optimizer/{name}/{field}"
                shape = () if field == "step" else tuple(p.shape)
                if key not in given:
                    continue
                value = given.pop(key)
                if tuple(value.shape) != shape:
                    raise CheckpointError(f"optimizer state {key!r} has shape {tuple(value.shape)}, expected {shape}")
                # The fused kernel walks memory, so the moments must have their parameter's strides.
                like = torch.zeros((), device=p.device) if field == "step" else torch.empty_like(p)
                fields[field] = like.copy_(value)
            if fields and len(fields) != len(STATE):
                raise CheckpointError(f"optimizer state of {name!r} is incomplete: only {', '.join(fields)} are there")
            if fields:
                self.adamw.state[p] = fields
        if given:
            raise CheckpointError(f"optimizer state {next(iter(given))!r} belongs to no parameter of this network")
