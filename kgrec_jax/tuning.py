"""Hyper-parameter search on the validation part: Optuna proposes, a trial is a run, the test is never looked at.

OUT holds `base/` (the split, and the stages on which the search has no bearing: they are computed once), one run folder
a trial in `trials/`, the study (study.db), and what the search has found so far: trials.tsv, best.json, best.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from kgrec_jax import compilation_cache, pipeline
from kgrec_jax.config import to_json
from kgrec_jax.config_expression import config_file
from kgrec_jax.data.tables import cell, write_tsv
from kgrec_jax.errors import Interrupted, KgrecError
from kgrec_jax.metrics import METRICS
from kgrec_jax.stages import fuse
from kgrec_jax.tracking import Tracker, write_json, write_text
from kgrec_jax.tuning_space import Choices, Value, corners, prunes, shared_stages, shares_choices, value_at, with_values
from kgrec_jax.tuning_trial import BaseRun, Search, finish_stages, run_trial
from kgrec_jax.workdir import FORMAT_VERSION, Run, differences, read_json

NAMES = tuple(f"{name}@{k}" for name in METRICS for k in (10, 20))  # what can be searched for
_STARTUP = 10  # trials drawn at random before TPE models anything
_KEPT = 75.0  # percentile: a trial is ended early where it is among the worst quarter of those before it
_PRUNE_FROM = 5  # finished trials


def search(search: Search, out: pathlib.Path, trials: int, quiet: bool = False) -> dict[str, Any]:
    """Goes on until `trials` trials have ended; gives what best.json holds.

    The values of a trial are a function of the config's seed and of the trials before it. A trial that was killed is
    begun again with its values, from its last checkpoint. Raises KgrecError for bad input, for a folder of another
    search, and where no trial has come to its end.
    """
    optuna = import_optuna()
    compilation_cache.enable()
    check(search)
    tracker = Tracker(out, quiet)
    with _alone(out):
        _same_search(search, out)
        base = _prepare(search, out, tracker)
        study = optuna.create_study(
            storage=f"sqlite:///{out / 'study.db'}", study_name="kgrec", direction="maximize", load_if_exists=True,
            pruner=optuna.pruners.PercentilePruner(_KEPT, n_startup_trials=_PRUNE_FROM, n_warmup_steps=0))
        _again(optuna, study, search, base)
        began = len(_ended(optuna, study))
        with tracker.progress("tune", trials, min(began, trials)) as bar:
            for number in range(began, trials):
                row = _trial(optuna, study, search, base, out, number)
                found = write_results(optuna, study, search, out)
                best = found["value"] if found else float("nan")
                what = f"{search.metric} {row['value']:.4f}" if row["state"] == "complete" else row["state"]
                tracker.say(f"trial {number}: {what}{': ' + row['error'] if row['error'] else ''}, "
                            f"{row['seconds']:.0f} s; best {best:.4f}")
                bar.advance(1, best=best)
        found = write_results(optuna, study, search, out)
    if found is None:
        errors = [t.user_attrs["error"] for t in _ended(optuna, study) if t.user_attrs.get("error")]
        raise KgrecError(f"tune: found no trial that came to its end among {trials} ({errors[-1] if errors else ''}), "
                         "expected one; narrow the space or raise --trials")
    return found


def import_optuna() -> Any:
    """Optuna, with its own messages off; KgrecError naming the extra where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise KgrecError("kgrec tune: found no optuna, expected it: pip install 'kgrec-jax[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def check(search: Search) -> None:
    """KgrecError for a metric, a config or an end of a range that no trial could work with."""
    if search.metric not in NAMES:
        raise KgrecError(f"--metric: found {search.metric!r}, expected one of {', '.join(NAMES)}")
    pipeline.check(search.experiment)
    for values in corners(search.space):
        try:
            pipeline.check(with_values(search.experiment, values))
        except KgrecError as error:
            (path, value), = values.items()
            raise KgrecError(f"--space: {path}={value}: {error}") from None


@contextlib.contextmanager
def _alone(out: pathlib.Path) -> Iterator[None]:
    """Holds the folder; KgrecError where another search works in it: it would take our running trial for a dead one."""
    if out.is_file():
        raise KgrecError(f"--out: found the file {out}, expected a folder or a new name")
    left = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []
    if left and "tune.json" not in left:
        raise KgrecError(f"--out: found files in {out} but no tune.json, expected the folder of a search or an empty "
                         "one; choose another")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise KgrecError(f"--out: found another kgrec tune at work in {out}, expected none; wait for it or choose "
                             "another folder") from None
        yield


def _same_search(search: Search, out: pathlib.Path) -> None:
    held, now = out / "tune.json", search.to_json()
    if held.is_file():
        other = differences(read_json(held), now)
        if other:
            raise KgrecError(f"{held}: found a search with another {', '.join(other[:6])}, expected the same command; "
                             "choose another --out")
    else:
        write_json(held, now)


def _prepare(search: Search, out: pathlib.Path, tracker: Tracker) -> BaseRun:
    """The shared stages, texts and choices, computed where they are not there yet."""
    # What is only a row of the report takes time and has no part in the score.
    experiment = with_values(search.experiment, {"fuse.rows": ()})
    opened = Run.open(out / "base", experiment, tracker.quiet)
    base = BaseRun(opened.path, opened.experiment, tracker.at(opened.path))
    fuse.check_data(experiment.fuse, base.dataset)
    split = base.split
    tracker.say(f"tune: trained on {len(split.train) + len(split.valid):,} interactions, measured on the "
                f"{len(split.test):,} of the validation part; the test part is left alone")
    finish_stages(base, shared_stages(search.space))
    if shared_stages(search.space) == ("pretrain", "graph") and shares_choices(search.space):
        fuse.prepare(experiment, base)
    return base


def _distributions(optuna: Any, search: Search) -> dict[str, Any]:
    """The space in Optuna's terms; a field of whole numbers has them."""
    out: dict[str, Any] = {}
    for path, domain in search.space.items():
        if isinstance(domain, Choices):
            out[path] = optuna.distributions.CategoricalDistribution(domain.values)
        elif isinstance(value_at(search.experiment, path), int):
            out[path] = optuna.distributions.IntDistribution(int(domain.low), int(domain.high), domain.log,
                                                             int(domain.step) or 1)
        else:
            out[path] = optuna.distributions.FloatDistribution(domain.low, domain.high, domain.log,
                                                               domain.step or None)
    return out


def _own_values(search: Search, base: Run, distributions: Mapping[str, Any]) -> dict[str, Value]:
    """What the config itself has in the fields of the space, where the space holds it: the first trial."""
    steps = search.experiment.fuse.training.num_steps(len(np.unique(base.split.fit.user)))
    values = {path: value_at(search.experiment, path) or (steps if path == "fuse.steps" else 0)
              if isinstance(value_at(search.experiment, path), (int, float)) else value_at(search.experiment, path)
              for path in search.space}
    return {path: value for path, value in values.items()
            if distributions[path]._contains(distributions[path].to_internal_repr(value))}


def _again(optuna: Any, study: Any, search: Search, base: Run) -> None:
    """Queues the config itself at the very beginning, and what a kill has interrupted with the same values."""
    if not study.trials:
        study.enqueue_trial(_own_values(search, base, _distributions(optuna, search)))
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if trial.params.keys() == search.space.keys():
            study.enqueue_trial(trial.params)


def _ended(optuna: Any, study: Any) -> list[Any]:
    """The trials that ended by themselves: finished, pruned, or failed with an error of their own."""
    state = optuna.trial.TrialState
    return [t for t in study.get_trials(deepcopy=False)
            if t.state in (state.COMPLETE, state.PRUNED) or (t.state == state.FAIL and "error" in t.user_attrs)]


def _trial(optuna: Any, study: Any, search: Search, base: BaseRun, out: pathlib.Path, number: int) -> dict[str, Any]:
    """Runs the trial with this number to its end, and tells the study."""
    seed = np.random.SeedSequence((search.experiment.seed, 41, number)).generate_state(1)[0]
    # A sampler of its own for each trial: one that goes on after a restart would draw its first numbers again.
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=_STARTUP, seed=int(seed))
    trial = study.ask(_distributions(optuna, search))
    trial.set_user_attr("number", number)
    began, error, value, inner = time.monotonic(), "", float("nan"), float("nan")

    def watch(told: dict) -> None:
        nonlocal inner
        inner = _reached(told)
        if math.isfinite(inner) and prunes(search.space):
            trial.report(inner, step=0)
            if trial.should_prune():
                raise optuna.TrialPruned

    try:
        value = run_trial(search, base, out / "trials" / f"{number:03d}", trial.params, watch)
        state = optuna.trial.TrialState.COMPLETE
    except optuna.TrialPruned:
        state = optuna.trial.TrialState.PRUNED
    except Interrupted:  # the trial goes on from its checkpoint when the search does
        raise
    except KgrecError as wrong:  # values that do not go together, a training that diverged: no reason to end the search
        state, error = optuna.trial.TrialState.FAIL, str(wrong)
        trial.set_user_attr("error", error)
    seconds = time.monotonic() - began
    trial.set_user_attr("seconds", seconds)
    trial.set_user_attr("inner", inner if math.isfinite(inner) else None)
    study.tell(trial, value if state == optuna.trial.TrialState.COMPLETE else None, state=state)
    return {"state": state.name.lower(), "value": value, "error": error, "seconds": seconds}


def _reached(told: dict) -> float:
    """NDCG@10 of the gate on the users kept to check it: known before the parts are fitted anew. NaN without any."""
    sides = [told["guard"][side] for side in ("warm", "cold") if side in told["guard"]]
    return float(sides[0]["fused"] if sides[0]["kept"] == "the gate" else sides[0]["value"]) if sides else float("nan")


def write_results(optuna: Any, study: Any, search: Search, out: pathlib.Path) -> dict[str, Any] | None:
    """Writes trials.tsv, best.json and best.py; gives what best.json holds, None while no trial is complete."""
    ended = sorted(_ended(optuna, study), key=lambda t: t.user_attrs["number"])
    if not ended:
        return None

    def cells(of: Callable[[Any], Any]) -> list[str]:
        return ["" if (value := of(trial)) is None else cell(value) for trial in ended]

    write_tsv(out / "trials.tsv", {
        "trial": cells(lambda t: t.user_attrs["number"]), "state": cells(lambda t: t.state.name.lower()),
        search.metric: cells(lambda t: t.value if t.state.name == "COMPLETE" else None),
        "inner_ndcg@10": cells(lambda t: t.user_attrs.get("inner")),
        "seconds": cells(lambda t: round(t.user_attrs["seconds"], 1)),
        **{path: cells(lambda t, p=path: t.params.get(p)) for path in search.space},
        "error": cells(lambda t: t.user_attrs.get("error"))})
    complete = [t for t in ended if t.state.name == "COMPLETE"]
    if not complete:
        return None
    best = max(complete, key=lambda t: t.value)  # the earliest of equals
    number, config = best.user_attrs["number"], with_values(search.experiment, best.params)
    found = {"format_version": FORMAT_VERSION, "metric": search.metric, "value": best.value, "trial": number,
             "params": dict(best.params), "trials": len(ended), "complete": len(complete), "config": to_json(config)}
    write_json(out / "best.json", found)
    about = f"The best of {len(ended)} trials of kgrec tune: {search.metric} {best.value:.4f} on the validation part."
    write_text(out / "best.py", config_file(config, about))
    return found
