"""Learning the gate on interactions that none of its parts was fitted on, and checking it against the best part."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax import train
from kgrec_jax.evaluation.significance import paired_difference
from kgrec_jax.linear.choose import ndcg10
from kgrec_jax.models.fusion import GateInputs, Head, alone, gate_init, gate_penalty, gate_scores
from kgrec_jax.models.recommender import WITHOUT_HISTORY, FusedModel, Histories
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import REPLICATED

_SCORES = 1 << 27  # of all parts together, in a block of users: 512 MB


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How the gate over the parts is learned."""

    head: Head = "additive"  # what a part's weight depends on beside user and item: attention and mlp see the scores
    steps: int = 300  # of the gate
    batch: int = 256  # users of a step
    optim: OptimConfig = OptimConfig(peak_lr=0.03, warmup_share=0.0, schedule="cosine")
    candidates: int = 100  # highest items of each user that the gate learns to order
    penalty: float = 0.01  # pulls the gate's dependence on user and item to zero
    inner_share: float = 0.1  # of each user's items, and of the items, held out for the gate
    guard_share: float = 0.25  # of the users, on whom the gate is compared with the best part alone
    max_users: int = 4000  # users that it is learned on


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


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What the gate is learned on: histories, what is left out of the lists, what is to be found."""

    histories: Histories
    seen: sp.csr_matrix  # [Nu, I]
    relevant: sp.csr_matrix  # [Nu, I]
    joint: bool  # warm and cold items are held out as they will be met, so their levels can be compared

    def users(self, limit: int, seed: int) -> np.ndarray:
        """Rows of the users with a history and something to be found, at most `limit` of them, in order."""
        users = np.flatnonzero((self.relevant.getnnz(axis=1) > 0) & (self.histories.matrix.getnnz(axis=1) > 0))
        if len(users) > limit:
            users = np.sort(np.random.default_rng(seed).choice(users, limit, replace=False))
        return users


def gate_loss(cfg: GateConfig, joint: bool, params: Any, constants: Any, batch: GateBatch,
              key: jax.Array) -> tuple[jax.Array, dict]:
    """Softmax over the highest warm candidates, over the highest cold ones, and over both where that can be learned."""
    del constants, key
    scores = gate_scores(params, batch.inputs)
    cold = batch.inputs.cold
    groups = [batch.valid & ~cold, batch.valid & cold] + ([batch.valid] if joint else [])
    total = jnp.zeros(())
    for group in groups:
        logits = jnp.where(group, scores, -1e9)
        relevant = jnp.where(group, batch.relevant, 0.0)
        total = total - (relevant * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean()
    return total + cfg.penalty * gate_penalty(params), {}


def gate_data(cfg: GateConfig, model: FusedModel, held: HeldOut, users: np.ndarray, lead: dict[bool, str]) -> GateBatch:
    """The highest candidates of each user by the leading part, warm and cold ones; relevant = held out."""
    cold, known, features = model.cold, model.known(), model.item_features()
    pieces, size = [], _users_at_a_time(model, 256)
    for start in range(0, len(users), size):
        rows = users[start:start + size]
        scores, present, user = model.standardised(held.histories.take(rows))
        hide = held.seen[rows].toarray() > 0
        lists, valid = [], []
        for is_cold in (False, True):
            base = np.where(hide | (cold != is_cold)[None], -np.inf, scores[model.names.index(lead[is_cold])])
            k = min(cfg.candidates, base.shape[1])
            top = np.argpartition(-base, k - 1, axis=1)[:, :k]
            lists.append(top)
            valid.append(np.take_along_axis(base, top, axis=1) > -np.inf)
        items = np.concatenate(lists, axis=1)  # [b, K]
        at = np.arange(len(rows))[:, None]
        there = known[:, items].transpose(1, 2, 0) & present.T[:, None, :]  # [b, K, P]
        inputs = GateInputs(scores.transpose(1, 2, 0)[at, items], there, cold[items], user, features[items])
        relevant = np.asarray(held.relevant[rows][at, items].todense(), np.float32)
        pieces.append(GateBatch(inputs, relevant, np.concatenate(valid, axis=1)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *pieces)


def learn_gate(cfg: GateConfig, model: FusedModel, held: HeldOut, run: Any, seed: int) -> tuple[dict, dict]:
    """(the gate's parameters, what was measured on the way) for the parts of `model`.

    A share of the users is kept for the guard: where the gate is behind the best part by more than a standard error on
    them, among warm or among cold items, that part alone orders those items. Equal weights where nobody can tell.
    """
    users = held.users(cfg.max_users, seed)
    equal = jax.device_get(gate_init(len(model.names), 1, 1))
    if len(users) < 8:
        run.tracker.say(f"fuse: {len(users)} users to learn the gate on: all parts count alike")
        return equal, {"judged": {}, "guard": {}}
    kept = np.random.default_rng((seed, 23)).random(len(users)) < cfg.guard_share
    guard_users = users[kept] if kept.sum() >= 20 else users
    judged = judge_parts(model, held, guard_users)
    lead = {side: max((n for n in model.names if n not in WITHOUT_HISTORY), key=lambda n: judged[side][n].mean()
                      if judged[side] else 0.0) for side in (False, True)}
    if not judged[True] and "features" in model.names:
        lead[True] = "features"
    batch = gate_data(cfg, model, held, users[~kept] if kept.sum() >= 20 else users, lead)
    fitted = train.fit(
        workdir=run.stage("fuse") / "gate", constants={},
        init_fn=lambda key: gate_init(len(model.names), 1, 1, cfg.head, key),
        loss_fn=functools.partial(gate_loss, cfg, held.joint), source=GateSource(batch, cfg.batch, cfg.steps, seed),
        tx=make_optimizer(cfg.optim, cfg.steps), seed=seed, mesh=run.mesh, rules=REPLICATED, log_every=20,
        checkpoint_every=cfg.steps, label="fuse gate", tracker=run.tracker)
    gate = jax.device_get(fitted.params)
    guard = {}
    for side, name in ((False, "warm"), (True, "cold")):
        if judged[side]:
            gate, guard[name] = check_gate(model, gate, held, guard_users, judged[side], side)
            run.tracker.say(f"fuse: {name} items, held-out users: NDCG@10 fused {guard[name]['fused']:.4f}, best part "
                            f"{guard[name]['best']} {guard[name]['value']:.4f}; {guard[name]['kept']} orders them")
    sides = (("warm", judged[False]), ("cold", judged[True]))
    means = {side: {name: float(v.mean()) for name, v in found.items()} for side, found in sides}
    return gate, {"judged": means, "guard": guard}


def judge_parts(model: FusedModel, held: HeldOut, users: np.ndarray) -> dict[bool, dict[str, np.ndarray]]:
    """{is_cold: {part: NDCG@10 of each user who has something to be found there}}, empty where nobody has."""
    out: dict[bool, dict[str, np.ndarray]] = {}
    for side in (False, True):
        among = model.cold == side
        there = bool(_relevant(held, users, among).nnz)
        out[side] = {name: _each(held, users, among, functools.partial(model.part_scores, name=name), model)
                     for name in model.names if there}
    return out


def check_gate(model: FusedModel, gate: dict, held: HeldOut, users: np.ndarray, judged: dict[str, np.ndarray],
               side: bool) -> tuple[dict, dict]:
    """The gate, or that of the best part alone among warm or cold items where the gate is behind it."""
    fused = _each(held, users, model.cold == side, dataclasses.replace(model, gate=gate).scores, model)
    best = max(judged, key=lambda name: judged[name].mean())
    mean, error = paired_difference(fused, judged[best])
    told = {"fused": float(fused.mean()), "best": best, "value": float(judged[best].mean()), "kept": "the gate"}
    if mean < 0 and not -mean <= error:  # an error that is unknown lets the part decide too
        gate = alone(gate, model.names.index(best), side)
        told["kept"] = best
    return gate, told


def _relevant(held: HeldOut, users: np.ndarray, among: np.ndarray) -> sp.csr_matrix:
    """[n, I]: what is to be found, among the items of one kind."""
    relevant = (held.relevant[users] @ sp.diags(among.astype(np.float32))).tocsr()
    relevant.eliminate_zeros()
    return relevant


def _users_at_a_time(model: FusedModel, most: int) -> int:
    """Users whose scores by every part are held together: all of `most` but where there are very many items."""
    return max(1, min(most, _SCORES // (len(model.names) * model.num_items)))


def _each(held: HeldOut, users: np.ndarray, among: np.ndarray, score: Any, model: FusedModel) -> np.ndarray:
    """NDCG@10 of each user who has something to be found among the items of one kind, those alone ranked."""
    relevant, out, size = _relevant(held, users, among), [], _users_at_a_time(model, 512)
    for start in range(0, len(users), size):
        rows = users[start:start + size]
        scores = np.array(score(held.histories.take(rows)))
        scores[:, ~among] = -np.inf
        out.append(ndcg10(scores, held.seen[rows].tocsr(), relevant[start:start + size]))
    return np.concatenate(out)
