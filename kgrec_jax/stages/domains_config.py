"""The config of a run of several domains, what it is checked for, and the folders that it reads and writes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from kgrec_jax import pipeline
from kgrec_jax.config import Experiment, to_json
from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.folder import expanded
from kgrec_jax.data.importers.auto import read_dataset
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.domain_towers import READS, HeadsConfig
from kgrec_jax.stages.bounds import check_bounds
from kgrec_jax.tracking import Tracker, write_json
from kgrec_jax.workdir import DOMAINS, FORMAT_VERSION, differences, read_json

# What may differ when a run goes on, beside logging; a control that was left out can still be run.
_FREE = ("mesh", "domains.control")


@dataclasses.dataclass(frozen=True)
class Config:
    """What domains share and what each has of its own; towers, steps and gate are those of `fuse`."""

    heads: HeadsConfig = HeadsConfig()  # of users and items, in each domain
    # whether the shared towers with their heads are also trained on each domain alone: what they are then ahead by is
    # owed to the other domains, and not to another architecture. It takes the towers' and tables' training once more.
    control: bool = True


@dataclasses.dataclass(frozen=True)
class DomainsExperiment(Experiment):
    """An experiment whose data are several folders."""

    domains: Config = Config()  # heads over the shared towers

    @property
    def ordinary(self) -> Experiment:
        """Without what is about several domains."""
        return Experiment(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Experiment)})

    @staticmethod
    def of(experiment: Experiment, cfg: Config = Config()) -> DomainsExperiment:
        """An experiment, for several domains."""
        return DomainsExperiment(**{f.name: getattr(experiment, f.name) for f in dataclasses.fields(Experiment)},
                                 domains=cfg)


def check(experiment: DomainsExperiment) -> None:
    """KgrecError naming the first field that no run of several domains could work with."""
    heads, tower = experiment.domains.heads, experiment.fuse.tower
    check_bounds("domains", experiment.domains, {
        "heads.experts": (1, 256), "heads.own_experts": (1, 256), "heads.levels": (1, 16),
        "heads.width": (1, 1 << 20)})
    if heads.levels > 1 and heads.kind != "ple":
        raise KgrecError(f"domains.heads.levels: found {heads.levels} with domains.heads.kind {heads.kind}, expected "
                         "1, or the kind ple")
    if tower.history not in READS or tower.trained_on != "hidden-share":
        raise KgrecError(f"fuse.tower.history: found {tower.history} (objective {tower.trained_on}), expected "
                         f"{' or '.join(READS)} with hidden-share: towers of several domains read histories as sets")
    if tower.candidates:
        raise KgrecError(f"fuse.tower.candidates: found {tower.candidates}, expected 0: towers of several domains tell "
                         "a target from all items of its domain")
    for field, expected in (("encoder", "frozen"), ("loss_weights", "fixed"), ("ensemble", 1)):
        if getattr(experiment.fuse, field) != expected:
            raise KgrecError(f"fuse.{field}: found {getattr(experiment.fuse, field)}, expected {expected}: towers of "
                             "several domains are one pair, which reads texts that are encoded once, under given weights of "
                             "the loss")
    if experiment.pretrain.mode == "scratch":
        raise KgrecError("pretrain.mode: found scratch, expected another: domains share one encoder, and each would "
                         "make its own; train it first and give it as encoder")
    for field in ("path", "name"):
        if getattr(experiment.data, field):
            raise KgrecError(f"data.{field}: found {getattr(experiment.data, field)}, expected none; --folders names "
                             "the data")
    pipeline.check(experiment.ordinary)


def read_domains(experiment: Experiment, folders: Sequence[pathlib.Path | str],
                 tracker: Tracker) -> dict[str, tuple[Experiment, Dataset]]:
    """{name of the folder: (the experiment of that domain alone, its data)}.

    KgrecError for a single folder, for two of one name, for one that is none or has no interactions.
    """
    if len(folders) < 2:
        raise KgrecError(f"--folders: found {len(folders)}, expected at least two dataset folders; kgrec run is "
                         "for one")
    paths: dict[str, pathlib.Path] = {}
    for folder in folders:
        path = expanded(str(folder))
        if not path.is_dir():
            raise KgrecError(f"--folders: found no folder at {folder}, expected dataset folders")
        name = path.resolve().name
        if name in paths:
            raise KgrecError(f"--folders: found {paths[name]} and {path} with the one name {name}, expected a name of "
                             "its own for each domain; rename or link one of them")
        paths[name] = path
    out = {}
    for name, path in paths.items():
        own = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, path=str(path)))
        data = read_dataset(own.data, tracker.say)
        if not len(data.interactions):
            raise KgrecError(f"--folders: found no interactions in {path}, expected a log in every domain; leave the "
                             "folder out")
        out[name] = own, data
    return out


def open_folder(path: pathlib.Path, experiment: DomainsExperiment, names: Sequence[str], quiet: bool) -> Tracker:
    """Begins a run of several domains in an empty folder, or goes on with one of the same config and domains."""
    held, resolved = path / DOMAINS, to_json(experiment)
    if path.exists() and not path.is_dir():
        raise KgrecError(f"--workdir: found a file at {path}, expected a run folder or a new name")
    if held.is_file():
        before = read_json(held)
        if before.get("domains") != list(names):
            raise KgrecError(f"{held}: found a run of {', '.join(before.get('domains', []))}, expected one of "
                             f"{', '.join(names)}; choose another --workdir or the folders that it was begun with")
        changed = [d for d in differences(before.get("config"), resolved) if not _is_free(d)]
        if changed:
            raise KgrecError(f"{held}: found a run with another {', '.join(changed[:6])}, expected the same config; "
                             "choose another --workdir or the settings that it was begun with")
    elif path.is_dir() and any(not p.name.startswith(".") for p in path.iterdir()):
        raise KgrecError(f"{path}: found files but no {DOMAINS}, expected a run of several domains or an empty folder; "
                         "choose another --workdir")
    else:
        write_json(held, {"format_version": FORMAT_VERSION, "domains": list(names), "config": resolved})
    return Tracker(path, quiet)


def _is_free(field: str) -> bool:
    return field.endswith(".log_every") or any(field == f or field.startswith(f + ".") for f in _FREE)
