"""This program's side of `kgrec bench graph`: answers a line of JSON to each line it reads, as the peer does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.bench.language import matmul_peak
from kgrec_jax.data.link_batches import LinkRows, LinkSource, merge_queries
from kgrec_jax.evaluation.link_prediction import KnownTails, add_inverses, evaluate_link_prediction
from kgrec_jax.machine import peak_mb
from kgrec_jax.models.graph_embedding import GraphEmbedding
from kgrec_jax.optim import OptimConfig
from kgrec_jax.sharding import padded_rows
from kgrec_jax.stages.graph_config import Config
from kgrec_jax.stages.graph_sparse import init_sparse, make_sparse_step, sparse_batch
from kgrec_jax.stages.graph_structure import structure_loss, structure_optimizer
from kgrec_jax.train import TrainState, make_step

WARM_UP = 2  # steps before the clock starts
STEPS = 1_000_000  # of the run that the steps seem to be a part of: no schedule ends within the bench
TAILS = 64  # answers of one row: the 149,689 queries of FB15k-237 are 151,199 rows
OPTIMIZERS = {"adagrad": Config().optim, "adamw": OptimConfig(schedule="constant", warmup_share=0.0, clip_norm=0.0)}


@dataclasses.dataclass
class Trained:
    """A compiled step and what it has changed so far."""

    step: Callable
    state: TrainState
    batch_of: Callable  # number -> batch
    done: int = 0


class Worker:
    """The graph, and what was compiled and trained on it so far."""

    def __init__(self, file: str, dim: int, batch: int, optimizer: str):
        with np.load(file) as held:
            self.train, self.known, self.test = (held[name] for name in ("train", "known", "test"))
            self.entities, self.relations = int(held["num_entities"]), int(held["num_relations"])
        self.width, self.batch, self.optimizer = 2 * dim, batch, optimizer
        self.trained: dict[str, Trained] = {}
        self.scorer: Callable | None = None  # compiled once, as graph_structure.structure_scorer does for a run
        self.compile_s = 0.0

    def link(self, steps: int) -> dict:
        """ComplEx, all entities as rivals: distinct (head, relation) queries, inverse ones included."""
        if "link" not in self.trained:
            cfg = Config(scorer="complex", dim=self.width, batch=self.batch, tails=TAILS, rivals="all", n3=0.0,
                         optim=OPTIMIZERS[self.optimizer])
            rows = merge_queries(self.train, self.relations, TAILS)
            self.queries = len(np.unique(rows.head.astype(np.int64) * 2 * self.relations + rows.relation))
            self.share = self.queries / len(rows)
            source = LinkSource(rows, batch=self.batch, steps=STEPS, seed=0, num_entities=self.entities)
            self.model = self._model("complex")
            tx = structure_optimizer(cfg, STEPS)
            tables = self.model.init(jax.random.key(0))
            with jax.numpy_dtype_promotion("standard"):
                state = TrainState(jnp.zeros((), jnp.int32), tables, tx.init(tables))
            step = make_step(lambda t, _, b, key: structure_loss(cfg, self.model, t, b), tx, jax.random.key(1))
            self._compile("link", step, state, source.__getitem__)
        taken = self._time("link", steps)
        # Three products of [batch, entities] with the width between them; the rest is less than a tenth.
        flops = 6.0 * self.batch * self.entities * self.width * steps
        return taken | {"count": steps * self.batch * self.share, "queries": self.queries,
                "gflops": flops / taken["seconds"] / 1e9}

    def sampled(self, steps: int) -> dict:
        """RotatE, one sampled negative a positive, on the rows in use."""
        if "sampled" not in self.trained:
            cfg = Config(scorer="rotate", dim=self.width, batch=self.batch, tails=1, rivals="per-query", candidates=1,
                         loss="margin", n3=0.0, optim=OptimConfig(schedule="constant", warmup_share=0.0, clip_norm=0.0))
            both = add_inverses(self.train, self.relations)
            rows = LinkRows(*both[:, :2].T, both[:, 2:], np.ones((len(both), 1), np.float32))
            source = LinkSource(rows, batch=self.batch, steps=STEPS, seed=0, num_entities=self.entities, candidates=1,
                                shared=False)
            model = self._model("rotate")
            self._compile("sampled", make_sparse_step(cfg, model, STEPS), init_sparse(model.init(jax.random.key(0))),
                          lambda number: sparse_batch(source[number], model.entity_rows))
        return self._time("sampled", steps) | {"count": steps * self.batch}

    def evaluation(self, triples: int) -> dict:
        """Filtered ranks of the first test triples in both directions, by the ComplEx model; the filter's lists too."""
        def evaluate() -> dict:
            known = KnownTails.of(self.known, self.relations)
            tables = self.trained["link"].state.params
            return evaluate_link_prediction(lambda h, r: self.scorer(tables, h, r), self.test[:triples], known=known,
                                            num_entities=self.entities)

        if self.scorer is None:
            self.scorer = jax.jit(self.model.scores)
            self.compile_s += _clocked(evaluate)[0]["seconds"]  # a first ranking included
        taken, found = _clocked(evaluate)
        return taken | {"count": int(found["queries"]), "mrr": found["mrr"]}

    def peak(self, count: int) -> dict:
        """The fastest large matrix product of this moment, GFLOP/s; and what compilation has taken so far."""
        del count
        return {"matmul_gflops": matmul_peak("float32") / 1e9, "compile_s": self.compile_s,
                "device": jax.devices()[0].device_kind}

    def _model(self, scorer: str) -> GraphEmbedding:
        return GraphEmbedding(scorer, self.width, self.entities, self.relations, padded_rows(self.entities, 1))

    def _compile(self, name: str, step: Callable, state: TrainState, batch_of: Callable) -> None:
        taken, compiled = _clocked(lambda: jax.jit(step, donate_argnums=0).lower(
            state, {}, jax.tree.map(jnp.asarray, batch_of(0))).compile())
        self.compile_s += taken["seconds"]
        self.trained[name] = Trained(compiled, state, batch_of)

    def _time(self, name: str, steps: int) -> dict[str, float]:
        """Seconds of so many steps after the warm-up, their batches made and moved within the time."""
        held = self.trained[name]

        def run(number: int) -> None:
            for _ in range(number):
                held.state, _ = held.step(held.state, {}, jax.tree.map(jnp.asarray, held.batch_of(held.done)))
                held.done += 1
            jax.block_until_ready(held.state.params)

        run(WARM_UP)
        return _clocked(lambda: run(steps))[0]


def main() -> None:
    """Answers until the standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    for name in ("dim", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adagrad")
    args = parser.parse_args()
    worker = Worker(args.file, args.dim, args.batch, args.optimizer)
    print(json.dumps({"program": f"kgrec_jax, jax {jax.__version__}"}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(worker, order["measure"])(order["count"])
        print(json.dumps(answer | {"peak_mb": peak_mb()}), flush=True)


def _clocked(function: Callable) -> tuple[dict[str, float], Any]:
    """(seconds on the wall and processor seconds of all threads, what the call returned)."""
    wall, processor = time.perf_counter(), time.process_time()
    found = function()
    return {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - processor}, found


if __name__ == "__main__":
    main()
