"""What the contract tests share: an adapter, its small data set, its configurations, and its networks in a state that shows faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydiff.core import adapter as adapters
from polydiff.core.adapter import Adapter, Item
from polydiff.core.build import Built, build
from polydiff.core.denoiser import Denoiser
from polydiff.core.noise import Noise
from polydiff.core.tree import State, leaves, tree_map

GUIDE = "see docs/adding-a-modality.md"
ITEMS = 8


@dataclass(frozen=True)
class Case:
    """One adapter under test.

    Args:
        name: of the adapter.
        words: ``key=value`` that change its experiment.
        folder: for files; thrown away afterwards.
    """

    name: str
    words: tuple[str, ...]
    folder: Path

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter."""
        return adapters.load(self.name)

    @cached_property
    def point(self) -> EntryPoint | None:
        """The entry point by which it is installed; None for a folder of polydiff itself."""
        is_own = self.adapter is getattr(sys.modules.get(f"polydiff.modalities.{self.name}"), "ADAPTER", None)
        return None if is_own else next(p for p in entry_points(group=adapters.GROUP) if p.name == self.name)

    @cached_property
    def module(self) -> str:
        """The module that holds ``ADAPTER``."""
        return self.point.module if self.point else f"polydiff.modalities.{self.name}"

    @cached_property
    def experiments(self) -> list[dict[str, Any]]:
        """Configurations of this adapter's experiments, those on its own small data set first."""
        own = [config for config in _experiments().values() if config["adapter"] == self.name]
        assert own, (
            f"no experiment has adapter: {self.name}; ship a package of configurations with an experiment/<name>.yaml that "
            f'says so, and declare it under [project.entry-points."polydiff.configs"]; {GUIDE}'
        )
        return sorted(own, key=lambda config: config["data"]["name"] != self.adapter.default_data)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration that the tests take."""
        from polydiff.core.commands.compose import compose

        name = self.experiments[0]["experiment"]
        return compose([f"experiment={name}", "data.path=null", *self.words])

    @cached_property
    def path(self) -> Path:
        """File of the adapter's small data set."""
        from polydiff import data

        name = self.adapter.default_data
        assert name, (
            "ADAPTER.default_data is empty: name a small data set that needs no download, for tests and a first run"
        )
        entry = data.catalogue().get(name)
        return data.prepare(name, folder=self.folder) if entry and entry.embedded else data.locate(name)

    def dataset(self, split: str) -> Any:
        """A split of the small data set."""
        return self.adapter.dataset(self.path, split, **self.config["data"]["options"])

    @cached_property
    def train(self) -> Any:
        """The training split."""
        return self.dataset("train")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the data set says about itself, as a checkpoint gives it back."""
        return json.loads(json.dumps(self.train.facts))

    @cached_property
    def items(self) -> list[Item]:
        """A few real items of sizes as different as the first ones have."""
        items = sorted((self.train[i] for i in range(min(64, len(self.train)))), key=lambda item: _elements(item.x))
        assert len(items) >= ITEMS, (
            f"data set {self.adapter.default_data!r} has {len(items)} items, the tests need {ITEMS}"
        )
        return [items[i * (len(items) - 1) // (ITEMS - 1)] for i in range(ITEMS)]

    @cached_property
    def codec(self) -> Any:
        """The codec of the data set."""
        return self.adapter.codec(self.facts)

    def batch(self, items: Sequence[Item] | None = None) -> Item:
        """Items as one batch; all by default."""
        return self.adapter.collate(list(self.items if items is None else items))

    def build(
        self, network: str | None = None, redrawn: bool = True, facts: Mapping[str, Any] | None = None, **objective: Any
    ) -> Built:
        """Process, denoiser and objective of an experiment, in eval mode.

        Args:
            network: a name in the adapter's table; default: the experiment's.
            redrawn: move every parameter by a normal draw of standard deviation 0.1. Layers that start at zero would
                otherwise hide what the rest of the network does.
            facts: of the data; default: those of the data set.
            objective: changes to the section ``objective``.
        """
        config = {**self.config, "objective": {**self.config["objective"], **objective}}
        if network is not None and network != config["network"]["name"]:
            named = [other["network"] for other in self.experiments if other["network"]["name"] == network]
            config["network"] = named[0] if named else {"name": network}
        built = build(config, self.facts if facts is None else facts, seed=0)
        built.denoiser.eval()
        if redrawn:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in built.denoiser.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return built

    @cached_property
    def written(self) -> dict[str, list[Path]]:
        """Files of three items in each of the codec's formats."""
        return {name: self.codec.write(self.items[:3], self.folder / name, name) for name in self.codec.formats}

    @cached_property
    def fresh(self) -> dict[str, Any]:
        """What a new process imports with the adapter, and whether it then reads the files that were written."""
        from safetensors.torch import load_file

        out = self.folder / "read.safetensors"
        task = {
            "name": self.name,
            "module": self.module,
            "facts": self.facts,
            "files": {name: [str(path) for path in paths] for name, paths in self.written.items()},
            "out": str(out),
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        script = Path(__file__).with_name("fresh.py")
        done = subprocess.run(  # noqa: S603
            [sys.executable, str(script)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, f"a new process cannot use the adapter:\n{done.stderr}"
        return {**json.loads(done.stdout.splitlines()[-1]), "states": load_file(out)}


def noised(built: Built, item: Item) -> tuple[State, Tensor]:
    """States of a batch at times spread over the noise levels, and those times; equal items get equal noise."""
    n, axis = len(leaves(item.x)[0]), getattr(built.process, "mask_axis", 1)
    t = torch.linspace(0.2, 0.8, n, dtype=torch.float64) * (built.process.t_max - built.process.t_min)
    z = Noise(0, range(n), mask_axis=axis).draw(0, "contract", item.x, mask=item.mask)
    return built.process.perturb(item.x, built.process.t_min + t, z, item.mask), built.process.t_min + t


def update(
    denoiser: Denoiser, x_t: State, t: Tensor, mask: Tensor | None = None, cond: Any = None, present: Any = None
) -> State:
    """What the network itself returns when the denoiser is asked; fails if it is zero or not finite."""
    caught: list[State] = []
    hook = denoiser.network.register_forward_hook(lambda module, given, output: caught.append(output))
    with torch.no_grad():
        denoiser(x_t, t, mask, cond or {}, present or {})
    hook.remove()
    (output,) = caught
    for leaf in leaves(output):
        assert bool(leaf.isfinite().all()), "the network returns numbers that are not finite for a noised real batch"
        assert float(leaf.abs().max()) > 1e-3, (
            "the network returns zero although every parameter was redrawn: something multiplies its output by zero"
        )
    return output


def distance(x: State, y: State) -> float:
    """Largest difference in units of y's largest element, or of 1 if that is smaller."""
    pairs = zip(leaves(x), leaves(y), strict=True)
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)


def rows(item: Item, index: Any) -> Item:
    """Some rows of a batch."""
    mask = None if item.mask is None else item.mask[index]
    return Item(tree_map(lambda x: x[index], item.x), mask, {name: value[index] for name, value in item.cond.items()})


@cache
def _experiments() -> dict[str, dict[str, Any]]:
    from polydiff.core.commands.compose import choices, compose

    return {name: compose([f"experiment={name}", "data.path=null"]) for name in choices("experiment")}


def _elements(x: State) -> int:
    return sum(leaf.numel() for leaf in leaves(x))


def home(case: Case) -> Path:
    """The folder of the module that holds ``ADAPTER``."""
    return Path(str(import_module(case.module).__file__)).parent


def difference(x: State, y: State) -> float:
    """Largest absolute difference between the elements of two states, infinite where their shapes differ."""
    pairs = list(zip(leaves(x), leaves(y), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in pairs)
