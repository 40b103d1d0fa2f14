"""The run folder: what each stage leaves, where the next finds it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import platform
from typing import Any

from kgrec_jax.config import Experiment, to_json
from kgrec_jax.data.dataset import Dataset, Split
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.interactions import load_split, make_split, save_split
from kgrec_jax.errors import KgrecError
from kgrec_jax.sharding import make_mesh
from kgrec_jax.tracking import Tracker, write_json

FORMAT_VERSION = 1
STAGES = ("pretrain", "graph", "fuse")
_FREE = ("mesh", "data.path")  # what may differ when a run goes on; the data are compared by content


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
        """Begins a run in an empty folder or goes on with one of the same config; KgrecError names the fields that differ."""
        path = pathlib.Path(path)
        resolved = to_json(experiment)
        held = path / "experiment.json"
        if held.is_file():
            before = read_experiment_json(path)["config"]
            changed = [d for d in differences(before, resolved) if not any(d == f or d.startswith(f + ".") for f in _FREE)]
            if changed:
                raise KgrecError(f"{held}: found a run with another {', '.join(changed[:6])}, expected the same config; "
                                 "choose another --workdir or the settings that it was begun with")
        elif path.is_dir() and any(path.iterdir()):
            raise KgrecError(f"{path}: found files but no experiment.json, expected a run folder or an empty one; choose another --workdir")
        else:
            path.mkdir(parents=True, exist_ok=True)
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            write_json(held, {"format_version": FORMAT_VERSION, "config": resolved, "cpu_threads": threads,
                              "python": platform.python_version()})
        return Run(path, experiment, Tracker(path, quiet))

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data set; its content must be what the run was begun with."""
        found = read_folder(self.experiment.data.path, self.experiment.data)
        counts = {"format_version": FORMAT_VERSION, "name": found.name, "hash": found.content_hash(), "users": found.num_users,
                  "items": found.num_items, "interactions": len(found.interactions), "entities": found.graph.num_entities,
                  "triples": len(found.graph.triples), "notes": list(found.notes)}
        held = self.path / "dataset.json"
        if held.is_file() and json.loads(held.read_text(encoding="utf-8"))["hash"] != counts["hash"]:
            raise KgrecError(f"data.path: found other data than the run in {self.path} was begun with; choose another --workdir")
        write_json(held, counts)
        return found

    @functools.cached_property
    def split(self) -> Split:
        """The split, frozen to the run folder the first time."""
        folder = self.path / "split"
        if (folder / "split.json").is_file():
            return load_split(folder, self.dataset)
        split = make_split(self.dataset, self.experiment.data.split)
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
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def finish(self, name: str, results: dict) -> None:
        """Marks a stage as finished."""
        write_json(self.stage(name) / "done.json", {"format_version": FORMAT_VERSION, **results})


def read_experiment_json(path: pathlib.Path) -> dict:
    """experiment.json of a run folder."""
    file = path / "experiment.json"
    if not file.is_file():
        raise KgrecError(f"{path}: found no experiment.json, expected a run folder; begin one with kgrec run CONFIG --workdir {path}")
    held = json.loads(file.read_text(encoding="utf-8"))
    if held.get("format_version") != FORMAT_VERSION:
        raise KgrecError(f"{file}: found format version {held.get('format_version')}, expected {FORMAT_VERSION}; run it again in a new folder")
    return held
