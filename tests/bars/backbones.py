"""Bar "DiT and U-Net learn alike": on MNIST, after ten minutes each, both beat the best linear denoiser alike.

    python tests/bars/backbones.py [unet=runs/image-mnist-unet] [dit=runs/image-mnist-dit] [seconds=600] [n=2000]

The held-out error of x0_hat over that of the Wiener filter of the training split, on the same test items and noise, at
sigma / (alpha sigma_data) = 0.1, 0.3 and 1; the bar holds for the mean of the three. A run that is missing is trained first:
``experiment=image-mnist``, network ``unet-small`` or ``dit-small``, for ``seconds``; one of these that was interrupted goes on. The
network is told the class, which the linear denoiser is not; the ratios without it are printed beside. Further ``key=value``
words, those with a dot, go to the training.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

from _bars import arguments, check, machine

from polydiff.core.evaluation.linear import LEVELS, fitted, ratios
from polydiff.core.run import Run

BAR, JUDGED = 0.6, (0.1, 0.3, 1.0)
NETWORKS = ("unet", "dit")


def trained(folder: str, network: str, seconds: float, words: list[str]) -> Run:
    """The run of one network; it is trained where it is missing, and goes on where its time is not used up."""
    chosen = ["experiment=image-mnist", f"network={network}-small", f"run={folder}"]
    budget = [f"trainer.seconds={seconds:g}", "trainer.steps=10000000", "trainer.preview_every=1000000"]
    if not Path(folder, "LATEST").exists() or Run.load(folder).config["trainer"].get("seconds"):
        subprocess.run([sys.executable, "-m", "polydiff", "train", *chosen, *budget, *words], check=True)
    return Run.load(folder)


def main() -> int:
    """Run the bar; 0 if it is met."""
    options = {"seconds": "600", "n": "2000"} | {name: f"runs/image-mnist-{name}" for name in NETWORKS}
    given = arguments()
    words = [f"{key}={value}" for key, value in given.items() if "." in key]
    own = {key: value for key, value in given.items() if "." not in key}
    if wrong := own.keys() - options:
        raise SystemExit(f"unknown option {min(wrong)!r}; valid: {', '.join(options)}, and key=value words with a dot")
    options |= own
    met, linear, mean = [], None, float("nan")
    for name in NETWORKS:
        run = trained(options[name], name, float(options["seconds"]), words)
        linear = linear or fitted(run)
        for told in (True, False):
            found = ratios(run, n=int(options["n"]), conditions=told, linear=linear)
            cells = "  ".join(f"{level:g}: {found[level]:.3f}" for level in LEVELS)
            print(f"  {name}, class {'told' if told else 'not told'}: {cells}", flush=True)
            if told:
                mean = fmean(found[level] for level in JUDGED)
        parameters = sum(p.numel() for p in run.denoiser.parameters())
        note = f"{parameters / 1e6:.1f} M parameters, {run.step} steps"
        met.append(check(f"{name}, error over the best linear denoiser's", mean, BAR, note=note))
    print(f"backbones: {options['n']} test items, {options['seconds']} s of training; {machine()}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
