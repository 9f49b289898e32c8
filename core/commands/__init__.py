"""The verbs of the ``polydiff`` command: name -> (one line of help, usage). One module each, imported when used."""

from __future__ import annotations

VERBS: dict[str, tuple[str, str]] = {
    "list": ("experiments, adapters, solvers, grids, schedules and data sets", "[WHAT]"),
    "data": ("prepare a data set: download or convert, verify, write one HDF5 file", "NAME [source=PATH]"),
    "train": ("train a model, or go on with a run", "experiment=NAME [group=choice key=value ...] [run=DIR] [-m]"),
    "sample": (
        "draw samples from a run and write them as files",
        "run=DIR [n=16 steps=20 cond.label=3 task=NAME input=FILE ...]",
    ),
    "evaluate": ("compare samples with real data", "run=DIR | samples=DIR reference=DIR adapter=NAME"),
    "report": ("write one offline HTML page about a run", "run=DIR"),
    "doctor": ("check versions, devices, optional parts, data and runs", "[data=PATH] [run=DIR]"),
}
