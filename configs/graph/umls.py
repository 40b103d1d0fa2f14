"""Link prediction on UMLS by structure and by words: kgrec graph graph/umls --data.path FOLDER --workdir RUN."""

from kgrec_jax.config import Experiment
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import graph, pretrain


def get_config() -> Experiment:
    return Experiment(
        name="umls",
        pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(
            scorer="complex", dim=1024, rivals="all", batch=256, steps=1400, n3=0.01, relation_weight=0.1,
            optim=OptimConfig(name="adagrad", peak_lr=0.1, schedule="linear", warmup_share=0.0, clip_norm=0.0),
            encoder_mode="off", checkpoint_every=1000))
