"""The fusion stage: closed forms, towers and a gate over all of them.

The gate is learned on interactions that none of its parts was fitted on: an inner cut of the training split, in which some
items are hidden altogether so that it learns what to trust for an item that nobody has touched. Then every part is fitted
again on the split's whole fit part, with the settings that were chosen.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax import losses, train
from kgrec_jax.data.dataset import Interactions, Split
from kgrec_jax.data.history_batches import HistoryBatch, HistoryBatches
from kgrec_jax.data.text import coverage, load_tokenizer, tfidf_svd
from kgrec_jax.linear import ridge
from kgrec_jax.linear.choose import LinearChoice, choose_linear, ndcg10
from kgrec_jax.linear.ease import ease, skip_reason
from kgrec_jax.linear.neighbours import item_knn, user_knn
from kgrec_jax.linear.parts import Constant, Factors, ItemWeights, Part
from kgrec_jax.linear.popularity import popularity
from kgrec_jax.linear.spectral import spectral
from kgrec_jax.models.fusion import GateInputs, gate_init, gate_penalty, gate_scores
from kgrec_jax.models.recommender import TOWER, FusedModel, Histories, Scale, TowerPart, histories_of
from kgrec_jax.models.towers import FREE, ItemFeatures, TowerConfig, Towers
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.pretrained.hf import load_encoder
from kgrec_jax.sharding import REPLICATED, Rules
from kgrec_jax.stages import item_features
from kgrec_jax.stages.item_features import ItemContent

TOWER_RULES: Rules = REPLICATED  # the towers are small; item tables are sharded with the large-catalogue path


@dataclasses.dataclass(frozen=True)
class Config:
    """What the fusion stage fits; 0 steps: from the number of users."""

    tower: TowerConfig = TowerConfig()  # shape of the towers
    steps: int = 0  # of the towers; 0: forty passes over the users, 300 to 1200
    batch: int = 128  # users of a step
    optim: OptimConfig = OptimConfig(peak_lr=5e-3, weight_decay=1e-4)  # of the towers
    cf_weight: float = 0.2  # λ of L_CF: the history's mean free row against the free rows
    text_length: int = 128  # tokens of an item's text
    text_encoder: str = "choose"  # choose: by recall on held-out items; or released
    gate_steps: int = 300  # of the gate
    gate_batch: int = 256  # users of a gate step
    gate_optim: OptimConfig = OptimConfig(peak_lr=0.03, warmup_share=0.0, schedule="cosine")
    gate_candidates: int = 100  # highest items of each user that the gate learns to order
    gate_penalty: float = 0.01  # pulls the gate's dependence on user and item to zero
    inner_share: float = 0.1  # of each user's items, and of the items, held out for the gate
    log_every: int = 20
    checkpoint_every: int = 100


@dataclasses.dataclass(frozen=True)
class Inner:
    """The cut on which the gate is learned."""

    fit: Interactions
    heldout: Interactions
    cold: np.ndarray  # [c] items hidden from `fit`
    joint: bool  # the split has cold items of its own, so the level of cold against warm is learned too


def inner_cut(split: Split, cfg: Config, seed: int) -> Inner:
    """What the gate's parts are fitted on and what it is learned on."""
    if not split.valid_given and len(split.valid_cold_items):
        return Inner(split.train, split.valid, split.valid_cold_items, True)
    rng = np.random.default_rng((seed, 17))
    log = split.train
    warm = np.unique(log.item)
    cold = np.sort(rng.choice(warm, max(1, int(cfg.inner_share * len(warm))), replace=False)) if len(warm) > 20 else np.zeros(0, np.int64)
    hidden = np.isin(log.item, cold)
    if split.valid_given or not len(split.valid):
        drawn = rng.random(len(log)) < cfg.inner_share
        return Inner(log.take(~(hidden | drawn)), log.take(hidden | drawn), cold, False)
    return Inner(log.take(~hidden), Interactions.concatenate([split.valid, log.take(hidden)]), cold, False)


def read_texts(experiment: Any, run: Any, train_matrix: sp.csr_matrix, part: ItemWeights | None) -> tuple[np.ndarray | None, str, dict]:
    """(text vectors [I, d] or None, where they are from, what was compared)."""
    cfg, rows = experiment.fuse, item_features.item_texts(run.dataset)
    held = run.stage("fuse") / "text.npz"
    if held.is_file():
        with np.load(held, allow_pickle=False) as file:
            return file["vectors"], str(file["source"]), {}
    if not any(r.strip() for r in rows):
        return None, "", {}
    encoder = load_encoder(experiment.encoder, say=run.tracker.say)
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    reason = coverage(tokenizer, [r for r in rows if r.strip()]).reason
    compared: dict[str, float] = {}
    if reason:
        run.tracker.say(f"fuse: {reason}: the text part uses character n-grams")
        vectors, source = tfidf_svd(rows, min(item_features.FALLBACK_WIDTH, max(2, len(rows) // 4)), experiment.seed), "character n-grams"
    else:
        candidates = item_features.text_candidates(experiment, run)
        source = "released encoder"
        if cfg.text_encoder == "choose" and part is not None and len(candidates) > 1:
            sample = np.sort(np.random.default_rng(experiment.seed).permutation(np.flatnonzero(part.known))[:400])
            for name, weights in candidates.items():
                some = item_features.encode(encoder, weights, tokenizer, [rows[i] for i in sample], min(cfg.text_length, 64), run, f"texts by {name}")
                sub = ItemWeights(np.asarray(part.weights)[np.ix_(sample, sample)], np.ones(len(sample), bool))
                found = ridge.choose(train_matrix[:, sample].tocsr(), sub, {"text": ridge.kernel(item_features.centred(some))}, fold_items=100)
                compared[name] = found.score
            best = max(compared, key=compared.get)
            # The released encoder stays unless another is clearly ahead: item vectors spoil easily and few items tell.
            source = best if compared[best] > compared[source] * 1.02 else source
            run.tracker.say("fuse: recall on held-out items by text: " + ", ".join(f"{n} {v:.4f}" for n, v in compared.items()) + f"; {source} reads the items")
        vectors = item_features.encode(encoder, candidates[source], tokenizer, rows, cfg.text_length, run, "item texts")
    temporary = held.with_suffix(".tmp.npz")
    np.savez(temporary, vectors=vectors, source=source)
    temporary.replace(held)
    return vectors, source, compared


@dataclasses.dataclass(frozen=True)
class Fitter:
    """Fits all parts on one log; everything that does not depend on the log is held."""

    cfg: Config
    run: Any
    content: ItemContent
    kernels: dict[str, np.ndarray]
    linear: LinearChoice
    with_ease: bool
    seed: int

    def closed_forms(self, log: Interactions, choice: ridge.Choice | None) -> dict[str, Part]:
        """The parts without a loop, by name; `ease` is the baseline row, `collaborative` the part of the score."""
        data = self.run.dataset
        matrix = log.matrix(data.num_users, data.num_items)
        out: dict[str, Part] = {"popularity": popularity(matrix), "item-knn": item_knn(matrix, self.linear.item_neighbours),
                                "user-knn": user_knn(matrix, self.linear.user_neighbours), "spectral": spectral(matrix, self.linear.rank)}
        if self.with_ease:
            out["ease"] = ease(matrix, self.linear.plain_ease_l2)
            out["collaborative"] = ease(matrix, self.linear.ease_l2, self.linear.ease_dropout)
            if choice is not None:
                out["features"] = ridge.content(out["collaborative"], self.kernels, choice)
                out["expected-popularity"] = self.expected_popularity(out["popularity"], choice)
        if self.content.text is not None:
            vectors = item_features.centred(self.content.text)
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
            out["text"] = Factors(vectors, np.ascontiguousarray(vectors.T), np.abs(vectors).sum(1) > 0)
        return out

    def expected_popularity(self, part: Constant, choice: ridge.Choice) -> Constant:
        """Log popularity as the features predict it, leave-one-out for warm items: the base rate of a cold one."""
        warm = np.flatnonzero(part.known)
        mean = part.values[warm].mean()
        row = np.zeros((len(part.values), len(part.values)), np.float32)
        row[0, :] = np.where(part.known, part.values - mean, 0.0)
        target = row[0, warm]
        combined = sum(np.float32(w) * self.kernels[n] for n, w in choice.weights.items())
        system = combined[np.ix_(warm, warm)].astype(np.float64)
        system[np.diag_indices(len(warm))] += choice.l2
        inverse = np.linalg.inv(system)
        alpha = inverse @ target
        values = (combined[:, warm] @ alpha).astype(np.float32)
        values[warm] = (target - alpha / np.diagonal(inverse)).astype(np.float32)  # leave-one-out residuals
        return Constant(values + mean, np.diagonal(combined) > 0)

    def features(self, log: Interactions) -> ItemFeatures:
        """What the item tower reads; free rows are present for the log's items alone."""
        data, content = self.run.dataset, self.content
        head, relation, tail = item_features.item_edges(content, data.num_items)
        dense = {**({"text": content.text} if content.text is not None else {}), **content.media}
        present = {name: np.abs(vectors).sum(1) > 0 for name, vectors in dense.items()}
        present["graph"] = np.isin(np.arange(data.num_items), head)
        present[FREE] = np.isin(np.arange(data.num_items), log.item)
        none = np.zeros((1, 1), np.float32)
        return jax.tree.map(jnp.asarray, ItemFeatures(dense, present, none if content.entity is None else content.entity,
                                                      none if content.relation is None else content.relation, head, relation, tail))

    def tower(self, log: Interactions, name: str) -> TowerPart:
        """The towers trained on one log."""
        cfg, data = self.cfg, self.run.dataset
        steps = cfg.steps or int(np.clip(40 * len(np.unique(log.user)) // cfg.batch, 300, 1200))
        model, features = Towers(cfg.tower, data.num_items), self.features(log)
        start = np.full((1, 1), -1, np.int32)
        source = HistoryBatches.of(log, num_steps=steps, batch=cfg.batch, max_history=cfg.tower.max_history, seed=self.seed)
        fitted = train.fit(
            workdir=self.run.stage("fuse") / name, init_fn=lambda key: model.init(key, features, start)["params"],
            loss_fn=functools.partial(loss, cfg, model), constants=features, source=source, tx=make_optimizer(cfg.optim, steps),
            seed=self.seed, mesh=self.run.mesh, rules=TOWER_RULES, log_every=cfg.log_every, checkpoint_every=cfg.checkpoint_every,
            label=f"fuse {name}", tracker=self.run.tracker)
        params = jax.device_get(fitted.params)
        parts = jax.device_get(model.apply({"params": params}, features, method=Towers.item_parts))
        known = np.any([np.asarray(p) for n, p in features.present.items() if n in parts], axis=0)
        return TowerPart(cfg.tower, params, np.asarray(sum(parts.values())), parts, known)


def loss(cfg: Config, model: Towers, params: Any, features: ItemFeatures, batch: HistoryBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    """λ_rec L_REC + λ_cf L_CF, means over the batch's users, and each term as (sum, count)."""
    users, items = model.apply({"params": params}, features, batch.history, False, rngs={"dropout": key})
    rec = losses.table_cross_entropy(users, items, batch.targets, weights=batch.weights)  # [B]
    free = params["items"]["item_embeddings"]
    mask = (batch.history >= 0).astype(jnp.float32)  # [B, H]
    mean = (jnp.take(free, jnp.maximum(batch.history, 0), axis=0) * mask[..., None]).sum(1)
    mean = mean / jnp.maximum(mask.sum(1, keepdims=True), 1.0)
    cf = losses.table_cross_entropy(mean * 10.0, free, batch.targets, weights=batch.weights)
    count = (batch.weights.sum(1) > 0).sum().astype(jnp.float32)
    total = (rec.sum() + cfg.cf_weight * cf.sum()) / jnp.maximum(count, 1.0)
    return total, {"rec_loss": (rec.sum(), count), "cf_loss": (cf.sum(), count)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateBatch:
    """Candidates of some users, warm ones and cold ones in lists of their own."""

    inputs: GateInputs
    relevant: np.ndarray  # [B, K] float32
    valid: np.ndarray  # [B, K] bool


@dataclasses.dataclass(frozen=True)
class GateSource:
    """Step -> users drawn by (seed, step)."""

    batch: GateBatch
    size: int
    num_steps: int
    seed: int

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> GateBatch:
        rows = np.random.default_rng((self.seed, step)).integers(len(self.batch.valid), size=self.size)
        return jax.tree.map(lambda x: x[rows], self.batch)


def gate_loss(cfg: Config, joint: bool, params: Any, constants: Any, batch: GateBatch, key: jax.Array) -> tuple[jax.Array, dict]:
    """Softmax over the highest warm candidates, over the highest cold ones, and over both where the split has cold items."""
    del constants, key
    scores = gate_scores(params, batch.inputs)
    cold = batch.inputs.cold
    groups = [batch.valid & ~cold, batch.valid & cold] + ([batch.valid] if joint else [])
    total = jnp.zeros(())
    for group in groups:
        logits = jnp.where(group, scores, -1e9)
        relevant = jnp.where(group, batch.relevant, 0.0)
        each = -(relevant * jax.nn.log_softmax(logits, axis=-1)).sum(-1)
        total = total + each.mean()
    return total + cfg.gate_penalty * gate_penalty(params), {}


def gate_data(cfg: Config, model: FusedModel, histories: Histories, seen: sp.csr_matrix, heldout: sp.csr_matrix, lead: dict[bool, str],
              seed: int) -> GateBatch:
    """The highest candidates of each user by the leading part, warm and cold ones; relevant = held out."""
    users = np.flatnonzero((heldout.getnnz(axis=1) > 0) & (histories.matrix.getnnz(axis=1) > 0))
    users = users if len(users) <= 4000 else np.sort(np.random.default_rng(seed).choice(users, 4000, replace=False))
    cold, known, features = model.cold, model.known(), model.item_features()
    pieces = []
    for start in range(0, len(users), 256):
        rows = users[start:start + 256]
        own = histories.take(rows)
        scores, present, user = model.standardised(own)
        hide = seen[rows].toarray() > 0
        lists, valid = [], []
        for is_cold in (False, True):
            base = np.where(hide | (cold != is_cold)[None], -np.inf, scores[model.names.index(lead[is_cold])])
            k = min(cfg.gate_candidates, base.shape[1])
            top = np.argpartition(-base, k - 1, axis=1)[:, :k]
            lists.append(top)
            valid.append(np.take_along_axis(base, top, axis=1) > -np.inf)
        items = np.concatenate(lists, axis=1)
        at = np.arange(len(rows))[:, None]
        inputs = GateInputs(scores.transpose(1, 2, 0)[at, items], known[:, items].transpose(1, 2, 0) & present.T[:, None, :],
                            cold[items], user, features[items])
        pieces.append(GateBatch(inputs, np.asarray(heldout[rows][at, items].todense(), np.float32), np.concatenate(valid, axis=1)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *pieces)


def scale_of(matrix: sp.csr_matrix) -> Scale:
    """Mean and deviation of log history length and log popularity."""
    users, items = np.log1p(matrix.getnnz(axis=1)), np.log1p(matrix.getnnz(axis=0))
    users, items = users[users > 0], items[items > 0]
    return Scale(float(users.mean()), float(users.std() + 1e-6), float(items.mean()), float(items.std() + 1e-6))


def run(experiment: Any, run: Any) -> tuple[FusedModel, dict[str, Part], dict]:
    """Fits everything; gives the fused model, the baseline rows beside it, and the results of done.json."""
    cfg, data, split, seed, say = experiment.fuse, run.dataset, run.split, experiment.seed, run.tracker.say
    shape = data.num_users, data.num_items
    train_matrix = split.train.matrix(*shape)
    skipped = {"ease": reason} if (reason := skip_reason(data.num_items)) else {}
    warm_valid = split.valid.take(~np.isin(split.valid.item, split.valid_cold_items)) if len(split.valid) else split.valid
    inner = inner_cut(split, cfg, seed)
    inner_matrix = inner.fit.matrix(*shape)
    choosing = warm_valid.matrix(*shape) if len(warm_valid) else inner.heldout.take(~np.isin(inner.heldout.item, inner.cold)).matrix(*shape)
    base = train_matrix if len(warm_valid) else inner_matrix
    linear = choose_linear(base, choosing, with_ease=not skipped, say=say)
    first = None if skipped else ease(train_matrix, linear.ease_l2, linear.ease_dropout)
    vectors, source, compared = read_texts(experiment, run, train_matrix, first)
    content = item_features.build_content(data, run, vectors, source)
    kernels = {} if skipped else {name: ridge.kernel(block) for name, block in content.blocks().items()}
    choice = ridge.choose(train_matrix, first, kernels, say=say) if kernels else None
    fitter = Fitter(cfg, run, content, kernels, linear, not skipped, seed)

    def model_on(log: Interactions, name: str, gate: Any = None) -> tuple[FusedModel, dict[str, Part]]:
        parts = fitter.closed_forms(log, choice)
        fused = {n: p for n, p in parts.items() if n != "ease"}
        matrix = log.matrix(*shape)
        names = (*fused, TOWER)
        gate = gate_init(len(names), 1, 1) if gate is None else gate
        return FusedModel(fused, fitter.tower(log, name), gate, names, matrix.getnnz(axis=0), scale_of(matrix)), parts

    model, _ = model_on(inner.fit, "tower_inner")
    histories = histories_of(inner.fit, *shape, cfg.tower.max_history)
    heldout = inner.heldout.matrix(*shape)
    known_then = inner_matrix + split.valid.matrix(*shape) if split.valid_given else inner_matrix
    judged = {name: judge_part(model, histories, name, known_then, heldout) for name in model.names}
    lead = {False: max((n for n in model.names if n not in ("popularity", "expected-popularity")), key=judged.get),
            True: "features" if choice is not None else TOWER}
    batch = gate_data(cfg, model, histories, known_then, heldout, lead, seed)
    fitted = train.fit(
        workdir=run.stage("fuse") / "gate", init_fn=lambda key: gate_init(len(model.names), 1, 1), constants={},
        loss_fn=functools.partial(gate_loss, cfg, inner.joint), source=GateSource(batch, cfg.gate_batch, cfg.gate_steps, seed),
        tx=make_optimizer(cfg.gate_optim, cfg.gate_steps), seed=seed, mesh=run.mesh, rules=REPLICATED, log_every=cfg.log_every,
        checkpoint_every=cfg.gate_steps, label="fuse gate", tracker=run.tracker)
    gate = jax.device_get(fitted.params)
    say("fuse: weights of the parts: " + ", ".join(f"{n} {w:.2f}" for n, w in zip(model.names, np.asarray(jax.nn.softmax(gate["warm"])))))
    final, parts = model_on(split.fit, "tower", gate)
    rows = {name: parts[name] for name in ("popularity", "item-knn", "user-knn", "ease", "spectral", "collaborative", "features", "text") if name in parts}
    results = {"linear": dataclasses.asdict(linear), "content": None if choice is None else dataclasses.asdict(choice), "text_source": source,
               "text_compared": compared, "judged": judged, "skipped": skipped,
               "gate": {"names": list(final.names), **{k: np.asarray(v).tolist() for k, v in gate.items()}}}
    return final, rows, results


def judge_part(model: FusedModel, histories: Histories, name: str, seen: sp.csr_matrix, heldout: sp.csr_matrix) -> float:
    """NDCG@10 of one part alone over the items it knows, on at most 2,000 users."""
    users = np.flatnonzero(heldout.getnnz(axis=1) > 0)[:2000]
    values = []
    for start in range(0, len(users), 512):
        rows = users[start:start + 512]
        values.append(ndcg10(model.part_scores(histories.take(rows), name), seen[rows].tocsr(), heldout[rows]) * len(rows))
    return float(np.sum(values) / max(len(users), 1))
