"""The whole way: pretrain → graph → fuse → evaluate → export; a killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import pathlib
import time

from kgrec_jax import compilation_cache
from kgrec_jax.budget import announce
from kgrec_jax.config import Experiment, from_json
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.control_words import console_lines
from kgrec_jax.evaluation.controls import finished_controls, predicted_popularity, run_controls
from kgrec_jax.evaluation.judge import Judge
from kgrec_jax.evaluation.plots import draw_plots, plot_controls
from kgrec_jax.evaluation.ranking import RankingResult
from kgrec_jax.evaluation.report import Report, make_report, read_report, write_report
from kgrec_jax.evaluation.render import print_report
from kgrec_jax.evaluation.seeds import PerUser
from kgrec_jax.evaluation.tradeoff import lines, measure_tradeoffs, write_tradeoffs
from kgrec_jax.models.recommender import TOWER
from kgrec_jax.serving.intake import JOURNAL
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import FORMAT_VERSION, STAGES, Run, read_experiment_json

PER_USER = "per_user.npz"  # headline metrics of every row and user, which paired comparisons between runs need


def run(experiment: Experiment, workdir: pathlib.Path | str, quiet: bool = False, until: str = "fuse") -> Report | None:
    """Runs the stages up to `until` that the folder has not finished; the report once all are.

    Raises KgrecError for bad input, Interrupted after Ctrl-C once the state is saved.
    """
    if until not in STAGES:
        raise KgrecError(f"until: found {until!r}, expected one of {', '.join(STAGES)}")
    check(experiment)
    return go_on(Run.open(workdir, experiment, quiet), quiet, until)


def go_on(held: Run, quiet: bool = False, until: str = "fuse") -> Report | None:
    """The same for a run that is open."""
    compilation_cache.enable()
    experiment = held.experiment
    if experiment.data.path or until != "pretrain":  # a corpus of its own needs no data set
        for note in held.dataset.notes:
            held.tracker.say(f"note: {note}")
        if until == "fuse":
            fuse.check_data(experiment.fuse, held.dataset)
        announce(experiment, held)
    for name, stage in (("pretrain", pretrain.run), ("graph", graph.run))[:STAGES.index(until) + 1]:
        held.ensure(name, stage)
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


def evaluate_run(workdir: pathlib.Path | str, quiet: bool = False, tradeoff: bool = False,
                 seeds: int = 0) -> Report | None:
    """Ranks the test of a finished run anew and writes its report, None without a test; nothing of the run is trained.

    `tradeoff`: also what variety and calibration of its lists cost, in tradeoff.tsv and a picture. `seeds`: so many
    trainings of every control (see `evaluation.controls`) and of the run itself are compared; 0: none is trained.
    Raises Interrupted after Ctrl-C once the control at work is saved.
    """
    compilation_cache.enable()
    held = _open(workdir, quiet)
    if seeds and not len(held.split.test):
        raise KgrecError(f"--controls: found nothing held out in {workdir} to measure on, expected a run with a test "
                         "part; run it with data.split.test_share above 0")
    return _fuse_and_report(held, quiet, tradeoff, seeds)


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
    recommender = recommender.with_categories_of(held)
    recommender.save(out / "recommender")
    write_json(out / "refit.json", {"format_version": FORMAT_VERSION, "run": held.path.name, "interactions": len(log)})
    held.tracker.say(f"refit on {len(log):,} interactions: kgrec recommend {out} --user ID")
    return recommender


def _open(workdir: pathlib.Path | str, quiet: bool) -> Run:
    """A run whose stages are all finished."""
    path = pathlib.Path(workdir)
    about = read_experiment_json(path)
    if "control" in about:
        raise KgrecError(f"{path}: found the control {about['control']['name']} of a run, expected a run itself: "
                         f"{path.resolve().parents[2]}")
    held = Run.open(path, from_json(Experiment, about["config"]), quiet)
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


def _fuse_and_report(held: Run, quiet: bool, tradeoff: bool = False, seeds: int = 0) -> Report | None:
    """Fits (or reads) the fused model, ranks the test, writes recommender, report and plots; controls of `seeds`."""
    began = time.monotonic()
    model, rows, results = fuse.run(held.experiment, held)
    before = held.done("fuse") or {}
    wall = before.get("wall_seconds", time.monotonic() - began)
    began = time.monotonic()
    recommender = Recommender.from_run(held, model).with_categories_of(held)
    if (held.path / JOURNAL).is_file():
        held.tracker.say(f"note: the items that {held.path / JOURNAL} lists are no longer in the recommender; it says "
                         "from where kgrec items add added them")
    if not len(held.split.test):
        recommender.save(held.path / "recommender")
        held.tracker.say("nothing was held out to measure on (data.split.test_share is 0): no report")
        held.finish("fuse", {**results, "wall_seconds": wall})
        return None
    judge = Judge.of(held, recommender.histories, recommender.known)
    report, ranked = evaluate(held, recommender, judge, rows, results, wall)
    recommender.save(held.path / "recommender")
    PerUser.of(ranked).save(held.path / PER_USER)
    draw_plots(report.models, held.path)
    if tradeoff:
        _tradeoffs(held, recommender, judge, quiet)
    report = _with_controls(report, held.path, *finished_controls(held))
    held.finish("fuse", {**results, "wall_seconds": wall, "evaluate_seconds": time.monotonic() - began})
    if seeds:
        given = {"run": ranked["fusion"], **predicted_popularity(model, judge)}
        del model, rows, recommender, ranked  # matrices of all items, which controls are going to have too
        report = _with_controls(report, held.path, *run_controls(held, judge, given, seeds))
    if not quiet:
        print_report(report)
        print("".join(f"{line}\n" for line in console_lines(report.controls)), end="")
    return report


def _with_controls(report: Report, folder: pathlib.Path, controls: dict | str, seconds: float) -> Report:
    """The report, written with what the controls found."""
    timing = report.timing | ({"controls": seconds} if seconds else {})
    report = dataclasses.replace(report, controls=controls, timing=timing)
    plot_controls(controls, folder / "plots" / "controls.png")
    write_report(report, folder)
    return report


def _tradeoffs(held: Run, recommender: Recommender, judge: Judge, quiet: bool) -> None:
    """Leaves tradeoff.tsv and its picture, which the report then shows."""
    found = measure_tradeoffs(recommender, recommender.measures(judge.candidates)[0], judge.test, held.experiment.seed)
    if not found:
        held.tracker.say("tradeoff: nothing says which items are alike or of one kind: no table")
        return
    write_tradeoffs(found, held.path)
    if not quiet:
        print("\n".join(lines(found)))


def evaluate(held: Run, recommender: Recommender, judge: Judge, rows: dict, results: dict,
             fuse_seconds: float) -> tuple[Report, dict[str, RankingResult]]:
    """(the report on the baselines, the towers and the fused model, their rankings of the test)."""
    data, split, model = held.dataset, held.split, recommender.model
    ranked = {name: judge.of_part(part) for name, part in rows.items()}
    ranked |= {TOWER: judge.of_towers(model), "fusion": judge.of_model(model)}
    measures, by = recommender.measures(judge.candidates)
    ranked = {name: measures.added_to(result) for name, result in ranked.items()}
    stages = {name: held.done(name) or {} for name in ("pretrain", "graph")}
    timing, skipped = _seconds(stages) | {"fuse": fuse_seconds}, _skipped(stages) | results["skipped"]
    report = make_report(
        ranked, name=data.name, split=split.kind, fit_on=split.fit_on, history=split.fit_on, seed=held.experiment.seed,
        reference="fusion", timing=timing, skipped=skipped, example=recommender.example(judge.first_user),
        link_prediction=stages["graph"].get("link_prediction", {}), notes=(*data.notes, *judge.notes, by))
    return report, ranked
