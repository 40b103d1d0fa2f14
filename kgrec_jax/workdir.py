"""The run folder: what each stage leaves, where the next finds it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

from kgrec_jax.config import Experiment, to_json
from kgrec_jax.data.dataset import Dataset, Split
from kgrec_jax.data.importers.auto import read_dataset, split_config
from kgrec_jax.data.interactions import load_split, make_split, save_split
from kgrec_jax.errors import KgrecError
from kgrec_jax.machine import cpu_threads
from kgrec_jax.sharding import make_mesh
from kgrec_jax.tracking import Tracker, write_json

FORMAT_VERSION = 1
STAGES = ("pretrain", "graph", "fuse")
DOMAINS = "domains.json"  # config and domains of a run of several, in its folder
_FREE = ("mesh", "data.path")  # what may differ when a run goes on, beside logging; data are compared by content


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two resolved configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        return [d for name in names for d in differences(old.get(name), new.get(name), f"{prefix}{name}.")]
    return [] if old == new else [prefix.rstrip(".")]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder, its data, its devices."""

    path: pathlib.Path
    experiment: Experiment
    tracker: Tracker

    @staticmethod
    def open(path: pathlib.Path | str, experiment: Experiment, quiet: bool = False) -> Run:
        """Begins a run in an empty folder or goes on with one of the same config.

        KgrecError names the fields that differ, a folder that holds something else or cannot be made, an
        experiment.json that cannot be read. A machine that differs from the one the run was begun on is said in one
        line. A folder in which nothing was computed yet (its data could not be read, say) takes any config.
        """
        path = pathlib.Path(path)
        resolved, machine = to_json(experiment), _machine(experiment)
        held, run = path / "experiment.json", Run(path, experiment, Tracker(path, quiet))
        before = read_experiment_json(path) if held.is_file() else {}
        if run.begun and before:
            changed = [d for d in differences(before["config"], resolved) if not _is_free(d)]
            if changed:
                raise KgrecError(f"{held}: found a run with another {', '.join(changed[:6])}, expected the same "
                                 "config; choose another --workdir or the settings that it was begun with")
            other = [f"{name.replace('_', ' ')} {_words(machine[name])} instead of {_words(before[name])}"
                     for name in machine if name != "python" and before.get(name, machine[name]) != machine[name]]
            if other and not run.finished:
                run.tracker.say(f"note: the run goes on with {', '.join(other)}: results will differ in the last bits "
                                "from an uninterrupted run's")
            return run
        if path.exists() and not path.is_dir():
            raise KgrecError(f"{path}: found a file, expected a run folder or a new name; choose another --workdir")
        # A hidden file is what a run that was killed at its very beginning leaves.
        if not before and path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
            raise KgrecError(f"{path}: found files but no experiment.json, expected a run folder or an empty one; "
                             "choose another --workdir")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KgrecError(f"{path}: found no way to make the folder ({error.strerror}), expected a place that can "
                             "be written; choose another --workdir") from None
        write_json(held, {"format_version": FORMAT_VERSION, "config": resolved, **machine})
        return run

    @property
    def begun(self) -> bool:
        """Whether anything was computed that a change of the config would make wrong."""
        folders = [self.path / name for name in ("split", *STAGES)]
        return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)

    @property
    def finished(self) -> bool:
        """Whether every stage is done and the report is written."""
        return self.done(STAGES[-1]) is not None and (self.path / "report.json").is_file()

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data set; its content must be what the run was begun with."""
        return self.with_counts_of(read_dataset(self.experiment.data, self.tracker.say))

    def with_counts_of(self, found: Dataset) -> Dataset:
        """`found`, once its counts are in dataset.json; KgrecError where the run was begun with other data."""
        counts = {"format_version": FORMAT_VERSION, "name": found.name, "hash": found.content_hash(),
                  "users": found.num_users, "items": found.num_items, "interactions": len(found.interactions),
                  "entities": found.graph.num_entities, "triples": len(found.graph.triples),
                  "notes": list(found.notes)}
        held = self.path / "dataset.json"
        if self.begun and held.is_file() and read_json(held).get("hash") != counts["hash"]:
            raise KgrecError(f"data.path: found other data than the run in {self.path} was begun with; "
                             "choose another --workdir")
        write_json(held, counts)
        return found

    @functools.cached_property
    def split(self) -> Split:
        """The split, frozen to the run folder the first time."""
        folder = self.path / "split"
        if (folder / "split.json").is_file():
            return load_split(folder, self.dataset)
        split = make_split(self.dataset, split_config(self.experiment.data))
        save_split(split, self.dataset, folder)
        return split

    @functools.cached_property
    def mesh(self) -> Any:
        """The devices."""
        return make_mesh(self.experiment.mesh)

    def stage(self, name: str) -> pathlib.Path:
        """The folder of a stage."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def done(self, name: str) -> dict | None:
        """What a finished stage reported; None before it is finished."""
        file = self.path / name / "done.json"
        return read_json(file) if file.is_file() else None

    def ensure(self, name: str, stage: Callable[[Experiment, Run], dict]) -> None:
        """Runs a stage that is not finished, and marks it with its results and seconds."""
        if self.done(name) is None:
            began = time.monotonic()
            results = stage(self.experiment, self)
            if "skipped" in results:
                self.tracker.say(f"{name}: skipped: {results['skipped']}")
            self.finish(name, {**results, "wall_seconds": time.monotonic() - began})

    def finish(self, name: str, results: dict) -> None:
        """Marks a stage as finished."""
        write_json(self.stage(name) / "done.json", {"format_version": FORMAT_VERSION, **results})


@dataclasses.dataclass(frozen=True)
class VariantRun(Run):
    """A run beside another, with its data and split; the stages in `shared` are those of other runs."""

    base: Run
    shared: Mapping[str, Run]  # stage -> the run whose stage it is

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The base's, read once."""
        return self.base.dataset

    @functools.cached_property
    def split(self) -> Split:
        """The base's."""
        return self.base.split

    def stage(self, name: str) -> pathlib.Path:
        """The folder of a stage, another run's where it is shared."""
        return self.shared[name].stage(name) if name in self.shared else super().stage(name)

    def done(self, name: str) -> dict | None:
        """What a finished stage reported, another run's where it is shared."""
        return self.shared[name].done(name) if name in self.shared else super().done(name)


def read_experiment_json(path: pathlib.Path) -> dict:
    """experiment.json of a run folder."""
    file = path / "experiment.json"
    if not file.is_file():
        at = path.resolve()
        whole = next((p for p in (at, *at.parents[:2]) if (p / DOMAINS).is_file()), None)
        if whole is not None:  # its pieces are runs that only `kgrec domains` can go on with
            alone = whole / "alone" / at.name
            raise KgrecError(f"{path}: found what kgrec domains made, expected the run of one data set; use "
                             f"{alone if alone.is_dir() else alone.with_name('NAME')}, the domain's ordinary run; the "
                             f"figures of all domains are in {whole / 'report.md'}")
        raise KgrecError(f"{path}: found no experiment.json, expected a run folder; begin one with "
                         f"kgrec run CONFIG --workdir {path}")
    held = read_json(file)
    if held.get("format_version") != FORMAT_VERSION:
        raise KgrecError(f"{file}: found format version {held.get('format_version')}, expected {FORMAT_VERSION}; "
                         "run it again in a new folder")
    if not isinstance(held.get("config"), dict):
        raise KgrecError(f"{file}: found no config, expected the fields of a run; run it again in a new folder")
    return held


def read_json(file: pathlib.Path) -> dict:
    """The object of a file that a run wrote; KgrecError where it is damaged."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KgrecError(f"{file}: found a damaged file ({error}), expected JSON that a run wrote; restore it or "
                         "choose another --workdir") from None
    if not isinstance(held, dict):
        raise KgrecError(f"{file}: found a JSON {type(held).__name__}, expected an object; choose another --workdir")
    return held


def _is_free(field: str) -> bool:
    return field.endswith(".log_every") or any(field == f or field.startswith(f + ".") for f in _FREE)


def _machine(experiment: Experiment) -> dict[str, Any]:
    """What the last bits of a run's results depend on beside its config and its data."""
    import jax

    mesh = make_mesh(experiment.mesh)
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    return {"cpu_threads": cpu_threads(), "python": platform.python_version(), "jax": jax.__version__,
            "devices": f"{mesh.size} x {', '.join(kinds)}", "mesh": dict(mesh.shape)}


def _words(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
