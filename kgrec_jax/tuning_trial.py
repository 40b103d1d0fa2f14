"""One trial of a search: a run whose data, split and finished stages are shared with the other trials."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from kgrec_jax import pipeline
from kgrec_jax.config import Experiment, to_json
from kgrec_jax.data.dataset import Split
from kgrec_jax.data.importers.auto import split_config
from kgrec_jax.data.interactions import load_split, make_split, save_split
from kgrec_jax.data.tuning_split import tuning_split
from kgrec_jax.evaluation.judge import Judge
from kgrec_jax.models.recommender import FusedModel, histories_of
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.tracking import Tracker, write_json
from kgrec_jax.tuning_space import Domain, Value, shared_stages, shares_choices, with_values
from kgrec_jax.workdir import FORMAT_VERSION, Run, VariantRun


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched, for what."""

    experiment: Experiment
    space: Mapping[str, Domain]
    metric: str = "ndcg@10"

    def to_json(self) -> dict[str, Any]:
        """What tune.json holds, and what a search that goes on must agree with."""
        return {"format_version": FORMAT_VERSION, "metric": self.metric, "config": to_json(self.experiment),
                "space": {path: str(domain) for path, domain in self.space.items()}}


@dataclasses.dataclass(frozen=True)
class BaseRun(Run):
    """What all trials share. Its split is the one that `tuning_split` makes, frozen the first time."""

    @functools.cached_property
    def split(self) -> Split:
        """The old validation part as the test."""
        folder, cfg = self.path / "split", split_config(self.experiment.data)
        if not (folder / "split.json").is_file():
            save_split(tuning_split(self.dataset, make_split(self.dataset, cfg), cfg), self.dataset, folder)
        return load_split(folder, self.dataset)


def finish_stages(run: Run, names: tuple[str, ...] = ("pretrain", "graph")) -> None:
    """Runs those of the stages before the fusion that are not done."""
    for name, stage in (("pretrain", pretrain.run), ("graph", graph.run)):
        if name in names:
            run.ensure(name, stage)


def run_trial(search: Search, base: BaseRun, folder: pathlib.Path, values: Mapping[str, Value],
              watch: Callable[[dict], None]) -> float:
    """The metric of the fused score on the old validation part, after training with `values`; resumable."""
    import jax

    jax.clear_caches()  # each width has programs of its own; all of them at once would fill the memory
    experiment = with_values(base.experiment, values)
    pipeline.check(experiment)
    write_json(folder / "experiment.json", {"format_version": FORMAT_VERSION, "config": to_json(experiment)})
    shared: Mapping[str, Run] = dict.fromkeys(shared_stages(search.space), base)
    trial = VariantRun(folder, experiment, Tracker(folder, quiet=True), base, shared)
    finish_stages(trial)
    if shares_choices(search.space):
        _take_choices(base, trial)
    began = time.monotonic()
    model, _, results = fuse.run(experiment, trial, watch=watch)
    value = measure(trial, model, search.metric)
    trial.finish("fuse", {**results, search.metric: value, "wall_seconds": time.monotonic() - began})
    return value


def measure(trial: Run, model: FusedModel, metric: str) -> float:
    """The mean over users of a metric of the fused score, all items ranked but those of the history."""
    data, split = trial.dataset, trial.split
    histories = histories_of(split.fit, data.num_users, data.num_items, trial.experiment.fuse.tower.max_history)
    return Judge.of(trial, histories, histories.matrix).of_model(model).means()[metric]


def _take_choices(base: Run, trial: Run) -> None:
    """Texts as they were read and closed forms as they were chosen once."""
    for name in ("text.npz", "choices.json"):
        source, target = base.stage("fuse") / name, trial.stage("fuse") / name
        if source.is_file() and not target.is_file():
            temporary = target.with_name(f".{name}.tmp")
            shutil.copyfile(source, temporary)
            temporary.replace(target)
