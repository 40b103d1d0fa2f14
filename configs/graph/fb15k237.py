"""Link prediction on FB15k-237 by structure: kgrec graph graph/fb15k237 --data.path FOLDER --workdir RUN."""

from kgrec_jax.config import Experiment
from kgrec_jax.models.scorers import ScorerOptions
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import graph, pretrain


def get_config() -> Experiment:
    return Experiment(
        name="fb15k237",
        pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(
            scorer="complex", dim=512, options=ScorerOptions(input_dropout=0.2, query_dropout=0.1), rivals="all",
            batch=256, steps=14_000, n3=0.05, relation_weight=0.5,
            optim=OptimConfig(name="adagrad", peak_lr=0.1, schedule="linear", warmup_share=0.0, clip_norm=0.0,
                              accumulator=0.0),
            encoder_mode="off", checkpoint_every=1000, log_every=50))
