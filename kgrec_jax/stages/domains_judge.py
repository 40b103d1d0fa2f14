"""What the shared towers are worth in one domain: by themselves and in its fused score, each beside its control.

The gate over the domain's parts and the new one is learned as without it: on interactions of the domain's inner cut,
with shared towers that were trained on the inner cuts of all domains.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.judge import Judge
from kgrec_jax.evaluation.ranking import RankingResult
from kgrec_jax.evaluation.significance import paired_difference
from kgrec_jax.models.domain_towers import DomainPart
from kgrec_jax.models.fusion import warm_shares
from kgrec_jax.models.recommender import FusedModel
from kgrec_jax.serving import store
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse
from kgrec_jax.stages.domains_parts import Trained
from kgrec_jax.stages.fuse_cut import held_out, inner_cut
from kgrec_jax.stages.fuse_gate import HeldOut, learn_gate
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import Run, VariantRun

PART = "domains"  # the name of the shared towers' part of the fused score
METRICS = ("ndcg@10", "recall@20")
OWN, SINGLE, SHARED = "own towers", "shared towers on one domain", "shared towers"
ALONE, FUSED_SINGLE, JOINED = "fused alone", "fused with one domain", "fused with domains"
# name -> (what is compared, what it is compared with)
CONTROLS = {"towers": (SHARED, SINGLE), "fused": (JOINED, FUSED_SINGLE)}  # they differ in the other domains alone
PAIRS = {"own towers": (SHARED, OWN), "fused alone": (JOINED, ALONE)}
VIEWS = ("all", "warm", "cold")


def pairs(control: bool) -> dict[str, tuple[str, str]]:
    """What is compared in each domain, with and without the control."""
    return {**CONTROLS, **PAIRS} if control else PAIRS


@dataclasses.dataclass(frozen=True)
class Joining:
    """A part that joins a domain's fused score, and the run that keeps the gate of it."""

    run: VariantRun
    trained: Trained


@dataclasses.dataclass(frozen=True)
class Ground:
    """What gates of one domain are learned on; fitted once for all of them, and not at all where they are learned."""

    base: Run  # the domain's ordinary run

    @functools.cached_property
    def fitted(self) -> tuple[FusedModel, HeldOut]:
        """(the domain's parts fitted on the inner cut, without a gate; what is held out from them)."""
        experiment, split, data = self.base.experiment, self.base.split, self.base.dataset
        fitter, _ = fuse.prepare(experiment, self.base)
        cut = inner_cut(split, experiment.fuse.gate.inner_share, experiment.seed)
        model, _ = fitter.model(cut.fit, self.base.stage("fuse") / "tower_inner", {})
        return model, held_out(cut, split, (data.num_users, data.num_items), experiment.fuse.tower.max_history)


def joined_run(base: Run, folder: Any) -> VariantRun:
    """The run in which a domain's fused score has the part of other towers, beside the domain's ordinary run."""
    return VariantRun(folder, base.experiment, base.tracker.at(folder), base, {"pretrain": base, "graph": base})


def finished(run: VariantRun, control: bool) -> bool:
    """Whether all figures of a domain were measured and its recommender is there."""
    done = run.done("fuse")
    return (done is not None and set(pairs(control)) <= set(done.get("paired", {}))
            and (Recommender.folder(run.path) / store.MANIFEST).is_file())


def with_part(model: FusedModel, part: DomainPart, gate: Mapping[str, np.ndarray]) -> FusedModel:
    """The model with one part more, last in the order of the gate."""
    return dataclasses.replace(model, parts={**model.parts, PART: part}, names=(*model.names, PART), gate=gate)


def learn(ground: Ground, joining: Joining) -> tuple[dict[str, np.ndarray], dict]:
    """(the gate over the domain's parts and the one that joins, what was measured), learned or read."""
    run, experiment = joining.run, ground.base.experiment
    held = run.stage("fuse") / "gate.json"
    if not held.is_file():
        model, found = ground.fitted
        gate, told = learn_gate(experiment.fuse.gate, with_part(model, joining.trained.inner, {}), found, run,
                                experiment.seed)
        write_json(held, {"gate": {name: np.asarray(value).tolist() for name, value in gate.items()}, **told})
    try:
        about = json.loads(held.read_text(encoding="utf-8"))
        return {name: np.asarray(value, np.float32) for name, value in about["gate"].items()}, about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KgrecError(f"{held}: found a damaged file ({type(error).__name__}: {error}), expected the gate that "
                         f"kgrec domains wrote; remove {held.parent} and run it again") from None


def measure(base: Run, shared: Joining, single: Joining | None) -> dict[str, Any]:
    """The domain's figures; leaves the recommender that they were measured with in the folder of `shared`.

    `single`: the control, towers of the same kind that were trained on this domain alone; None where none was.
    """
    data, part = base.dataset, shared.trained.final.for_serving()
    gate, single_gate = _gates(base, shared, single)
    alone = fuse.run(base.experiment, base)[0]
    model = with_part(alone, part, gate[0])
    recommender = served(base, model)
    judge = Judge.of(base, recommender.histories, recommender.known)
    ranked = {OWN: judge.of_towers(alone), SHARED: judge.of_part(part), ALONE: judge.of_model(alone),
              JOINED: judge.of_model(model)}
    if single is not None:
        ranked[SINGLE] = judge.of_part(single.trained.final)
        ranked[FUSED_SINGLE] = judge.of_model(with_part(alone, single.trained.final, single_gate[0]))
    recommender.save(shared.run.path / "recommender")
    return {
        "split": base.split.kind, "users": data.num_users, "items": data.num_items,
        "interactions": len(data.interactions), "notes": list(judge.notes),
        "models": {name: figures(ranked[name]) for name in (OWN, SINGLE, SHARED, ALONE, FUSED_SINGLE, JOINED)
                   if name in ranked},
        "paired": {name: compared(ranked[one], ranked[other])
                   for name, (one, other) in pairs(single is not None).items()},
        "gate": _told(model.names, *gate),
        **({} if single is None else {"control_gate": _told(model.names, *single_gate)})}


def _gates(base: Run, *joinings: Joining | None) -> list[Any]:
    """What `learn` gives for each, None for None; the models of the inner cut are forgotten before others are fitted.
    """
    ground = Ground(base)
    return [None if joining is None else learn(ground, joining) for joining in joinings]


def served(base: Run, model: FusedModel) -> Recommender:
    """The recommender of a domain whose fused score has the part of the shared towers.

    It takes no new items in: what reads an item (the shared item tower, the tables of the joined graph, one encoder for
    all) stays with the run, so what other parts would need for that is left out as well.
    """
    return dataclasses.replace(Recommender.from_run(base, model).with_categories_of(base), intake=None)


def _told(names: tuple[str, ...], gate: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> dict[str, Any]:
    """A gate in numbers: the parts' weights for warm items, what the parts and the guard were measured as."""
    return {"weights": dict(zip(names, warm_shares(gate).tolist(), strict=True)),
            "judged": about["judged"], "guard": about["guard"]}


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
