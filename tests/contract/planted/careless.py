"""An adapter with faults in everything but its network: eager imports, lost digits, other people's servers."""

from dataclasses import replace
from pathlib import Path

import h5py
import torch

from polydiff.core.adapter import Item, Metric
from polydiff.core.tasks import Task
from polydiff.modalities.toy2d import ADAPTER as TOY2D
from polydiff.modalities.toy2d.codec import Codec


class Careless(Codec):
    formats = ("csv",)  # type: ignore[assignment]

    def encode(self, raw):
        return super().encode(raw).mul(10).round().div(10)

    def read(self, path):
        return self.decode(torch.tensor([float(number) for number in Path(path).read_text().split()[1].split(",")]))


def shape(size, cond):
    return torch.zeros(2), None


def metrics(samples, reference, options):
    return {"luck": Metric(0.5, n=h5py.version.version_tuple.major)}


def view(samples, reference):
    fragment = TOY2D.view(samples, reference)
    return fragment._replace(html=fragment.html + '<script src="https://cdn.example/plot.js"></script>')


def forgets(input, options, run, noise, k):
    return Task(reference=Item(input.x, meta={"kept": torch.tensor([True, False])}))


def draws(input, options, run, noise, k):
    return Task(x_start=input.x + torch.randn(2), reference=input)


ADAPTER = replace(
    TOY2D,
    name="careless",
    codec=Careless,
    shape=shape,
    tasks={**TOY2D.tasks, "forgets": forgets, "draws": draws},
    metrics=metrics,
    view=view,
)
