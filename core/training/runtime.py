"""Where training runs: device, precision, one process or several, signals. The only module that knows accelerate."""

from __future__ import annotations

import atexit
import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from polydiff.core.errors import ConfigError, unknown

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
EXIT_INTERRUPTED = 75
"""Exit code of a run that a signal interrupted and that was saved: EX_TEMPFAIL, "start the same command again"."""


class Runtime:
    """Devices and processes; launched by ``torchrun`` it spans all of them, otherwise it is one.

    Args:
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``mps``.
        precision: ``fp32``, or ``bf16``: the network's forward pass under autocast, weights and optimizer in float32.
    Raises:
        ConfigError: a device or precision that does not exist here.
    """

    def __init__(self, device: str = "auto", precision: str = "fp32") -> None:
        if device not in DEVICES:
            raise unknown("trainer.device", device, DEVICES)
        if precision not in PRECISIONS:
            raise unknown("trainer.precision", precision, PRECISIONS)
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(device, True):
            raise ConfigError(f"trainer.device={device}: there is none here; use trainer.device=auto or cpu")
        on_cpu = device == "cpu" or (device == "auto" and not there["cuda"])
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin

        # accelerate remembers the first call in the process; a second run may want another device or precision.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        try:
            self._accelerator = Accelerator(
                device_placement=False,
                cpu=on_cpu,
                mixed_precision=PRECISIONS[precision],
                gradient_accumulation_steps=1,
                rng_types=[],
                log_with=None,
                step_scheduler_with_optimizer=False,
                dynamo_plugin=TorchDynamoPlugin(backend="no"),
                kwargs_handlers=[
                    DistributedDataParallelKwargs(
                        broadcast_buffers=True, find_unused_parameters=False, gradient_as_bucket_view=True
                    )
                ],
            )
        except ValueError as error:
            raise ConfigError(f"trainer.precision={precision} on this device: {error}") from error
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.main = self.rank == 0

    def prepare(self, module: nn.Module) -> nn.Module:
        """Wrap a module that is already on the device for several processes and mixed precision."""
        return self._accelerator.prepare_model(module, device_placement=False)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """While it lasts, gradients of a prepared module are summed up locally and not exchanged."""
        return self._accelerator.no_sync(module)

    def mean(self, value: Tensor) -> Tensor:
        """Average over processes."""
        return value if self.world == 1 else self._accelerator.reduce(value, "mean")

    def gather(self, value: Tensor) -> list[Tensor]:
        """The tensor of every process, in order, on the CPU; all must have one shape."""
        if self.world == 1:
            return [value.cpu()]
        stacked = self._accelerator.gather(value[None].to(self.device))
        return list(stacked.cpu())

    def barrier(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Wait for all processes, so that none leaves (and makes a launcher end the others) while one still saves.

        The group is taken down when the interpreter ends, not here: another run may follow in the same processes. After
        an error nobody calls this, because taking a group down may wait for those who are gone.
        """
        if self.world > 1:
            self.barrier()
            # The group's own threads still let go of that last message, for which they need the interpreter: one that is
            # taken down under them aborts the process, after all is saved.
            time.sleep(0.2)
            atexit.unregister(_leave)
            atexit.register(_leave)


def channels_last(module: nn.Module) -> nn.Module:
    """Store the kernels of convolutions over two axes with their channels last, as the matrix units of a GPU take them.

    Those over one and three axes have other layouts and stay as they are.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Interrupt(AbstractContextManager["Interrupt"]):
    """Turns SIGINT, SIGTERM and SIGUSR1 into a request to stop after the current step; a second SIGINT stops at once.

    Handlers are installed in the main thread only and put back afterwards.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
