"""The fusion stage: closed forms, towers and a gate over all of them.

The gate is learned on interactions that none of its parts was fitted on: an inner cut of the training split, in which
some items are hidden altogether so that it learns what to trust for an item that nobody has touched. Then every part is
fitted again on the split's whole fit part, with the settings that were chosen.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from kgrec_jax.data.dataset import Dataset, Interactions, Split
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear import neighbours, ridge
from kgrec_jax.linear.choose import LinearChoice, choose_linear
from kgrec_jax.linear.ease import ease, skip_reason
from kgrec_jax.linear.parts import Part
from kgrec_jax.models.fusion import warm_shares
from kgrec_jax.models.recommender import FusedModel
from kgrec_jax.models.tower_config import TowerConfig, check_towers
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import fuse_media, item_features
from kgrec_jax.stages.bounds import check_bounds, check_optimizers
from kgrec_jax.stages.fuse_bpr import BOUNDS as BPR_BOUNDS
from kgrec_jax.stages.fuse_bpr import BprConfig
from kgrec_jax.stages.fuse_cut import held_out, inner_cut
from kgrec_jax.stages.fuse_encoder import EncoderTraining
from kgrec_jax.stages.fuse_gate import GateConfig, learn_gate
from kgrec_jax.stages.fuse_media import MEDIA_BOUNDS, MediaConfig
from kgrec_jax.stages.fuse_parts import Fitter, kernels_of
from kgrec_jax.stages.fuse_propagation import KINDS, PROPAGATION_BOUNDS, Propagator
from kgrec_jax.stages.fuse_rows import FURTHER, FurtherRows, Row
from kgrec_jax.stages.fuse_towers import TowerTraining
from kgrec_jax.stages.item_features import ItemContent
from kgrec_jax.tracking import write_json

# The rows of the report beside `fusion` and the towers', in order.
ROWS = ("popularity", "item-knn", "user-knn", "ease", "spectral", "collaborative", "features", "graph", "text",
        *FURTHER, *KINDS)


@dataclasses.dataclass(frozen=True)
class Config:
    """What the fusion stage fits."""

    tower: TowerConfig = TowerConfig()  # shape of the towers
    ensemble: int = 1  # towers that are trained one after the other, each from its own beginning, and count together
    steps: int = 0  # of the towers; 0: forty passes over the users, 300 to 1200
    batch: int = 128  # users of a step
    optim: OptimConfig = OptimConfig(peak_lr=5e-3, weight_decay=1e-4)  # of the towers
    rec_weight: float = 1.0  # λ of L_REC: the user's vector against the items'
    cf_weight: float = 0.2  # λ of L_CF: the history's mean free row against the free rows
    mlm_weight: float = 0.1  # λ of L_MLM: hidden tokens of the step's own items, where the encoder learns along
    loss_weights: Literal["fixed", "uncertainty"] = "fixed"  # uncertainty: the λ are where learned weights begin
    encoder: Literal["frozen", "lora", "full"] = "frozen"  # what of the text encoder learns with the towers
    encoder_items: int = 32  # texts that it reads in a step; the other items keep the vectors of when they were read
    encoder_rank: int = 8  # lora: rank of the sums
    encoder_alpha: float = 16.0  # lora: they count alpha / rank
    encoder_optim: OptimConfig = OptimConfig(peak_lr=2e-4)  # of encoder and masked-LM head
    propagation: Literal["off", "rgcn", "kgat", "kgin", "lightgcn"] = "off"  # a part of its own beside the towers
    propagation_dim: int = 64  # width of its vectors
    propagation_layers: int = 2  # hops
    propagation_bases: int = 4  # rgcn: basis matrices that all relations share
    propagation_attention: int = 16  # kgat: width of the space in which heads and tails are compared
    propagation_intents: int = 4  # kgin: reasons that a user may have, mixtures of relations
    propagation_independence: float = 1e-4  # kgin: weight of the intents' distance correlation
    propagation_dropout: float = 0.1  # share of a layer's entries that are dropped in a step
    propagation_free_dropout: float = 0.1  # share of the items that are in a step as if nobody had touched them
    propagation_loss: Literal["softmax", "bpr"] = "softmax"  # against all items, or against one drawn for each
    propagation_steps: int = 0  # 0: forty passes over the users, 300 to 1200
    propagation_batch: int = 256  # users of a step, at most a quarter of all
    propagation_optim: OptimConfig = OptimConfig(peak_lr=1e-2)  # of the propagation
    rows: tuple[Row, ...] = ()  # further rows of the report beside EASE: ials, slim, bpr, tfidf
    joined: tuple[Row, ...] = ()  # of these, parts of the fused score as well; they are rows in any case
    bpr: BprConfig = BprConfig()  # how the row bpr is trained
    gate: GateConfig = GateConfig()  # over all parts
    media: MediaConfig = MediaConfig()  # towers on raw images and sounds
    text_length: int = 128  # tokens of an item's text
    text_encoder: Literal["choose", "released"] = "choose"  # choose: by recall on held-out items
    eval_users: int = 20_000  # users on whom the test is ranked, drawn by the seed where there are more; 0: all
    log_every: int = 20  # steps between two rows of metrics.jsonl
    checkpoint_every: int = 100  # steps between two checkpoints

    @property
    def training(self) -> TowerTraining:
        """How the towers are trained; KgrecError for a field out of bounds.

        That is found out here because the estimate at the start of a run asks for it, before any stage has begun.
        """
        check(self)
        return TowerTraining(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TowerTraining)})

    @property
    def propagator(self) -> Propagator | None:
        """What is propagated and how it is trained; None where nothing is."""
        return None if self.propagation == "off" else Propagator.of(self, self.tower.temperature)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What was chosen before any part of the score is fitted."""

    linear: LinearChoice
    content: ridge.Choice | None  # of the feature ridge; None without features or without EASE
    text_source: str  # which weights read the items; "" without texts
    text_compared: Mapping[str, float]  # recall of each candidate on held-out items
    skipped: Mapping[str, str]  # row -> reason

    def save(self, path: pathlib.Path) -> None:
        """Writes JSON."""
        write_json(path, dataclasses.asdict(self))

    @staticmethod
    def load(path: pathlib.Path) -> Choices:
        """Reads what `save` wrote."""

        def build(held: dict) -> Choices:
            content = None if held["content"] is None else ridge.Choice(**held["content"])
            return Choices(LinearChoice(**held["linear"]), content, held["text_source"], held["text_compared"],
                           held["skipped"])

        return _read(path, build)


def _read(path: pathlib.Path, build: Callable[[Any], Any]) -> Any:
    """What `build` makes of a JSON file that this stage wrote; KgrecError where it is damaged or of another version."""
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KgrecError(f"{path}: found a damaged file ({type(error).__name__}: {error}), expected what the fusion "
                         f"stage wrote; restore it, or remove {path.parent} and run it again") from None


def check(cfg: Config) -> None:
    """KgrecError naming the first field that no training can do anything with."""
    many = 1 << 30
    bounds = {"ensemble": (1, 64), "steps": (0, many), "batch": (1, many), "rec_weight": (0.0, 1e6),
              "cf_weight": (0.0, 1e6), "mlm_weight": (0.0, 1e6), "encoder_items": (1, many), "encoder_rank": (1, many),
              "encoder_alpha": (0.0, 1e6), "text_length": (3, many),
              "eval_users": (0, many), "tower.width": (1, many), "tower.layers": (1, 1000), "tower.heads": (1, many),
              "tower.max_history": (1, many), "tower.part_dropout": (0.0, 0.99), "tower.free_dropout": (0.0, 0.99),
              "tower.history_dropout": (0.0, 0.99), "tower.hidden_dropout": (0.0, 0.99),
              "tower.mask_share": (1e-6, 0.99), "tower.temperature": (1e-4, 1e4), "tower.candidates": (0, many),
              "tower.candidate_power": (0.0, 4.0), "gate.steps": (0, many),
              "gate.batch": (1, many), "gate.candidates": (1, many), "gate.penalty": (0.0, 1e6),
              "gate.inner_share": (0.0, 0.9), "gate.guard_share": (0.0, 0.9), "gate.max_users": (1, many),
              **{f"bpr.{name}": bound for name, bound in BPR_BOUNDS.items()},
              **{f"media.{name}": bound for name, bound in MEDIA_BOUNDS.items()},
              **{f"propagation_{name}": bound for name, bound in PROPAGATION_BOUNDS.items()}}
    check_bounds("fuse", cfg, bounds)
    if cfg.ensemble > 1 and cfg.encoder != "frozen":
        raise KgrecError(f"fuse.ensemble: found {cfg.ensemble} with fuse.encoder {cfg.encoder}, expected 1, or an "
                         "encoder that is frozen: a query and a new item are read by one encoder")
    optimizers = ("optim", "encoder_optim", "gate.optim", "propagation_optim", "bpr.optim", "media.optim")
    check_optimizers("fuse", cfg, optimizers)
    check_towers(cfg.tower)
    fuse_media.check(cfg.media)


def check_data(cfg: Config, data: Dataset) -> None:
    """KgrecError where the config asks for what the data do not have."""
    fuse_media.check_data(cfg.media, data)
    if cfg.tower.rating_weight == "none":
        return
    if not data.has_ratings:
        raise KgrecError(f"fuse.tower.rating_weight: found {cfg.tower.rating_weight} for {data.name}, whose log has no "
                         "column rating, expected none")
    if (data.interactions.rating < 0).any():
        raise KgrecError(f"fuse.tower.rating_weight: found {cfg.tower.rating_weight} for {data.name}, which has the "
                         f"rating {data.interactions.rating.min():g}, expected none, or ratings from 0 on")


def prepare(experiment: Any, run: Any, linear: LinearChoice | None = None) -> tuple[Fitter, Choices]:
    """Chooses every setting on held-out interactions, once for a run folder, and reads texts and graph.

    `linear`: settings of the closed forms that were chosen already, on the same interactions.
    """
    cfg, held = experiment.fuse, run.stage("fuse") / "choices.json"
    if run.dataset.raw_media:
        fuse_media.learn(experiment, run, inner_cut(run.split, cfg.gate.inner_share, experiment.seed).fit)
    if held.is_file():
        choices = Choices.load(held)
        vectors, source, _ = item_features.read_texts(experiment, run, None, None)
        content = item_features.build_content(run.dataset, run, vectors, source)
        kernels = kernels_of(content, choices.content.weights if choices.content else ())
    else:
        choices, content, kernels = _choose(experiment, run, linear)
        choices.save(held)
    kernel, l2 = None, 0.0
    if choices.content is not None:
        kernel, l2 = ridge.combine(kernels, choices.content), choices.content.l2
    fitter = Fitter(cfg.tower, cfg.training, run, content, kernel, l2, choices.linear, experiment.seed, cfg.propagator,
                    FurtherRows.of(cfg), tuple(choices.skipped), choices.content,
                    EncoderTraining.of(experiment, run, choices.text_source), cfg.ensemble)
    return fitter, choices


def _choose(experiment: Any, run: Any,
            linear: LinearChoice | None) -> tuple[Choices, ItemContent, dict[str, np.ndarray]]:
    """(what held-out interactions choose, the items' content, the kernels of its blocks)."""
    split, say = run.split, run.tracker.say
    shape = run.dataset.num_users, run.dataset.num_items
    train_matrix = split.train.matrix(*shape)
    skipped = {"ease": reason} if (reason := skip_reason(run.dataset.num_items)) else {}
    skipped |= neighbours.skip_reasons(train_matrix)
    further = FurtherRows.of(experiment.fuse)
    if linear is None:
        linear = _choose_linear(split, shape, experiment.fuse.gate.inner_share, experiment.seed, tuple(skipped),
                                further, say)
    part = None if "ease" in skipped else ease(train_matrix, linear.ease_l2, linear.ease_dropout)
    vectors, source, compared = item_features.read_texts(experiment, run, train_matrix, part)
    content = item_features.build_content(run.dataset, run, vectors, source)
    kernels = {} if part is None else kernels_of(content)
    choice = ridge.choose(train_matrix, part, kernels, say=say) if kernels else None
    return Choices(linear, choice, source, compared, skipped | further.skipped(shape[1])), content, kernels


def _choose_linear(split: Split, shape: tuple[int, int], share: float, seed: int, without: tuple[str, ...],
                   further: FurtherRows, say: Any) -> LinearChoice:
    """Settings of the closed forms on the warm part of the validation, or of the inner cut where there is none."""
    base, chosen = split.train, split.valid.take(np.isin(split.valid.item, split.valid_cold_items, invert=True))
    if not len(chosen):
        inner = inner_cut(split, share, seed)
        base, chosen = inner.fit, inner.heldout.take(np.isin(inner.heldout.item, inner.cold, invert=True))
    with_ease = "ease" not in without
    return choose_linear(
        base.matrix(*shape), chosen.matrix(*shape), with_ease=with_ease, with_ials=further.with_ials or not with_ease,
        with_slim=further.with_slim(shape[1]), without=without, seed=seed, say=say)


def run(experiment: Any, run: Any, linear: LinearChoice | None = None,
        watch: Callable[[dict], None] = lambda told: None) -> tuple[FusedModel, dict[str, Part], dict]:
    """Fits everything; gives the fused model, the baseline rows beside it, and the results of done.json.

    `linear`: as in `prepare`. `watch` gets what was measured while the gate was learned, before all parts are fitted
    anew; what it raises ends the stage there.
    """
    fitter, choices = prepare(experiment, run, linear)
    held = run.stage("fuse") / "gate.json"
    if not held.is_file():
        write_json(held, _learn(experiment, run, fitter))
    gate, learned = _read(held, _learned)
    watch(learned)
    final, parts = fitter.model(run.split.fit, run.stage("fuse") / "tower", gate)
    run.tracker.say("fuse: weights of the parts for warm items: " + ", ".join(
        f"{name} {weight:.2f}" for name, weight in zip(final.names, warm_shares(gate))))
    rows = {name: parts[name] for name in ROWS if name in parts}
    told = {**dataclasses.asdict(choices), "skipped": {**choices.skipped, **_lacking(parts, fitter.further)}}
    return final, rows, {**told, **learned, "names": list(final.names)}


def _lacking(parts: Mapping[str, Part], further: FurtherRows) -> dict[str, str]:
    """Row -> why there is none, for those that follow from what is known of the items."""
    rows = ("text", *(("tfidf",) if "tfidf" in further.names else ()))
    out = {name: "no item has a text or a name" for name in rows if name not in parts}
    if "features" not in parts:
        out["features"] = ("no item has words, graph neighbours or vectors to share with another" if "ease" in parts
                           else "it carries EASE's scores to other items, and there is no EASE")
    return out


def _learned(held: dict) -> tuple[dict[str, np.ndarray], dict]:
    """(the gate's parameters, all of gate.json)."""
    return {name: np.asarray(value, np.float32) for name, value in held["gate"].items()}, held


def _learn(experiment: Any, run: Any, fitter: Fitter) -> dict:
    """The gate as JSON values, learned on the inner cut."""
    cfg, split, data, seed = experiment.fuse, run.split, run.dataset, experiment.seed
    shape = data.num_users, data.num_items
    inner = inner_cut(split, cfg.gate.inner_share, seed)
    model, _ = fitter.model(inner.fit, run.stage("fuse") / "tower_inner", {})
    held = held_out(inner, split, shape, cfg.tower.max_history)
    gate, told = learn_gate(cfg.gate, model, held, run, seed)
    return {"gate": {name: np.asarray(value).tolist() for name, value in gate.items()}, **told}


def refit(experiment: Any, run: Any, folder: pathlib.Path) -> tuple[FusedModel, Interactions]:
    """The chosen configuration fitted on every interaction of the data set, for use: (model, the log)."""
    fitter, _ = prepare(experiment, run)
    gate, _ = _read(run.stage("fuse") / "gate.json", _learned)
    log = run.dataset.interactions
    return fitter.model(log, folder / "tower", gate)[0], log
