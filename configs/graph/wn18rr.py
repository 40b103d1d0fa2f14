"""Link prediction on WN18RR by structure, rules and glosses: kgrec graph graph/wn18rr --data.path FOLDER --workdir RUN.

An inductive run, a fifth of the entities unseen in training: the same with --graph.unseen-share 0.2.
"""

from kgrec_jax.config import Experiment
from kgrec_jax.linear.rules import RuleConfig
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import graph, graph_bi_encoder, pretrain


def get_config() -> Experiment:
    return Experiment(
        name="wn18rr",
        pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(
            scorer="complex", dim=256, rivals="all", batch=256, tails=8, steps=6500, n3=0.1, relation_weight=0.05,
            optim=OptimConfig(name="adagrad", peak_lr=0.1, schedule="linear", warmup_share=0.0, clip_norm=0.0,
                              accumulator=0.0),
            rules="on", rule_mining=RuleConfig(min_support=1, min_confidence=0.001, bodies_per_constant=1000),
            encoder_mode="off", checkpoint_every=500, log_every=50,
            bi_encoder=graph_bi_encoder.Config(
                mode="full", batch=128, steps=400, refresh=128,
                optim=OptimConfig(peak_lr=2e-4, schedule="linear", warmup_share=0.05))))
