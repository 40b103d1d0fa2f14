"""One process of `kgrec bench peft`: reads an order as JSON, prints what it found as JSON on its last line."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kgrec_jax import compilation_cache, losses, train
from kgrec_jax.bench.peft import RATES, Settings
from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.link_batches import LinkRows, hold_out, merge_queries, some_triples
from kgrec_jax.data.sources import resolve
from kgrec_jax.data.text import load_tokenizer
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import KnownTails, evaluate_link_prediction
from kgrec_jax.machine import cpu_threads, peak_mb
from kgrec_jax.models import bert, encoders, heads, peft
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.optim import OptimConfig, by_part, make_optimizer
from kgrec_jax.pretrained.hf import Encoder, load_encoder
from kgrec_jax.sharding import make_mesh
from kgrec_jax.tracking import Tracker

ENTITY_TOKENS = 64  # of an entity's name and text
FIRST_SCALE = 20.0  # 1 / temperature at the start, that of most sentence encoders


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryBatch:
    """Queries in words, with their known answers."""

    input_ids: np.ndarray  # [B, L] int32
    attention_mask: np.ndarray  # [B, L] int32
    tails: np.ndarray  # [B, T] int32
    weight: np.ndarray  # [B, T] float32, sums to 1 in each row


@dataclasses.dataclass(frozen=True)
class Task:
    """The graph task, read once and left in a folder for every method."""

    triples: np.ndarray  # [T, 3] int32
    part: np.ndarray  # [T] int8: 0 train, 1 valid, 2 test
    num_relations: int
    entity_ids: np.ndarray  # [N, Le] int32 tokens of the names, -1: none
    relation_ids: np.ndarray  # [2R, Lr] int32 tokens of the names, -1: none
    entities: np.ndarray  # [N, D] float32 unit vectors of the entities' texts
    special: np.ndarray  # [CLS], [SEP], padding
    length: int

    def words(self, heads_: np.ndarray, relations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, attention_mask), both [b, length] int32: [CLS] head [SEP] relation [SEP]."""
        cls, sep, pad = (int(x) for x in self.special)
        out, mask = np.full((len(heads_), self.length), pad, np.int32), np.zeros((len(heads_), self.length), np.int32)
        for row, (h, r) in enumerate(zip(heads_, relations, strict=True)):
            name, relation = (table[i][table[i] >= 0] for table, i in ((self.entity_ids, h), (self.relation_ids, r)))
            room = self.length - 3 - len(relation)
            tokens = np.concatenate([[cls], name[:max(room, 1)], [sep], relation, [sep]])[:self.length]
            out[row, :len(tokens)], mask[row, :len(tokens)] = tokens, 1
        return out, mask


@dataclasses.dataclass(frozen=True)
class QuerySource:
    """`steps` batches of queries, a function of (seed, step)."""

    task: Task
    rows: LinkRows
    steps: int
    batch: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> QueryBatch:
        rng = np.random.default_rng([self.seed, step])
        at = rng.choice(len(self.rows), self.batch, replace=len(self.rows) < self.batch)
        weight = self.rows.weight[at]
        ids, mask = self.task.words(self.rows.head[at], self.rows.relation[at])
        return QueryBatch(ids, mask, self.rows.tails[at], weight / weight.sum(1, keepdims=True))


def prepare(settings: Settings, folder: pathlib.Path) -> dict[str, Any]:
    """Reads the graph, encodes names, relations and entities into `folder`; returns what the table says of it."""
    encoder = load_encoder(settings.encoder, say=_say)
    peft.check(peft.PeftConfig(), encoder.config)
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    graph = _graph(settings)
    part = graph.part if graph.part.any() else hold_out(graph.triples, 0.05, 0.1, seed=settings.seed)
    names = list(graph.entity_names)
    texts = [f"{name}. {text}" if text else name for name, text in zip(names, graph.entity_texts, strict=True)]
    vectors = encode_texts(encoder, encoders.backbone(encoder.config, encoder.params), tokenizer, texts,
                           max_length=ENTITY_TOKENS)
    relations = [*graph.relation_names, *(f"inverse of {name}" for name in graph.relation_names)]
    tables = [_table(tokenizer.encode(words, settings.length, special=False)) for words in (names, relations)]
    longest = [int((table >= 0).sum(1).max()) for table in tables]
    length = min(settings.length, sum(longest) + 3)
    np.savez(folder / "task.npz", triples=graph.triples, part=part, num_relations=graph.num_relations,
             entity_ids=tables[0], relation_ids=tables[1], entities=vectors, length=length,
             special=np.array([tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]))
    task = load_task(folder)
    frozen = peft.PeftConfig(method="frozen")
    untuned = quality(settings, task, encoder, frozen, {"encoder": {}, "head": _head()})
    return {"data": pathlib.Path(settings.data).name or "toy world", "entities": graph.num_entities, "length": length,
            "queries": len(merge_queries(graph.triples[part == 0], graph.num_relations, 16)),
            "test": len(_test(settings, task)), "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
            f"{cpu_threads()} CPU threads",
            "untuned_mrr": untuned["mrr"]}


def load_task(folder: pathlib.Path) -> Task:
    """The task that `prepare` left."""
    with np.load(folder / "task.npz") as held:
        return Task(**{f.name: held[f.name] if held[f.name].ndim else int(held[f.name])
                       for f in dataclasses.fields(Task)})


def measure(settings: Settings, method: str, folder: pathlib.Path) -> dict[str, Any]:
    """Trains by one method; its row of the table."""
    task, encoder = load_task(folder), load_encoder(settings.encoder, say=_say)
    cfg = peft.PeftConfig(method=method)
    backbone = encoders.backbone(encoder.config, encoder.params)
    base = peft.base(cfg, encoder.config, backbone)
    tx = optimizer(cfg, settings.steps)
    rows = merge_queries(task.triples[task.part == 0], task.num_relations, 16)
    source = QuerySource(task, rows, settings.steps, settings.batch, settings.seed)

    def init(key: jax.Array) -> dict:
        return {"encoder": peft.init(cfg, encoder.config, backbone, key), "head": _head()}

    mesh = make_mesh(devices=jax.devices()[:1])
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        fitted = train.fit(
            workdir=pathlib.Path(workdir), init_fn=init, constants={"encoder": base, "entities": task.entities},
            loss_fn=functools.partial(loss, cfg, encoder.config), source=source, tx=tx,
            seed=settings.seed, mesh=mesh, rules=encoders.rules(encoder.config), log_every=max(1, settings.steps // 8),
            checkpoint_every=0, label=method, tracker=Tracker(workdir, quiet=True))
        speed = throughput(pathlib.Path(workdir), source)
    peak = peak_mb()
    shapes = jax.eval_shape(init, jax.random.key(0))
    found = quality(settings, task, encoder, cfg, jax.device_get(fitted.params))
    return {"method": method, "trainable_share": peft.share(backbone, shapes["encoder"]), "peak_mb": peak,
            "trainable": peft.size(shapes["encoder"]), "learning_rate": RATES[method], **speed,
            "loss": fitted.metrics["loss"], "mergeable": "yes" if peft.is_mergeable(cfg) else "no",
            **{name: found[name] for name in ("mrr", "mr", "hits@1", "hits@3", "hits@10")}}


def loss(cfg: peft.PeftConfig, config: bert.BertConfig, params: dict, constants: dict, batch: QueryBatch,
         key: jax.Array) -> tuple[jax.Array, dict]:
    """Cross-entropy over all entities, a query's answers sharing its weight."""
    queries = vectors(cfg, config, params["encoder"], constants["encoder"], batch.input_ids, batch.attention_mask, key)
    scaled = queries * heads.learned_scale(params["head"])
    each = losses.table_cross_entropy(scaled, constants["entities"], batch.tails, weights=batch.weight)
    return each.mean() + peft.penalty(cfg, params["encoder"]), {"link_loss": (each.sum(), jnp.float32(each.shape[0]))}


def vectors(cfg: peft.PeftConfig, config: bert.BertConfig, trainable: dict, base: dict, ids: jax.Array,
            mask: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Unit vectors [B, D] of queries [B, L]."""
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    states = peft.hidden_states(cfg, config, base, trainable, ids, mask, jnp.zeros_like(ids), key=key)
    return heads.unit(heads.pool(states[-1], mask, "mean"))


def optimizer(cfg: peft.PeftConfig, steps: int) -> optax.GradientTransformation:
    """The method's rate for the encoder, one rate for the temperature."""
    tuned = peft.optimizer(cfg, make_optimizer(OptimConfig(peak_lr=RATES[cfg.method]), steps), steps)
    return by_part({"encoder": tuned, "head": make_optimizer(OptimConfig(peak_lr=1e-2), steps)})


def quality(settings: Settings, task: Task, encoder: Encoder, cfg: peft.PeftConfig, params: dict) -> dict[str, float]:
    """Filtered metrics on the test triples."""
    base = encoders.backbone(encoder.config, encoder.params)
    encode = jax.jit(lambda tuned, base, ids, mask: vectors(cfg, encoder.config, tuned, base, ids, mask))
    entities = jnp.asarray(task.entities)

    def score(heads_: np.ndarray, relations: np.ndarray) -> jax.Array:
        return encode(params["encoder"], base, *task.words(heads_, relations)) @ entities.T

    return evaluate_link_prediction(score, _test(settings, task), num_entities=len(task.entities), block=64,
                                    known=KnownTails.of(task.triples, task.num_relations))


def throughput(workdir: pathlib.Path, source: QuerySource) -> dict[str, float]:
    """Tokens a second and milliseconds a step of the fastest logged interval, which other work disturbs the least.

    The first interval, which compiles, does not count where there is another.
    """
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [row["examples_per_second"] for row in rows if row.get("examples_per_second")]
    rate = float(max(rates[1:] or rates))
    tokens = np.mean([source[step].attention_mask.sum(1).mean() for step in range(min(len(source), 8))])
    return {"tokens_per_s": rate * float(tokens), "step_ms": 1000.0 * source.batch / rate}


def _head() -> dict:
    return heads.init_matching(1.0 / FIRST_SCALE)


def _graph(settings: Settings) -> Graph:
    graph = read_folder(resolve(settings.data)).graph if settings.data else toy_world(num_users=8, num_items=120).graph
    if not len(graph.triples):
        raise KgrecError(f"--data.path: found no triples in {settings.data}, expected a graph")
    unnamed = sum(not name for name in graph.entity_names)
    if unnamed == graph.num_entities:
        raise KgrecError(f"--data.path: found no entity with a name in {settings.data}, expected names; the task reads "
                         "them")
    return graph


def _test(settings: Settings, task: Task) -> np.ndarray:
    return some_triples(task.triples[task.part == 2], settings.eval_limit, settings.seed)


def _table(ids: list[list[int]]) -> np.ndarray:
    out = np.full((len(ids), max(map(len, ids))), -1, np.int32)
    for row, tokens in enumerate(ids):
        out[row, :len(tokens)] = tokens
    return out


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Obeys the order on the standard input."""
    order = json.loads(sys.stdin.read())
    folder, method, preparing = pathlib.Path(order.pop("folder")), order.pop("method", ""), order.pop("prepare", False)
    settings = Settings(**order)
    compilation_cache.enable()
    try:
        found = prepare(settings, folder) if preparing else measure(settings, method, folder)
    except KgrecError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
