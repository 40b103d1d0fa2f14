"""Controls: a finished run trained again without its graph, its texts or its behaviour, and what each is worth.

A graph that helps only by its degrees, or a text that helps only by being there, helps as much when it is wired or
dealt at random; so both are compared with their scrambled twins too. Every control ranks the same candidates for the
same users as the run, and is compared with it user by user.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.control_run import (CONTENT, NAMES, POPULARITY, RUN, TRAINED, ControlRun, content_parts,
                                              control_folder, fingerprint, open_control, reads_text, train_content,
                                              train_control)
from kgrec_jax.evaluation.judge import Judge
from kgrec_jax.evaluation.ranking import RankingResult
from kgrec_jax.evaluation.render import HEADLINE
from kgrec_jax.evaluation.significance import bootstrap_cis, paired_over_seeds
from kgrec_jax.models.recommender import FusedModel
from kgrec_jax.stages.item_features import item_texts
from kgrec_jax.tracking import NPZ_ERRORS, to_json, write_json, write_npz
from kgrec_jax.workdir import Run, read_json

NOT_RUN = "not run"
SIDES = ("all", "warm", "cold")
SCRAMBLED = {"random-graph": "no-graph", "shuffled-text": "no-text"}  # control -> what it adds something random to
_PREDICTED = "expected-popularity"  # the part of the fused score that ranks by popularity as features predict it
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Figures:
    """The metrics of one training of one control, user by user."""

    users: Mapping[str, np.ndarray]  # side -> [n] rows
    values: Mapping[str, Mapping[str, np.ndarray]]  # side -> metric -> [n]
    seconds: float  # that it took; 0 for the run itself

    @staticmethod
    def of(result: RankingResult, seconds: float = 0.0) -> Figures:
        """Of a ranking, warm and cold items apart where there are any."""
        views = {side: view for side, view in zip(SIDES, (result, result.warm, result.cold)) if view is not None}
        return Figures({side: view.users for side, view in views.items()},
                       {side: dict(view.per_user) for side, view in views.items()}, seconds)

    def save(self, path: pathlib.Path) -> None:
        """Writes the file, whole or not at all."""
        arrays = {f"{side}/{name}": values for side, of in self.values.items() for name, values in of.items()}
        arrays |= {f"{side}/": rows for side, rows in self.users.items()}
        write_npz(path, seconds=self.seconds, **arrays)

    @staticmethod
    def load(path: pathlib.Path) -> Figures:
        """Reads what `save` wrote; KgrecError where it is damaged."""
        users: dict[str, np.ndarray] = {}
        values: dict[str, dict[str, np.ndarray]] = {}
        try:
            with np.load(path, allow_pickle=False) as file:
                for key in file.files:
                    side, slash, metric = key.partition("/")
                    if metric:
                        values.setdefault(side, {})[metric] = file[key]
                    elif slash:
                        users[side] = file[key]
                return Figures(users, values, float(file["seconds"]))
        except NPZ_ERRORS as error:
            reason = str(error).partition("\n")[0]
            raise KgrecError(f"{path}: found a damaged file ({reason}), expected the metrics of a control; remove it "
                             "and run the controls again") from None


def run_controls(base: Run, judge: Judge, given: Mapping[str, RankingResult],
                 count: int) -> tuple[dict[str, Any] | str, float]:
    """(the report's `controls` of a finished run for `count` seeds of it, seconds of training); see `summarise`.

    `given`: the rankings that the run has itself, of `run` and (where it has that part) `popularity-from-features`.
    What is finished is read; Interrupted after Ctrl-C, once the state is saved. Leaves controls/controls.json.
    """
    say = base.tracker.say
    seeds = [base.experiment.seed + k for k in range(count)]
    skipped = _skipped(base, given)
    for line in announcement(base, seeds, skipped):
        say(line)
    found: dict[str, list[Figures]] = {name: [] for name in (RUN, *NAMES) if name not in skipped}
    for seed in seeds:
        real: Run = base
        if seed == seeds[0]:
            first = {name: Figures.of(result) for name, result in given.items() if name not in skipped}
        else:
            real, first = _other_seed(base, judge, seed, POPULARITY not in skipped)
        for name, figures in first.items():
            found[name].append(figures)
        for name in (*TRAINED, CONTENT):
            if name not in skipped:
                found[name].append(_one(base, real, judge, name, seed))
    for name, trainings in found.items():
        for figures in trainings:
            _same_users(found[RUN][0], figures, base.path / "controls" / name)
    seconds = sum(figures.seconds for trainings in found.values() for figures in trainings)
    say(f"controls: {seconds:.0f} s of training, {seconds / max(_stage_seconds(base, 'fuse'), 1e-9):.1f} times the "
        "run's fuse stage")
    write_json(base.path / "controls" / "controls.json", {
        "format_version": _FORMAT, "of": fingerprint(base), "seconds": seconds,
        "controls": summarise(found, seeds, skipped)})
    return finished_controls(base)


def finished_controls(base: Run) -> tuple[dict[str, Any] | str, float]:
    """What `run_controls` left for the run as it is; ("not run", 0) where it left nothing or the run is another."""
    file = base.path / "controls" / "controls.json"
    held = read_json(file) if file.is_file() else {}
    if held.get("format_version") != _FORMAT or held.get("of") != fingerprint(base):
        return NOT_RUN, 0.0
    return held["controls"], float(held["seconds"])


def summarise(found: Mapping[str, Sequence[Figures]], seeds: Sequence[int],
              skipped: Mapping[str, str]) -> dict[str, Any]:
    """{control: {metric: mean of seeds and users, "users", "seeds", "paired", "warm", "cold"} or {"skipped": reason}}.

    `paired` is the run minus the control, {metric: {difference, standard_error, ci95, seed_deviation}}; `worth` of a
    scrambled source is its control minus the one without the source. `warm` and `cold` have the same fields.
    """
    out: dict[str, Any] = {}
    for name, trainings in found.items():
        sides = {side: _entry(found, name, side) for side in SIDES if side in trainings[0].values}
        out[name] = sides.pop("all") | sides
        out[name]["seeds"] = [
            {"seed": seed, **{m: float(figures.values["all"][m].mean()) for m in HEADLINE}}
            for seed, figures in zip(seeds, trainings)]
    return out | {name: {"skipped": reason} for name, reason in skipped.items()}


def _entry(found: Mapping[str, Sequence[Figures]], name: str, side: str) -> dict[str, Any]:
    own = [figures.values[side] for figures in found[name]]
    entry: dict[str, Any] = {metric: float(np.mean([one[metric].mean() for one in own])) for metric in own[0]}
    entry["users"] = len(next(iter(own[0].values())))
    if name != RUN:
        entry["paired"] = _paired([figures.values[side] for figures in found[RUN]], own)
    if SCRAMBLED.get(name) in found:
        entry["worth"] = _paired(own, [figures.values[side] for figures in found[SCRAMBLED[name]]])
    return entry


def _paired(a: Sequence[Mapping[str, np.ndarray]], b: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict]:
    """a minus b, user by user, in the headline metrics."""
    out, each = {}, {}
    for metric in HEADLINE:
        left, right = np.stack([one[metric] for one in a]), np.stack([one[metric] for one in b])  # [S, n]
        mean, error, deviation = paired_over_seeds(left, right)
        out[metric] = {"difference": mean, "standard_error": error, "seed_deviation": deviation}
        each[metric] = (left - right).mean(axis=0)
    for metric, interval in bootstrap_cis(each, seed=0).items():
        out[metric]["ci95"] = interval
    return to_json({m: {k: None if k != "ci95" and not np.isfinite(v) else v for k, v in of.items()}
                    for m, of in out.items()})


def _skipped(base: Run, given: Mapping[str, RankingResult]) -> dict[str, str]:
    """Control -> why this run cannot have it."""
    data, out = base.dataset, {}
    has_text = any(text.strip() for text in item_texts(data))
    if not len(data.graph.triples):
        out |= dict.fromkeys(("no-graph", "random-graph"), "the data set has no triples")
    if not has_text:
        out |= dict.fromkeys(("no-text", "shuffled-text"), "no item has a text or a name")
    if not (len(data.graph.triples) or has_text or data.media or data.raw_media):
        out[CONTENT] = "nothing is known of the items beside who touched them"
    if POPULARITY not in given:
        ease = (base.done("fuse") or {}).get("skipped", {}).get("ease", "")
        out[POPULARITY] = f"no EASE, so no features are chosen ({ease})" if ease else "the items share no features"
    return out


def _other_seed(base: Run, judge: Judge, seed: int, with_popularity: bool) -> tuple[ControlRun, dict[str, Figures]]:
    """The run itself under another seed, and the figures that come from it."""
    real = open_control(base, base, RUN, seed)
    files = {RUN: real.path / "metrics.npz"}
    if with_popularity:
        folder = open_control(base, real, POPULARITY, seed).path
        files[POPULARITY] = folder / "metrics.npz"
    if not all(file.is_file() for file in files.values()):
        base.tracker.say(f"controls: the run itself, seed {seed}")
        began = time.monotonic()
        model = train_control(real, base)
        seconds = _seconds(real, time.monotonic() - began)
        Figures.of(judge.of_model(model), seconds).save(files[RUN])
        if with_popularity:
            Figures.of(judge.of_part(model.parts[_PREDICTED])).save(files[POPULARITY])
    return real, {name: Figures.load(file) for name, file in files.items()}


def _one(base: Run, real: Run, judge: Judge, name: str, seed: int) -> Figures:
    """The figures of a control under one seed, trained where they are not there yet."""
    control = open_control(base, real, name, seed)
    file = control.path / "metrics.npz"
    if not file.is_file():
        base.tracker.say(f"controls: {name}, seed {seed}")
        began = time.monotonic()
        model = train_content(control, content_parts(real)) if name == CONTENT else train_control(control, real)
        seconds = _seconds(control, time.monotonic() - began)
        Figures.of(judge.of_model(model), seconds).save(file)
    return Figures.load(file)


def _seconds(control: ControlRun, session: float) -> float:
    """What a control took: this session, or its stages where they were finished in another one."""
    stages = [(control.done(s) or {}).get("wall_seconds", 0.0) for s in ("graph", "fuse") if s not in control.shared]
    return max(session, sum(stages))


def predicted_popularity(model: FusedModel, judge: Judge) -> dict[str, RankingResult]:
    """{"popularity-from-features": its ranking} of a run's model, empty where it has no such part."""
    return {POPULARITY: judge.of_part(model.parts[_PREDICTED])} if _PREDICTED in model.parts else {}


def _same_users(run: Figures, control: Figures, folder: pathlib.Path) -> None:
    for side, rows in run.users.items():
        if side not in control.users or not np.array_equal(rows, control.users[side]):
            raise KgrecError(f"{folder}: found figures of other users than the run's, expected the same; remove the "
                             "folder and run the controls again")


def announcement(base: Run, seeds: Sequence[int], skipped: Mapping[str, str]) -> list[str]:
    """What the controls are about to cost, by the times of the run's own stages, in lines."""
    graph_seconds, fuse_seconds = _stage_seconds(base, "graph"), _stage_seconds(base, "fuse")
    structure = float((base.done("graph") or {}).get("structure", {}).get("seconds", 0.0))
    words = max(graph_seconds - structure, 0.0) if reads_text(base) else 0.0
    of_graph = {RUN: graph_seconds, "random-graph": graph_seconds, "shuffled-text": words}
    lines, total = [], 0.0
    for name in (RUN, *NAMES):
        if name in skipped:
            lines.append(f"  {name:<25} skipped: {skipped[name]}")
            continue
        trained = list(seeds[1:] if name == RUN else seeds)  # the run itself is there under its own seed
        if name == POPULARITY or not trained:
            continue
        left = [seed for seed in trained if not (control_folder(base, name, seed) / "metrics.npz").is_file()]
        seconds = 0.1 * fuse_seconds if name == CONTENT else fuse_seconds + of_graph.get(name, 0.0)
        total += len(left) * seconds
        lines.append(f"  {name:<25} " + (f"{len(left)} × {seconds / 60:.1f} minutes" if left else "finished"))
    times = total / max(fuse_seconds, 1e-9)
    return [f"controls: {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, at most about {total / 60:.1f} minutes in "
            f"all, {times:.1f} times the run's fuse stage (estimates from the run's own stages)", *lines]


def _stage_seconds(base: Run, name: str) -> float:
    return float((base.done(name) or {}).get("wall_seconds", 0.0))
