"""Several domains in one run: towers, encoder and graph that they share, heads of each, and the domain alone beside it.

Each domain has its ordinary run in WORKDIR/alone/NAME. WORKDIR/shared has one structural training over the union of the
graphs, the texts of all items read by one encoder, and the shared towers, trained twice: on the inner cuts, for the
gates, and on what each split leaves to fit. WORKDIR/joined/NAME has the gate of a domain's fused score with the part
`domains`, and the recommender with it. WORKDIR/single/NAME has the control: all of this once more with towers of the
same kind that were trained on that domain alone. No interaction that a domain holds out is in any of these trainings.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kgrec_jax import compilation_cache, pipeline
from kgrec_jax.config import Experiment, to_json
from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.domains import union
from kgrec_jax.errors import KgrecError
from kgrec_jax.stages import domains_judge
from kgrec_jax.stages.domains_config import Config, DomainsExperiment, check, open_folder, read_domains
from kgrec_jax.stages.domains_judge import Joining, joined_run
from kgrec_jax.stages.domains_parts import SharedRun, of_domain, trained_parts, union_texts
from kgrec_jax.stages.domains_report import lines, markdown
from kgrec_jax.tracking import Tracker, write_json, write_text
from kgrec_jax.workdir import FORMAT_VERSION, Run, read_json

__all__ = ["Config", "DomainsExperiment", "check", "open_folder", "read_domains", "run", "steps_of"]


def run(experiment: DomainsExperiment, folders: Sequence[pathlib.Path | str], workdir: pathlib.Path | str,
        quiet: bool = False) -> dict[str, Any]:
    """Trains every domain alone and all of them together; leaves report.json and report.md, whose content it returns,
    and a recommender of every domain.

    The same call on the same folder goes on where it stopped. KgrecError for bad input, Interrupted after Ctrl-C once
    the state is saved.
    """
    compilation_cache.enable()
    check(experiment)
    path, control = pathlib.Path(workdir), experiment.domains.control
    found = read_domains(experiment.ordinary, folders, Tracker(path, quiet))
    tracker = open_folder(path, experiment, list(found), quiet)
    steps = steps_of(experiment, {name: data for name, (_, data) in found.items()})
    joined = union({name: data for name, (_, data) in found.items()})
    for line in joined.notes:
        tracker.say(line)
    trained = "each alone, all together, the shared towers on each alone" if control else "each alone and all together"
    tracker.say(f"domains: {len(found)} domains, {trained}; every towers' training takes {steps:,} steps of "
                f"{experiment.fuse.batch} users of a domain")
    alone = {name: _alone(own, steps, path / "alone" / name, quiet) for name, (own, _) in found.items()}
    shared = SharedRun(path / "shared", experiment.ordinary, tracker.at(path / "shared"), joined)
    runs = {name: joined_run(base, path / "joined" / name) for name, base in alone.items()}
    waiting = [name for name, held in runs.items() if not domains_judge.finished(held, control)]
    seconds = _seconds(path)
    if waiting:
        seconds |= _judge_all(experiment, shared, {name: data for name, (_, data) in found.items()}, alone, runs,
                              waiting, steps)
    domains = {name: held.done("fuse") for name, held in runs.items()}
    report = {"format_version": FORMAT_VERSION, "domains": domains, "shared": {
        "heads": to_json(experiment.domains.heads), "steps": steps, "users_a_step": experiment.fuse.batch,
        "common": dict(joined.common), "notes": list(joined.notes), **seconds}}
    write_json(path / "report.json", report)
    write_text(path / "report.md", markdown(report))
    for line in lines(report):
        tracker.say(line)
    tracker.say("domains: to have lists with the part `domains`: " + ", ".join(
        f"kgrec recommend {held.path} --user ID" for held in runs.values()))
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


def _judge_all(experiment: DomainsExperiment, shared: SharedRun, datasets: Mapping[str, Dataset],
               alone: Mapping[str, Run], runs: Mapping[str, Run], waiting: Sequence[str],
               steps: int) -> dict[str, float]:
    """Trains the shared towers and the controls, and measures the domains that are `waiting`.

    Gives what the shared towers and the controls took in this session.
    """
    began = time.monotonic()
    text = union_texts(experiment, shared, alone)
    parts = trained_parts(experiment, shared, alone, steps, text)
    seconds = {"seconds": time.monotonic() - began, "control_seconds": 0.0}
    for name in waiting:
        base, held, single = alone[name], runs[name], None
        if experiment.domains.control:
            began = time.monotonic()
            single = _single(experiment, shared, name, datasets[name], base, steps, of_domain(shared.union, name, text))
            seconds["control_seconds"] += time.monotonic() - began
        (held.stage("fuse") / "done.json").unlink(missing_ok=True)  # of a run without the control, or without lists
        joining = Joining(held, parts[name])
        held.ensure("fuse", lambda _, __, base=base, joining=joining, single=single: domains_judge.measure(
            base, joining, single))
    return seconds


def _single(experiment: DomainsExperiment, shared: SharedRun, name: str, data: Dataset, base: Run, steps: int,
            text: np.ndarray | None) -> Joining:
    """The control of a domain: the shared towers and its heads trained on it alone, with tables of its own graph.

    text [I_d, d]: what the shared towers read of its items. Their steps draw the same users as the shared ones' did.
    """
    folder = shared.path.parent / "single" / name
    one = SharedRun(folder, experiment.ordinary, shared.tracker.at(folder), union({name: data}))
    return Joining(joined_run(base, folder), trained_parts(experiment, one, {name: base}, steps, text)[name])


def _seconds(path: pathlib.Path) -> dict[str, float]:
    """What an earlier session's report told that the trainings took."""
    file = path / "report.json"
    held = read_json(file).get("shared", {}) if file.is_file() else {}
    return {name: held.get(name, 0.0) for name in ("seconds", "control_seconds")}
