"""How plausible a triple is: two calibrators over one scorer, and how far each can be believed.

Both are fitted on validation triples, which the scorer has not learned from, and measured on test triples:

* Proposals: P(the candidate is a hidden fact | features). The likely queries (head, relation) are asked as if the
  validation triples were not known; a candidate is right where it is one of them, v of them among v + u + n that look
  alike, u being facts that nobody has listed and count as wrong there, n false. Of proposals, for which all parts are
  known, u / (u + n) are right: v / (v + u + n) is a lower bound of it wherever the graph lacks at least as many facts
  as the validation part has, alike in kind (u ≥ v), and too high in a graph that lacks fewer. No data tell how many a
  graph lacks; `Completer.prior_shift` takes a belief about it.
* Facts: P(the statement is true | features), among held-out facts and as many false statements of right types, one end
  replaced by another entity of its slot, known facts never. A training triple's features know the answer, so its
  probability is too high and only the order of such triples, the lowest first, says something.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib
from typing import Any, Literal

import numpy as np

from kgrec_jax.data.link_batches import some_triples
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.calibration import Calibrator, fit_calibrator
from kgrec_jax.evaluation.reliability import (Reliability, calibration_metrics, plot_reliability, precision_at,
                                              reliability)
from kgrec_jax.evaluation.triple_features import FEATURES, corrupt
from kgrec_jax.serving.candidates import Search, candidates, likely_queries, some_queries
from kgrec_jax.serving.complete import PARTS, Completer
from kgrec_jax.tracking import write_json

THRESHOLDS = (0.5, 0.8)
FORMAT_VERSION = 1

Examples = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # features [n, 8], relations, labels, groups [n]


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """On how much the calibrators are fitted, and how."""

    triples: int = 5_000  # held-out triples of each part that are weighed against false ones
    queries: int = 20_000  # queries of each part that are asked for proposals
    method: Literal["logistic", "isotonic"] = "logistic"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Both calibrators, and how far they can be believed on test triples, which they have not seen."""

    facts: Calibrator
    proposals: Calibrator
    measured: dict[str, dict[str, float]]  # of "facts" and "proposals", what is a number; empty without test triples
    curves: dict[str, Reliability]  # of the same; empty where it was read from a file


def calibrate(scored: Completer, cfg: CalibrationConfig = CalibrationConfig(),
              search: Search = Search()) -> Calibration:
    """Both calibrators of a scored graph.

    Raises KgrecError where nothing was held out to learn from, or none of it is among the candidates.
    """
    if not (scored.part == 1).any():
        raise KgrecError("calibration: found no held-out triple to learn from, expected some; give a triples.valid.tsv "
                         "or raise graph.valid_share and run the graph stage in a new folder")
    fitted, measured, curves = {}, {}, {}
    for name, examples in (("facts", fact_examples), ("proposals", proposal_examples)):
        features, relations, labels, groups = examples(scored, 1, cfg, search)
        fitted[name] = fit_calibrator(features, relations, labels, groups=groups, method=cfg.method,
                                      num_relations=scored.graph.num_relations)
        if not (scored.part == 2).any():
            continue
        features, relations, labels, _ = examples(scored, 2, cfg, search)
        if len(labels):
            p = fitted[name].probabilities(features, relations)
            figures = calibration_metrics(p, labels) | precision_at(p, labels, THRESHOLDS)
            measured[name] = {figure: value for figure, value in figures.items() if np.isfinite(value)}
            curves[name] = reliability(p, labels)
    return Calibration(fitted["facts"], fitted["proposals"], measured, curves)


def fact_examples(scored: Completer, part: int, cfg: CalibrationConfig, search: Search) -> Examples:
    """Triples of a part and as many corrupted ones."""
    del search
    true, known = some_triples(scored.triples(part), cfg.triples, cfg.seed), scored.known(0, 1, 2)
    place, false = corrupt(true, scored.graph.triples, known=known, seed=cfg.seed + part)
    # Where no false one can be made the true one does not count either, so that both are equally frequent.
    both = np.concatenate([true[place], false])
    with scored.tracker.progress(f"statements of {PARTS[part]}", 2 * len(both)) as bar:
        features = scored.features(both, known, bar.advance)
    return features, both[:, 1], np.arange(len(both)) < len(place), np.tile(place, 2)


def proposal_examples(scored: Completer, part: int, cfg: CalibrationConfig, search: Search) -> Examples:
    """Candidates of likely queries, right where they are triples of `part`, which the search does not know.

    The other held-out part is known, and so no candidate at all.
    """
    known, slots = scored.known(0, 3 - part), scored.slots(0, 3 - part)
    queries = some_queries(likely_queries(slots, search), cfg.queries, cfg.seed + part)
    found = [np.zeros((0, 3), np.int32)]
    with scored.tracker.progress(f"queries of {PARTS[part]}", sum(map(len, queries.values()))) as bar:
        found += candidates(scored.score_block, queries, known=known, slots=slots, search=search,
                            num_entities=scored.graph.num_entities, advance=bar.advance)
    asked = np.concatenate(found)
    with scored.tracker.progress(f"candidates of {PARTS[part]}", 2 * len(asked)) as bar:
        features = scored.features(asked, known, bar.advance)
    keys = scored.keys(asked)
    return features, asked[:, 1], np.isin(keys, scored.keys(scored.triples(part))), keys // scored.graph.num_entities


def fingerprint(scored: Completer, cfg: CalibrationConfig, search: Search) -> dict[str, Any]:
    """What a calibration follows from, for a JSON file: settings, features, checksums of scores and parts."""
    probe = np.unique(np.linspace(0, len(scored.part) - 1, 64).astype(np.int64)) if len(scored.part) else []
    some = scored.graph.triples[probe]
    scores = np.asarray(scored.score_block(some[:, 0], some[:, 1]), np.float32)[:, :scored.graph.num_entities]
    return {"format_version": FORMAT_VERSION, "features": list(FEATURES), "calibration": dataclasses.asdict(cfg),
            "search": dataclasses.asdict(search), "triples": zlib.crc32(scored.graph.triples.tobytes()),
            "part": zlib.crc32(scored.part.tobytes()), "scores": np.round(scores.mean(axis=1), 3).tolist()}


def held_calibration(scored: Completer, folder: pathlib.Path, plots: pathlib.Path,
                     cfg: CalibrationConfig = CalibrationConfig(), search: Search = Search()) -> Calibration:
    """The calibration that `folder` holds, where it follows from the same; else a new one, left there.

    Leaves calibration.json in `folder` and, where there are test triples, reliability.png in `plots`.
    """
    file, follows = folder / "calibration.json", fingerprint(scored, cfg, search)
    if file.is_file():
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["follows_from"] == follows:
                return Calibration(*(Calibrator.from_json(held[name]) for name in ("facts", "proposals")),
                                   held["measured"], {})
        except (ValueError, KeyError, TypeError):
            scored.tracker.say(f"{file}: damaged; it is made anew")
    made = calibrate(scored, cfg, search)
    write_json(file, {"follows_from": follows, "measured": made.measured, "facts": made.facts.to_json(),
                      "proposals": made.proposals.to_json()})
    if made.curves:
        plot_reliability(made.curves, plots / "reliability.png")
    return made
