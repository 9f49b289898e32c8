"""Bar "U-Net speed": forward, backward and Adam of ~10 M parameters on pictures of 3x32x32, beside peers.

    python tests/benchmarks/unet_peers.py [threads=2] [rounds=8] [batch=4] [compile=false] [dtype=float32]
    python tests/benchmarks/unet_peers.py device=cuda [rounds=20] [batch=256] [compile=true] [dtype=bfloat16] [peak=TFLOPS]

Peers come from the package index into a virtual environment of their own (``pip install polydiff diffusers azula``); one
that is missing is left out, without diffusers there is no bar and the exit code is 2. All networks take the noise level as
input, have the same dtype, compile flag, memory layout, threads and optimiser, and are timed in turn: a busy machine slows
all alike. MFU is the operations of matrix products and convolutions over time over the device's peak (``peak=``, in TFLOP/s,
replaces the table's). ``channels_last=`` and ``warmup=`` rounds may be given, too.
The bar stands against the fastest of diffusers' shapes, whose widths are multiples of its 32 groups; exit code 1 on a miss.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable

import torch
from _device import interleaved, operations, options, peak, utilisation
from torch import Tensor, nn

from polydiff.core.nn.unet import UNet
from polydiff.core.training.runtime import channels_last

DEFAULTS = {
    "device": "cpu",
    "threads": "2",
    "rounds": "8",
    "warmup": "2",
    "batch": "4",
    "compile": "false",
    "dtype": "float32",
    "channels_last": "false",
    "peak": "",
}
ON_CUDA = {
    "rounds": "20",
    "warmup": "5",
    "batch": "256",
    "compile": "true",
    "dtype": "bfloat16",
    "channels_last": "true",
}
BAR = {"cpu": 0.8, "cuda": 0.7}
PARAMETERS = 10e6
Call = Callable[[Tensor, Tensor], Tensor]


def polydiff_unet(field: int = 3) -> tuple[nn.Module, Call]:
    """Ours, for a field of that many channels: most blocks and all attention where it is small."""
    network = UNet(2, field, channels=64, multipliers=(1, 2, 2, 3), blocks=(1, 2, 3, 2), middle=0, attention=(-2, -1))
    return network, lambda x, c_noise: network(x, c_noise)


def diffusers_unet(*widths: int, field: int = 3) -> tuple[nn.Module, Call]:
    """UNet2DModel with its defaults, attention on the smallest field."""
    from diffusers import UNet2DModel

    plain = len(widths) - 1
    network = UNet2DModel(
        sample_size=32,
        in_channels=field,
        out_channels=field,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
    )
    return network, lambda x, c_noise: network(x, c_noise).sample


def azula_unet(*widths: int, blocks: int) -> tuple[nn.Module, Call]:
    """azula's UNet with its defaults, modulated by the noise level."""
    from azula.nn.layers import SineEncoding
    from azula.nn.unet import UNet as AzulaUNet

    features = 4 * widths[0]
    encoding = nn.Sequential(SineEncoding(features), nn.Linear(features, features), nn.SiLU())
    network = AzulaUNet(3, 3, hid_channels=widths, hid_blocks=(blocks,) * len(widths), mod_features=features)
    return nn.ModuleList([encoding, network]), lambda x, c_noise: network(x, encoding(c_noise))


NETWORKS = {
    "polydiff": (None, polydiff_unet),
    "diffusers 64-128-192": ("diffusers", lambda: diffusers_unet(64, 128, 192)),
    "diffusers 64-96-128-160": ("diffusers", lambda: diffusers_unet(64, 96, 128, 160)),
    "azula 64-128-192": ("azula", lambda: azula_unet(64, 128, 192, blocks=3)),
}


def main(words: list[str]) -> int:
    """Time all networks in turn and print a table."""
    given = options(words, DEFAULTS, ON_CUDA)
    device, dtype = torch.device(given["device"]), getattr(torch, given["dtype"])
    torch.set_num_threads(int(given["threads"]))
    torch.manual_seed(0)
    x = torch.randn(int(given["batch"]), 3, 32, 32, device=device)
    c_noise = torch.rand(len(x), device=device)
    if given["channels_last"] == "true":
        x = x.to(memory_format=torch.channels_last)
    steps: dict[str, Callable[[], None]] = {}
    columns: dict[str, tuple[float, float]] = {}
    for name, (package, build) in NETWORKS.items():
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed here")
            continue
        network, call = build()
        network.to(device)
        if given["channels_last"] == "true":
            channels_last(network)
        step = training_step(network, call, x, c_noise, dtype, compiled=False)
        columns[name] = (sum(p.numel() for p in network.parameters()), operations(step))
        steps[name] = training_step(network, call, x, c_noise, dtype, compiled=given["compile"] == "true")
    times = interleaved(steps, int(given["rounds"]), device, int(given["warmup"]))
    reference = min((times[name] for name in times if name.startswith("diffusers")), default=None)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {given}, torch {torch.__version__}")
    most = peak(device, dtype, given["peak"])
    for name, seconds in times.items():
        size, work = columns[name]
        share = f"{seconds / reference:6.2f}" if reference else ""
        mfu = utilisation(work, seconds, most)
        print(
            f"{name:26s} {size / 1e6:6.2f} M {work / 1e9:8.1f} GFLOP {1e3 * seconds:8.1f} ms {share}"
            f" {len(x) / seconds:8.0f} items/s, MFU {mfu}"
        )
    if reference is None:
        return 2
    fits = all(abs(columns[name][0] / PARAMETERS - 1) <= 0.05 for name in times)
    ratio, bar = times["polydiff"] / reference, BAR[device.type]
    met = ratio <= bar and fits
    print(f"measured {ratio:.2f}, bar <= {bar}, parameters within 5 % of 10 M: {fits}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


def training_step(
    network: nn.Module, call: Call, x: Tensor, c_noise: Tensor, dtype: torch.dtype, *, compiled: bool
) -> Callable[[], None]:
    """One step of training: forward, backward, Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    run = torch.compile(call, dynamic=False) if compiled else call

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
            y = run(x, c_noise)
        (y.float() - x).square().mean().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
