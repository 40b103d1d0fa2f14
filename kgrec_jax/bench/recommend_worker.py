"""This program's side of `kgrec bench recommend`: trains or ranks once, in lines of JSON like the peer's."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from kgrec_jax.data.dataset import Graph, Interactions
from kgrec_jax.evaluation.ranking import RankingResult, evaluate_ranking
from kgrec_jax.machine import peak_mb
from kgrec_jax.models.propagation import Propagation, PropagationPart
from kgrec_jax.optim import make_optimizer
from kgrec_jax.stages import fuse
from kgrec_jax.stages.fuse_propagation import (
    Constants, PropagationTraining, UserBatches, build, init_params, loss, part_maker)
from kgrec_jax.train import TrainState, make_step

METRIC = "ndcg@10"


@dataclasses.dataclass(frozen=True)
class World:
    """What both sides read: users, items and entities as rows, the items the first entities."""

    train: sp.csr_matrix  # [Nu, I] float32 of ones
    valid: sp.csr_matrix
    test: sp.csr_matrix
    graph: Graph
    factors: tuple[np.ndarray, ...]  # vectors of users and items to rank by, where there are some

    @staticmethod
    def of(held: dict[str, np.ndarray]) -> World:
        """Of the arrays of a file."""
        size = int(held["num_users"]), int(held["num_items"])
        parts = [sp.csr_matrix((np.ones(len(pairs), np.float32), tuple(pairs.T)), shape=size)
                 for pairs in (held[name] for name in ("train", "valid", "test"))]
        triples = held["triples"].astype(np.int32) if "triples" in held else np.zeros((0, 3), np.int32)
        entities = int(max(size[1], triples[:, [0, 2]].max(initial=-1) + 1))
        relations = int(triples[:, 1].max(initial=-1) + 1)
        graph = Graph(tuple(map(str, range(entities))), ("",) * entities, ("",) * entities,
                      tuple(map(str, range(relations))), ("",) * relations, triples, size[1],
                      np.zeros(len(triples), np.int8))
        factors = tuple(held[name] for name in ("user_factors", "item_factors") if name in held)
        return World(*parts, graph, factors)

    @property
    def log(self) -> Interactions:
        """The training part as a log."""
        user, item = (index.astype(np.int32) for index in self.train.nonzero())
        return Interactions(user, item, np.ones(len(user), np.float32), np.zeros(len(user), np.int64))

    def ranked(self, part: str, score_block: Callable) -> RankingResult:
        """The figures of a scorer on a part, as RecBole has them: what stands in an earlier part is left out."""
        relevant = {"valid": self.valid, "test": self.test}[part]
        known = self.train if part == "valid" else self.train + self.valid
        return evaluate_ranking(score_block, known=known, relevant=relevant, num_items=self.train.shape[1],
                                fit=self.train)


def train(args: argparse.Namespace, world: World) -> dict:
    """The kind's training by the defaults of `kgrec run`, ranked on the validation part every `args.every` steps.

    `reached` is the first ranking at or above `args.target`, with the processor seconds of everything until then
    (`cpu_s`: the graph's arrays, compilation, steps and rankings; `train_cpu_s`: without the rankings) and the test of
    that moment. The schedule is gone through to its end all the same.
    """
    began = clocks()
    cfg = fuse.Config(propagation=args.model).propagator
    num_users, num_items = world.train.shape
    model, arrays, known = build(cfg.shape, world.graph, world.log, num_users, num_items)
    constants = jax.tree.map(jnp.asarray, arrays)
    steps = args.steps or cfg.training.num_steps(int((world.train.getnnz(axis=1) > 0).sum()))
    source = UserBatches.of(world.log, num_users, num_steps=steps, batch=cfg.training.batch, seed=args.seed)
    state, step = _compiled(cfg.training, model, constants, source, args.seed)
    part_of = part_maker(model, constants, num_users, known)
    _figure(world, "valid", part_of(state.params))  # what ranks is compiled, too
    compiled, ranking, rows, reached = since(began)["cpu_s"], 0.0, [], None
    for number in range(steps):
        state, _ = step(state, constants, jax.tree.map(jnp.asarray, source[number]))
        if (number + 1) % args.every and number + 1 < steps:
            continue
        jax.block_until_ready(state.params)
        before = clocks()
        part = part_of(state.params)
        value = _figure(world, "valid", part)
        ranking += since(before)["cpu_s"]
        spent = since(began)
        rows.append({"step": number + 1, METRIC: value, **spent, "train_cpu_s": spent["cpu_s"] - ranking})
        say(rows[-1])
        if reached is None and value >= args.target:
            before = clocks()
            reached = rows[-1] | {"test": _figure(world, "test", part)}
            began = tuple(a + b - c for a, b, c in zip(began, clocks(), before))  # the test is not on the clock
    return {"curve": rows, "best": max(rows, key=lambda row: row[METRIC]), "reached": reached, "steps": steps,
            "test": _figure(world, "test", part), "compile_cpu_s": compiled,
            "params": sum(leaf.size for leaf in jax.tree.leaves(state.params))}


def _compiled(cfg: PropagationTraining, model: Propagation, constants: Constants, source: UserBatches,
              seed: int) -> tuple[TrainState, Callable]:
    """(first state, compiled train step), as `train.fit` has them."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    tx = make_optimizer(cfg.optim, len(source))
    params = jax.jit(functools.partial(init_params, model))(init_key, constants)
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    step = jax.jit(make_step(functools.partial(loss, cfg, model), tx, step_key), donate_argnums=0)
    return state, step.lower(state, constants, jax.tree.map(jnp.asarray, source[0])).compile()


def _figure(world: World, which: str, part: PropagationPart) -> float:
    """Mean NDCG@10 of a part of the score."""
    return world.ranked(which, lambda users: part.scores(world.train[users])).means()[METRIC]


def rank(args: argparse.Namespace, world: World) -> dict:
    """Full ranking of the test users by given factors: the first time, compilation included, and once more."""
    del args
    users, items = map(jnp.asarray, world.factors)

    @jax.jit
    def scores(users: jax.Array, items: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.take(users, rows, axis=0) @ items.T  # [b, I]

    out: dict[str, Any] = {"before_mb": peak_mb()}
    for name in ("first", "again"):
        began = clocks()
        found = world.ranked("test", lambda rows: scores(users, items, rows))
        out[name] = since(began)
    return out | {"metrics": found.means(), "users": len(found.users)}


def judge(args: argparse.Namespace, world: World) -> dict:
    """The figures on the validation part of a matrix of scores [Nu, I] that the peer has left."""
    scores = np.load(args.scores, mmap_mode="r")
    return {METRIC: world.ranked("valid", lambda users: scores[users]).means()[METRIC]}


ORDERS = {"train": train, "rank": rank, "judge": judge}


def main() -> None:
    """One order, its rows as they come and its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("order", choices=tuple(ORDERS))
    parser.add_argument("file")
    parser.add_argument("--model", default="")
    parser.add_argument("--target", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", default="")
    args = parser.parse_args()
    say({"program": f"kgrec_jax, jax {jax.__version__}"})
    with np.load(args.file) as held:
        world = World.of(dict(held))
    say({"result": ORDERS[args.order](args, world) | {"peak_mb": peak_mb()}})


def say(answer: dict) -> None:
    """One line of JSON on the standard output, at once."""
    print(json.dumps(answer), flush=True)


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and processor seconds of all threads of this process."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> dict[str, float]:
    """What both clocks have run since."""
    wall, processor = clocks()
    return {"seconds": wall - began[0], "cpu_s": processor - began[1]}


if __name__ == "__main__":
    main()
