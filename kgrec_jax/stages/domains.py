"""Several domains in one run: towers, encoder and graph that they share, heads of each, and the domain alone beside it.

Each domain has its ordinary run in WORKDIR/alone/NAME, which is its control. WORKDIR/shared has one structural training
over the union of the graphs, the texts of all items read by one encoder, and the shared towers, trained twice: on the
inner cuts, for the gates, and on what each split leaves to fit. WORKDIR/joined/NAME has the gate of a domain's fused
score with the part `domains`. No interaction that a domain holds out is in any of these trainings.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kgrec_jax import checkpoint, compilation_cache, pipeline
from kgrec_jax.config import Experiment, to_json
from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.domains import Union, union
from kgrec_jax.data.folder import expanded
from kgrec_jax.data.importers.auto import read_dataset
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.domain_towers import READS, DomainPart, HeadsConfig
from kgrec_jax.stages import domains_judge, graph, item_features
from kgrec_jax.stages.bounds import check_bounds
from kgrec_jax.stages.domains_report import lines, markdown
from kgrec_jax.stages.domains_towers import Content, fit_shared
from kgrec_jax.stages.fuse_cut import inner_cut
from kgrec_jax.tracking import Tracker, write_json, write_text
from kgrec_jax.workdir import FORMAT_VERSION, Run, differences, read_json

ABOUT = "domains.json"  # config and domains of a run of several
_FREE = ("mesh",)  # what may differ when a run goes on, beside logging


@dataclasses.dataclass(frozen=True)
class Config:
    """What domains share and what each has of its own; towers, steps and gate are those of `fuse`."""

    heads: HeadsConfig = HeadsConfig()  # of users and items, in each domain


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


@dataclasses.dataclass(frozen=True)
class SharedRun(Run):
    """The run folder of what the domains share; its data are the union of theirs."""

    union: Union

    @functools.cached_property
    def dataset(self) -> Union:
        """What the stages ask of a data set that has no log: the items' words and the graph."""
        return self.union


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
    for field, expected in (("encoder", "frozen"), ("loss_weights", "fixed")):
        if getattr(experiment.fuse, field) != expected:
            raise KgrecError(f"fuse.{field}: found {getattr(experiment.fuse, field)}, expected {expected}: towers of "
                             "several domains read texts that are encoded once, under given weights of the loss")
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
    held, resolved = path / ABOUT, to_json(experiment)
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
        raise KgrecError(f"{path}: found files but no {ABOUT}, expected a run of several domains or an empty folder; "
                         "choose another --workdir")
    else:
        write_json(held, {"format_version": FORMAT_VERSION, "domains": list(names), "config": resolved})
    return Tracker(path, quiet)


def _is_free(field: str) -> bool:
    return field.endswith(".log_every") or any(field == f or field.startswith(f + ".") for f in _FREE)


def run(experiment: DomainsExperiment, folders: Sequence[pathlib.Path | str], workdir: pathlib.Path | str,
        quiet: bool = False) -> dict[str, Any]:
    """Trains every domain alone and all of them together; leaves report.json and report.md, whose content it returns.

    The same call on the same folder goes on where it stopped. KgrecError for bad input, Interrupted after Ctrl-C once
    the state is saved.
    """
    compilation_cache.enable()
    check(experiment)
    path = pathlib.Path(workdir)
    found = read_domains(experiment.ordinary, folders, Tracker(path, quiet))
    tracker = open_folder(path, experiment, list(found), quiet)
    steps = steps_of(experiment, {name: data for name, (_, data) in found.items()})
    joined = union({name: data for name, (_, data) in found.items()})
    for line in joined.notes:
        tracker.say(line)
    tracker.say(f"domains: {len(found)} domains, each alone and all together; every towers' training takes {steps:,} "
                f"steps of {experiment.fuse.batch} users of a domain")
    alone = {name: _alone(own, steps, path / "alone" / name, quiet) for name, (own, _) in found.items()}
    shared = SharedRun(path / "shared", experiment.ordinary, tracker.at(path / "shared"), joined)
    began = time.monotonic()
    inner, final = _shared_parts(experiment, shared, alone, steps)
    seconds = time.monotonic() - began
    domains = {}
    for name, base in alone.items():
        run_of = domains_judge.joined_run(base, path / "joined" / name)
        run_of.ensure("fuse", lambda _, held, base=base, name=name: domains_judge.measure(
            base, held, inner[name], final[name]))
        domains[name] = run_of.done("fuse")
    report = {"format_version": FORMAT_VERSION, "domains": domains, "shared": {
        "heads": to_json(experiment.domains.heads), "steps": steps, "users_a_step": experiment.fuse.batch,
        "common": dict(joined.common), "notes": list(joined.notes), "seconds": seconds}}
    write_json(path / "report.json", report)
    write_text(path / "report.md", markdown(report))
    for line in lines(report):
        tracker.say(line)
    return report


def steps_of(experiment: Experiment, datasets: Mapping[str, Dataset]) -> int:
    """fuse.steps, or the most that any domain's own towers would be trained for."""
    training = experiment.fuse.training
    return max(training.num_steps(len(np.unique(data.interactions.user))) for data in datasets.values())


def _alone(own: Experiment, steps: int, folder: pathlib.Path, quiet: bool) -> Run:
    """A domain's ordinary run, finished; its towers are trained for as many steps as the shared ones."""
    own = dataclasses.replace(own, fuse=dataclasses.replace(own.fuse, steps=steps))
    pipeline.run(own, folder, quiet)
    base = Run.open(folder, own, quiet)
    if not len(base.split.test):
        raise KgrecError(f"data.split.test_share: found nothing held out in {folder.name}, expected a test part: "
                         "several domains are compared with each one alone")
    return base


def _shared_parts(experiment: DomainsExperiment, run: SharedRun, alone: Mapping[str, Run],
                  steps: int) -> tuple[dict[str, DomainPart], dict[str, DomainPart]]:
    """({domain: part} of towers on the inner cuts, the same on all that the splits leave to fit)."""
    _train_tables(experiment, run)
    content = Content(run.union, _texts(experiment, run, alone), *_tables(run))
    cfg, share = experiment.fuse, experiment.fuse.gate.inner_share
    fit = functools.partial(fit_shared, cfg.tower, experiment.domains.heads, cfg.training, steps, content, run=run,
                            seed=experiment.seed)
    inner = {name: inner_cut(base.split, share, experiment.seed).fit for name, base in alone.items()}
    return (fit(inner, run.stage("towers_inner")),
            fit({name: base.split.fit for name, base in alone.items()}, run.stage("towers")))


def _train_tables(experiment: DomainsExperiment, run: SharedRun) -> None:
    """Tables V and U of the union, by the structural scorer alone."""
    cfg = dataclasses.replace(
        experiment.graph, encoder_mode="off", rules="off", unseen_share=0.0, text_eval=1, mixture_triples=1,
        bi_encoder=dataclasses.replace(experiment.graph.bi_encoder, mode="off"))
    run.ensure("graph", lambda _, held: graph.run(dataclasses.replace(held.experiment, graph=cfg), held))


def _tables(run: SharedRun) -> tuple[np.ndarray | None, np.ndarray | None]:
    folder = run.stage("graph") / "tables"
    if not folder.is_dir():
        return None, None
    held = checkpoint.load_tree(folder)
    return np.asarray(held["entity"], np.float32), np.asarray(held["relation"], np.float32)


def _texts(experiment: DomainsExperiment, run: SharedRun, alone: Mapping[str, Run]) -> np.ndarray | None:
    """[I, d] vectors of all items' texts by the released encoder, or n-grams where it does not know the language.

    Where every domain's own run read its texts with that encoder, these are taken over and nothing is read twice.
    """
    held = run.stage("fuse") / "text.npz"
    if not held.is_file():
        own = [item_features.read_texts(base.experiment, base, None, None) for base in alone.values()]
        if all(source == item_features.RELEASED for _, source, _ in own):
            vectors = np.concatenate([vectors for vectors, _, _ in own])
            item_features.save_texts(held, vectors, item_features.RELEASED, {})
    return item_features.read_texts(experiment.ordinary, run, None, None)[0]
