"""Bar "MNIST": class-conditional samples with the labels of the test split, against the training split.

    python tests/bars/mnist_quality.py [run=runs/image-mnist] [n=10000] [steps=12] [guidance=1.2] [batch=100]

dpmpp-2m. The distance of the real test split at the same count is the unit of that of the samples. A run that is missing
is trained first with the shipped configuration, within an hour on two processor cores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from _bars import (
    Bar,
    Metrics,
    arguments,
    classifier_accuracy,
    draw,
    frechet_ratio,
    intended_class,
    judge,
    machine,
    score,
    trained_run,
)

from polydiff.core.run import Run


def bars(guidance: float) -> tuple[Bar, ...]:
    """What is promised."""
    return (
        Bar("accuracy of the classifier itself", guidance, classifier_accuracy, 0.99),
        Bar("intended class", guidance, intended_class, 0.98),
        Bar("Frechet distance / real test split's", guidance, frechet_ratio, 3.0, at_least=False),
    )


def show(metrics: Metrics) -> None:
    """Print every measure with its interval and its value for real data."""
    for name, metric in metrics.items():
        ends = "" if metric.low is None else f" ({metric.low:.4g} to {metric.high:.4g})"
        print(f"  {name} {metric.value:.4g}{ends}{'' if metric.real is None else f', real {metric.real:.4g}'}")


def main(model: Run, given: Mapping[str, str]) -> int:
    """Run the bar; 0 if it is met."""
    n, steps, batch = int(given.get("n", 10_000)), int(given.get("steps", 20)), int(given.get("batch", 250))
    guidance, began = float(given.get("guidance", 1.2)), time.monotonic()
    samples = draw(model, n, solver="dpmpp-2m", steps=steps, guidance=guidance, batch=batch)
    drawn = time.monotonic()
    metrics = score(model, samples)
    show(metrics)
    met = judge(bars(guidance), {guidance: [metrics]})
    print(
        f"MNIST quality: step {model.step}, {n} samples, {steps} steps, {drawn - began:.0f} s of sampling and "
        f"{time.monotonic() - drawn:.0f} s of measuring; {machine(model.device)}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    words = arguments()
    raise SystemExit(main(trained_run(words.get("run", "runs/image-mnist"), "image-mnist"), words))
