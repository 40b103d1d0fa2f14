"""The whole way: pretrain → graph → fuse → evaluate → export; each stage once, a killed run goes on where it was."""

from __future__ import annotations

import pathlib
import time

import numpy as np

from kgrec_jax import compilation_cache
from kgrec_jax.config import Experiment
from kgrec_jax.evaluation.plots import draw_plots
from kgrec_jax.evaluation.ranking import evaluate_ranking
from kgrec_jax.evaluation.report import Report, make_report, read_report, write_report
from kgrec_jax.evaluation.render import print_report
from kgrec_jax.models.recommender import TOWER
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.workdir import Run


def run(experiment: Experiment, workdir: pathlib.Path | str, quiet: bool = False) -> Report:
    """Runs every stage that the folder has not finished, and returns the report.

    Raises KgrecError for bad input, Interrupted after Ctrl-C once the state is saved.
    """
    compilation_cache.enable()
    held = Run.open(workdir, experiment, quiet)
    for note in held.dataset.notes:
        held.tracker.say(f"note: {note}")
    for name, stage in (("pretrain", pretrain.run), ("graph", graph.run)):
        if held.done(name) is None:
            began = time.monotonic()
            results = stage(experiment, held)
            if "skipped" in results:
                held.tracker.say(f"{name}: skipped: {results['skipped']}")
            held.finish(name, {**results, "wall_seconds": time.monotonic() - began})
    if held.done("fuse") is not None and (held.path / "report.json").is_file():
        return read_report(held.path)
    began = time.monotonic()
    model, rows, results = fuse.run(experiment, held)
    wall = time.monotonic() - began
    began = time.monotonic()
    recommender = Recommender.from_run(held, model)
    report = evaluate(held, recommender, rows, results, wall)
    recommender.save(held.path / "recommender")
    draw_plots(report.models, held.path)
    write_report(report, held.path)
    held.finish("fuse", {**results, "wall_seconds": wall, "evaluate_seconds": time.monotonic() - began})
    if not quiet:
        print_report(report)
    return report


def evaluate(held: Run, recommender: Recommender, rows: dict, results: dict, fuse_seconds: float) -> Report:
    """Ranks the test for the baselines, the towers and the fused model."""
    data, split = held.dataset, held.split
    shape = data.num_users, data.num_items
    fit = split.fit.matrix(*shape)
    model, histories, known = recommender.model, recommender.histories, recommender.known
    block = max(8, min(256, 2_000_000 // data.num_items))

    def rank(score_block):
        return evaluate_ranking(score_block, known=known, relevant=split.test.matrix(*shape), num_items=data.num_items, fit=fit, block=block)

    def of_part(part):
        def score(users):
            scores = np.array(part.scores(histories.matrix[users]))
            scores[:, ~part.known] = np.finfo(np.float32).min
            return scores
        return score

    ranked = {name: rank(of_part(part)) for name, part in rows.items()}
    ranked[TOWER] = rank(lambda users: model.part_scores(histories.take(users), TOWER))
    ranked["fusion"] = rank(lambda users: model.scores(histories.take(users)))
    timing = {name: float((held.done(name) or {}).get("wall_seconds", 0.0)) for name in ("pretrain", "graph")} | {"fuse": fuse_seconds}
    stages = {name: held.done(name) or {} for name in ("pretrain", "graph")}
    skipped = {name: done["skipped"] for name, done in stages.items() if "skipped" in done} | results["skipped"]
    user = int(np.flatnonzero(split.test.matrix(*shape).getnnz(axis=1))[0])
    example = recommender.example(user)
    return make_report(ranked, name=data.name, split=split.kind, fit_on=split.fit_on, history=split.fit_on, seed=held.experiment.seed,
                       reference="fusion", link_prediction=stages["graph"].get("link_prediction", {}), timing=timing, skipped=skipped,
                       example=example, notes=tuple(data.notes))
