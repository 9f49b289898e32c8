"""Bar "digits quality": samples with the labels of the test split, scored on one stored classifier.

    python tests/bars/digits_quality.py [run=runs/image-digits] [seeds=5] [steps=20]

One sample for each of the 360 test items, dpmpp-2m with 20 steps, mean over 5 seeds, at guidance 1 and 1.5. Distances are
against the training split; the distance of the real test split is the unit. A run that is missing is trained first
with the shipped configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from _bars import arguments, check, machine, trained_run

from polydiff.core.adapter import Metric
from polydiff.core.build import data_path
from polydiff.core.run import Run

GUIDANCE = (1.0, 1.5)


@dataclass(frozen=True)
class Bar:
    """A promise: what is measured at which guidance, and the bound it must keep."""

    name: str
    guidance: float
    measure: Callable[[Mapping[str, Metric]], float]
    bound: float
    at_least: bool = True


def frechet_ratio(metrics: Mapping[str, Metric]) -> float:
    """Frechet distance of the samples in units of that of the real test split."""
    distance = metrics["frechet_distance"]
    return distance.value / (distance.real or float("nan"))


def classifier_accuracy(metrics: Mapping[str, Metric]) -> float:
    """Accuracy of the stored classifier on the real test split."""
    real = metrics["class_accuracy"].real
    return float("nan") if real is None else real


BARS = (
    Bar("accuracy of the classifier itself", 1.0, classifier_accuracy, 0.98),
    Bar("intended class", 1.0, lambda m: m["class_accuracy"].value, 0.96),
    Bar("Frechet distance / real test split's", 1.0, frechet_ratio, 1.5, at_least=False),
    Bar("recall", 1.0, lambda m: m["recall"].value, 0.85),
    Bar("intended class", 1.5, lambda m: m["class_accuracy"].value, 0.99),
)


def judge(results: Mapping[float, list[Mapping[str, Metric]]]) -> bool:
    """Print every bar beside the mean over seeds; whether all are met.

    Args:
        results: by guidance, the metrics of each seed.
    """
    met = []
    for bar in BARS:
        values = [bar.measure(metrics) for metrics in results[bar.guidance]]
        name, spread = f"guidance {bar.guidance:g}, {bar.name}", f"{min(values):.4g} to {max(values):.4g}"
        met.append(check(name, fmean(values), bar.bound, at_least=bar.at_least, note=spread))
    return all(met)


def main(model: Run, seeds: int, steps: int) -> int:
    """Run the bar; 0 if it is met."""
    began = time.monotonic()
    file = data_path(model.config["data"])
    train, test = ([d[i] for i in range(len(d))] for d in (model.dataset(split, file) for split in ("train", "test")))
    wanted = [int(item.cond["label"]) for item in test]
    options = {"held_out": test, "facts": model.facts, "store": file.parent}
    results: dict[float, list[Mapping[str, Metric]]] = {}
    for guidance in GUIDANCE:
        for seed in range(seeds):
            samples = model.sample(
                len(test), cond={"label": wanted}, solver="dpmpp-2m", steps=steps, guidance=guidance, seed=seed
            )
            results.setdefault(guidance, []).append(model.adapter.metrics(samples, train, {**options, "seed": seed}))
        for name, first in results[guidance][0].items():
            mean = fmean(metrics[name].value for metrics in results[guidance])
            real = "" if first.real is None else f", real {first.real:.4f}"
            print(f"  guidance {guidance:g}: {name} {mean:.4f}{real}")
    met = judge(results)
    print(
        f"digits quality: step {model.step}, {len(test)} samples, {seeds} seeds, {time.monotonic() - began:.0f} s; "
        f"{machine(model.device)}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    given = arguments()
    run = trained_run(given.get("run", "runs/image-digits"))
    raise SystemExit(main(run, int(given.get("seeds", 5)), int(given.get("steps", 20))))
