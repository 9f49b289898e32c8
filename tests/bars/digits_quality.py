"""Bar "digits quality": samples with the labels of the test split, scored on one stored classifier.

    python tests/bars/digits_quality.py [run=runs/image-digits] [seeds=5] [steps=20]

One sample for each of the 360 test items, dpmpp-2m with 20 steps, mean over 5 seeds, at guidance 1 and 1.5. Distances are
against the training split; the distance of the real test split is the unit. A run that is missing is trained first
with the shipped configuration.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import fmean

import _bars
from _bars import Bar, Metrics, arguments, classifier_accuracy, draw, frechet_ratio, intended_class, machine, score

from polydiff.core.run import Run

GUIDANCE = (1.0, 1.5)
BARS = (
    Bar("accuracy of the classifier itself", 1.0, classifier_accuracy, 0.98),
    Bar("intended class", 1.0, intended_class, 0.96),
    Bar("Frechet distance / real test split's", 1.0, frechet_ratio, 1.5, at_least=False),
    Bar("recall", 1.0, lambda m: m["recall"].value, 0.85),
    Bar("intended class", 1.5, intended_class, 0.99),
)

judge = partial(_bars.judge, BARS)


def main(model: Run, seeds: int, steps: int) -> int:
    """Run the bar; 0 if it is met."""
    began, results = time.monotonic(), dict[float, list[Metrics]]()
    for guidance in GUIDANCE:
        for seed in range(seeds):
            samples = draw(model, None, seed, solver="dpmpp-2m", steps=steps, guidance=guidance)
            results.setdefault(guidance, []).append(score(model, samples, seed))
        for name, first in results[guidance][0].items():
            mean = fmean(metrics[name].value for metrics in results[guidance])
            real = "" if first.real is None else f", real {first.real:.4f}"
            print(f"  guidance {guidance:g}: {name} {mean:.4f}{real}")
    met, n = judge(results), results[1.0][0]["frechet_distance"].n
    print(
        f"digits quality: step {model.step}, {n} samples, {seeds} seeds, {time.monotonic() - began:.0f} s; "
        f"{machine(model.device)}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    given = arguments()
    run = _bars.trained_run(given.get("run", "runs/image-digits"))
    raise SystemExit(main(run, int(given.get("seeds", 5)), int(given.get("steps", 20))))
