"""FID and KID on Inception features, through torch-fidelity and its weights file where both are on the machine."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydiff.core.adapter import Metric
from polydiff.core.evaluation.bootstrap import interval
from polydiff.core.evaluation.features import digest, remembered
from polydiff.core.evaluation.frechet import KernelStatistic, Moments, frechet_distance, frechet_interval, moments
from polydiff.core.evaluation.quality import LIMIT, matched, subset
from polydiff.modalities.image.codec import Codec

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
BATCH = 64


def ready(options: Mapping[str, Any]) -> Path | str:
    """The weights file to use, or why there are no such measures: one line, empty when they were not asked for.

    Nothing is downloaded. The file must be what its name says: the name ends with the first digits of its SHA-256.
    No fault ends an evaluation whose samples are drawn already: it costs these two measures.

    Args:
        options: ``inception`` (``auto`` or ``off``; absent is off) and ``inception_weights``, a file, or None to look
            where torch keeps downloads.
    """
    if options.get("inception", "off") == "off":
        return ""
    given = options.get("inception_weights")
    file = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if importlib.util.find_spec("torch_fidelity") is None:
        return "no FID: torch-fidelity is not installed; get it with: pip install 'polydiff[fid]'"
    if not file.is_file():
        return f"no FID: the Inception weights are not on this machine; save {ADDRESS} as {file}"
    said, found = re.search(r"-([0-9a-f]{8,64})\.pth$", file.name), sha256(file)
    if said is None or not found.startswith(said[1]):
        return (
            f"no FID: the SHA-256 of {file} begins with {found[:8]}, which its name does not end with; save {ADDRESS}"
        )
    return file


def sha256(file: Path) -> str:
    """Digest of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def extractor(weights: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """The function from pictures (n, c, h, w) in [-1, 1], c = 1 or 3, to their Inception features (n, 2048) float32.

    Pictures are rounded to 8 bits, as they are when written; grey ones are repeated to three channels.

    Args:
        weights: what ``ready`` found; torch-fidelity reads it.
        device: where to compute.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    network, codec = network.to(device), Codec()

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        parts = []
        for part in x.split(BATCH):
            pixels = torch.from_numpy(codec.decode(part)).movedim(-1, 1)
            parts.append(network(pixels.expand(-1, 3, -1, -1).contiguous().to(device))[0].cpu())
        return torch.cat(parts)

    return features


def inception_scores(
    x: Tensor,
    train: Tensor,
    fresh: Tensor | None,
    weights: Path,
    *,
    classes: Tensor | None = None,
    available: Tensor | None = None,
    seed: int = 0,
    store: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Metric]:
    """``fid`` and ``kid`` of samples against the whole training split; ``real`` is the held-out split against the same.

    The features of real pictures are computed once and kept in ``store``. The kernel distance takes all samples and at
    most 10,000 training pictures at once, where papers average it over small subsets: the same expectation, less
    scatter. The FID is biased upwards by O(1/n): compare it at equal n only.

    Args:
        x, train, fresh: samples, training and held-out pictures, (n, c, h, w) in [-1, 1].
        weights: see ``extractor``.
        classes, available: classes of the samples and of the held-out pictures, see ``quality.matched``.
        seed: of the intervals and of what is thinned.
        store: folder, or None.
        device: where to compute.
    """
    features = extractor(weights, device)

    def compute() -> dict[str, Tensor]:
        real = features(train)
        fitted = moments(real)
        known = {"mean": fitted.mean, "cov": fitted.cov, "thin": subset(real, LIMIT, 0)}
        return known if fresh is None else {**known, "fresh": features(fresh)}

    seen = None if fresh is None else digest(fresh)
    identity = {"weights": sha256(weights), "train": digest(train), "held_out": seen}
    known, own = remembered(store, "inception", identity, compute), features(x)
    fitted, thin, n = Moments(known["mean"], known["cov"], len(train)), known["thin"], len(x)
    kernel = KernelStatistic(own, thin)
    fid, kid = frechet_distance(own, fitted), kernel(torch.arange(n))
    low, high = frechet_interval(own, fitted, strata=classes) if n > own.shape[1] else (None, None)
    real: tuple[float | None, float | None] = (None, None)
    chosen = None if fresh is None else known["fresh"][matched(classes, available, n, len(fresh), seed)]
    if chosen is not None and len(chosen) > 1:  # there may be none of the classes of the samples
        real = (
            frechet_distance(chosen, fitted),
            KernelStatistic(chosen, thin, reference=kernel.reference)(torch.arange(len(chosen))),
        )
    ends = interval(kernel, n, seed=seed, estimate=kid, strata=classes)
    return {"fid": Metric(fid, low, high, real[0], n), "kid": Metric(kid, *ends, real[1], n)}
