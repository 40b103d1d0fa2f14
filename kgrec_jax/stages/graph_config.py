"""What the graph stage trains, and the bounds of its fields."""

from __future__ import annotations

import dataclasses
from typing import Literal

from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.rule_scorer import RuleScoreConfig
from kgrec_jax.linear.rules import RuleConfig
from kgrec_jax.linear.rules import check as check_rules
from kgrec_jax.models.scorers import ScorerOptions, get_scorer
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import graph_bi_encoder
from kgrec_jax.stages.bounds import check_bounds, check_optimizers


@dataclasses.dataclass(frozen=True)
class Config:
    """What the graph stage trains and for how long; 0 steps: from the size of the data."""

    scorer: Literal["complex", "distmult", "simple", "transe", "transe-l1", "rotate", "rotate-l1", "tucker",
                    "conve"] = "complex"  # structural score of a triple
    options: ScorerOptions = ScorerOptions()  # dropout, and what a scorer with weights of its own is made of
    dim: int = 128  # width D of entity and relation vectors; complex numbers take two each
    steps: int = 0  # structure steps; 0: up to `epochs`, within about half a minute on two cores
    epochs: int = 30  # passes over the distinct queries where `steps` is 0 and time allows
    batch: int = 512  # queries of a structure step
    tails: int = 16  # answers of one row; a query with more takes several rows
    rivals: Literal["auto", "all", "sampled", "per-query"] = "auto"  # of an answer; auto: all of up to 8192 entities
    candidates: int = 2048  # entities drawn where rivals are sampled, for a step or for each of its queries
    loss: Literal["softmax", "margin"] = "softmax"  # margin: self-adversarial, against sampled rivals
    margin: float = 6.0  # γ of the margin loss; the scores of l1 scorers are distances below it
    adversarial: float = 1.0  # temperature α of the margin loss: how much more the harder rivals count; 0: all the same
    n3: float = 0.02  # weight of the nuclear 3-norm of the rows in use
    dura: float = 0.0  # weight of the duality-induced norm of the rows in use; complex, distmult, simple
    relation_weight: float = 0.0  # of predicting the relation of two entities; complex, distmult, simple
    optim: OptimConfig = OptimConfig(name="adagrad", peak_lr=0.1, schedule="constant", warmup_share=0.0, clip_norm=0.0)
    valid_share: float = 0.03  # of the triples, held out by pairs where the folder gives no split
    test_share: float = 0.03  # of the triples, held out by pairs where the folder gives no split
    heldout_limit: int = 2000  # triples of each held-out part at most
    unseen_share: float = 0.0  # of the entities, hidden from training with all their triples (an inductive split)
    encoder_mode: Literal["off", "frozen", "lora", "full"] = "lora"  # what of the encoder the text training changes
    text_steps: int = 0  # text steps; 0: two passes over the queries, at most 200
    text_batch: int = 32  # queries of a text step
    text_length: int = 32  # tokens of a triple at most; shorter where the names are
    entity_words: Literal["name", "name-and-text"] = "name"  # what of an entity is read
    withhold: float = 0.25  # share of named heads whose vectors are left out, so that words alone can answer
    lora_rank: int = 8  # rank of the adapters of encoder_mode=lora
    lora_alpha: float = 16.0  # the adapters' product counts alpha / rank
    mlm_weight: float = 0.1  # λ of L_MLM; needs an encoder with a masked-LM head
    mask_share: float = 0.15  # of a triple's words
    table_optim: OptimConfig = OptimConfig(name="sgd", peak_lr=0.05, schedule="linear")  # V, U in text steps
    bridge_optim: OptimConfig = OptimConfig(peak_lr=5e-3)  # projections between tables and encoder
    encoder_optim: OptimConfig = OptimConfig(peak_lr=3e-4)  # adapters, or the whole encoder
    bi_encoder: graph_bi_encoder.Config = graph_bi_encoder.Config()  # triples and entities by their texts alone
    rules: Literal["off", "on"] = "off"  # Horn rules of the training triples, whose score joins the mixture
    rule_mining: RuleConfig = RuleConfig()  # which rules are kept
    rule_score: RuleScoreConfig = RuleScoreConfig()  # how rules that derive the same triple add up
    text_eval: int = 250  # test triples that are ranked through the encoder; 0: all, and its score joins the mixture
    mixture_triples: int = 1000  # validation triples that choose the weights of structure and text
    log_every: int = 20  # steps between two rows of metrics.jsonl
    checkpoint_every: int = 200  # steps between two checkpoints


def check(cfg: Config) -> None:
    """KgrecError naming the first field that no training can do anything with."""
    many = 1 << 30
    bounds = {"dim": (2, many), "steps": (0, many), "epochs": (1, many), "batch": (1, many), "tails": (1, many),
              "candidates": (1, many), "margin": (0.0, 1e3), "adversarial": (0.0, 1e3), "n3": (0.0, 1e3),
              "dura": (0.0, 1e3), "relation_weight": (0.0, 1e3), "valid_share": (0.0, 0.5), "test_share": (0.0, 0.5),
              "heldout_limit": (0, many), "unseen_share": (0.0, 0.9), "text_steps": (0, many),
              "text_batch": (1, many), "text_length": (8, many), "withhold": (0.0, 1.0), "lora_rank": (1, many),
              "mlm_weight": (0.0, 1e3), "mask_share": (0.0, 0.9), "text_eval": (0, many),
              "mixture_triples": (0, many)}
    check_bounds("graph", cfg, bounds)
    rates = dict.fromkeys(("input_dropout", "hidden_dropout", "query_dropout"), (0.0, 0.95))
    check_bounds("graph.options", cfg.options, rates | {"core_rank": (0, many), "channels": (1, many),
                                                        "kernel": (1, 15)})
    check_rules(cfg.rule_mining)
    graph_bi_encoder.check(cfg.bi_encoder)
    scorer = get_scorer(cfg.scorer, cfg.dim, cfg.options)
    sampled = cfg.rivals in ("sampled", "per-query")
    if cfg.loss == "margin" and not sampled:
        raise KgrecError(f"graph.rivals: found {cfg.rivals!r} with graph.loss=margin, expected sampled or per-query")
    if cfg.loss == "softmax" and cfg.rivals == "per-query":
        raise KgrecError("graph.rivals: found 'per-query' with graph.loss=softmax, whose rivals all queries of a step "
                         "share, expected sampled; or graph.loss=margin")
    if scorer.l1 and cfg.loss != "margin":
        raise KgrecError(f"graph.loss: found {cfg.loss!r} with graph.scorer={cfg.scorer}, expected margin (with "
                         f"graph.rivals=sampled); or the scorer {cfg.scorer.removesuffix('-l1')}")
    for field in ("dura", "relation_weight"):
        if getattr(cfg, field) and scorer.relation_transform is None:
            raise KgrecError(f"graph.{field}: found {getattr(cfg, field)} with graph.scorer={cfg.scorer}, expected 0, "
                             "or one of the scorers complex, distmult, simple")
    check_optimizers("graph", cfg, ("optim", "table_optim", "bridge_optim", "encoder_optim"))
