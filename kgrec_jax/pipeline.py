"""The whole way: pretrain → graph → fuse → evaluate → export; a killed run goes on where it was."""

from __future__ import annotations

import pathlib
import time

import numpy as np
import scipy.sparse as sp

from kgrec_jax import compilation_cache
from kgrec_jax.budget import announce
from kgrec_jax.config import Experiment, from_json
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.plots import draw_plots
from kgrec_jax.evaluation.ranking import evaluate_ranking
from kgrec_jax.evaluation.report import Report, make_report, read_report, write_report
from kgrec_jax.evaluation.render import print_report
from kgrec_jax.models.recommender import TOWER
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import FORMAT_VERSION, STAGES, Run, read_experiment_json


def run(experiment: Experiment, workdir: pathlib.Path | str, quiet: bool = False, until: str = "fuse") -> Report | None:
    """Runs the stages up to `until` that the folder has not finished; the report once all are.

    Raises KgrecError for bad input, Interrupted after Ctrl-C once the state is saved.
    """
    if until not in STAGES:
        raise KgrecError(f"until: found {until!r}, expected one of {', '.join(STAGES)}")
    compilation_cache.enable()
    check(experiment)
    held = Run.open(workdir, experiment, quiet)
    if experiment.data.path or until != "pretrain":  # a corpus of its own needs no data set
        for note in held.dataset.notes:
            held.tracker.say(f"note: {note}")
        announce(experiment, held)
    for name, stage in (("pretrain", pretrain.run), ("graph", graph.run))[:STAGES.index(until) + 1]:
        if held.done(name) is None:
            began = time.monotonic()
            results = stage(experiment, held)
            if "skipped" in results:
                held.tracker.say(f"{name}: skipped: {results['skipped']}")
            held.finish(name, {**results, "wall_seconds": time.monotonic() - began})
    if until == "graph":
        return _report_graph(held, quiet)
    if until != "fuse":
        return None
    if held.done("fuse") is not None and (held.path / "report.json").is_file():
        report = read_report(held.path)
        if not quiet:
            print_report(report)
        return report
    return _fuse_and_report(held, quiet)


def check(experiment: Experiment) -> None:
    """Refuses what no stage could work with, before a folder is made."""
    if experiment.seed < 0:
        raise KgrecError(f"seed: found {experiment.seed}, expected at least 0")
    for stage, cfg in ((pretrain, experiment.pretrain), (graph, experiment.graph), (fuse, experiment.fuse)):
        stage.check(cfg)


def evaluate_run(workdir: pathlib.Path | str, quiet: bool = False) -> Report | None:
    """Ranks the test of a finished run anew and writes its report, None without a test; nothing is trained."""
    compilation_cache.enable()
    held = _open(workdir, quiet)
    return _fuse_and_report(held, quiet)


def refit(workdir: pathlib.Path | str, out: pathlib.Path | str, quiet: bool = False) -> Recommender:
    """Fits the configuration that a finished run chose on all interactions, the held-out ones too, into `out`.

    `out` holds a recommender for use; nothing can be measured with it any more.
    """
    compilation_cache.enable()
    held, out = _open(workdir, quiet), pathlib.Path(out)
    left = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if left - {"tower"}:  # a refit that was broken off leaves its towers' training, and goes on with it
        raise KgrecError(f"OUT: found something in {out} already, expected a new or empty folder; choose another")
    model, log = fuse.refit(held.experiment, held, out)
    shape = held.dataset.num_users, held.dataset.num_items
    recommender = Recommender.build(held, model, log=log, known=log.matrix(*shape), held_out=0)
    recommender.save(out / "recommender")
    write_json(out / "refit.json", {"format_version": FORMAT_VERSION, "run": held.path.name, "interactions": len(log)})
    held.tracker.say(f"refit on {len(log):,} interactions: kgrec recommend {out} --user ID")
    return recommender


def _open(workdir: pathlib.Path | str, quiet: bool) -> Run:
    """A run whose stages are all finished."""
    path = pathlib.Path(workdir)
    held = Run.open(path, from_json(Experiment, read_experiment_json(path)["config"]), quiet)
    for name in STAGES:
        if held.done(name) is None:
            raise KgrecError(f"{path}: found a run whose stage {name} is not finished, expected a finished one; finish "
                             "it with the kgrec run that began it")
    held.split  # read to be verified: a run whose split was changed since has chosen nothing that could be trusted
    return held


def _report_graph(held: Run, quiet: bool) -> Report:
    """The report of a run that ends with the graph stage: link prediction, and no list for anybody."""
    stages = {name: held.done(name) or {} for name in ("pretrain", "graph")}
    report = Report(
        name=held.dataset.name, split=stages["graph"].get("split", ""), fit_on="train", history="", candidates=0,
        users=0, models={}, paired={}, reference="", link_prediction=stages["graph"].get("link_prediction", {}),
        timing=_seconds(stages), skipped=_skipped(stages), example={}, notes=tuple(held.dataset.notes))
    if held.done("fuse") is None:  # a finished run keeps the report of all its stages
        draw_plots(report.models, held.path)
        write_report(report, held.path)
    if not quiet:
        print_report(report)
    return report


def _seconds(stages: dict[str, dict]) -> dict[str, float]:
    return {name: float(done.get("wall_seconds", 0.0)) for name, done in stages.items()}


def _skipped(stages: dict[str, dict]) -> dict[str, str]:
    return {name: done["skipped"] for name, done in stages.items() if "skipped" in done}


def _fuse_and_report(held: Run, quiet: bool) -> Report | None:
    """Fits (or reads) the fused model, ranks the test, writes recommender, report and plots."""
    began = time.monotonic()
    model, rows, results = fuse.run(held.experiment, held)
    before = held.done("fuse") or {}
    wall = before.get("wall_seconds", time.monotonic() - began)
    began = time.monotonic()
    recommender = Recommender.from_run(held, model)
    if not len(held.split.test):
        recommender.save(held.path / "recommender")
        held.tracker.say("nothing was held out to measure on (data.split.test_share is 0): no report")
        held.finish("fuse", {**results, "wall_seconds": wall})
        return None
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
    fit, test = split.fit.matrix(*shape), split.test.matrix(*shape)
    notes, limit = list(data.notes), held.experiment.fuse.eval_users
    users = np.flatnonzero(test.getnnz(axis=1))
    if limit and len(users) > limit:
        drawn = np.zeros(shape[0], np.float32)
        drawn[np.random.default_rng((held.experiment.seed, 29)).choice(users, limit, replace=False)] = 1.0
        notes.append(f"measured on {limit:,} of {len(users):,} users, drawn by the seed (fuse.eval_users)")
        test = (sp.diags(drawn) @ test).tocsr()
        test.eliminate_zeros()
    candidates = None
    if split.kind == "cold-items":  # the protocol of that split: what nobody has touched, among itself
        candidates = np.isin(np.arange(data.num_items), split.cold_items)
        notes.append(f"the split is cold-items: the {len(split.cold_items):,} hidden items are ranked among themselves")
    model, histories, known = recommender.model, recommender.histories, recommender.known
    block = max(8, min(256, 2_000_000 // data.num_items))

    def rank(score_block):
        return evaluate_ranking(score_block, known=known, relevant=test, num_items=data.num_items, fit=fit, block=block,
                                candidates=candidates)

    def of_part(part):
        def score(users):
            scores = np.array(part.scores(histories.matrix[users]))
            scores[:, ~part.known] = np.finfo(np.float32).min
            return scores
        return score

    ranked = {name: rank(of_part(part)) for name, part in rows.items()}
    ranked[TOWER] = rank(lambda users: model.part_scores(histories.take(users), TOWER))
    ranked["fusion"] = rank(lambda users: model.scores(histories.take(users)))
    stages = {name: held.done(name) or {} for name in ("pretrain", "graph")}
    timing, skipped = _seconds(stages) | {"fuse": fuse_seconds}, _skipped(stages) | results["skipped"]
    user = int(np.flatnonzero(test.getnnz(axis=1))[0])
    example = recommender.example(user)
    return make_report(ranked, name=data.name, split=split.kind, fit_on=split.fit_on, history=split.fit_on,
                       seed=held.experiment.seed, reference="fusion", timing=timing, skipped=skipped, example=example,
                       link_prediction=stages["graph"].get("link_prediction", {}), notes=tuple(notes))
