"""Features for evaluation: a small classifier trained on the real training split, or principal components.

No downloaded weights: the classifier is trained once for a data set, in seconds for a small one, and kept beside it
with everything needed to tell whether it still belongs to that data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polydiff.core.adapter import Item
from polydiff.core.errors import DataError
from polydiff.core.evaluation.classifier import VERSION, FeatureClassifier, Settings, classify, train

log = logging.getLogger(__name__)


def obtain(
    store: Path | None,
    training: Sequence[Item],
    held_out: Sequence[Item] | None = None,
    *,
    seed: int = 0,
    settings: Settings | None = None,
) -> tuple[FeatureClassifier, dict[str, Any]]:
    """The classifier of a data set: loaded where one is stored for just this data, else trained and stored.

    It is stored as ``classifier-<key>.safetensors`` with a ``.json`` beside it; the key hashes the training items,
    settings, seed and code version. A stored one whose weights do not hash to the recorded value, or that cannot be read, is
    trained anew with a warning: training is deterministic, so nothing is lost. A folder that cannot be written to
    costs a warning and the training time again.

    Args:
        store: folder, made if missing; None to train without storing.
        training: items with a class condition ``settings.label``.
        held_out: items on which the accuracy is measured, if they have the condition; never trained on.
        seed: of initial weights, batches and augmentation.
        settings: None for those that suit the items' size, ``Settings.suited``.
    Returns:
        The classifier in eval mode and its facts, those of the ``.json``: accuracy (on the held-out items, None
        without), seed, settings, data_sha256, weights_sha256, classes, shape, version, n_train, n_held_out, held_out_sha256.
    Raises:
        DataError: no items, items without the label, or items of different shapes.
    """
    x = stack(training)
    settings = settings or Settings.suited(x.shape[1:])
    y = labels(training, settings.label)
    if y is None:
        raise DataError(f"a classifier needs the condition {settings.label!r} on every item to learn from")
    classes = int(y.max()) + 1
    identity = {
        "version": VERSION,
        "data_sha256": digest(x, y),
        "settings": asdict(settings),
        "seed": seed,
        "shape": list(x.shape[1:]),
        "classes": classes,
        "n_train": len(x),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = None if store is None else Path(store) / f"classifier-{key}.safetensors"
    model, stored = _load(path, FeatureClassifier(x.shape[1:], classes, settings)) if path else (None, None)
    if model is None:
        model = train(x, y, classes=classes, seed=seed, settings=settings)
    weights, truth = _weights(model), labels(held_out, settings.label)
    fresh = None if truth is None else stack(held_out or ())
    seen = None if truth is None or fresh is None else digest(fresh, truth)
    info = {
        **identity,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "n_held_out": len(held_out or ()),
        "held_out_sha256": seen,
        "accuracy": None,
    }
    if fresh is not None and truth is not None:
        is_known = stored is not None and stored.get("held_out_sha256") == seen
        info["accuracy"] = stored["accuracy"] if is_known and stored else _accuracy(model, fresh, truth)
    if path and info != stored:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if stored is None:
                _write(path, weights)
            _write(path.with_suffix(".json"), json.dumps(info, indent=2, sort_keys=True).encode() + b"\n")
        except OSError as error:
            log.warning("the classifier cannot be stored in %s (%s): it is trained again next time", store, error)
    return model, info


def principal(train: Tensor, components: int = 64) -> Callable[[Tensor], Tensor]:
    """Fit principal components; the features for data without classes, on which no classifier can be trained.

    Args:
        train: (n, *dims), fitted on at most 4096 of them, evenly spaced.
        components: how many at most; there are never more than n or than elements.
    Returns:
        The function (b, *dims) -> (b, components): projections, with unit variance on average over ``train``.
    """
    x = train[:: -(-len(train) // 4096)].flatten(1).double()
    mean = x.mean(0)
    x = x - mean
    if min(x.shape) > 16 * components:  # then a decomposition of the smaller product is many times faster
        is_tall = x.shape[0] >= x.shape[1]
        squares, vectors = torch.linalg.eigh(x.T @ x if is_tall else x @ x.T)
        values, basis = squares.flip(0)[:components].clamp_min(0).sqrt(), vectors.flip(1)[:, :components].T
        basis = basis if is_tall else torch.nn.functional.normalize(basis @ x, dim=1)
    else:
        _, values, basis = torch.linalg.svd(x, full_matrices=False)
    basis = basis[:components]
    scale = (values[:components].square().mean() / max(len(x) - 1, 1)).sqrt().clamp_min(1e-12)
    return lambda y: (y.flatten(1).double() - mean) @ basis.T / scale


def stack(items: Sequence[Item]) -> Tensor:
    """States of items as one tensor (n, *dims).

    Raises:
        DataError: no items, states that are not tensors of one shape, or a value that is not finite.
    """
    shapes = {tuple(item.x.shape) if isinstance(item.x, Tensor) else None for item in items}
    if len(shapes) != 1 or None in shapes:
        what = "no items" if not items else f"items of shapes {sorted(map(str, shapes))}"
        raise DataError(f"these measures need items of one shape, got {what}")
    x = torch.stack([item.x for item in items if isinstance(item.x, Tensor)]).float()
    if not bool(x.isfinite().all()):
        bad = int((~x.flatten(1).isfinite()).any(1).nonzero()[0])
        raise DataError(f"item {bad} ({items[bad].id!r}) has values that are not finite: it cannot be evaluated")
    return x


def labels(items: Sequence[Item] | None, name: str = "label") -> Tensor | None:
    """Class of each item (n,) int64; None where there are no items or one of them has no such condition."""
    if not items or any(name not in item.cond for item in items):
        return None
    return torch.stack([torch.as_tensor(item.cond[name]) for item in items]).long()


def digest(*tensors: Tensor) -> str:
    """SHA-256 of tensors: their types, shapes and numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def remembered(
    store: Path | None, name: str, identity: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors that are computed once and then kept in a folder, as ``<name>-<key>.safetensors``.

    A file that cannot be read, or whose tensors are not those that were stored, is computed anew with a warning.

    Args:
        store: folder, made if missing; None to compute always.
        name: what they are.
        identity: everything they depend on, JSON-able; the key is its hash, with ``classifier.VERSION``.
        compute: makes them.
    """
    if store is None:
        return compute()
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    versioned = {"version": VERSION, "identity": identity}
    key = hashlib.sha256(json.dumps(versioned, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(store) / f"{name}-{key}.safetensors"
    if path.exists():
        try:
            tensors = load(path.read_bytes())
            stamp = bytes(tensors.pop("stamp").tolist()).decode()
            if stamp != digest(*(tensors[key] for key in sorted(tensors))):
                raise ValueError("it is not what was stored")
            return tensors
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            log.warning("%s is not used (%s): computing it anew", path.name, error)
    tensors = compute()
    stamp = digest(*(tensors[key] for key in sorted(tensors)))
    stamped = {**tensors, "stamp": torch.tensor(list(stamp.encode()), dtype=torch.uint8)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, save({name: value.contiguous() for name, value in stamped.items()}))
    except OSError as error:
        log.warning("%s cannot be stored in %s (%s): it is computed again next time", name, store, error)
    return tensors


def _weights(model: nn.Module) -> bytes:
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in model.state_dict().items()})


def _accuracy(model: FeatureClassifier, x: Tensor, y: Tensor) -> float:
    return float((classify(model, x) == y).double().mean())


def _load(path: Path, model: FeatureClassifier) -> tuple[FeatureClassifier, dict[str, Any]] | tuple[None, None]:
    """The model with the stored weights, in eval mode, and its facts; None where there are none or they were altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.exists():
        return None, None
    try:
        weights, info = path.read_bytes(), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if info["weights_sha256"] != hashlib.sha256(weights).hexdigest():
            raise ValueError("its weights are not the ones that were stored")
        model.load_state_dict(load(weights))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        log.warning("stored classifier %s is not used (%s): training it anew", path.name, error)
        return None, None
    return model.eval(), info


def _write(path: Path, content: bytes) -> None:
    """Write atomically: a reader sees the old file or the whole new one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
