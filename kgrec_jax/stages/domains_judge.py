"""What the shared towers are worth in one domain: alone beside its own towers, and as a part of its fused score.

The gate over the domain's parts and the new one is learned as without it: on interactions of the domain's inner cut,
with shared towers that were trained on the inner cuts of all domains.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.judge import Judge
from kgrec_jax.evaluation.ranking import RankingResult
from kgrec_jax.evaluation.significance import paired_difference
from kgrec_jax.linear.parts import Part
from kgrec_jax.models.recommender import FusedModel, histories_of
from kgrec_jax.stages import fuse
from kgrec_jax.stages.fuse_cut import held_out, inner_cut
from kgrec_jax.stages.fuse_gate import learn_gate
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import Run, VariantRun

PART = "domains"  # the name of the shared towers' part of the fused score
METRICS = ("ndcg@10", "recall@20")
OWN, SHARED, ALONE, JOINED = "own towers", "shared towers", "fused alone", "fused with domains"
PAIRS = {"towers": (SHARED, OWN), "fused": (JOINED, ALONE)}  # name -> (what is compared, its control)
VIEWS = ("all", "warm", "cold")


def joined_run(base: Run, folder: Any) -> VariantRun:
    """The run in which a domain's fused score has the shared towers' part, beside the domain's ordinary run."""
    return VariantRun(folder, base.experiment, base.tracker.at(folder), base, {"pretrain": base, "graph": base})


def with_part(model: FusedModel, part: Part, gate: Mapping[str, np.ndarray]) -> FusedModel:
    """The model with one part more, last in the order of the gate."""
    return dataclasses.replace(model, parts={**model.parts, PART: part}, names=(*model.names, PART), gate=gate)


def learn(base: Run, run: VariantRun, part: Part) -> tuple[dict[str, np.ndarray], dict]:
    """(the gate over the domain's parts and `part`, what was measured), learned on the inner cut or read.

    `part` was trained on the inner cuts alone.
    """
    held = run.stage("fuse") / "gate.json"
    if not held.is_file():
        experiment, split, data = base.experiment, base.split, base.dataset
        fitter, _ = fuse.prepare(experiment, base)
        inner = inner_cut(split, experiment.fuse.gate.inner_share, experiment.seed)
        model, _ = fitter.model(inner.fit, base.stage("fuse") / "tower_inner", {})
        found = held_out(inner, split, (data.num_users, data.num_items), experiment.fuse.tower.max_history)
        gate, told = learn_gate(experiment.fuse.gate, with_part(model, part, {}), found, run, experiment.seed)
        write_json(held, {"gate": {name: np.asarray(value).tolist() for name, value in gate.items()}, **told})
    try:
        about = json.loads(held.read_text(encoding="utf-8"))
        return {name: np.asarray(value, np.float32) for name, value in about["gate"].items()}, about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KgrecError(f"{held}: found a damaged file ({type(error).__name__}: {error}), expected the gate that "
                         f"kgrec domains wrote; remove {held.parent} and run it again") from None


def measure(base: Run, run: VariantRun, inner_part: Part, part: Part) -> dict[str, Any]:
    """The domain's figures: `inner_part` is of towers trained on the inner cuts, `part` of those on all that is fit."""
    data, split, cfg = base.dataset, base.split, base.experiment.fuse
    gate, told = learn(base, run, inner_part)
    control, _, _ = fuse.run(base.experiment, base)
    model = with_part(control, part, gate)
    shape = data.num_users, data.num_items
    known = split.fit.matrix(*shape)
    if split.valid_given:
        known = (known + split.valid.matrix(*shape)).tocsr()
    judge = Judge.of(base, histories_of(split.fit, *shape, cfg.tower.max_history), known)
    ranked = {OWN: judge.of_towers(control), SHARED: judge.of_part(part), ALONE: judge.of_model(control),
              JOINED: judge.of_model(model)}
    weights = np.exp(gate["warm"] - gate["warm"].max())
    return {
        "split": split.kind, "users": data.num_users, "items": data.num_items, "interactions": len(data.interactions),
        "notes": list(judge.notes), "models": {name: figures(result) for name, result in ranked.items()},
        "paired": {name: compared(ranked[one], ranked[other]) for name, (one, other) in PAIRS.items()},
        "gate": {"weights": dict(zip(model.names, (weights / weights.sum()).tolist(), strict=True)),
                 "judged": told["judged"], "guard": told["guard"]}}


def _views(result: RankingResult) -> dict[str, RankingResult]:
    """View -> its result, of those in which somebody has anything to be found."""
    parts = zip(VIEWS, (result, result.warm, result.cold), strict=True)
    return {name: part for name, part in parts if part is not None}


def figures(result: RankingResult) -> dict[str, dict[str, float]]:
    """{view: {metric: mean, "users", "candidates"}}."""
    return {view: {m: float(part.per_user[m].mean()) for m in METRICS} | {
        "users": len(part.users), "candidates": part.num_candidates} for view, part in _views(result).items()}


def compared(one: RankingResult, control: RankingResult) -> dict[str, dict[str, dict[str, float | None]]]:
    """{view: {metric: {"difference": mean of one - control, "standard_error"}}} over the same users."""
    out: dict[str, dict[str, dict[str, float | None]]] = {}
    others = _views(control)
    for view, part in _views(one).items():
        out[view] = {}
        for metric in METRICS:
            mean, error = paired_difference(part.per_user[metric], others[view].per_user[metric])
            out[view][metric] = {"difference": mean, "standard_error": error if math.isfinite(error) else None}
    return out
