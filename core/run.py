"""A training run, opened: its EMA denoiser, what it knows about its data, and samples from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polydiff.core.adapter import Adapter, Item
from polydiff.core.build import Built, build, check_stored, open_data, read_config
from polydiff.core.denoiser import Denoise, Denoiser
from polydiff.core.errors import CheckpointError, ConfigError, unknown
from polydiff.core.grids import as_grid
from polydiff.core.guidance import cfg
from polydiff.core.noise import Noise
from polydiff.core.request import Asked, Settings, asked, check_fields, positive, sampling_settings, whole
from polydiff.core.sampling import sample
from polydiff.core.solvers import Solver, resolve
from polydiff.core.tasks import Task, grid_of, grouped, guide_of, work, x_start_of
from polydiff.core.training import checkpoint as checkpoints
from polydiff.core.training.state import load_weights
from polydiff.core.tree import State, leaves, move, tree_map

MOST_SAMPLES = 1_000_000  # in one call, and
MOST_NUMBERS = 2**31  # in all of them together: 8 GiB


class Run:
    """A run folder whose newest valid checkpoint has been loaded; use :meth:`load` to get one.

    Attributes:
        path: the run folder.
        config: the resolved configuration, a plain dictionary.
        facts: what the data set said about itself: size, classes, sigma_data.
        adapter, process, denoiser: the objects built from them; the denoiser has EMA weights, in eval mode, frozen.
        step: the checkpoint's step.
        checkpoint_path: its folder.
        device: where the denoiser is.
    """

    def __init__(self, path: Path, config: dict[str, Any], facts: dict[str, Any], built: Built, step: int) -> None:
        self.path, self.config, self.facts, self.step = path, config, facts, step
        self.adapter: Adapter = built.adapter
        self.process: Any = built.process
        self.denoiser: Denoiser = built.denoiser
        self.checkpoint_path = path
        self.device = torch.device("cpu")

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", network: str | None = None) -> Run:
        """Open a run.

        Args:
            path: a folder that ``polydiff train`` wrote, or one of its ``checkpoints/step-XXXXXXXX``.
            device: ``auto`` (CUDA where there is one), or a torch device.
            network: the import path of a network that is in no adapter's table, when the run was trained with one.

        Raises:
            CheckpointError: no folder, no valid checkpoint, or one that was altered.
            ConfigError: its configuration names something that does not exist here.
        """
        if not isinstance(path, str | Path):
            raise CheckpointError(f"a run is opened by the path of its folder, not by {path!r}")
        path = check_folder(Path(path))
        if (path / "manifest.json").is_file():
            found, path = checkpoints.load(path), path.resolve().parents[1]
        else:
            newest = checkpoints.newest(path / "checkpoints")
            if newest is None:
                raise CheckpointError(f"{path}: no checkpoint in this folder; a run saves one every trainer.save_every")
            found = newest
        if (path / "config.yaml").is_file() and network is None:
            read_config(path / "config.yaml")
        config = check_stored(found.config, found.path, network)
        facts = found.state.get("facts")
        if not isinstance(facts, dict):
            raise CheckpointError(f"{found.path}: its state.json has no facts about the data")
        built = build(config, facts, local=network is not None)
        run = cls(path, config, facts, built, found.step)
        run.device = pick_device(device)
        load_weights(run.denoiser, found.ema, f"{found.path}/ema.safetensors")
        run.denoiser.to(run.device).eval().requires_grad_(False)
        run.checkpoint_path = found.path
        return run

    def settings(
        self,
        solver: str | Solver | None = None,
        grid: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Settings:
        """The run's own sampling settings with those given put over them; raises ConfigError for bad ones."""
        return sampling_settings(self.config["sampling"], solver, grid, steps, guidance)

    def sample(
        self,
        n: int,
        cond: Mapping[str, Any] | None = None,
        size: Mapping[str, Any] | None = None,
        solver: str | Solver | None = None,
        steps: int | None = None,
        grid: str | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch: int = 64,
        trajectory: int = 0,
        deterministic_batch: int | None = None,
        advance: Callable[[int], None] | None = None,
        task: str | None = None,
        input: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[Item]:
        """Draw samples.

        Item i draws its own noise from (seed, i), so that it depends neither on n nor on ``batch``; what it becomes is
        then bit-identical at equal batch size and equal within rounding otherwise.

        Args:
            n: how many.
            cond: conditions by name: a class as index or name, a tensor, a file, or a folder of files where the adapter
                reads them; a list that cycles over the items; None for without.
            size: changes to the size that training had, e.g. ``{"height": 16}``.
            solver: a name in ``NAMES`` or a Solver; it, steps, grid and guidance default to the run's ``sampling`` section.
            seed: of all draws.
            batch: items in a network call.
            trajectory: keep this many predicted clean states of each item in ``meta["trajectory"]``, (k, *dims).
            deterministic_batch: pad every network call to this many items: bit-identical for any n.
            advance: called with the number of items after each batch of them.
            task: name of one of the adapter's tasks.
            input: what it works on: an Item, a file, a folder, or a list of Items and files, which cycles.
            options: of the task by key.

        Returns:
            Items in normalised form, on the CPU; ``run.adapter.codec(run.facts).decode`` turns them into raw arrays. What a
            task was given is ``meta["given"]``, an Item, and what it notes is ``meta["task"]``.

        Raises:
            ConfigError: a number below 1, more samples than ``check_count`` allows, a label out of range, an unknown
                name, guidance without a condition; or what the task says of its input and options.
            DataError: an input that cannot be read.
            DivergenceError: a sample is not finite.
        """
        settings = self.settings(solver, grid, steps, guidance)
        width = batch if deterministic_batch is None else deterministic_batch
        positive(**{"n": n, "batch" if deterministic_batch is None else "deterministic_batch": width})
        whole(seed=seed, trajectory=trajectory)
        self.check_count(n, size)
        wanted = self._asked(cond or {}, n, size or {})
        values = [item.cond for item in wanted]
        if task is None and (input is not None or options):
            raise ConfigError("input and its options need a task: give task=NAME")
        job = None if task is None else work(self, task, input, options or {}, size or {}, seed)
        if guidance is not None and guidance != 1 and not any(value.keys() - self._settings for value in values):
            able = [f"cond.{name}=..." for name in self.denoiser.conditions if name not in self._settings]
            raise ConfigError(
                f"guidance={guidance} needs a condition to guide towards: {', '.join(able) or '(this model has none)'}"
            )
        items: dict[int, Item] = {}
        for chunk in _chunks([frozenset(value) for value in values], width):
            tasks = [Task() if job is None else job(i) for i in chunk]
            for rows in grouped(tasks, resolve(settings.solver)):
                indices = [chunk[row] for row in rows]
                spare = 0 if deterministic_batch is None else width - len(rows)
                designs = [tasks[row] for row in rows + rows[-1:] * spare]
                padded = indices + indices[-1:] * spare
                blanks = [
                    self._blank(size or {}, {**values[i], **one.cond}, one)
                    for i, one in zip(padded, designs, strict=True)
                ]
                x, frames = self._draw(blanks, designs, padded, settings, seed, trajectory)
                for row, i in enumerate(indices):
                    like = blanks[row].x
                    meta: dict[str, Any] = {"files": wanted[i].files} if wanted[i].files else {}
                    if frames:
                        own = [_cut(frame, row, like) for frame in frames]
                        meta["trajectory"] = tree_map(lambda *leaf: torch.stack(leaf), *own)
                    if job is not None:
                        meta |= {"task": designs[row].meta, "given": designs[row].reference}
                    items[i] = Item(_cut(x, row, like), blanks[row].mask, blanks[row].cond, f"sample-{i:05d}", meta)
                if advance is not None:
                    advance(len(indices))
        return [items[i] for i in range(n)]

    def conditions(self, cond: Mapping[str, Any], n: int) -> list[dict[str, Tensor]]:
        """Conditions of n items; see :meth:`sample` for what ``cond`` may hold."""
        return [item.cond for item in self._asked(cond, n, {})]

    def check_count(self, n: int, size: Mapping[str, Any] | None = None) -> None:
        """Refuse more samples than one call may return: 1,000,000, and 2^31 numbers (8 GiB) in all of them together.

        Raises:
            ConfigError: naming how many of this size are allowed.
        """
        numbers = sum(leaf.numel() for leaf in leaves(self._blank(size or {}, {}).x))
        most = min(MOST_SAMPLES, max(1, MOST_NUMBERS // max(1, numbers)))
        if n > most:
            raise ConfigError(
                f"n={n} must be at most {most} for samples of this size: draw more in parts, by their seeds"
            )

    def dataset(self, split: str, path: str | Path | None = None) -> Any:
        """The data set this run was trained on, one split of it.

        Args:
            split: ``train``, ``test`` or ``valid``.
            path: its file, when it is no longer where the configuration says.
        """
        return open_data(self.config, split, None if path is None else Path(path))

    @property
    def _settings(self) -> set[str]:
        """Conditions that are never absent, so that there is nothing to guide towards."""
        return {name for name, condition in self.denoiser.conditions.items() if condition.kind == "setting"}

    def _asked(self, cond: Mapping[str, Any], n: int, size: Mapping[str, Any]) -> list[Asked]:
        own = {**(self.facts.get("size") or {}), **size}
        return asked(self.denoiser.conditions, cond, n, self.facts, own)

    def _blank(self, size: Mapping[str, Any], cond: dict[str, Tensor], task: Task | None = None) -> Item:
        own = self.facts.get("size") or {}
        if not isinstance(size, Mapping):
            raise ConfigError(f"size={size!r} must be a mapping of numbers by name: {', '.join(own)}")
        for name in size:
            if name not in own:
                raise unknown("size", f"size.{name}", [f"size.{key}" for key in own])
        like, mask = self.adapter.shape({**own, **size}, cond)
        if task is not None:
            like = next((own for own in (task.x_start, task.like) if own is not None), like)
            mask = mask if task.mask is None else task.mask
        check_fields(self.denoiser.conditions, cond, like)
        return Item(like, mask, cond)

    def _draw(
        self,
        blanks: Sequence[Item],
        tasks: Sequence[Task],
        indices: list[int],
        settings: Settings,
        seed: int,
        trajectory: int,
    ) -> tuple[State, list[State]]:
        batch = self.adapter.collate(list(blanks))
        x, mask, cond = (move(part, self.device) for part in (batch.x, batch.mask, batch.cond))
        noise = Noise(seed, indices, mask_axis=getattr(self.process, "mask_axis", 1))
        solver: Solver = resolve(settings.solver) if tasks[0].wrap is None else tasks[0].wrap(resolve(settings.solver))
        grid = as_grid(grid_of(tasks[0], settings.grid, settings.steps, self.process), settings.steps, self.process)
        steps = len(solver.plan(self.process, grid))  # a solver may go through intervals several times
        wanted = set(torch.linspace(0, steps - 1, trajectory).round().int().tolist()) if trajectory > 0 else set()
        frames: list[State] = []

        def keep(k: int, _t: Any, _x: State, x0_hat: State | None) -> None:
            if k in wanted and x0_hat is not None:
                frames.append(move(x0_hat, "cpu"))

        x = sample(
            guide_of(tasks, self.device)(self._guided(mask, cond, settings)),
            self.process,
            x_start_of(tasks[0], self.process, x, noise, mask),
            solver=solver,
            grid=grid,
            mask=mask,
            fixed=cond.get("fixed"),
            generator=noise,
            callback=keep if wanted else None,
        )
        return move(x, "cpu"), frames

    def _guided(self, mask: Tensor | None, cond: dict[str, Tensor], settings: Settings) -> Denoise:
        conditional = self.denoiser.bind(mask, cond)
        if settings.guidance == 1 or not cond:
            return conditional
        kept = {name: cond[name] for name in cond.keys() & self._settings}
        return cfg(conditional, self.denoiser.bind(mask, kept), settings.guidance, settings.interval)


def check_folder(path: Path) -> Path:
    """The folder of a run, if there is one; else CheckpointError says how to make it."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run; train one with: polydiff train experiment=NAME run={path}")
    return path


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; any other name is torch's.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # a device without numbers, such as meta, is none
        return torch.device(name)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error


def _chunks(kinds: Sequence[frozenset[str]], width: int) -> Iterator[list[int]]:
    """Item indices in chunks of at most ``width``; items of a chunk have the same conditions present."""
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        for start in range(0, len(members), width):
            yield members[start : start + width]


def _cut(state: State, row: int, like: State) -> State:
    """One item of a batch at its own size, without the padding."""
    return tree_map(lambda x, own: x[row][tuple(slice(0, n) for n in own.shape)].clone(), state, like)
